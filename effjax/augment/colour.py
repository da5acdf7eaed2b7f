"""Colour operations with random strengths.

Images are taken as they come to the step: `bounds` says which values black and white have there,
(0, 1) for `image / 255`, (-1, 1) for the harness's `shift=127.5, scale=1 / 127.5`, and numbers per
channel for standardized images. Values outside them are clipped to them.
"""

from collections.abc import Callable

import jax
from jax import Array

from effjax.augment import pixels
from effjax.augment.images import Operation, check_probability
from effjax.augment.pixels import Bounds
from effjax.errors import SetupError
from effjax.schedules import Scalar, is_traced

UNIT: Bounds = (0.0, 1.0)


def _enhance(
    function: Callable[[Array, Scalar], Array], strength: Scalar, bounds: Bounds
) -> Operation:
    if not is_traced(strength) and strength < 0:
        raise SetupError(
            f"strength={strength}: factors are uniform in 1 - strength .. 1 + strength; give 0 or "
            "above."
        )
    pixels.check_bounds(bounds)

    def apply(key: Array, image: Array) -> Array:
        factor = 1.0 + strength * jax.random.uniform(key, (), minval=-1.0)
        return pixels.from_levels(function(pixels.to_levels(image, bounds), factor), bounds, image)

    return apply


def brightness(strength: Scalar, bounds: Bounds = UNIT) -> Operation:
    """Blends with black by a factor uniform in 1 - strength .. 1 + strength, perhaps traced."""
    return _enhance(pixels.brightness, strength, bounds)


def contrast(strength: Scalar, bounds: Bounds = UNIT) -> Operation:
    """Blends with the mean luminance by a factor uniform in 1 - strength .. 1 + strength."""
    return _enhance(pixels.contrast, strength, bounds)


def colour(strength: Scalar, bounds: Bounds = UNIT) -> Operation:
    """Blends with the grey image by a factor uniform in 1 - strength .. 1 + strength."""
    return _enhance(pixels.colour, strength, bounds)


def sharpness(strength: Scalar, bounds: Bounds = UNIT) -> Operation:
    """Blends with the smoothed image by a factor uniform in 1 - strength .. 1 + strength."""
    return _enhance(pixels.sharpness, strength, bounds)


def _sometimes(
    function: Callable[[Array], Array], probability: Scalar, bounds: Bounds, what: str
) -> Operation:
    check_probability(probability, what)
    pixels.check_bounds(bounds)

    def apply(key: Array, image: Array) -> Array:
        levels = pixels.to_levels(image, bounds)
        changed = pixels.from_levels(function(levels), bounds, image)
        return jax.numpy.where(jax.random.bernoulli(key, probability), changed, image)

    return apply


def autocontrast(probability: Scalar = 0.5, bounds: Bounds = UNIT) -> Operation:
    """With a probability, stretches each channel to the whole range."""
    return _sometimes(pixels.autocontrast, probability, bounds, "autocontrast")


def invert(probability: Scalar = 0.5, bounds: Bounds = UNIT) -> Operation:
    """With a probability, exchanges dark and bright."""
    return _sometimes(pixels.invert, probability, bounds, "an inversion")


def equalise(probability: Scalar = 0.5, bounds: Bounds = UNIT) -> Operation:
    """With a probability, flattens each channel's histogram."""
    return _sometimes(pixels.equalise, probability, bounds, "an equalisation")


def solarise(
    threshold: Scalar = 128, probability: Scalar = 0.5, bounds: Bounds = UNIT
) -> Operation:
    """With a probability, inverts what is at or above a level of 0 .. 255, perhaps traced."""
    if not is_traced(threshold) and not 0 <= threshold <= 256:
        raise SetupError(f"solarise({threshold}): the threshold is a level, 0 .. 256.")

    def function(levels: Array) -> Array:
        return pixels.solarise(levels, threshold)

    return _sometimes(function, probability, bounds, "a solarisation")


def posterise(bits: Scalar = 4, probability: Scalar = 0.5, bounds: Bounds = UNIT) -> Operation:
    """With a probability, keeps the most significant 1 .. 8 bits of each level, perhaps traced."""
    if not is_traced(bits) and not 1 <= bits <= 8:
        raise SetupError(f"posterise({bits}): levels have 8 bits; keep 1 .. 8 of them.")

    def function(levels: Array) -> Array:
        return pixels.posterise(levels, bits)

    return _sometimes(function, probability, bounds, "a posterisation")
