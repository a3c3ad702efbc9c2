"""One file per family of diffusion models."""
