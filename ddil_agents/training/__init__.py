"""How an algorithm is trained: the loop, its networks and their average, stages, checkpoints, metrics and callbacks."""
