"""Measurements of speed and memory: in one process, interleaved, with their spread; the results are CSV files.

Nothing is reported before `checks.check_operations` has found every operation right on small cases.
"""
