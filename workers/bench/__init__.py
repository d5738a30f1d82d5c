"""Benchmarks of the engine: ``make bench`` or ``python -m workers.bench``. They report times and demand none."""
