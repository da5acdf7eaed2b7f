"""RandAugment: a few operations drawn uniformly, all of one magnitude."""

from collections.abc import Sequence

import jax
from jax import Array

from effjax.augment import ops, pixels
from effjax.augment.images import Operation
from effjax.augment.pixels import Bounds
from effjax.augment.strengths import LARGEST, Ranges, argument, check_magnitude
from effjax.errors import SetupError
from effjax.schedules import Scalar

OPERATIONS = tuple(name for name in ops.NAMES if name != "invert")
"""The 14 of the paper, the identity among them."""


def randaugment(
    count: int = 2,
    magnitude: Scalar = 9.0,
    bounds: Bounds = (0.0, 1.0),
    operations: Sequence[str] = OPERATIONS,
    fill: Scalar | Array | None = None,
) -> Operation:
    """Applies `count` operations drawn uniformly, with replacement, one after another.

    Magnitude 10 is a shear of slope 0.3, a shift by 150/331 of the side, 30 degrees, a factor of
    1 ± 0.9 for colour, contrast, brightness and sharpness, 4 bits of 8, and an inversion of all
    levels by solarise; magnitude 0 changes nothing in these. autocontrast and equalise have no
    magnitude. Operations that go both ways do so with equal probability.

    Args:
      count: N of the paper, 1 or more.
      magnitude: M, 0 .. 10, perhaps traced; torchvision's 0 .. 30 divided by 3.
      bounds: the values of black and white in the images, (0, 1) for `image / 255`.
      operations: what is drawn from, names of `ops.NAMES`; without "colour" and "contrast", images
        may have any number of channels.
      fill: what comes in from outside, in the images' values; grey where None.

    Raises:
      SetupError: a count below 1, a magnitude outside 0 .. 10, an unknown operation; when traced,
        images with neither 1 nor 3 channels for an operation on luminance.

    Example:
      >>> import effjax as ej
      >>> augment = ej.augment.images(ej.augment.crop(4), ej.augment.randaugment(2, 9))

    Reference: Cubuk et al., "RandAugment: practical automated data augmentation with a reduced
    search space", 2019, https://arxiv.org/abs/1909.13719.
    """
    if count < 1:
        raise SetupError(f"randaugment(count={count}): apply one operation or more.")
    check_magnitude(magnitude, "randaugment's magnitude")
    pixels.check_bounds(bounds)
    names = ops.check_names(operations, "randaugment")

    def draw(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        which, side = jax.random.split(key)
        choices, signs = ops.uniform(which, names, count), ops.sign(side, count)

        def strong(choice: Array, sign: Array) -> Array:
            return argument(choice, magnitude / LARGEST, sign, shape, Ranges())

        return choices, jax.vmap(strong)(choices, signs)

    return ops.operation(draw, names, bounds, fill)
