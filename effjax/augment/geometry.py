"""Images turned, sheared, scaled and shifted: one affine map, one gather."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from effjax.augment.images import Operation
from effjax.errors import SetupError
from effjax.schedules import Scalar, is_traced

Method = Literal["nearest", "bilinear"]


def affine(
    image: Array, matrix: Array, method: Method = "nearest", fill: Scalar | Array = 0.0
) -> Array:
    """Moves the pixels of one image: output (x, y) is the input at matrix · (x, y, 1).

    Coordinates are Pillow's: pixel (0, 0) covers 0 <= x, y < 1, and the map is evaluated at the
    middle of each output pixel. `Image.transform(size, AFFINE, matrix.ravel())` is the same.

    Args:
      image: [height, width, channels].
      matrix: [2, 3], from output to input coordinates, in pixels.
      method: the pixel that the place falls in, or the four nearest middles, linearly.
      fill: what comes in from outside: a number or [channels], in the image's values.

    Returns:
      The moved image, of the same shape and dtype.
    """
    height, width, channels = image.shape
    (a, b, c), (d, e, f) = jnp.asarray(matrix, jnp.float32)
    x, y = jnp.arange(width) + 0.5, jnp.arange(height)[:, None] + 0.5
    u, v = a * x + b * y + c, d * x + e * y + f
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    flat = image.reshape(-1, channels)

    def at(row: Array, column: Array) -> Array:
        row, column = jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)
        return flat.at[row * width + column].get(mode="promise_in_bounds")

    if method == "nearest":
        moved = at(jnp.floor(v).astype(jnp.int32), jnp.floor(u).astype(jnp.int32))
    else:
        left, top = jnp.floor(u - 0.5), jnp.floor(v - 0.5)
        right, low = ((u - 0.5) - left)[..., None], ((v - 0.5) - top)[..., None]
        i, j = top.astype(jnp.int32), left.astype(jnp.int32)
        upper = at(i, j) * (1 - right) + at(i, j + 1) * right
        lower = at(i + 1, j) * (1 - right) + at(i + 1, j + 1) * right
        moved = upper * (1 - low) + lower * low
    return jnp.where(inside[..., None], moved, jnp.asarray(fill)).astype(image.dtype)


def about_centre(linear: Array, shape: tuple[int, ...], shift: Array | None = None) -> Array:
    """[2, 3]: the linear map [2, 2] about an image's middle, after a shift (x, y) in pixels."""
    centre = jnp.array([shape[1] / 2, shape[0] / 2], jnp.float32)
    moved = centre if shift is None else centre + shift
    return jnp.concatenate([linear, (centre - linear @ moved)[:, None]], axis=1)


def turning(degrees: Scalar) -> Array:
    """[2, 2]: a rotation counter-clockwise as one sees it (rows run downwards)."""
    angle = -jnp.asarray(degrees, jnp.float32) * (math.pi / 180)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([cos, sin]), jnp.stack([-sin, cos])])


def random_affine(
    degrees: Scalar = 0.0,
    shear: Scalar = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    shift: Scalar = 0.0,
    method: Method = "bilinear",
    fill: Scalar = 0.0,
) -> Operation:
    """Turns, shears, scales and shifts an image about its middle, in one resampling.

    Args:
      degrees: the largest angle; drawn uniformly from -degrees .. degrees. Perhaps traced.
      shear: the largest shear along each axis, as a slope; perhaps traced.
      scale: (smallest, largest) magnification, drawn log-uniformly.
      shift: the largest shift along each axis, as a fraction of the image; perhaps traced.
      method: "nearest" or "bilinear".
      fill: what comes in from outside.

    Raises:
      SetupError: a negative bound, a scale not (smallest, largest) above 0, an unknown method.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> still = random_affine()
      >>> bool((still(jax.random.key(0), jnp.ones((4, 4, 3))) == 1).all())
      True
    """
    for name, bound in {"degrees": degrees, "shear": shear, "shift": shift}.items():
        if not is_traced(bound) and bound < 0:
            raise SetupError(f"{name}={bound}: give the largest one, 0 or above; both signs occur.")
    if not 0 < scale[0] <= scale[1]:
        raise SetupError(f"scale={scale}: give (smallest, largest), above 0.")
    if method not in ("nearest", "bilinear"):
        raise SetupError(f"method={method!r}; there are 'nearest' and 'bilinear'.")

    def apply(key: Array, image: Array) -> Array:
        draws = jax.random.uniform(key, (6,), minval=-1.0)
        low, high = math.log(scale[0]), math.log(scale[1])
        size = jnp.exp(low + (high - low) * (draws[0] + 1) / 2)
        sheared = jnp.eye(2) + jnp.array([[0.0, 1.0], [0.0, 0.0]]) * (shear * draws[1])
        sheared = sheared @ (jnp.eye(2) + jnp.array([[0.0, 0.0], [1.0, 0.0]]) * (shear * draws[2]))
        linear = turning(degrees * draws[3]) @ sheared / size
        sides = jnp.array([image.shape[1], image.shape[0]], jnp.float32)
        matrix = about_centre(linear, image.shape, shift * draws[4:] * sides)
        return affine(image, matrix, method, fill)

    return apply


def rotate(degrees: Scalar, method: Method = "bilinear", fill: Scalar = 0.0) -> Operation:
    """Turns about the middle by an angle uniform in -degrees .. degrees, perhaps traced."""
    return random_affine(degrees=degrees, method=method, fill=fill)


def shear(slope: Scalar, method: Method = "bilinear", fill: Scalar = 0.0) -> Operation:
    """Shears along both axes by slopes uniform in -slope .. slope, perhaps traced."""
    return random_affine(shear=slope, method=method, fill=fill)


def scale(
    smallest: float, largest: float, method: Method = "bilinear", fill: Scalar = 0.0
) -> Operation:
    """Magnifies about the middle by a factor log-uniform in smallest .. largest."""
    return random_affine(scale=(smallest, largest), method=method, fill=fill)
