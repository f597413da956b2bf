"""Faults on purpose, in a real server: what `tests/faults` and `tools/soak.py` are made of."""
