"""Measurements: JSON lines that carry commit, versions and machine, and a script to compare two.

``docs/benchmarks.md`` says how to run and read them. Nothing here is part of the wheel.
"""
