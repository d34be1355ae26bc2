"""Checks of an installation: here, that trainings outlast kills and that damaged files are detected."""
