"""Training: the loop, one SAE of a group (a member), checkpoints, and metrics sinks."""
