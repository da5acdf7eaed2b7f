"""The operations that policies draw from, any of them on any image of a batch at one price.

Which operation an image gets is a number, different for each image, so that a `switch` under `vmap`
would compute all of them for all. Here they share what they do, and an operation chooses numbers
with which a part of it is the identity: a map of levels (kept bits, a threshold, a stretch), the
histogram's map, one blend of the image with another, and one affine map with one gather. Images are
whole levels 0 .. 255, and each operation is Pillow's.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from effjax.augment import geometry, pixels
from effjax.augment.images import Operation
from effjax.augment.pixels import Bounds
from effjax.errors import SetupError
from effjax.schedules import Scalar

WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLENDS = ("colour", "sharpness", "brightness", "contrast")
LEVELS = ("posterise", "solarise", "invert", "autocontrast", "equalise")
NAMES = ("identity", *WARPS, *BLENDS, *LEVELS)
"""All operations; `choice` is an index into them. Their arguments: the slope of a shear, pixels of
a translation, degrees of a rotation, factors of colour, sharpness, brightness and contrast, bits
kept, the level from which a solarisation inverts; the others have none."""

INDEX = {name: i for i, name in enumerate(NAMES)}

# (key, image shape) -> (choices int32 [count], arguments float32 [count])
Draw = Callable[[Array, tuple[int, ...]], tuple[Array, Array]]


def apply(
    image: Array, choices: Array, arguments: Array, fill: Array, names: Sequence[str] = NAMES
) -> Array:
    """Operations on one image, one after another.

    Args:
      image: uint8 [height, width, channels].
      choices: int32 [count], indices into NAMES.
      arguments: float32 [count], each in its operation's own unit.
      fill: uint8 [channels], what comes in from outside.
      names: those that choices can be; parts that none of them needs are left out.

    Raises:
      SetupError: when traced, an image that has no luminance where an operation needs it.
    """
    look_up = partial(_look_up, fill=fill, names=names)
    compute = partial(_compute, names=names)

    def turn(levels: Array, drawn: tuple[Array, Array, Array]) -> tuple[Array, None]:
        first, *rest = drawn
        return lax.cond(first, look_up, compute, levels, *rest), None

    # Two turns of a loop for each operation, whose carry is computed once: in one piece XLA would
    # compute what is looked up again for each use, of which a blur has nine a pixel, and would
    # vectorise nothing.
    first = jnp.arange(2 * len(choices)) % 2 == 0
    found, _ = lax.scan(turn, image, (first, jnp.repeat(choices, 2), jnp.repeat(arguments, 2)))
    return found


def _look_up(
    image: Array, choice: Array, argument: Array, fill: Array, names: Sequence[str]
) -> Array:
    """The operations that look up values at places found out at run time."""
    found = image
    if "equalise" in names:
        equal = pixels.equalise(image.astype(jnp.float32)).astype(jnp.uint8)
        found = jnp.where(choice == INDEX["equalise"], equal, found)
    if not set(WARPS).isdisjoint(names):
        found = jnp.where(_among(choice, WARPS), _warp(image, choice, argument, fill), found)
    return found


def _among(choice: Array, group: tuple[str, ...]) -> Array:
    return (choice >= INDEX[group[0]]) & (choice <= INDEX[group[-1]])


def _compute(image: Array, choice: Array, argument: Array, names: Sequence[str]) -> Array:
    """The operations whose pixels depend on pixels at places known beforehand."""
    levels = image.astype(jnp.float32)

    def chosen(name: str, value: ArrayLike, otherwise: ArrayLike) -> Array:
        return jnp.where(choice == INDEX[name], value, otherwise)

    found = levels
    if "posterise" in names:
        step = jnp.exp2(8 - jnp.round(chosen("posterise", argument, 8.0)))
        found = jnp.floor(found / step) * step
    if not {"solarise", "invert"}.isdisjoint(names):
        threshold = chosen("solarise", argument, chosen("invert", 0.0, 256.0))
        found = jnp.where(found < threshold, found, 255 - found)
    if "autocontrast" in names:
        whole = image.astype(jnp.int32)  # whose extremes are found ten times as fast
        low, high = whole.min((0, 1)), whole.max((0, 1))
        stretch = (choice == INDEX["autocontrast"]) & (high > low)
        low, gain = jnp.where(stretch, low, 0), jnp.where(stretch, 255, 1)
        found = jnp.floor((found - low) * gain / jnp.where(stretch, high - low, 1))
    if not set(BLENDS).isdisjoint(names):
        other = jnp.float32(0)
        if "contrast" in names:
            other = chosen("contrast", pixels.mean_grey(levels), other)
        if "colour" in names:
            other = chosen("colour", _whole(pixels.grey(levels)), other)
        if "sharpness" in names:
            other = chosen("sharpness", _whole(pixels.smooth(levels)), other)
        factor = jnp.where(_among(choice, BLENDS), argument, 1.0)
        # Pillow cuts a blend off to whole levels.
        found = jnp.floor(pixels.blend(other, found, factor))
    return found.astype(jnp.uint8)


def _whole(levels: Array) -> Array:
    return jnp.floor(levels + 0.5)


def _warp(image: Array, choice: Array, argument: Array, fill: Array) -> Array:
    a, one, zero = argument, jnp.float32(1), jnp.float32(0)
    turn = geometry.about_centre(geometry.turning(a), image.shape).ravel()
    rows = {
        "identity": (one, zero, zero, zero, one, zero),
        "shear_x": (one, a, zero, zero, one, zero),
        "shear_y": (one, zero, zero, a, one, zero),
        "translate_x": (one, zero, a, zero, one, zero),
        "translate_y": (one, zero, zero, zero, one, a),
        "rotate": tuple(turn),
    }
    at = jnp.where(choice < len(rows), choice, 0)
    matrix = jnp.stack([jnp.stack(row) for row in rows.values()])[at].reshape(2, 3)
    channels = image.shape[-1]
    if not 1 < channels <= 4:
        return geometry.affine(image, matrix, fill=fill)
    # A pixel's channels in one number: one gather instead of three.
    shifts = jnp.arange(0, 8 * channels, 8, dtype=jnp.uint32)
    packed = (image.astype(jnp.uint32) << shifts).sum(-1, keepdims=True, dtype=jnp.uint32)
    outside = (fill.astype(jnp.uint32) << shifts).sum(dtype=jnp.uint32)
    moved = geometry.affine(packed, matrix, fill=outside)
    return ((moved >> shifts) & 255).astype(jnp.uint8)


def operation(
    draw: Draw, names: Sequence[str], bounds: Bounds, fill: Scalar | Array | None
) -> Operation:
    """What a policy draws for each image, one operation after another, on images in `bounds`.

    Values are rounded to 256 levels, as an 8-bit image has them.
    """

    def run(key: Array, image: Array) -> Array:
        choices, arguments = draw(key, image.shape)
        outside = outside_level(image, bounds, fill)
        levels = apply(encode(image, bounds), choices, arguments, outside, names)
        return pixels.from_levels(levels.astype(jnp.float32), bounds, image)

    return run


def encode(image: Array, bounds: Bounds) -> Array:
    """An image in `bounds` as uint8 levels."""
    return jnp.round(pixels.to_levels(image, bounds)).astype(jnp.uint8)


def outside_level(image: Array, bounds: Bounds, fill: Scalar | Array | None) -> Array:
    """uint8 [channels]: a fill in an image's own values as levels; 128, grey, where it is None."""
    channels = image.shape[-1]
    if fill is None:
        return jnp.full(channels, 128, jnp.uint8)
    value = jnp.broadcast_to(jnp.asarray(fill, jnp.float32), (channels,))
    return encode(value, bounds)


def check_names(names: Sequence[str], what: str) -> tuple[str, ...]:
    """Raises unless there are names, all known; returns them."""
    unknown = [name for name in names if name not in INDEX]
    if not names or unknown:
        raise SetupError(
            f"{what} has the operations {list(names)}"
            + (f"; there are none of the names {unknown}." if unknown else "; it draws from some.")
            + f" There are {', '.join(NAMES)}."
        )
    return tuple(names)


def uniform(key: Array, names: Sequence[str], count: int) -> Array:
    """`count` operations drawn uniformly, with replacement: int32 [count]."""
    indices = jnp.array([INDEX[name] for name in names], jnp.int32)
    return jax.random.choice(key, indices, (count,))


def sign(key: Array, count: int) -> Array:
    """-1 or 1, float32 [count]."""
    return jnp.where(jax.random.bernoulli(key, 0.5, (count,)), 1.0, -1.0)
