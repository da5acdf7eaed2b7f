"""Sparsity: what a weight's score is, which masks follow from scores, how many weights are kept,
and when."""

from effjax.prune import budgets, counts, masks, scores, threshold
from effjax.prune.gradual import magnitude

__all__ = ["budgets", "counts", "magnitude", "masks", "scores", "threshold"]
