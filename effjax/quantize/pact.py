"""PACT: activations clipped at a bound that is trained."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from effjax.core import Transform
from effjax.errors import ScheduleError, SetupError
from effjax.quantize import engine, levels, numerics
from effjax.quantize.learned import ONE, Signs, ends_seen, is_signed
from effjax.quantize.lowbit import dorefa_weights
from effjax.quantize.operands import Operand, Place, Values, transform_of
from effjax.quantize.rules import Bits
from effjax.schedules import Scalar, is_traced
from effjax.select import KERNELS


def pact(
    weights: numerics.Bits = 4,
    activations: numerics.Bits = 4,
    *,
    alpha: float | None = None,
    decay: Scalar = 1e-4,
    select: str = KERNELS,
    signed: Signs = "auto",
    rules: Sequence[tuple[str, Bits]] = (),
    products: bool | str = False,
) -> Transform:
    """PACT: activations are clipped at a bound a that is trained, and rounded below it.

    An activation that is never negative becomes s · round(clip(x, 0, a) / s), s = a / (2^b - 1);
    one that is (the image), s · round(clip(x, -a, a) / s), s = a / (2^(b-1) - 1). Gradients:

        dq/dx = 1 where 0 (or -a) <= x < a, else 0;  dq/da = 1 where x >= a, -1 where x < -a, else 0

    and the loss gets decay/2 · (sum of a²), which pulls the bounds down from where they begin.
    Weights are DoReFa's, as in the paper; see `dorefa`.

    Args:
      weights, activations: bits, 1..8, or 16 and more for floating point; may be traced.
      alpha: where the bounds begin; the paper takes 10. None takes max|x| of the first batch.
      decay: of the bounds, beside the optimizer's own; may be traced.
      select, rules, products: as `qat`.
      signed: as `lsq`.

    Extra: {"alpha": {"activations": {site: float32 []}}}, by a label tree "^extra/.*alpha/".

    Raises:
      ScheduleError: a negative decay.
      SetupError: an alpha that is not positive; SetupError, SelectorError, SiteError: as `qat`.

    Example:
      >>> import effjax as ej
      >>> ej.quantize.pact(4, 4, alpha=6.0).kind
      'quantize'

    Reference: Choi et al., "PACT: Parameterized clipping activation for quantized neural networks",
    2018, https://arxiv.org/abs/1805.06085.
    """
    if not is_traced(decay) and decay < 0:
        raise ScheduleError(f"the decay of PACT's bounds is {decay}; it is a number >= 0.")
    if alpha is not None and not is_traced(alpha) and alpha <= 0:
        raise SetupError(f"alpha is {alpha}; activations are clipped at a bound above 0.")
    default = Bits(weights, activations)
    asked = engine.rules_of("pact", default, rules, select, False, products, ONE)

    def fit(seen: Values, bits: numerics.Bits) -> Values:
        first = jnp.maximum(seen["high"], seen["low"])
        first = first if alpha is None else jnp.full_like(first, alpha)
        return {"alpha": first, "signed": is_signed(seen, signed)}

    def rounded(x: Array, values: Values, bits: numerics.Bits, place: Place) -> Array:
        own = levels.choose(values["signed"], bits, narrow=True)
        return levels.learned_bound(x, values["alpha"], own)

    clipped = Operand(rounded, ends_seen, fit, ("alpha",))
    return transform_of(asked, Operand(dorefa_weights), clipped, penalty={"alpha": decay})
