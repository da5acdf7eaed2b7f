"""The laws that every Transform obeys, as checks: for effjax's own, and for yours.

    ej.testing.check_transform(ej.testing.Case(transform, model, batch, loss))

runs all that can be checked from outside; a broken law is an AssertionError that names it. What
needs knowledge of the transform (law 6, the gradient its docstring states; law 10, its errors) is
left to its own tests.
"""

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.export
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from effjax.core import Ctx, PyTree, Transform, chain
from effjax.model import Model
from effjax.population import Run, population
from effjax.select import leaves
from effjax.sharding import Layout, state_shardings
from effjax.step import Loss, TrainState, export, forward, init_state, make_step


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A transform on a model and a batch, and how it is trained while its laws are checked.

    transform: the transform under test; it is checked as the member "t" of a chain, or as it is
      where it is a chain.
    model, batch, loss: what it is applied to.
    tx: an optimizer with moments and weight decay, under which pruned weights would move.
    frozen: for "t", or by member name where the transform is a chain.
    steps: how many steps are run; cover what the transform does rarely.
    rules: how the params are split over a mesh axis "model", for law 8; see `Layout`.
    meshes: the shapes (data, model) of the meshes of law 8.
    """

    transform: Transform
    model: Model
    batch: PyTree
    loss: Loss
    tx: optax.GradientTransformation = dataclasses.field(
        default_factory=lambda: optax.adamw(1e-2, weight_decay=1e-2)
    )
    frozen: PyTree = None
    steps: int = 4
    rules: tuple[tuple[str, PartitionSpec], ...] = ()
    meshes: tuple[tuple[int, int], ...] = ((8, 1), (1, 8), (4, 2))

    @functools.cached_property
    def chain(self) -> Transform:
        """The transform as a chain."""
        return self.transform if self.transform.kind == "chain" else chain(t=self.transform)

    @functools.cached_property
    def inputs(self) -> PyTree:
        """The frozen inputs as that chain takes them."""
        given = self.frozen is not None and self.transform.kind != "chain"
        return {"t": self.frozen} if given else self.frozen

    def init(self, transform: Transform | None = None, **kwargs: Any) -> TrainState:
        """The state at step 0."""
        args = (self.model, transform or self.chain, self.tx, self.batch, self.inputs)
        return init_state(jax.random.key(0), *args, **kwargs)

    def step(self, transform: Transform | None = None) -> Callable[..., Any]:
        """The train step, not jitted."""
        return make_step(self.model.apply, transform or self.chain, self.loss, self.tx)

    @functools.cached_property
    def jitted(self) -> Any:
        """The train step, jitted once for all laws."""
        return jax.jit(self.step())

    @functools.cached_property
    def trajectory(self) -> list[TrainState]:
        """The states at steps 0 .. steps."""
        return self._run[0]

    @functools.cached_property
    def _run(self) -> tuple[list[TrainState], int]:
        states = [self.init()]
        with compilations("step") as compiled:
            for _ in range(self.steps):
                states.append(self.jitted(states[-1], self.batch, self.inputs)[0])
        return states, len(compiled)


@contextlib.contextmanager
def compilations(function: str) -> Iterator[list[float]]:
    """The compilations of the jitted function of this name inside the `with`, in seconds each."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        named = kwargs.get("fun_name") == f"jit({function})"
        if event == "/jax/core/compile/backend_compile_duration" and named:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def check_transform(case: Case, laws: Iterable[int] | None = None) -> None:
    """Checks a transform against the laws, by number as in docs/design.md; all by default.

    Raises:
      AssertionError: naming the law and what differs.
    """
    for number in LAWS if laws is None else laws:
        try:
            LAWS[number](case)
        except AssertionError as error:
            raise AssertionError(f"law {number} ({LAWS[number].__doc__}): {error}") from error


