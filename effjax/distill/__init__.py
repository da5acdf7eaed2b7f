"""Distillation: losses of logits, and the transforms that add them to a step."""

from effjax.distill.logits import Teacher, logits
from effjax.distill.losses import kl

__all__ = ["Teacher", "kl", "logits"]
