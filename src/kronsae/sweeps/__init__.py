"""Sweeps: many runs over a grid of settings, and their results in one table."""
