"""Evaluates policies: samples against data, trajectories against the expert's."""
