"""Benchmarks: one module a question, JSON under benchmarks/results/. `python -m benchmarks` runs all."""
