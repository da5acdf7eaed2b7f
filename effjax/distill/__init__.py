"""Distillation: losses of logits, features and relations, and the transforms that add them to a
step."""

from effjax.distill.hints import attention_transfer, fsp, hint, nst, vid
from effjax.distill.logits import Teacher, logits
from effjax.distill.losses import cosine, dist, kl, mse
from effjax.distill.relations import crd, minilm, rkd_angle, rkd_distance, similarity
from effjax.distill.targets import TopK, dkd, hard, label_smoothing, top_k, top_k_kl

__all__ = [
    "Teacher",
    "TopK",
    "attention_transfer",
    "cosine",
    "crd",
    "dist",
    "dkd",
    "fsp",
    "hard",
    "hint",
    "kl",
    "label_smoothing",
    "logits",
    "minilm",
    "mse",
    "nst",
    "rkd_angle",
    "rkd_distance",
    "similarity",
    "top_k",
    "top_k_kl",
    "vid",
]
