"""Integer execution: a model trained with `qat` as a program on integers.

At each quantized site both operands are integer codes, their products are summed in int32, and the
sums are scaled once. The weights are stored as codes and scales, and are arguments of the program.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, PyTree, Transform
from effjax.errors import SetupError
from effjax.interpret import Handler, Operation, intercept
from effjax.quantize import kernels, numerics
from effjax.quantize.execution import Entry, check_selected, entry_of, state_of
from effjax.quantize.stored import check_grids, codes_of, store
from effjax.select import leaves
from effjax.sites import Analysis, Site, analyze
from effjax.step import TrainState, abstract, export
from effjax.taint import DATA, NEUTRAL, Flow, Taint


class Integer(NamedTuple):
    """A model in integers.

    apply: `(weights, model_state, batch, key, train) -> (outputs, model_state)`, not for training.
    weights: {"codes": {site: integers; of a matrix, in a program for CPU, transposed}, "scales":
      {site: float32}, "inputs": {name: float32, the scales of static activations}, "params": {path:
      leaves that stay in floating point}}.
    runs: {site: how}. "integer"; "float": both operands are rounded, and multiplied as floats;
      "weights": the weights alone are rounded; "inputs": the activations alone; "table": the rows
      of an embedding.
    """

    apply: Apply
    weights: dict[str, dict[str, Array]]
    runs: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, scales included."""
        return sum(x.nbytes for x in jax.tree.leaves(self.weights))


def integer(
    apply: Apply,
    transform: Transform,
    state: TrainState,
    batch: PyTree,
    *,
    select: str | None = None,
    grouped: Literal["auto", "integer", "float"] = "auto",
    backend: str | None = None,
) -> Integer:
    """The trained model as an integer program.

    A site of `qat` with weights w ≈ s_w · w' and activations x ≈ s_x · x', w' and x' integers, is

        y = (s_x · s_w) · sum_k x'_k w'_k

    with the sum in int32, where it is exact, and one scale for each output channel. Biases,
    normalization and activation functions follow in floating point, and XLA fuses them with the
    scaling, and with the rounding of the next site's input to int8.

    The result is what evaluation under `qat` computes, but for the rounding of that evaluation:
    it adds K products of floats, so that, for equal inputs of the site,

        |y - y_qat| <= (K + 5) · 2^-24 · sum_k |s_x x'_k| |s_w w'_k|.

    Where that is less than the step of the grid that y is rounded to next, the two integers differ
    by one at most, and only where y lies at a tie. In bfloat16 models both are rounded to bfloat16.

    Args:
      apply: the model's, as in training.
      transform: the one trained with, with one `qat` in it; masks and the like are applied.
      state: of the training run; its step, optimizer and key are not used.
      batch: an example; shapes will do.
      select: regular expression over site paths; a site it matches that would not be multiplied in
        integers is an error.
      grouped: grouped convolutions. "auto" multiplies them in integers except, on CPU, those
        with more than one channel in a group, which XLA runs slower than floats.
      backend: "cpu", "gpu" or "tpu": what the program is written for; by default the one there is.

    Raises:
      SetupError: no `qat` or several; trained steps, or grids other than qat's symmetric ones;
        static ranges that were never calibrated; bits outside 2..8; sums that may exceed int32; a
        selected site that stays in floating point.
      SelectorError: `select` matches no site.
      SiteError: a site in a branch that does not run for the batch, or inside a `shard_map`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import effjax as ej
      >>> def apply(params, model_state, batch, key, train):
      ...     return batch["x"] @ params["kernel"], model_state
      >>> model = ej.Model(lambda key, batch: ({"kernel": jnp.eye(64)}, {}), apply)
      >>> batch = {"x": jnp.ones((8, 64))}
      >>> from effjax.quantize.integer import integer
      >>> qat = ej.quantize.qat(weights=8, activations=8)
      >>> state = ej.init_state(jax.random.key(0), model, qat, optax.sgd(0.1), batch)
      >>> small = integer(apply, qat, state, batch)
      >>> small.runs, small.nbytes  # 64 x 64 int8 and 64 scales
      ({'kernel': 'integer'}, 4352)
      >>> outputs, _ = jax.jit(small.apply, static_argnums=4)(small.weights, {}, batch, None, False)
      >>> bool(jnp.allclose(outputs, 1.0))
      True

    Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, https://arxiv.org/abs/1712.05877.
    """
    if grouped not in ("auto", "integer", "float"):
        raise SetupError(f"grouped is {grouped!r}; it is 'auto', 'integer' or 'float'.")
    cpu = (backend or jax.default_backend()) == "cpu"
    own = state_of(transform, state)
    params, model_state = export(transform, state), state.model_state
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if _is_abstract(x) else x, batch)
    analysis, stays = _analyze(apply, params, model_state, batch)
    facts = transform.describe(state.vars.model, state.vars.extra, state.transform)
    # The branches of a cond share a weight's codes.
    kept = {site.path for site in analysis.sites if not kernels.turns(site)}
    entries = {
        site.path: entry_of(site, own, facts, grouped, cpu, cpu and site.path not in kept)
        for site in analysis.sites
        if site.path in own["scales"] or site.path in own["tables"]
    }
    check_selected(entries, select, analysis)
    stored = store(apply, entries, analysis, params, model_state, batch)
    weights: dict[str, dict[str, Array]] = {
        "codes": {path: found["codes"] for path, found in stored.items()},
        "scales": {path: found["scale"] for path, found in stored.items()},
        "inputs": {},
        "params": {},
    }
    if "ranges" in own:
        for entry in entries.values():
            for name in entry.names.values():
                grid = numerics.grid(entry.act_bits or numerics.WIDEST)
                weights["inputs"][name] = numerics.scale_of(own["ranges"][name], grid)
    check_grids(apply, transform, state, entries, stored, weights["inputs"], batch)
    rounded = {p for site in analysis.sites if site.path in stored for p in site.leaves}
    met = {p for site in analysis.sites if site.path not in stored for p in site.leaves}
    gone = {p for p in rounded - met - stays if not analysis.met[p]}
    named = leaves(params)
    weights["params"] = {p: jnp.asarray(x) for p, x in named.items() if p not in gone}
    template = abstract(params)

    def run(weights, model_state, batch, key, train):
        if train:
            raise SetupError(
                "an integer model is asked to train; it has no weights that could. Train the "
                "model it came from, and make it integer again."
            )
        # What stands for the weights is read by nothing: XLA drops it.
        floats = {p: weights["params"].get(p) for p in named}
        shapes = leaves(template)
        filled = [
            jnp.zeros(shapes[p].shape, shapes[p].dtype) if x is None else x
            for p, x in floats.items()
        ]
        given: dict[str, dict[str, Any]] = {}
        for path, entry in entries.items():
            mine = {kind: weights[kind][path] for kind in ("codes", "scales") if path in stored}
            inputs = {n: weights["inputs"][n] for n in entry.names.values() if "ranges" in own}
            given[path] = {**mine, "inputs": inputs}

        def closed(params, model_state, batch, key):
            return apply(params, model_state, batch, key, False)

        def choose(site: Site) -> Handler | None:
            entry = entries.get(site.path)
            return None if entry is None else lambda op: (_at(op, entry, cpu), {})

        key = jax.random.key(0) if key is None else key
        evaluate = intercept(closed, choose, given=given)
        params = jax.tree.unflatten(jax.tree.structure(template), filled)
        return evaluate(params, model_state, batch, key)[0]

    return Integer(run, weights, {path: entry.run for path, entry in entries.items()})


