"""TrivialAugment: one operation, of a random magnitude."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from effjax.augment import ops, pixels
from effjax.augment.images import Operation
from effjax.augment.pixels import Bounds
from effjax.augment.randaugment import OPERATIONS
from effjax.augment.strengths import Ranges, argument
from effjax.schedules import Scalar

WIDE = Ranges(shear=0.99, translate=0.0, pixels=32.0, rotate=135.0, factor=0.99, bits=(8, 2))
STRENGTHS = 31


def trivialaugment(
    bounds: Bounds = (0.0, 1.0),
    operations: Sequence[str] = OPERATIONS,
    fill: Scalar | Array | None = None,
) -> Operation:
    """Applies one operation drawn uniformly, of one of 31 strengths drawn uniformly.

    The paper's wide ranges: at most, a shear of slope 0.99, a shift by 32 pixels, 135 degrees,
    factors of 1 ± 0.99, 2 bits of 8, all levels inverted by solarise. There is nothing to tune.

    Args:
      bounds: the values of black and white in the images, (0, 1) for `image / 255`.
      operations: what is drawn from, names of `ops.NAMES`.
      fill: what comes in from outside, in the images' values; grey where None.

    Raises:
      SetupError: an unknown operation; when traced, images with neither 1 nor 3 channels.

    Example:
      >>> import effjax as ej
      >>> augment = ej.augment.images(ej.augment.flip(), ej.augment.trivialaugment())

    Reference: Müller and Hutter, "TrivialAugment: tuning-free yet state-of-the-art data
    augmentation", 2021, https://arxiv.org/abs/2103.10158.
    """
    pixels.check_bounds(bounds)
    names = ops.check_names(operations, "trivialaugment")

    def draw(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        which, side, much = jax.random.split(key, 3)
        choices, signs = ops.uniform(which, names, 1), ops.sign(side, 1)
        strength = jax.random.randint(much, (), 0, STRENGTHS) / (STRENGTHS - 1)
        return choices, jnp.stack([argument(choices[0], strength, signs[0], shape, WIDE)])

    return ops.operation(draw, names, bounds, fill)
