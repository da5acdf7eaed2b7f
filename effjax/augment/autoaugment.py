"""AutoAugment: two operations of a policy that a search has found."""

import difflib

import jax
import jax.numpy as jnp
from jax import Array

from effjax.augment import ops, pixels
from effjax.augment.images import Operation
from effjax.augment.pixels import Bounds
from effjax.augment.policies import POLICIES
from effjax.augment.strengths import LARGEST, Ranges, argument
from effjax.errors import SetupError
from effjax.schedules import Scalar

RANGES = Ranges(through=True)


def autoaugment(
    policy: str = "cifar10",
    bounds: Bounds = (0.0, 1.0),
    fill: Scalar | Array | None = None,
) -> Operation:
    """Draws one of a policy's 25 sub-policies for each image, and applies its two operations, each
    with its probability.

    Magnitudes mean what they mean in the paper's table of ranges and the authors' code: m of 10 of
    the way from one end to the other. So factors are 0.1 + 0.18 m (torchvision has 1 ± 0.1 m), bits
    8 - 0.4 m, thresholds 256 - 25.6 m, and shears, shifts and turns have a random sign.

    Args:
      policy: "cifar10", "svhn" or "imagenet". The paper applies the first after crops and flips and
        before `cutout(16)`.
      bounds: the values of black and white in the images, (0, 1) for `image / 255`.
      fill: what comes in from outside, in the images' values; grey where None.

    Raises:
      SetupError: no such policy; when traced, images with neither 1 nor 3 channels.

    Example:
      >>> import effjax as ej
      >>> augment = ej.augment.images(ej.augment.crop(4), ej.augment.autoaugment("cifar10"))

    Reference: Cubuk et al., "AutoAugment: learning augmentation strategies from data", 2018,
    https://arxiv.org/abs/1805.09501.
    """
    if policy not in POLICIES:
        near = difflib.get_close_matches(str(policy).lower(), POLICIES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SetupError(f"autoaugment({policy!r}): there are {', '.join(POLICIES)}.{hint}")
    pixels.check_bounds(bounds)
    pairs = POLICIES[policy]
    names = tuple({name: None for pair in pairs for name, _, _ in pair})

    def draw(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        which, chance, side = jax.random.split(key, 3)
        chosen = jax.random.randint(which, (), 0, len(pairs))
        choices = jnp.array([[ops.INDEX[n] for n, _, _ in pair] for pair in pairs])[chosen]
        probabilities = jnp.array([[p for _, p, _ in pair] for pair in pairs])[chosen]
        strengths = jnp.array([[m / LARGEST for _, _, m in pair] for pair in pairs])[chosen]

        def strong(choice: Array, strength: Array, sign: Array) -> Array:
            return argument(choice, strength, sign, shape, RANGES)

        arguments = jax.vmap(strong)(choices, strengths, ops.sign(side, 2))
        happens = jax.random.bernoulli(chance, probabilities)
        return jnp.where(happens, choices, ops.INDEX["identity"]), arguments

    return ops.operation(draw, names, bounds, fill)
