"""How strong each operation of a policy is: from a strength to the operation's own argument."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from effjax.augment.ops import NAMES
from effjax.errors import SetupError
from effjax.schedules import Scalar, is_traced

LARGEST = 10
"""Magnitudes are 0 .. 10, as in AutoAugment's and RandAugment's own code and in timm; 10 is an
operation's full strength. torchvision counts to 30."""


class Ranges(NamedTuple):
    """Arguments at full strength; at strength s they are s of the way there.

    Attributes:
      shear: the slope.
      translate: a shift as a fraction of the image's side, and `pixels` added to it.
      pixels: see `translate`.
      rotate: degrees.
      factor: how far the factors of colour, contrast, brightness and sharpness are from 1.
      bits: (at strength 0, at full strength), kept by posterise.
      through: factors go from 1 - factor through 1 to 1 + factor as the strength rises, instead of
        from 1 either way by a random sign.
    """

    shear: float = 0.3
    translate: float = 150 / 331
    pixels: float = 0.0
    rotate: float = 30.0
    factor: float = 0.9
    bits: tuple[int, int] = (8, 4)
    through: bool = False


def argument(
    choice: Array, strength: Scalar, sign: Array, shape: tuple[int, ...], ranges: Ranges
) -> Array:
    """The argument of the operation NAMES[choice]: float32 scalar.

    Args:
      choice: int32 scalar.
      strength: 0 .. 1; for those that have one, 0 is the identity unless `ranges` says otherwise.
      sign: -1 or 1, for operations that go both ways.
      shape: (height, width, ...) of the image.
      ranges: the arguments at full strength.
    """
    s = jnp.asarray(strength, jnp.float32)
    height, width = shape[:2]
    factor = 1 + ranges.factor * ((2 * s - 1) if ranges.through else sign * s)
    most, least = ranges.bits
    arguments = {
        "shear_x": sign * s * ranges.shear,
        "shear_y": sign * s * ranges.shear,
        "translate_x": sign * s * (ranges.translate * width + ranges.pixels),
        "translate_y": sign * s * (ranges.translate * height + ranges.pixels),
        "rotate": sign * s * ranges.rotate,
        "colour": factor,
        "sharpness": factor,
        "brightness": factor,
        "contrast": factor,
        # Whole bits, cut off as in the authors' code; 1e-4 is for strengths such as 10 / 30.
        "posterise": jnp.maximum(most - jnp.floor((most - least) * s + 1e-4), 1),
        "solarise": 256 * (1 - s),
    }
    none = jnp.zeros((), jnp.float32)
    return jnp.stack([jnp.asarray(arguments.get(n, none), jnp.float32) for n in NAMES])[choice]


def check_magnitude(magnitude: Scalar, what: str, smallest: float = 0) -> None:
    """Raises unless a concrete magnitude is in smallest .. 10; a traced one passes."""
    if not is_traced(magnitude) and not smallest <= magnitude <= LARGEST:
        raise SetupError(
            f"{what} is {magnitude}; it is in {smallest} .. {LARGEST}, {LARGEST} being full "
            "strength, as in the papers' code and timm. torchvision's 0 .. 30 are three times "
            "these."
        )
