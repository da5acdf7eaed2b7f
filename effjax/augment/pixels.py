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
    return levels if channels == 1 else (levels * jnp.array(_GREY)).sum(-1, keepdims=True)


def smooth(levels: Array) -> Array:
    """Pillow's SMOOTH: weight 5/13 for the pixel, 1/13 for each of its 8 neighbours; edges stay."""
    height, width = levels.shape[:2]
    if min(height, width) < 3:
        return levels
    rows = levels[:-2] + levels[1:-1] + levels[2:]
    inner = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * levels[1:-1, 1:-1]) / 13.0
    padded = jnp.pad(inner, ((1, 1), (1, 1), (0, 0)))
    y, x = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    edge = (y == 0) | (y == height - 1) | (x == 0) | (x == width - 1)
    return jnp.where(edge, levels, padded)


def blend(degenerate: Array, levels: Array, factor: Scalar) -> Array:
    """degenerate + factor · (levels - degenerate), clipped: 0 gives the former, 1 the image."""
    return jnp.clip(degenerate + factor * (levels - degenerate), 0.0, 255.0)


def brightness(levels: Array, factor: Scalar) -> Array:
    """Blends with black."""
    return blend(jnp.zeros_like(levels), levels, factor)


def contrast(levels: Array, factor: Scalar) -> Array:
    """Blends with the mean luminance, a whole level."""
    return blend(jnp.floor(grey(levels).mean() + 0.5), levels, factor)


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
    """Makes each channel's histogram as flat as a map of whole levels to whole levels can."""
    channels = levels.shape[-1]
    whole = jnp.round(levels).astype(jnp.int32).reshape(-1, channels)
    table = flattening(whole)
    return table[jnp.arange(channels), whole].astype(levels.dtype).reshape(levels.shape)


def flattening(whole: Array) -> Array:
    """The map of `equalise`: int32 [channels, 256] for whole levels int32 [pixels, channels].

    A level goes to (step/2 + the number of pixels below it) / step, in integers, where step is the
    number of pixels that are not at the channel's highest level over 255; a channel for which it is
    0 stays.
    """
    pixels, channels = whole.shape
    # One scatter into all channels: the fastest of what was tried on CPU (sorting takes ten times
    # as long, sums of one-hot vectors a hundred times).
    bins = (whole + 256 * jnp.arange(channels)).reshape(-1)
    counts = jnp.zeros(256 * channels, jnp.int32).at[bins].add(1, mode="promise_in_bounds")
    counts = counts.reshape(channels, 256)
    at_highest = jnp.take_along_axis(counts, whole.max(0)[:, None], 1)
    step = (pixels - at_highest) // 255
    below = jnp.cumsum(counts, 1) - counts
    table = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
    return jnp.where(step == 0, jnp.arange(256), table)


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
