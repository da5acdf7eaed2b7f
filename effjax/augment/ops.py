"""The operations that policies draw from, any of them on any image of a batch at one price.

Which operation an image gets is a number, different for each image, so that a `switch` under `vmap`
would compute all of them for all. Here they share three stages, and an operation that has no part
in a stage leaves it the identity: one map of levels by a table of 256 entries for each channel, one
blend of the image with another, and one affine map with one gather. Images are whole levels
0 .. 255, and each operation is Pillow's.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from effjax.augment import geometry, pixels
from effjax.augment.images import Operation
from effjax.augment.pixels import Bounds
from effjax.errors import SetupError
from effjax.schedules import Scalar

WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLENDS = ("colour", "sharpness")
TABLES = (
    "brightness",
    "contrast",
    "posterise",
    "solarise",
    "invert",
    "autocontrast",
    "equalise",
)
NAMES = ("identity", *WARPS, *BLENDS, *TABLES)
"""All operations; `choice` is an index into them. Their arguments: the slope of a shear, pixels of
a translation, degrees of a rotation, factors of colour, sharpness, brightness and contrast, bits
kept, the level from which a solarisation inverts; the others have none."""

INDEX = {name: i for i, name in enumerate(NAMES)}

# (key, image shape) -> (choices int32 [count], arguments float32 [count])
Draw = Callable[[Array, tuple[int, ...]], tuple[Array, Array]]


def apply(
    image: Array, choice: Array, argument: Array, fill: Array, names: Sequence[str] = NAMES
) -> Array:
    """One operation on one image.

    Args:
      image: uint8 [height, width, channels].
      choice: int32 scalar, an index into NAMES.
      argument: float32 scalar, in the operation's own unit.
      fill: uint8 [channels], what comes in from outside.
      names: those that `choice` can be; stages that none of them needs are left out.

    Raises:
      SetupError: when traced, an image that has no luminance where an operation needs it.
    """
    if not set(TABLES).isdisjoint(names):
        image = _map_levels(image, choice, argument, names)
    if not set(BLENDS).isdisjoint(names):
        image = _blend(image, choice, argument, names)
    if not set(WARPS).isdisjoint(names):
        image = _warp(image, choice, argument, fill)
    return image


def _map_levels(image: Array, choice: Array, argument: Array, names: Sequence[str]) -> Array:
    channels = image.shape[-1]
    whole = image.astype(jnp.int32).reshape(-1, channels)
    level = jnp.arange(256, dtype=jnp.float32)
    step = jnp.exp2(8.0 - jnp.round(argument))
    made: dict[str, Callable[[], Array]] = {
        "brightness": lambda: _blended(jnp.float32(0), level, argument),
        "contrast": lambda: _blended(_mean_grey(image), level, argument),
        "posterise": lambda: jnp.floor(level / step) * step,
        "solarise": lambda: jnp.where(level < argument, level, 255 - level),
        "invert": lambda: 255 - level,
        "autocontrast": lambda: _stretching(whole),
        "equalise": lambda: pixels.flattening(whole).astype(jnp.float32),
    }
    table = jnp.broadcast_to(level, (channels, 256))
    for name, make in made.items():
        if name in names:
            table = jnp.where(choice == INDEX[name], make(), table)
    places = (whole + 256 * jnp.arange(channels)).reshape(-1)
    flat = table.astype(jnp.uint8).reshape(-1)
    return flat.at[places].get(mode="promise_in_bounds").reshape(image.shape)


def _stretching(whole: Array) -> Array:
    """[channels, 256]: what brings a channel's extremes to 0 and 255."""
    low, high = whole.min(0)[:, None], whole.max(0)[:, None]
    level = jnp.arange(256)
    stretched = jnp.clip((level - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, stretched, level).astype(jnp.float32)


def _blend(image: Array, choice: Array, argument: Array, names: Sequence[str]) -> Array:
    levels = image.astype(jnp.float32)
    other = levels
    if "colour" in names:
        other = jnp.where(choice == INDEX["colour"], _whole(pixels.grey(levels)), other)
    if "sharpness" in names:
        other = jnp.where(choice == INDEX["sharpness"], _whole(pixels.smooth(levels)), other)
    return _blended(other, levels, argument).astype(jnp.uint8)


def _blended(other: Array, levels: Array, factor: Array) -> Array:
    """Pillow's blend: cut off to whole levels, not rounded."""
    return jnp.floor(pixels.blend(other, levels, factor))


def _whole(levels: Array) -> Array:
    return jnp.floor(levels + 0.5)


def _mean_grey(image: Array) -> Array:
    return _whole(_whole(pixels.grey(image.astype(jnp.float32))).mean())


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
        levels, outside = encode(image, bounds), outside_level(image, bounds, fill)
        for i in range(choices.shape[0]):
            levels = apply(levels, choices[i], arguments[i], outside, names)
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
