"""Augmentation on the device: pure functions of one example and its key, applied in the train
step's `batch` hook."""

from effjax.augment.augmix import augmix
from effjax.augment.autoaugment import autoaugment
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
from effjax.augment.erase import cutout, erasing
from effjax.augment.geometry import random_affine, rotate, scale, shear
from effjax.augment.images import Operation, images
from effjax.augment.mix import cutmix, mixup
from effjax.augment.move import crop, flip, translate
from effjax.augment.randaugment import randaugment
from effjax.augment.text import TokenOperation, span_mask, swap, token_dropout, tokens
from effjax.augment.trivialaugment import trivialaugment

__all__ = [
    "Operation",
    "TokenOperation",
    "augmix",
    "autoaugment",
    "autocontrast",
    "brightness",
    "colour",
    "contrast",
    "crop",
    "cutmix",
    "cutout",
    "equalise",
    "erasing",
    "flip",
    "images",
    "invert",
    "mixup",
    "posterise",
    "randaugment",
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
    "trivialaugment",
]
