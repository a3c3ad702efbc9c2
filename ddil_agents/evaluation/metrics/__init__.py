"""One file per metric; `distances.as_pair` says what two sets of samples need to be compared."""
