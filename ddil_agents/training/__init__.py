"""How any learner is trained: the loop, its networks and their average, stages, checkpoints, tracking, many processes."""
