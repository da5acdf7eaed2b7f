"""Differentiable architecture search: choices as weights of a mixture, trained with the network."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import Ctx, Forward, Metrics, PyTree, Setup, Transform, abstract_key
from effjax.errors import ScheduleError, SetupError
from effjax.nas.bilevel import halves, joined, scaled
from effjax.nas.relaxations import RELAXATIONS
from effjax.schedules import Scalar, Schedule, as_schedule, is_traced

Loss = Callable[[PyTree, PyTree], Array]


class Latency(NamedTuple):
    """What operations cost, and how the search pays for it.

    The expected latency is LAT = base + Σ over edges and operations of p · cost, with p the softmax
    of the logits. "sum" adds strength · LAT to the loss (ProxylessNAS); "product" makes the task's
    loss CE into CE · strength · log(LAT)^power (FBNet), for which LAT has to stay above 1: choose
    its unit so.

    costs: {entry of the batch: float [edges, operations]}, of every entry that is searched.
    base: of what is not searched.
    """

    costs: Mapping[str, Any]
    base: Scalar = 0.0
    strength: Scalar = 0.2
    power: Scalar = 0.6
    form: Literal["sum", "product"] = "sum"


def darts(
    edges: Mapping[str, int],
    operations: Sequence[str],
    *,
    relax: str = "softmax",
    temperature: Scalar | Schedule = 1.0,
    loss: Loss | None = None,
    order: Literal[1, 2] = 1,
    rate: Scalar | Schedule | None = None,
    skip: str | None = "skip",
    auxiliary: Scalar | Schedule = 0.0,
    zero_one: Scalar = 0.0,
    decay: Scalar | Schedule = 0.0,
    latency: Latency | None = None,
    evaluate: Literal["mixture", "chosen"] = "mixture",
) -> Transform:
    """Differentiable search: DARTS, and what came of it.

    For a model that weighs the operations of its edges, y = Σ_o w[e, o] operation_o(x), by arrays
    float [edges, operations] in its batch. The search holds logits a for each of them and puts

        w = relax(a) + auxiliary(step) · [o is `skip`]

    there. In training the examples at even places of the batch train the network with w held fixed,
    and those at odd places train the logits with the network held fixed, in one step and one
    gradient; each half's gradient is that of its own mean loss (the user's is to be a mean over
    examples). The two should not share images: interleave a training and a validation set. The
    statistics of BatchNorm are the even half's.

    order=1: ∂L_val(θ, a)/∂a. order=2: d L_val(θ - ξ ∂L_train(θ, a)/∂θ, a)/da, as one step of
      gradient descent with `rate` ξ would leave the weights; exact, where the paper takes finite
      differences. It costs about two more passes. Weights that another transform masks are moved
      there as others.

    Gradients: logits have none by the even half, weights none by the odd one. Leaves that other
    transforms train (step sizes) learn from both, as without the search.

    In evaluation the network is the mixture without noise, or ("chosen") each edge's most probable
    operation alone. Weights are shipped as they are: `extract` gives the genes.

    Args:
      edges: {entry of the batch: how many edges it weighs}; {"edges": 6} is NAS-Bench-201's cell,
        {"normal": 14, "reduce": 14} DARTS's.
      operations: names of the operations of every edge, in order.
      relax: "softmax" (DARTS), "sigmoid" (FairDARTS), "gumbel" (SNAS, FBNet), "one_path" (GDAS) or
        "two_paths" (ProxylessNAS); see `effjax.nas.relaxations`.
      temperature: above 0; a number or a schedule.
      loss: the task's, for order 2 and for a latency of the form "product".
      order, rate: see above.
      skip: the operation whose growth is the collapse; None where there is none such.
      auxiliary: DARTS-: an additional skip connection that fades to 0 during the search.
      zero_one: FairDARTS: strength of the loss -mean (sigmoid(a) - ½)².
      decay: beta-DARTS: strength of the loss mean over edges of log Σ_o exp(a[e, o]), published as
        growing from 0 to 50 during the search. Its gradient is the softmax: it lowers a logit the
        more the larger its share is, which keeps one operation from running away.
      latency: see `Latency`.
      evaluate: see above.

    Extra: {"logits": {entry: float32 [edges, operations]}}, near 0 at first. Give them a label, and
    thereby a learning rate, of their own: (r"^extra/.*logits/", "architecture").

    Metrics: "skip", the fraction of edges whose most probable operation is `skip` (near 1 after a
    collapse); "entropy" of the choices, 1 where all are equal and 0 where all are made. Losses:
    "latency", "zero_one", "decay".

    Raises:
      SetupError: wrong arguments here; at `init`, a batch with an odd number of examples, or a
        model that takes no notice of an entry.
      ScheduleError: a temperature that is not positive.

    Example:
      >>> import effjax as ej
      >>> search = ej.nas.darts({"edges": 6}, ("none", "skip", "conv1x1", "conv3x3", "pool"))
      >>> search.kind
      'architecture'

    References: Liu et al., "DARTS: Differentiable architecture search", 2019,
    https://arxiv.org/abs/1806.09055; Chu et al., "DARTS-: Robustly stepping out of performance
    collapse without indicators", 2021, https://arxiv.org/abs/2009.01027; Ye et al., "beta-DARTS:
    Beta-decay regularization for differentiable architecture search", 2022,
    https://arxiv.org/abs/2203.01665; and those of the relaxations.
    """
    names, wrong = tuple(operations), _wrong(edges, operations, relax, skip, order, rate, loss)
    if wrong is None and latency is not None:
        wrong = _wrong_latency(latency, edges, len(names), loss)
    if wrong is not None:
        raise SetupError(wrong)
    if not callable(temperature) and not is_traced(temperature) and temperature <= 0:
        raise ScheduleError(f"the temperature is {temperature}; a relaxation needs one above 0.")
    heat, extra_skip = as_schedule(temperature), as_schedule(auxiliary)
    ahead = as_schedule(0.0 if rate is None else rate)
    place = None if skip is None else names.index(skip)
    # A schedule or a traced value may be anything.
    helped = callable(auxiliary) or is_traced(auxiliary) or auxiliary != 0
    pushed = is_traced(zero_one) or zero_one != 0
    decays, falling = callable(decay) or is_traced(decay) or decay != 0, as_schedule(decay)
    if helped and place is None:
        raise SetupError("an auxiliary skip connection needs skip=..., the operation's name.")

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        if not isinstance(setup.batch, Mapping):
            raise SetupError(
                f"the batch is a {type(setup.batch).__name__}; a differentiable search puts the "
                f"weights of the edges into a dict, as its entries {list(edges)}."
            )
        jax.eval_shape(halves, setup.batch)
        keys = jax.random.split(key, len(edges))
        logits = {
            entry: 1e-3 * jax.random.normal(k, (count, len(names)))
            for k, (entry, count) in zip(keys, edges.items(), strict=True)
        }
        _check_read(setup, params, logits)
        return {"logits": logits}, {}

    def weights(extra: PyTree, ctx: Ctx) -> dict[str, Array]:
        found = {}
        for i, (entry, logits) in enumerate(extra["logits"].items()):
            key = jax.random.fold_in(ctx.key, i)
            if ctx.train:
                found[entry] = RELAXATIONS[relax](logits, key, heat(ctx.step))
                if helped:
                    found[entry] = found[entry].at[:, place].add(extra_skip(ctx.step))
            elif evaluate == "chosen":
                found[entry] = jax.nn.one_hot(jnp.argmax(logits, -1), len(names))
            else:
                still = "sigmoid" if relax == "sigmoid" else "softmax"
                found[entry] = RELAXATIONS[still](logits, key, heat(ctx.step))
        return found

    def wrap(forward: Forward, extra: PyTree, state: PyTree, ctx: Ctx) -> Forward:
        def evaluated(params, model_state, batch, key, train):
            return forward(params, model_state, {**batch, **weights(extra, ctx)}, key, train)

        def searched(params, model_state, batch, key, train):
            even, odd = halves(batch)
            mixture = weights(extra, ctx)
            fixed = jax.lax.stop_gradient(mixture)
            one = forward(scaled(params, 2), model_state, {**even, **fixed}, key, train)
            # Each half's mean is half of the batch's: twice its gradient makes up for that.
            mixture, held = scaled(mixture, 2), jax.lax.stop_gradient(params)
            if order == 2:
                held = looked_ahead(held, mixture, model_state, even, key)
            other = jax.random.fold_in(key, 1)
            two = forward(held, model_state, {**odd, **mixture}, other, train)

            def whole(params, model_state, batch, key):
                found = forward(params, model_state, {**batch, **fixed}, key, train)
                return found[0], found[2]

            shapes = jax.eval_shape(whole, params, model_state, batch, key)
            outputs, aux = joined((one[0], one[2]), (two[0], two[2]), shapes)
            return outputs, one[1], aux

        def looked_ahead(held, mixture, model_state, batch, key):
            assert loss is not None  # asked for at once

            def training(params):
                return loss(forward(params, model_state, {**batch, **mixture}, key, True)[0], batch)

            slope, step = jax.grad(training)(held), ahead(ctx.step)
            return jax.tree.map(lambda w, g: w - step.astype(w.dtype) * g, held, slope)

        return searched if ctx.train else evaluated

    def terms(outputs, batch, aux, extra, state, ctx) -> Metrics:
        found: Metrics = {}
        if pushed:
            logits = jnp.concatenate([x.ravel() for x in extra["logits"].values()])
            square = jnp.mean(jnp.square(jax.nn.sigmoid(logits) - 0.5))
            found["zero_one"] = -jnp.asarray(zero_one, jnp.float32) * square
        if decays:
            logits = jnp.concatenate(list(extra["logits"].values()))
            found["decay"] = falling(ctx.step) * jnp.mean(jax.nn.logsumexp(logits, axis=-1))
        if latency is not None:
            strength = jnp.asarray(latency.strength, jnp.float32)
            took = expected(extra["logits"], latency)
            if latency.form == "sum":
                found["latency"] = strength * took
            else:
                assert loss is not None  # asked for at once
                factor = strength * jnp.log(took) ** jnp.asarray(latency.power, jnp.float32)
                found["latency"] = loss(outputs, batch) * (factor - 1)
        return found

    def report(vars, state, aux, ctx) -> Metrics:
        logits = jnp.concatenate(list(vars.extra["logits"].values()))
        p = jax.nn.softmax(logits)
        found = {"entropy": jnp.mean(-jnp.sum(p * jnp.log(p + 1e-12), -1)) / np.log(len(names))}
        if place is not None:
            found["skip"] = jnp.mean(jnp.argmax(logits, -1) == place, dtype=jnp.float32)
        return found

    return Transform(init=init, wrap=wrap, loss=terms, report=report, kind="architecture")


def expected(logits: Mapping[str, Array], latency: Latency) -> Array:
    """base + Σ p · cost, with p the softmax of the logits: float32 []."""
    took = jnp.asarray(latency.base, jnp.float32)
    for entry, own in logits.items():
        took += jnp.sum(jax.nn.softmax(own) * jnp.asarray(latency.costs[entry], jnp.float32))
    return took


def _check_read(setup: Setup, params: PyTree, logits: Mapping[str, Array]) -> None:
    """Raises unless the outputs depend on every entry."""
    batch = {**setup.batch, **logits}

    def outputs(params, model_state, batch, key):
        return setup.apply(params, model_state, batch, key, True)[0]

    args = (params, setup.model_state, batch, abstract_key())
    jaxpr = jax.make_jaxpr(outputs)(*args).jaxpr
    paths = jax.tree_util.tree_leaves_with_path(args)
    read = {v for eqn in jaxpr.eqns for v in eqn.invars if not hasattr(v, "val")}
    for entry in logits:
        which = jax.tree_util.keystr((jax.tree_util.SequenceKey(2), jax.tree_util.DictKey(entry)))
        at = [jax.tree_util.keystr(path) for path, _ in paths].index(which)
        if jaxpr.invars[at] not in read:
            raise SetupError(
                f"the model takes no notice of batch[{entry!r}], where the weights of its edges "
                f"are ([edges, operations] = {list(logits[entry].shape)}). Let it multiply each "
                "edge's operations with them, and hand it the entry: from_linen(module, "
                f"inputs=lambda batch: (batch['image'], batch[{entry!r}]))."
            )


def _wrong(edges, operations, relax, skip, order, rate, loss) -> str | None:
    if not edges or min(edges.values()) < 1 or len(operations) < 2:
        return (
            f"edges are {dict(edges)} and operations {list(operations)}; a search needs an edge or "
            "more in every entry, and two operations or more."
        )
    if len(set(operations)) < len(operations):
        return f"the operations {list(operations)} hold a name twice."
    if relax not in RELAXATIONS:
        return f"relax is {relax!r}; relaxations are {', '.join(RELAXATIONS)}."
    if skip is not None and skip not in operations:
        return f"skip is {skip!r}, none of {list(operations)}; give its name, or None."
    if order not in (1, 2):
        return f"order is {order}; it is 1 or 2."
    if order == 2 and (loss is None or rate is None):
        return (
            "order 2 looks one step of training ahead: give it the task's loss=... and rate=..., "
            "the weights' learning rate."
        )
    return None


def _wrong_latency(latency: Latency, edges, operations: int, loss) -> str | None:
    wanted = {entry: (count, operations) for entry, count in edges.items()}
    shapes = {entry: np.shape(x) for entry, x in latency.costs.items()}
    if shapes != wanted:
        return f"the latency's costs have the shapes {shapes}; they are {wanted}."
    if latency.form not in ("sum", "product"):
        return f"the latency's form is {latency.form!r}; it is 'sum' or 'product'."
    if latency.form == "product" and loss is None:
        return "a latency of the form 'product' multiplies the task's loss: give loss=..."
    given = (latency.base, *latency.costs.values())
    if latency.form == "product" and not any(is_traced(x) for x in given):
        least = float(latency.base) + sum(
            float(np.min(x, -1).sum()) for x in latency.costs.values()
        )
        if least <= 1:
            return (
                f"the cheapest network takes {least:.3g}, and log(LAT)^power needs a latency above "
                "1: give base and costs in a smaller unit."
            )
    return None
