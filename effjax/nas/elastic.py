"""Training of supernets: the sandwich rule, in-place distillation, progressive shrinking."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import Ctx, Forward, PyTree, Setup, Transform
from effjax.errors import ScheduleError, SetupError
from effjax.nas.inplace import InPlace
from effjax.nas.slices import Bits, Depth, Kernel, Resolution, Sparsity, Width
from effjax.nas.supernet import Supernet
from effjax.schedules import Scalar, Schedule
from effjax.select import leaves

ORDER = (Resolution, Kernel, Depth, Width, Bits, Sparsity)


def elastic(
    net: Supernet,
    *,
    samples: int = 2,
    alpha: Scalar | Schedule = 1.0,
    temperature: Scalar | Schedule = 1.0,
    shrink: Mapping[str, Sequence[int]] | None = None,
    logits: Callable[[PyTree], Array] = lambda outputs: outputs,
) -> Transform:
    """Trains all sub-networks of a supernet, by the sandwich rule.

    A step runs the largest network, the smallest, and `samples` random ones on the same batch. The
    largest learns the task; the others learn its outputs (in-place distillation):

      kl = alpha * mean over sub-networks and examples of T^2 KL(largest / T || sub-network / T),

    with the gradient through the largest network stopped in this term. Architectures are traced
    values, so the step compiles once, whatever is elastic.

    Gradients: a weight gets those of all networks that have it, and exactly zero from others. A
    weight that a sub-network's sparsity prunes gets none from it; rounding is straight-through. The
    matrices of elastic kernels are in `extra` and get the gradients of the networks that use them.

    In evaluation the architecture in `state["arch"]` (int32 [genes], at first the largest) is the
    model; set it with `subnet`. BatchNorm's statistics are those of the largest network: call
    `make_recalibrate` for the others. Every dropout draws the same units in all networks of a step.

    Args:
      net: see `Supernet`.
      samples: random sub-networks a step, besides the smallest; each gene is drawn by itself.
      alpha: weight of the distillation term; a number, a traced value, or a schedule.
      temperature: T > 0; a number, a traced value, or a schedule.
      shrink: progressive shrinking: {dimension: the steps from which its second largest, third
        largest, ... choice takes part}. What is not named takes part from the first step.
        `progressive` makes one.
      logits: from the outputs to the logits, floating [..., classes].

    Returns:
      A Transform of kind "architecture" with the loss term "kl"; it reports "agreement", the
      fraction of examples for which the smallest network chooses the class that the largest
      chooses.

    Raises:
      SetupError: a number of samples below 0, a dimension to shrink that there is not; at `init`,
        params that are not the supernet's, or outputs that are no logits.
      ScheduleError: steps to shrink at that decrease, or are not one for each smaller choice.

    References: Yu et al., "BigNAS", 2020, https://arxiv.org/abs/2003.11142 (sandwich, in-place
      distillation); Cai et al., "Once-for-All", 2020, https://arxiv.org/abs/1908.09791 (kernels,
      depths, progressive shrinking).
    """
    if samples < 0:
        raise SetupError(f"elastic draws samples={samples} sub-networks; use 0 or more.")
    taught = InPlace(alpha, temperature, logits)
    begins = _begins(net, shrink or {})
    whole = _is_whole(net)

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        check_params(net, params)
        taught.check(setup, params)
        matrices = net.matrices()
        state: dict[str, PyTree] = {"arch": net.largest}
        quant = net.quantizer(np.asarray(net.architecture()))
        if quant is not None:
            state["quant"] = quant.init(key, params, setup)[1]
        return ({"matrices": matrices} if matrices else {}), state

    def run(forward, params, arch, extra, state, ctx) -> Callable[..., tuple]:
        seen = net.view(params, arch, extra.get("matrices"))
        wrapped = net.wrap(forward, arch, state.get("quant"), ctx)
        return lambda model_state, batch, key, train: wrapped(seen, model_state, batch, key, train)

    def view(params: PyTree, extra: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
        if ctx.train:
            return params if whole else net.view(params, net.largest)
        return net.view(params, state["arch"], extra.get("matrices"))

    def wrap(forward: Forward, extra: PyTree, state: PyTree, ctx: Ctx) -> Forward:
        if not ctx.train:
            return net.wrap(forward, state["arch"], state.get("quant"), ctx)

        def sandwich(params, model_state, batch, key, train):
            teacher = net.wrap(forward, net.largest, state.get("quant"), ctx)
            outputs, new_state, aux = teacher(params, model_state, batch, key, train)
            lowest = jnp.asarray(net.largest) - sum(
                (ctx.step >= row for row in begins), jnp.zeros(len(net.names), jnp.int32)
            )
            smallest = net.canonical(lowest)
            drawn = net.draw(ctx.key, samples, lowest)
            subnets = []
            for arch in (smallest, *drawn):
                one = run(forward, params, arch, extra, state, ctx)
                subnets.append(one(model_state, batch, key, train)[0])
            return outputs, new_state, {**aux, **taught.seen(outputs, subnets)}

        return sandwich

    def export(params: PyTree, extra: PyTree, state: PyTree) -> PyTree:
        return net.view(params, state["arch"], extra.get("matrices"))

    def describe(params: PyTree, extra: PyTree, state: PyTree) -> dict[str, dict[str, int]]:
        return facts_of(net, np.asarray(state["arch"]), params, state.get("quant"))

    return Transform(
        init=init,
        view=view,
        wrap=wrap,
        loss=taught.loss,
        export=export,
        report=taught.report,
        describe=describe,
        kind="architecture",
    )


def progressive(
    net: Supernet, steps: int, order: Sequence[type] = ORDER
) -> dict[str, tuple[int, ...]]:
    """A schedule of progressive shrinking: one kind of dimension after the other.

    The steps are divided equally among the kinds that the supernet has, the first of which begins
    at step 0; within a kind the smaller choices come one after the other.

    Args:
      net: the supernet.
      steps: after which everything takes part.
      order: kinds of dimension; those left out take part from the first step.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp
      >>> import effjax as ej
      >>> model = ej.from_linen(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), inputs="x")
      >>> net = ej.nas.Supernet(
      ...     model, {"x": jnp.ones((1, 4))}, {"hidden": ej.nas.Width("layers_0/kernel")}
      ... )
      >>> ej.nas.progressive(net, 100)
      {'hidden': (0, 50)}
    """
    kinds = [k for k in order if any(isinstance(d, k) for d in net.elastic.values())]
    found: dict[str, tuple[int, ...]] = {}
    for i, kind in enumerate(kinds):
        for name, own in net.elastic.items():
            if isinstance(own, kind):
                smaller = len(net.values[net.names.index(name)]) - 1
                at = (i + j / max(smaller, 1) for j in range(smaller))
                found[name] = tuple(round(steps * x / len(kinds)) for x in at)
    return found


def check_params(net: Supernet, params: PyTree) -> None:
    """Raises SetupError unless these are the params of the supernet's model."""
    wanted = {path: np.shape(x) for path, x in leaves(net.params).items()}
    found = {path: np.shape(x) for path, x in leaves(params).items()}
    if found != wanted:
        apart = sorted(p for p in {*found, *wanted} if found.get(p) != wanted.get(p))
        raise SetupError(
            f"the params are not those of the supernet's model: {apart[:4]} differ. Make the "
            "Supernet of the model that is trained."
        )


