"""AugMix: several short chains of operations, mixed with each other and with the image."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from effjax.augment import ops, pixels
from effjax.augment.images import Operation
from effjax.augment.pixels import Bounds
from effjax.augment.strengths import LARGEST, Ranges, argument, check_magnitude
from effjax.errors import SetupError
from effjax.schedules import Scalar, is_traced

OPERATIONS = (
    "autocontrast",
    "equalise",
    "posterise",
    "rotate",
    "solarise",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
"""Those that are no corruption of ImageNet-C, on which the paper tests."""
RANGES = Ranges(translate=1 / 3, bits=(4, 0))
DEEPEST = 3


def augmix(
    severity: Scalar = 3.0,
    width: int = 3,
    depth: int | None = None,
    alpha: Scalar = 1.0,
    bounds: Bounds = (0.0, 1.0),
    operations: Sequence[str] = OPERATIONS,
    fill: Scalar | Array | None = None,
) -> Operation:
    """share · image + (1 - share) · Σ w_i · chain_i(image), of chains of random operations.

    Operations are drawn uniformly, the weights w from Dirichlet(alpha, ..., alpha), the share from
    Beta(alpha, alpha). The paper's third part, a loss that keeps predictions alike for several
    mixes of an image, is not done here. Costs width · depth times what one operation does.

    Args:
      severity: each operation's magnitude is uniform in 0.1 .. severity, in 0.1 .. 10; perhaps
        traced.
      width: the number of chains.
      depth: the operations of each chain; None draws 1 .. 3 for each.
      alpha: above 0, perhaps traced.
      bounds: the values of black and white in the images, (0, 1) for `image / 255`.
      operations: what is drawn from, names of `ops.NAMES`.
      fill: what comes in from outside, in the images' values; grey where None.

    Raises:
      SetupError: a severity outside its range, width or depth below 1, alpha not above 0, an
        unknown operation.

    Example:
      >>> import effjax as ej
      >>> augment = ej.augment.images(ej.augment.flip(), ej.augment.augmix(severity=3))

    Reference: Hendrycks et al., "AugMix: a simple data processing method to improve robustness and
    uncertainty", 2019, https://arxiv.org/abs/1912.02781.
    """
    check_magnitude(severity, "augmix's severity", smallest=0.1)
    if width < 1 or (depth is not None and depth < 1):
        raise SetupError(
            f"augmix(width={width}, depth={depth}): there is one chain or more, of one operation "
            "or more; depth=None draws 1 .. 3."
        )
    if not is_traced(alpha) and not alpha > 0:
        raise SetupError(f"augmix(alpha={alpha}): shares are from Beta(alpha, alpha), alpha > 0.")
    pixels.check_bounds(bounds)
    names = ops.check_names(operations, "augmix")
    longest = depth or DEEPEST

    def draw(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        which, side, much, length = jax.random.split(key, 4)
        choices, signs = ops.uniform(which, names, longest), ops.sign(side, longest)
        magnitudes = 0.1 + (severity - 0.1) * jax.random.uniform(much, (longest,))

        def strong(choice: Array, magnitude: Array, sign: Array) -> Array:
            return argument(choice, magnitude / LARGEST, sign, shape, RANGES)

        arguments = jax.vmap(strong)(choices, magnitudes, signs)
        if depth is None:
            kept = jnp.arange(longest) < jax.random.randint(length, (), 1, longest + 1)
            choices = jnp.where(kept, choices, ops.INDEX["identity"])
        return choices, arguments

    chain = ops.operation(draw, names, bounds, fill)

    def apply(key: Array, image: Array) -> Array:
        mixing, sharing, drawing = jax.random.split(key, 3)
        weights = jax.random.dirichlet(mixing, jnp.full(width, alpha, jnp.float32))
        share = jax.random.beta(sharing, alpha, alpha, dtype=jnp.float32)
        chains = jax.vmap(chain, (0, None))(jax.random.split(drawing, width), image)
        mixed = jnp.tensordot(weights, chains.astype(jnp.float32), 1)
        return (share * image + (1 - share) * mixed).astype(image.dtype)

    return apply
