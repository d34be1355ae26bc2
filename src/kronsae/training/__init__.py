"""Training: the loop, a member of a group, its state on disk, and where metrics go."""
