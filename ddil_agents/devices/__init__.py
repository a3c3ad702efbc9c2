"""Hardware: the processes of a distributed run, sharded networks, and errors when memory runs out."""