def _identity(case: Case) -> None:
    """chain() is the plain step, bit for bit and in compiled FLOPs."""

    def plain(state: TrainState, batch: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        key = jax.random.fold_in(state.key, state.step)

        def objective(params: PyTree) -> tuple[Array, PyTree]:
            outputs, changed = case.model.apply(params, state.model_state, batch, key, True)
            return case.loss(outputs, batch), changed

        grads, changed = jax.grad(objective, has_aux=True)(state.vars.model)
        # The optimizer's state mirrors Vars; its params are the model's.
        grads = state.vars._replace(model=grads)
        updates, opt = case.tx.update(grads, state.opt, state.vars)
        return optax.apply_updates(state.vars, updates), opt, changed

    state = case.init(chain())
    args = (state, case.batch)
    step = jax.jit(lambda s, b: case.step(chain())(s, b)[0]).lower(*args).compile()
    hand = jax.jit(plain).lower(*args).compile()
    got = step(*args)
    _equal((got.vars, got.opt, got.model_state), hand(*args), "the chain() step")
    # Without the metrics nothing may be computed that the plain step does not; the step counter is
    # one addition.
    flops, floor = (int((c.cost_analysis() or {}).get("flops", 0)) for c in (step, hand))
    assert flops <= floor + 1, f"chain() compiles to {flops} FLOPs, the plain step to {floor}"


def _associates(case: Case) -> None:
    """chain associates: the grouping of members changes nothing."""
    first, last = _decay(1e-3), _decay(1e-4)
    left = chain(chain(chain(first=first), case.chain), last=last)
    right = chain(chain(first=first), chain(case.chain, last=last))
    a, b = (_two_steps(case, grouped) for grouped in (left, right))
    _equal(a, b, "the two groupings")


def _decay(rate: float) -> Transform:
    def loss(outputs, batch, aux, extra, state, ctx):
        return {"noise": rate * jax.random.normal(ctx.key) * state["scale"]}

    def init(key, params, setup):
        return {}, {"scale": jax.random.uniform(key)}

    return Transform(init=init, loss=loss)


def _two_steps(case: Case, transform: Transform) -> tuple[TrainState, PyTree]:
    step = jax.jit(case.step(transform))
    state, _ = step(case.init(transform), case.batch, case.inputs)
    return step(state, case.batch, case.inputs)


def _stable_state(case: Case) -> None:
    """State keeps its structure, shapes, dtypes and shardings; the step compiles once."""
    first, *others = case.trajectory
    for number, state in enumerate(others, 1):
        a, b = (jax.tree.map(_description, s) for s in (first, state))
        assert a == b, f"after step {number} the state is {_difference(a, b)}"
    assert case._run[1] == 1, f"the step compiled {case._run[1]} times"


def _description(x: Array) -> str:
    weak = getattr(jax.typeof(x), "weak_type", False)
    return f"{jax.typeof(x)} weak={weak} {x.sharding}"


def _abstract_init(case: Case) -> None:
    """init works on abstract shapes; no leaf of the state is None."""
    shapes = jax.eval_shape(lambda: case.init())
    concrete = jax.eval_shape(lambda s: s, case.trajectory[0])
    assert shapes == concrete, _difference(concrete, shapes)
    nones = [
        x for x in jax.tree.leaves(case.trajectory[0], is_leaf=lambda x: x is None) if x is None
    ]
    assert not nones, f"{len(nones)} leaves of the state are None"


def _export(case: Case) -> None:
    """export computes what evaluation with view computes, bit for bit."""

    def outputs(state: TrainState, params: PyTree, transform: Transform) -> PyTree:
        ctx = Ctx(state.step, state.key, case.inputs, train=False)
        vars = state.vars._replace(model=params)
        args = (vars, state.model_state, state.transform, case.batch, ctx)
        return forward(case.model.apply, transform, *args).outputs

    seen = case.chain._replace(view=Transform().view)
    viewed = jax.jit(lambda s: outputs(s, s.vars.model, case.chain))
    exported = jax.jit(lambda s, p: outputs(s, p, seen))
    for state in case.trajectory:
        params = jax.jit(lambda s: export(case.chain, s))(state)
        _equal(exported(state, params), viewed(state), f"the outputs at step {int(state.step)}")


def _gradients(case: Case) -> None:
    """Every trained leaf gets a finite gradient, in its own dtype."""
    state = case.trajectory[0]

    def objective(vars: PyTree) -> Array:
        ctx = Ctx(state.step, state.key, case.inputs)
        args = (vars, state.model_state, state.transform, case.batch, ctx)
        out = forward(case.model.apply, case.chain, *args)
        return case.loss(out.outputs, out.batch) + out.loss

    for path, grad in leaves(jax.jit(jax.grad(objective))(state.vars)).items():
        assert np.all(np.isfinite(grad)), f"the gradient of {path} is not finite"


def _resume(case: Case) -> None:
    """A run saved at any step and restored goes on bit for bit."""
    final = case.trajectory[-1]
    for state in case.trajectory[:-1]:
        restored = jax.tree.map(_through_host, state)
        for _ in range(case.steps - int(state.step)):
            restored, _ = case.jitted(restored, case.batch, case.inputs)
        _equal(restored, final, f"the run restored at step {int(state.step)}")


def _through_host(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            jnp.asarray(np.asarray(jax.random.key_data(x))), impl=jax.random.key_impl(x)
        )
    return jnp.asarray(np.asarray(x))


def _sharded(case: Case) -> None:
    """8 devices make the same masks as one, equal numbers to rounding, and gather no weights."""
    if len(jax.devices()) < 8:
        raise AssertionError(
            "needs 8 devices; before jax starts, set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8"
        )
    one = case.trajectory
    for shape in case.meshes:
        mesh = jax.make_mesh(shape, ("data", "model"))
        layout = Layout(mesh, case.rules, batch=("data",))
        everywhere = NamedSharding(layout.mesh, PartitionSpec())
        where = f"on a mesh of {shape[0]} data x {shape[1]} model devices"
        batch = layout.put_batch(case.batch)
        frozen = jax.device_put(case.inputs, everywhere)
        state = case.init(layout=layout)
        _close(state, one[0], f"the first state {where}")
        shardings = state_shardings(state, layout)
        step = jax.jit(case.step(), out_shardings=(shardings, None))
        # The compiled step takes its own result again only if no sharding has changed.
        compiled = step.lower(state, batch, frozen).compile()
        jax.block_until_ready(compiled(compiled(state, batch, frozen)[0], batch, frozen))
        # From the same weights the masks are equal; after float arithmetic in another order the
        # weights differ by rounding, so each step starts from the one-device run's.
        for before, after in itertools.pairwise(one):
            state, _ = compiled(jax.device_put(before, shardings), batch, frozen)
            _close(state, after, f"step {int(before.step)} {where}")
        # Splitting activations may gather some of them; what matters is what the transform adds.
        added = _gathered(compiled.as_text()) - _plain_gathers(case.model, case.loss, layout, batch)
        weights = {
            tuple(sorted(x.shape))
            for path, x in leaves(state.vars.model).items()
            if layout.spec(path, x.shape) != PartitionSpec()
        }
        assert not added & weights, f"all-gathers of weights of shapes {added & weights} {where}"


def _plain_gathers(model: Model, loss: Loss, layout: Layout, batch: PyTree) -> set[tuple[int, ...]]:
    """What gradients of the plain model gather on this layout."""
    state = init_state(jax.random.key(0), model, chain(), optax.sgd(0.1), batch, layout=layout)
    step = make_step(model.apply, chain(), loss, optax.sgd(0.1))
    jitted = jax.jit(step, out_shardings=(state_shardings(state, layout), None))
    return _gathered(jitted.lower(state, batch).compile().as_text())


def _gathered(text: str | None) -> set[tuple[int, ...]]:
    """The shapes, sorted, of the results of all-gathers in a compiled program."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather", text or "")
    return {tuple(sorted(int(n) for n in shape.split(",") if n)) for shape in shapes}


def _population(case: Case) -> None:
    """A population of K runs equals K runs: bit for bit when mapped, to rounding under vmap."""
    keys = jax.random.split(jax.random.key(3), 2)

    def init(key: Array, batch: PyTree, frozen: PyTree) -> TrainState:
        return init_state(key, case.model, case.chain, case.tx, batch, frozen)

    singles = []
    for key in keys:
        state = init(key, case.batch, case.inputs)
        singles.append(case.jitted(state, case.batch, case.inputs)[0])
    modes: dict[Any, Any] = {"map": _equal, "vmap": _close}
    for mode, compare in modes.items():
        runs = population(lambda seed: Run(init, case.step()), {"seed": [0, 1]}, mode=mode)
        states = runs.init(keys, case.batch, case.inputs)
        states, _ = runs.step(states, case.batch, case.inputs)
        for i, single in enumerate(singles):
            compare(runs.member(states, i), single, f"run {i} of the population, {mode}")


def _lowers(case: Case) -> None:
    """The step lowers for cpu, cuda and tpu."""
    state = case.trajectory[0]
    args = jax.tree.map(jnp.asarray, (state, case.batch, case.inputs))
    shapes = jax.eval_shape(lambda *a: a, *args)
    exported = jax.export.export(jax.jit(case.step()), platforms=["cpu", "cuda", "tpu"])(*shapes)
    assert exported.platforms == ("cpu", "cuda", "tpu")


def _zeros(case: Case) -> None:
    """Pruned weights are zero and stay zero: the weights, what is shipped, and the moments."""
    for state in case.trajectory[1:]:
        zeros = {p: np.asarray(x) == 0 for p, x in leaves(state.vars.model).items()}
        for path, x in leaves(export(case.chain, state)).items():
            assert np.all(np.asarray(x)[zeros[path]] == 0), (
                f"zeros of {path} are not shipped as zeros"
            )
    for name, member in case.chain.members:
        # Learned sparsity has thresholds or gates, and no masks that are carried.
        learned = member.kind == "mask" and "mask" not in case.trajectory[0].transform[name]
        if member.kind in ("prune", "mask") and not learned:
            _masked_stay_zero(case, name, alive=member.kind == "mask")


def _masked_stay_zero(case: Case, name: str, alive: bool) -> None:
    """Of a "mask" only what is shipped is zero; the weights behind it live on."""
    pruned = 0
    for state in case.trajectory[1:]:
        model = leaves(export(case.chain, state) if alive else state.vars.model)
        for path, mask in state.transform[name].get("mask", {}).items():
            off = ~np.asarray(mask)
            pruned += int(off.sum())
            step = int(state.step)
            assert not np.any(np.asarray(model[path])[off]), (
                f"{path} has pruned weights at step {step}"
            )
            if alive:
                continue
            for where, moment in leaves(state.opt).items():
                if where.endswith(f"model/{path}") and np.shape(moment) == off.shape:
                    assert not np.any(np.asarray(moment)[off]), f"{where} moves pruned weights"
    assert pruned, f"{name!r} pruned nothing in {case.steps} steps, so this law was not tested"


def _leaf_pairs(
    got: PyTree, want: PyTree, what: str
) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
    a, b = leaves(got), leaves(want)
    assert list(a) == list(b), f"{what}: the trees differ, {sorted(set(a) ^ set(b))}"
    for path in a:
        x, y = (
            np.asarray(jax.random.key_data(v))
            if jnp.issubdtype(v.dtype, jax.dtypes.prng_key)
            else np.asarray(v)
            for v in (a[path], b[path])
        )
        yield path, x, y


def _equal(got: PyTree, want: PyTree, what: str) -> None:
    for path, x, y in _leaf_pairs(got, want, what):
        assert np.array_equal(x, y), f"{what}: {path} differs by {np.max(np.abs(x - y))}"


def _close(got: PyTree, want: PyTree, what: str) -> None:
    for path, x, y in _leaf_pairs(got, want, what):
        if x.dtype.kind in "fV":
            scale = np.max(np.abs(y), initial=1e-3)
            error = np.max(np.abs(x - y), initial=0.0) / scale
            assert error < 2e-4, f"{what}: {path} differs by {error:.1e} of its largest entry"
        else:
            assert np.array_equal(x, y), f"{what}: {path} ({x.dtype}) differs"


def _difference(a: PyTree, b: PyTree) -> str:
    x, y = leaves(a), leaves(b)
    changed = [f"{k}: {x.get(k)} became {y.get(k)}" for k in {**x, **y} if x.get(k) != y.get(k)]
    return "; ".join(changed[:3]) or "of another structure"


LAWS: dict[int, Callable[[Case], None]] = {
    1: _identity,
    2: _associates,
    3: _stable_state,
    4: _abstract_init,
    5: _export,
    6: _gradients,
    7: _resume,
    8: _sharded,
    9: _population,
    12: _lowers,
    13: _zeros,
}
