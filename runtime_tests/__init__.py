"""Judges: parity, conformance, packaging and layering tests, benchmarks."""
