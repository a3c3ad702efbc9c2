"""What a policy is worth: samples against data, trajectories against the expert's."""
