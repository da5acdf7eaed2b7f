"""Maths of colour on one image in levels 0 .. 255, as Pillow's ImageOps and ImageEnhance have it.

Each function takes floating point [height, width, channels] in levels and returns the same. Where
Pillow rounds a blend to whole levels, these do not.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.errors import SetupError
from effjax.schedules import Scalar

Bounds = tuple[Scalar, Scalar]
"""The values that black (level 0) and white (level 255) have in an image: numbers or [channels]."""

_GREY = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R 601-2, as Pillow converts to "L"


def to_levels(image: Array, bounds: Bounds) -> Array:
    """From an image's own values to float32 levels 0 .. 255, clipped to them."""
    low, high = (jnp.asarray(b, jnp.float32) for b in bounds)
    return jnp.clip((image.astype(jnp.float32) - low) * (255.0 / (high - low)), 0.0, 255.0)


def from_levels(levels: Array, bounds: Bounds, like: Array) -> Array:
    """From levels back to an image's own values and its dtype."""
    low, high = (jnp.asarray(b, jnp.float32) for b in bounds)
    return (levels * ((high - low) / 255.0) + low).astype(like.dtype)


def grey(levels: Array) -> Array:
    """Luminance [height, width, 1]: the image itself where it has one channel.

    Raises:
      SetupError: when traced, an image with neither 1 nor 3 channels.
    """
    channels = levels.shape[-1]
    if channels not in (1, 3):
        raise SetupError(
            f"an image of {channels} channels has no luminance; colour operations take 1 channel "
            "(grey) or 3 (red, green, blue)."
        )
    if channels == 1:
        return levels
    # Term by term, as sums over three channels are slow on CPU.
    red, green, blue = (levels[..., i : i + 1] * weight for i, weight in enumerate(_GREY))
    return red + green + blue


def mean_grey(levels: Array) -> Array:
    """The mean of the luminance in whole levels, a whole level itself: float32 scalar."""
    whole = jnp.floor(grey(levels) + 0.5).astype(jnp.int32)
    # Whole numbers: XLA sums floats in a tree, which takes 50 times as long on CPU.
    rows = whole.sum(1).astype(jnp.float32)
    return jnp.floor(rows.sum() / (levels.shape[0] * levels.shape[1]) + 0.5)


def smooth(levels: Array) -> Array:
    """Pillow's SMOOTH: weight 5/13 for the pixel, 1/13 for each of its 8 neighbours; edges stay."""
    height, width, channels = levels.shape
    if min(height, width) < 3:
        return levels
    # A row with its channels is one axis, along which the sums are vectorised.
    flat = levels.reshape(height, width * channels)
    padded = jnp.pad(flat, ((1, 1), (channels, channels)))
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    inner = rows[:, : -2 * channels] + rows[:, channels:-channels] + rows[:, 2 * channels :]
    y, x = jnp.arange(height)[:, None], jnp.arange(width * channels) // channels
    edge = (y == 0) | (y == height - 1) | (x == 0) | (x == width - 1)
    return jnp.where(edge, flat, (inner + 4 * flat) / 13.0).reshape(levels.shape)


def blend(degenerate: Array, levels: Array, factor: Scalar) -> Array:
    """degenerate + factor · (levels - degenerate), clipped: 0 gives the former, 1 the image."""
    return jnp.clip(degenerate + factor * (levels - degenerate), 0.0, 255.0)


def brightness(levels: Array, factor: Scalar) -> Array:
    """Blends with black."""
    return blend(jnp.zeros_like(levels), levels, factor)


def contrast(levels: Array, factor: Scalar) -> Array:
    """Blends with the mean luminance, a whole level."""
    return blend(mean_grey(levels), levels, factor)


def colour(levels: Array, factor: Scalar) -> Array:
    """Blends with the grey image."""
    return blend(grey(levels), levels, factor)


def sharpness(levels: Array, factor: Scalar) -> Array:
    """Blends with the smoothed image: below 1 blurs, above 1 sharpens."""
    return blend(smooth(levels), levels, factor)


def autocontrast(levels: Array) -> Array:
    """Stretches each channel so that its extremes are 0 and 255; a constant channel stays."""
    low, high = levels.min((0, 1)), levels.max((0, 1))
    some = high - low > 0.5
    stretched = (levels - low) * (255.0 / jnp.where(some, high - low, 1.0))
    return jnp.where(some, jnp.clip(stretched, 0.0, 255.0), levels)


def invert(levels: Array) -> Array:
    """255 - level."""
    return 255.0 - levels


def solarise(levels: Array, threshold: Scalar) -> Array:
    """Inverts the levels from a threshold on (compared as whole levels)."""
    return jnp.where(jnp.round(levels) < threshold, levels, 255.0 - levels)


def posterise(levels: Array, bits: Scalar) -> Array:
    """Keeps the given number of most significant bits, 1 .. 8, perhaps traced, of whole levels."""
    step = jnp.exp2(jnp.round(8.0 - jnp.asarray(bits, jnp.float32)))
    return jnp.where(step > 1, jnp.floor(jnp.round(levels) / step) * step, levels)


def equalise(levels: Array) -> Array:
    """Makes each channel's histogram as flat as a map of whole levels to whole levels can.

    A level goes to (step/2 + the number of pixels below it) / step, in integers, where step is the
    number of pixels that are not at the channel's highest level over 255; a channel for which it is
    0 stays. Exact in images of up to 2^24 pixels.
    """
    channels = levels.shape[-1]
    whole = jnp.round(levels).astype(jnp.int32)
    # One scatter into all channels: the fastest of what was tried on CPU (sorting takes ten times
    # as long, sums of one-hot vectors a hundred times). Each level counts for the one above it.
    at = whole + 257 * jnp.arange(channels)
    counts = jnp.zeros(257 * channels, jnp.int32)
    counts = counts.at[at.reshape(-1) + 1].add(1, mode="promise_in_bounds")
    below = jnp.cumsum(counts.reshape(channels, 257), 1).reshape(-1)

    def look_up(at: Array) -> Array:
        return below.at[at].get(mode="promise_in_bounds").astype(jnp.float32)

    step = jnp.floor(look_up(at.max((0, 1))) / 255)
    mapped = jnp.floor((look_up(at) + jnp.floor(step / 2)) / jnp.maximum(step, 1))
    return jnp.where(step == 0, whole, jnp.minimum(mapped, 255)).astype(levels.dtype)


def check_bounds(bounds: Bounds) -> None:
    """Raises unless the bounds are (black, white), black below white; traced ones pass."""
    if len(bounds) != 2:
        raise SetupError(f"bounds={bounds!r}: give (black, white), the values of levels 0 and 255.")
    low, high = bounds
    if isinstance(low, jax.core.Tracer) or isinstance(high, jax.core.Tracer):
        return
    if not np.all(np.asarray(low) < np.asarray(high)):
        raise SetupError(
            f"bounds={bounds!r}: black is not below white. They are the values that levels 0 and "
            "255 have in the batch: (0, 1) for image / 255, ((0 - mean) / std, (1 - mean) / std) "
            "for standardized images."
        )
