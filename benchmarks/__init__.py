"""Measurements, each a program: ``python -m benchmarks.speed.search --help``. They import nothing of the tests."""
