"""Formats of other libraries: a room to come."""
