"""Pictures with captions: read from where people keep them, encoded once, and drawn from memory."""
