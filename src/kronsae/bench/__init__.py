"""Benchmarks of speed and memory: interleaved in one process, with their spread; results are CSV files.

No result is reported before `checks.check_operations` has checked every operation on small cases.
"""
