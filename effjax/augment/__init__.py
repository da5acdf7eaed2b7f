"""Augmentation on the device: pure functions of one example and its key, applied in the train
step's `batch` hook."""

from effjax.augment.erase import erasing
from effjax.augment.images import Operation, images
from effjax.augment.move import flip, translate

__all__ = ["Operation", "erasing", "flip", "images", "translate"]
