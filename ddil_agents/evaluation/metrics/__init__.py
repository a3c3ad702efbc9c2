"""One file per metric. `distances.as_pair` checks that two sets of samples can be compared."""
