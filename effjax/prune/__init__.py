"""Sparsity: what a weight's score is, which weights are kept together, how many are kept in each
layer, when, and by which algorithm."""

from effjax.prune import budgets, counts, masks, oneshot, patterns, scores, threshold
from effjax.prune.acdc import acdc
from effjax.prune.alive import movement, ste
from effjax.prune.block_sparse import BlockSparse
from effjax.prune.compact import compact
from effjax.prune.dynamic import rigl, set_, sparse_momentum, static
from effjax.prune.engine import Rule, Scene, pruning
from effjax.prune.gradual import Criterion, custom, magnitude, random, saliency, taylor
from effjax.prune.grouping import channel_masks, group_masks, group_scores, groups
from effjax.prune.patterns import block, channel, n_m, unstructured
from effjax.prune.sparsegpt import sparsegpt
from effjax.prune.sparsify import sparsify

__all__ = [
    "BlockSparse",
    "Criterion",
    "Rule",
    "Scene",
    "acdc",
    "block",
    "budgets",
    "channel",
    "channel_masks",
    "compact",
    "counts",
    "custom",
    "group_masks",
    "group_scores",
    "groups",
    "magnitude",
    "masks",
    "movement",
    "n_m",
    "oneshot",
    "patterns",
    "pruning",
    "random",
    "rigl",
    "saliency",
    "scores",
    "set_",
    "sparse_momentum",
    "sparsegpt",
    "sparsify",
    "static",
    "ste",
    "taylor",
    "threshold",
    "unstructured",
]
