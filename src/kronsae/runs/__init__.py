"""Runs: config, recipes, training, evaluation and run folder."""
