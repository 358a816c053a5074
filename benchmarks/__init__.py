"""Measurements: ``python -m benchmarks.bench_<what>``; the other modules are theirs."""