def facts_of(
    net: Supernet, arch: np.ndarray, params: PyTree, quant: PyTree
) -> dict[str, dict[str, int]]:
    """What `Transform.describe` says of an architecture; `quant` is the quantizer's state."""
    facts: dict[str, dict[str, int]] = {}
    if (own := net.quantizer(arch)) is not None:
        facts = own.describe(params, {}, quant)
    for path in leaves(params):
        last = net.leaves[path].axes[-1:]
        if last and last[0].genes:
            facts[path] = facts.get(path, {}) | {"channels": int(last[0].count(arch))}
    return facts


def _is_whole(net: Supernet) -> bool:
    arch = np.asarray(net.largest)
    named = leaves(net.params)
    changed = [x for path, x in net.leaves.items() if path in named and x.changes]
    return all(
        int(x.entries(arch)) == math.prod(x.shape) and not net.zeros(x, arch) for x in changed
    )


def _begins(net: Supernet, shrink: Mapping[str, Sequence[int]]) -> list[Array]:
    """For the second largest, third largest, ... choices the steps at which they begin: int32
    [genes] each; a dimension that has no such choice never begins."""
    if unknown := sorted(set(shrink) - set(net.names)):
        raise SetupError(f"shrink names {unknown}; the dimensions are {net.names}.")
    rows: list[list[int]] = []
    for name, values in zip(net.names, net.values, strict=True):
        own = list(shrink.get(name, [0] * (len(values) - 1)))
        if len(own) != len(values) - 1 or own != sorted(own):
            raise ScheduleError(
                f"shrink gives {name} the steps {own}; it has {len(values) - 1} choices below the "
                "largest, which begin at steps that do not decrease."
            )
        rows.append(own)
    never = np.iinfo(np.int32).max
    most = max(len(row) for row in rows)
    return [jnp.array([row[i] if i < len(row) else never for row in rows]) for i in range(most)]
