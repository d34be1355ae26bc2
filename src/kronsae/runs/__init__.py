"""A run: its config, its training, its evaluation, its folder."""
