"""Elastic width: one set of weights that serves as networks of many widths."""

from collections.abc import Callable, Sequence

from jax import Array

from effjax.core import Ctx, Forward, PyTree, Setup, Transform
from effjax.errors import SetupError
from effjax.nas.groups import WIDTHS, Groups, WidthSpace, check_choices, width_space
from effjax.nas.inplace import InPlace
from effjax.schedules import Scalar, Schedule


def width(
    groups: Groups,
    choices: Sequence[float] = WIDTHS,
    *,
    samples: int = 2,
    alpha: Scalar | Schedule = 1.0,
    temperature: Scalar | Schedule = 1.0,
    logits: Callable[[PyTree], Array] = lambda outputs: outputs,
) -> Transform:
    """A weight-sharing search over widths, trained by the sandwich rule.

    A step runs the largest network, the smallest, and `samples` random ones on the same batch. The
    largest learns the task; the others learn its outputs (in-place distillation):

      kl = alpha * mean over sub-networks and examples of T^2 KL(largest / T || sub-network / T),

    with the gradient through the largest network stopped in this term. A width is a mask: the first
    ceil(channels * width) channels are kept and the others are exact zeros, so every architecture
    has the same shapes and runs in one compiled program. It computes what the physically sliced
    network computes if the zeros stay zeros, that is if activations map 0 to 0 (ReLU, GELU, SiLU,
    tanh; not sigmoid) and no layer takes statistics over a sliced axis (BatchNorm is right;
    LayerNorm and GroupNorm see the zeros). Leave the output layer out of the groups.

    Gradients: each channel gets that of the largest network plus those of the sub-networks that
    keep it; a sub-network gives exactly zero to channels it has cut.

    In evaluation the architecture in `state["width"]` (int32 [groups], at first the largest) is the
    model; set it with `subnet`. BatchNorm's statistics are those of the largest network, as the
    sub-networks' are discarded: call `recalibrate` for the others. Every dropout draws the same
    units in all networks of a step.

    Args:
      groups: {name: regular expression or list of them}, see `width_space`.
      choices: fractions of the channels in (0, 1]; the largest is what trains on the task.
      samples: random sub-networks a step, besides the smallest.
      alpha: weight of the distillation term; a number, a traced value, or a schedule.
      temperature: T > 0; a number, a traced value, or a schedule.
      logits: from the outputs to the logits, floating [..., classes].

    Returns:
      A Transform of kind "architecture" with the loss term "kl"; it reports "agreement", the
      fraction of examples for which the smallest network chooses the class that the largest
      chooses.

    Raises:
      SetupError: here, for wrong choices or samples; at `init`, for outputs that are no logits.
      SelectorError: at `init`, what `width_space` says of the groups.

    References: Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques",
      2019, https://arxiv.org/abs/1903.05134; Yu et al., "BigNAS", 2020,
      https://arxiv.org/abs/2003.11142.
    """
    check_choices(choices)
    if samples < 0:
        raise SetupError(f"the width search draws samples={samples} sub-networks; use 0 or more.")
    taught = InPlace(alpha, temperature, logits)

    def space(params: PyTree) -> WidthSpace:
        return width_space(params, groups, choices)

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        taught.check(setup, params)
        return {}, {"width": space(params).largest}

    def view(params: PyTree, extra: PyTree, state: PyTree, ctx: Ctx) -> PyTree:
        found = space(params)
        if not ctx.train:
            return found.mask(params, state["width"])
        return params if found.choices[-1] == 1 else found.mask(params, found.largest)

    def wrap(forward: Forward, extra: PyTree, state: PyTree, ctx: Ctx) -> Forward:
        if not ctx.train:
            return forward

        def sandwich(params, model_state, batch, key, train):
            outputs, new_state, aux = forward(params, model_state, batch, key, train)
            found = space(params)
            drawn = found.sample(ctx.key, samples)
            subnets = [
                forward(found.mask(params, arch), model_state, batch, key, train)[0]
                for arch in (found.smallest, *drawn)
            ]
            return outputs, new_state, {**aux, **taught.seen(outputs, subnets)}

        return sandwich

    def export(params: PyTree, extra: PyTree, state: PyTree) -> PyTree:
        return space(params).mask(params, state["width"])

    def describe(params: PyTree, extra: PyTree, state: PyTree) -> dict[str, dict[str, int]]:
        found = space(params)
        counts = found.channels(state["width"]).tolist()
        by_group = zip(counts, found.groups.values(), strict=True)
        return {path: {"channels": count} for count, paths in by_group for path in paths}

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
