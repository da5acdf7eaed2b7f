"""Augmentation on the device: pure functions of one example and its key, applied in the train
step's `batch` hook."""

from effjax.augment.colour import (
    autocontrast,
    brightness,
    colour,
    contrast,
    equalise,
    invert,
    posterise,
    sharpness,
    solarise,
)
from effjax.augment.erase import erasing
from effjax.augment.geometry import random_affine, rotate, scale, shear
from effjax.augment.images import Operation, images
from effjax.augment.mix import cutmix, mixup
from effjax.augment.move import flip, translate
from effjax.augment.text import TokenOperation, span_mask, swap, token_dropout, tokens

__all__ = [
    "Operation",
    "TokenOperation",
    "autocontrast",
    "brightness",
    "colour",
    "contrast",
    "cutmix",
    "equalise",
    "erasing",
    "flip",
    "images",
    "invert",
    "mixup",
    "posterise",
    "random_affine",
    "rotate",
    "scale",
    "sharpness",
    "shear",
    "solarise",
    "span_mask",
    "swap",
    "token_dropout",
    "tokens",
    "translate",
]
