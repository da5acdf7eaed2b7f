"""Calibration: static activation ranges from a few batches of data, without training."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import Apply, Ctx, PyTree, Transform
from effjax.errors import SetupError
from effjax.interpret import Operation, intercept
from effjax.quantize.estimators import ESTIMATORS, Estimator, Levels, Seen
from effjax.sites import Site
from effjax.step import TrainState, forward

BINS = 2048


def calibrate(
    apply: Apply,
    transform: Transform,
    state: TrainState,
    batches: Iterable[PyTree],
    estimator: str | Estimator = "mse",
) -> TrainState:
    """Sets the ranges of a `qat(ranges="static")` from data, without training.

    The model is evaluated as the transform shows it, masks and rounded weights included, with its
    activations in floating point. Two passes over the batches see each site's input: its ends, and
    a histogram of 2048 bins between them. Weights, and all other state, stay as they are; ranges
    from before are forgotten.

    Args:
      apply: the model's.
      transform: with one `qat(ranges="static")` in it, or several.
      state: as `init_state` made it, or trained.
      batches: of a calibration split: neither test data nor what a model is chosen by. Gone through
        twice, so give a list.
      estimator: "minmax", "moving average", "percentile", "mse" or "entropy"; or one of the
        functions of `quantize.estimators`.

    Returns:
      The state with ranges, which evaluation, `quantize.integer` and further training use.

    Raises:
      SetupError: no batches; an activation that is not finite, or that no batch reaches; an unknown
        estimator; a transform without static ranges.

    Reference: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference",
    2018, https://arxiv.org/abs/1806.08342; see `estimators` for theirs.
    """
    if isinstance(estimator, str) and estimator not in ESTIMATORS:
        raise SetupError(f"estimator={estimator!r}; there are {list(ESTIMATORS)}.")
    estimate = ESTIMATORS[estimator] if isinstance(estimator, str) else estimator
    batches = list(batches)
    if not batches:
        raise SetupError(
            "calibrate() got no batches: activation ranges come from data. Give some hundred "
            "examples of a calibration split, in a list of batches."
        )
    slots = _static(state.transform)
    if not slots:
        raise SetupError(
            "calibrate() found no static ranges in the state: only qat(ranges='static') has some. "
            "Dynamic ranges are those of the batch at hand and need no calibration."
        )
    state = state._replace(transform=_each(state.transform, _forgotten))
    levels = _levels(transform, state)
    ends, histogram = _observers(apply, transform, {n: own.symmetric for n, own in levels.items()})
    found = [jax.device_get(ends(state, batch)) for batch in batches]
    lows, highs = ({n: np.stack([f[n][i] for f in found]) for n in found[0]} for i in (0, 1))
    _check(lows, highs, levels)
    outer = {n: (lows[n].min(0), highs[n].max(0)) for n in lows}
    counts: dict[str, Any] = dict.fromkeys(outer, 0.0)
    for batch in batches:
        for n, x in jax.device_get(histogram(state, batch, outer)).items():
            counts[n] = counts[n] + x.astype(np.float64)

    def ranges(name: str) -> tuple[np.ndarray, np.ndarray]:
        shape = outer[name][0].shape
        places = list(np.ndindex(shape))
        pairs = [
            estimate(
                Seen(
                    lows[name][(slice(None), *p)].astype(np.float64),
                    highs[name][(slice(None), *p)].astype(np.float64),
                    counts[name][p],
                ),
                levels[name],
            )
            for p in places
        ]
        own = np.asarray(pairs, np.float32).reshape(*shape, 2)
        return own[..., 0], own[..., 1]

    chosen = {name: ranges(name) for name in outer}

    def calibrated(own: Mapping[str, Any]) -> dict[str, Any]:
        after = dict(own)
        after["ranges"] = {n: jnp.asarray(chosen[n][1]) for n in own["ranges"]}
        if "lows" in own:
            after["lows"] = {n: jnp.asarray(-chosen[n][0]) for n in own["lows"]}
        after["count"] = {n: jnp.full_like(x, len(batches)) for n, x in own["count"].items()}
        return after

    return state._replace(transform=_each(state.transform, calibrated))


def _static(state: PyTree) -> list[Mapping[str, Any]]:
    """The states of all `qat` with static ranges."""
    if not isinstance(state, Mapping):
        return []
    if "ranges" in state and "count" in state:
        return [state]
    return [own for value in state.values() for own in _static(value)]


def _each(state: PyTree, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> PyTree:
    if not isinstance(state, Mapping):
        return state
    if "ranges" in state and "count" in state:
        return change(state)
    return {name: _each(value, change) for name, value in state.items()}


def _forgotten(own: Mapping[str, Any]) -> dict[str, Any]:
    return {**own, "count": jax.tree.map(jnp.zeros_like, own["count"])}


def _levels(transform: Transform, state: TrainState) -> dict[str, Levels]:
    """The grid of each activation, by name."""
    known = _each(
        state.transform, lambda own: {**own, "count": jax.tree.map(np.ones_like, own["count"])}
    )
    facts = transform.describe(state.vars.model, state.vars.extra, known)
    found = {}
    for own in _static(state.transform):
        for name in own["ranges"]:
            path = name.removesuffix("/lhs").removesuffix("/rhs")
            fact = facts.get("@" + path) or facts[path]
            found[name] = Levels(int(fact["act_bits"]), "lows" not in own)
    return found


def _observers(
    apply: Apply, transform: Transform, symmetric: Mapping[str, bool]
) -> tuple[Callable[..., dict[str, Any]], Callable[..., dict[str, Array]]]:
    """`(state, batch) -> {name: (low, high)}` and `(state, batch, outer) -> {name: counts}`."""

    def inputs(site: Site) -> dict[int, str]:
        if site.weight is None:
            names = {0: f"{site.path}/lhs", 1: f"{site.path}/rhs"}
        else:
            names = {1 - site.weight: site.path}
        return {i: name for i, name in names.items() if name in symmetric}

    def observed(measure: Callable[[str, Array, PyTree], Any], merge: Any) -> Callable[..., Any]:
        @jax.jit
        def run(state: TrainState, batch: PyTree, outer: PyTree) -> dict[str, Any]:
            def handler(op: Operation) -> tuple[Array, PyTree]:
                own = {}
                for i, name in inputs(op.site).items():
                    own[name] = measure(name, op.operands[i].astype(jnp.float32), op.given)
                return op.run(*op.operands), own

            given: dict[str, dict[str, Any]] = {}
            for name, bounds in outer.items():
                path = name.removesuffix("/lhs").removesuffix("/rhs")
                given.setdefault(path, {})[name] = bounds

            def seeing(params, model_state, batch, key, train):
                def closed(params, model_state, batch, key):
                    return apply(params, model_state, batch, key, train)

                look = intercept(
                    closed, lambda site: handler if inputs(site) else None, given=given, merge=merge
                )
                (outputs, model_state), seen = look(params, model_state, batch, key)
                return (outputs, seen), model_state

            ctx = Ctx(state.step, state.key, None, train=False)
            out = forward(
                seeing, transform, state.vars, state.model_state, state.transform, batch, ctx
            )
            return {name: value for own in out.outputs[1].values() for name, value in own.items()}

        return run

    def two_ends(name: str, x: Array, given: PyTree) -> Any:
        # Maxima both, so that loops and shards join them.
        return jnp.max(-x, initial=0), jnp.max(x, initial=0)

    def counted(name: str, x: Array, given: PyTree) -> Array:
        low, high = given[name]
        if symmetric[name]:
            x, low, high = jnp.abs(x), jnp.zeros_like(low), jnp.maximum(high, -low)
        width = jnp.maximum(high - low, jnp.finfo(jnp.float32).tiny)
        place = jnp.clip((x - low) / width * BINS, 0, BINS - 1).astype(jnp.int32)
        return jnp.zeros(BINS, jnp.int32).at[place.ravel()].add(1)

    look, count = observed(two_ends, jnp.maximum), observed(counted, jnp.add)

    def ends(state: TrainState, batch: PyTree) -> dict[str, Any]:
        return {n: (-low, high) for n, (low, high) in look(state, batch, {}).items()}

    return ends, count


def _check(lows: Mapping[str, Any], highs: Mapping[str, Any], levels: Mapping[str, Levels]) -> None:
    for name in levels:
        if name not in lows:
            raise SetupError(
                f"no batch reaches {name!r} in evaluation, which training has; there is nothing to "
                "take its range from."
            )
        if not (np.isfinite(lows[name]).all() and np.isfinite(highs[name]).all()):
            raise SetupError(
                f"the input of {name!r} is not finite on the calibration batches. Look for NaN in "
                "the data, or for a model that diverged."
            )
        if not ((highs[name] - lows[name]).max(0) > 0).all():
            raise SetupError(
                f"the input of {name!r} is 0 for all calibration batches, so it has no range. Give "
                "more batches, or leave the layer out with `select`."
            )
