"""Distillation: losses of logits, features and relations, and the transforms that add them to a
step."""

from effjax.distill.average import mean_teacher
from effjax.distill.cache import Cache, Cached, read_cache, write_cache
from effjax.distill.contrast import nt_xent, twice
from effjax.distill.features import Match, features
from effjax.distill.hints import attention_transfer, fsp, hint, nst, vid
from effjax.distill.learned import Learned, embedded, projected, variational
from effjax.distill.logits import logits
from effjax.distill.losses import cosine, dist, kl, mse
from effjax.distill.mapping import layer_to_layer
from effjax.distill.online import each, mutual, peers
from effjax.distill.relations import crd, minilm, rkd_angle, rkd_distance, similarity
from effjax.distill.targets import TopK, dkd, hard, label_smoothing, top_k, top_k_kl
from effjax.distill.teachers import Teacher, ensemble, views

__all__ = [
    "Cache",
    "Cached",
    "Learned",
    "Match",
    "Teacher",
    "TopK",
    "attention_transfer",
    "cosine",
    "crd",
    "dist",
    "dkd",
    "each",
    "embedded",
    "ensemble",
    "features",
    "fsp",
    "hard",
    "hint",
    "kl",
    "label_smoothing",
    "layer_to_layer",
    "logits",
    "mean_teacher",
    "minilm",
    "mse",
    "mutual",
    "nst",
    "nt_xent",
    "peers",
    "projected",
    "read_cache",
    "rkd_angle",
    "rkd_distance",
    "similarity",
    "top_k",
    "top_k_kl",
    "twice",
    "variational",
    "vid",
    "views",
    "write_cache",
]
