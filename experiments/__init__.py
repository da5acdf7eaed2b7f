"""Experiments: one module each. `python -m experiments list` shows them."""
