"""Many processes and little memory: ranks, sharded networks, and what to do where memory ends."""
