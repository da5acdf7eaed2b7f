"""Sparsity: what a weight's score is, which weights are kept together, how many are kept in each
layer, when, and by which algorithm."""

from effjax.prune import budgets, counts, masks, oneshot, patterns, scores, threshold
from effjax.prune.acdc import acdc
from effjax.prune.alive import movement, ste
from effjax.prune.averages import ema
from effjax.prune.block_sparse import BlockSparse
from effjax.prune.compact import compact
from effjax.prune.dynamic import rigl, set_, sparse_momentum
from effjax.prune.engine import Rule, Scene, pruning
from effjax.prune.flops import Flops, flops
from effjax.prune.gradual import Criterion, custom, magnitude, random, saliency, taylor
from effjax.prune.grouping import groups
from effjax.prune.lasso import group_lasso
from effjax.prune.learned import hard_concrete, soft_threshold
from effjax.prune.lottery import Lottery, Ticket
from effjax.prune.patterns import block, channel, n_m, unstructured
from effjax.prune.sparsegpt import sparsegpt
from effjax.prune.sparsify import sparsify
from effjax.prune.static import static
from effjax.prune.structured import channel_masks, group_masks, group_scores

__all__ = [
    "BlockSparse",
    "Criterion",
    "Flops",
    "Lottery",
    "Rule",
    "Scene",
    "Ticket",
    "acdc",
    "block",
    "budgets",
    "channel",
    "channel_masks",
    "compact",
    "counts",
    "custom",
    "ema",
    "flops",
    "group_lasso",
    "group_masks",
    "group_scores",
    "groups",
    "hard_concrete",
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
    "soft_threshold",
    "sparse_momentum",
    "sparsegpt",
    "sparsify",
    "static",
    "ste",
    "taylor",
    "threshold",
    "unstructured",
]
