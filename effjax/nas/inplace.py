"""In-place distillation: what the largest network of a supernet teaches the smaller ones."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Ctx, Metrics, PyTree, Setup
from effjax.distill.losses import check_logits, kl
from effjax.schedules import Scalar, Schedule, as_schedule


class InPlace:
    """The loss of the sandwich rule, after one step has run its networks on the same batch:

      kl = alpha * mean over sub-networks and examples of T^2 KL(largest / T || sub-network / T),

    with the gradient through the largest stopped.

    Args:
      alpha, temperature: numbers, traced values, or schedules.
      logits: from the outputs to the logits, floating [..., classes].
    """

    def __init__(
        self,
        alpha: Scalar | Schedule,
        temperature: Scalar | Schedule,
        logits: Callable[[PyTree], Array],
    ):
        self.alpha, self.temperature = as_schedule(alpha), as_schedule(temperature)
        self.logits = logits

    def check(self, setup: Setup, params: PyTree) -> None:
        """SetupError for outputs that are no logits."""
        found = jax.eval_shape(self.logits, setup.trace(params)[0])
        check_logits(found, found)

    def seen(self, largest: PyTree, others: Sequence[PyTree]) -> dict[str, Array]:
        """From the networks' outputs, the smallest sub-network's first, what `loss` and `report`
        read in `aux`."""
        subnets = jnp.stack([self.logits(outputs) for outputs in others])
        same = jnp.argmax(subnets[0], axis=-1) == jnp.argmax(self.logits(largest), axis=-1)
        return {"subnets": subnets, "agreement": jnp.mean(same, dtype=jnp.float32)}

    def loss(
        self, outputs: PyTree, batch: PyTree, aux: PyTree, extra: PyTree, state: PyTree, ctx: Ctx
    ) -> Metrics:
        """The term "kl"."""
        largest = jax.lax.stop_gradient(self.logits(outputs))
        target = jnp.broadcast_to(largest, aux["subnets"].shape)
        distance = kl(aux["subnets"], target, self.temperature(ctx.step))
        return {"kl": self.alpha(ctx.step) * jnp.mean(distance)}

    def report(self, vars: PyTree, state: PyTree, aux: PyTree, ctx: Ctx) -> Metrics:
        """How often the smallest network chooses the largest's class."""
        return {"agreement": aux["agreement"]}