def _at(op: Operation, entry: Entry, cpu: bool) -> Array:
    """The operation at a site, on codes where it runs in integers."""
    site, operands = op.site, list(op.operands)
    scales: list[Array] = [jnp.ones(())] * 2
    if entry.weight_bits is not None and site.weight is not None:
        codes, scale = codes_of(op, entry), op.given["scales"]
        if entry.run == "integer":
            operands[site.weight], scales[site.weight] = codes, scale
        else:
            dtype = operands[site.weight].dtype
            operands[site.weight] = (codes.astype(scale.dtype) * scale).astype(dtype)
    grid = numerics.grid(entry.act_bits or numerics.WIDEST)
    for i, name in entry.names.items():
        x = operands[i]
        if op.given["inputs"]:
            scale = op.given["inputs"][name].reshape((1,) * x.ndim)
        else:
            scale = numerics.scale_of(numerics.absmax(x), grid)
        if entry.run == "integer":
            operands[i] = numerics.round_to(x, scale, grid).astype(jnp.int8)
            scales[i] = scale
        else:
            operands[i] = numerics.fake_quant(x, scale, grid)
    if entry.run != "integer":
        return op.run(*operands)
    return kernels.scaled(op.run, site, operands, scales, cpu=cpu, turned=entry.turned)


def _analyze(
    apply: Apply, params: PyTree, model_state: PyTree, batch: PyTree
) -> tuple[Analysis, set[str]]:
    """The analysis of a model in evaluation, and the leaves that it returns."""

    def traced(params, model_state, batch, key):
        return apply(params, model_state, batch, key, False)

    jaxpr = jax.make_jaxpr(traced)(params, model_state, batch, jax.random.key(0)).jaxpr
    names = list(leaves(params))
    inputs = [Taint(leaves=frozenset([i])) for i in range(len(names))]
    inputs += [NEUTRAL] * len(jax.tree.leaves(model_state))
    inputs += [DATA] * len(jax.tree.leaves(batch))
    inputs += [NEUTRAL] * (len(jaxpr.invars) - len(inputs))
    outputs = Flow().outputs(jaxpr, inputs, 0)
    returned = {names[i] for taint in outputs for i in taint.leaves}
    return analyze(jaxpr, params, model_state, batch), returned


def _is_abstract(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)
