"""Measurements: `python -m problems.benchmarks.NAME -json FILE`, rows of case, measured, unit, bar, met."""
