"""Magnitude pruning in a train step: counts, schedules, gradients, optimizers, errors, devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec

import effjax as ej
import effjax.prune.gradual as gradual
from effjax.core import Ctx, Vars
from effjax.errors import ScheduleError, SelectorError, SetupError
from effjax.prune.patterns import n_m
from effjax.select import KERNELS, leaves

RNG = np.random.default_rng(0)
BATCH = {"x": RNG.normal(size=(16, 12)).astype(np.float32), "y": RNG.integers(0, 6, 16)}


def init(key, batch):
    a, b = jax.random.split(key)
    layers = {"kernel": jax.random.normal(a, (12, 20)), "bias": jnp.zeros(20)}
    return {"body": layers, "head": {"kernel": jax.random.normal(b, (20, 6))}}, {}


def apply(params, model_state, batch, key, train):
    hidden = jnp.tanh(batch["x"] @ params["body"]["kernel"] + params["body"]["bias"])
    return hidden @ params["head"]["kernel"], model_state


MODEL = ej.Model(init, apply)
SIZES = {"body/kernel": 240, "head/kernel": 120}


def magnitude(*args, select=KERNELS, **kwargs):
    return gradual.magnitude(*args, select=select, **kwargs)


def loss(outputs, batch):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"]).mean()


def start(prune, tx=None, model=MODEL, **kwargs):
    transform = ej.chain(prune=prune)
    tx = tx or optax.adam(0.05)
    state = ej.init_state(jax.random.key(0), model, transform, tx, BATCH, **kwargs)
    return jax.jit(ej.make_step(model.apply, transform, loss, tx)), state


def zeros(tree):
    return {path: int(np.sum(np.asarray(leaves(tree)[path]) == 0)) for path in SIZES}


def expected(sparsity, size):
    return int(np.round(np.float32(sparsity) * np.float32(size)))


# What is pruned, and when.


@pytest.mark.parametrize("budget", ["uniform", "global"])
@pytest.mark.parametrize("initial", [0.0, 0.3])
def test_every_step_has_exactly_the_zeros_of_the_cubic_schedule(budget, initial):
    step, state = start(magnitude(0.9, 2, 11, 3, initial=initial, budget=budget))
    done = 0.0
    for t in range(14):
        state, metrics = step(state, BATCH)
        progress = min(max((t - 2) / 9, 0.0), 1.0)
        target = 0.0 if t < 2 else 0.9 + (initial - 0.9) * (1 - progress) ** 3
        assert float(metrics["prune/target"]) == pytest.approx(target, abs=1e-6)
        if t in (2, 5, 8, 11):
            done = target
        found = zeros(state.vars.model)
        masked = {p: int(jnp.sum(~m)) for p, m in state.transform["prune"]["mask"].items()}
        assert found == masked
        if budget == "uniform":
            assert found == {path: expected(done, size) for path, size in SIZES.items()}
        assert sum(found.values()) == (
            expected(done, 360) if budget == "global" else sum(found.values())
        )
        assert float(metrics["prune/sparsity"]) == pytest.approx(sum(found.values()) / 360)
        sparsest = max(found[path] / size for path, size in SIZES.items())
        assert float(metrics["prune/sparsest"]) == pytest.approx(sparsest)
    assert step._cache_size() <= 1  # jax may drop entries, in a long process
    assert sum(zeros(state.vars.model).values()) == 324


def test_the_smallest_weights_as_the_optimizer_left_them_are_pruned():
    tx = optax.adam(0.05)
    plain, dense = start(magnitude(0.5, begin=10), tx)
    dense, _ = plain(dense, BATCH)  # nothing happens before `begin`
    for budget in ("uniform", "global"):
        step, state = start(magnitude(0.5, budget=budget), tx)
        state, _ = step(state, BATCH)
        weights = {p: np.asarray(leaves(dense.vars.model)[p]) for p in SIZES}
        every = np.concatenate([np.abs(w).ravel() for w in weights.values()])
        for path, w in weights.items():
            ranked = np.sort(np.abs(w).ravel() if budget == "uniform" else every)
            mask = np.abs(w) >= ranked[ranked.size // 2]
            np.testing.assert_array_equal(state.transform["prune"]["mask"][path], mask)
            np.testing.assert_array_equal(leaves(state.vars.model)[path], np.where(mask, w, 0))


def test_a_plain_number_prunes_once():
    step, state = start(magnitude(0.75, begin=1))
    state, metrics = step(state, BATCH)
    assert sum(zeros(state.vars.model).values()) == 0
    assert float(metrics["prune/target"]) == 0.0
    state, metrics = step(state, BATCH)
    assert zeros(state.vars.model) == {"body/kernel": 180, "head/kernel": 90}
    assert float(metrics["prune/target"]) == 0.75
    mask = state.transform["prune"]["mask"]
    for _ in range(3):
        state, _ = step(state, BATCH)
    jax.tree.map(np.testing.assert_array_equal, mask, state.transform["prune"]["mask"])


def test_a_schedule_is_followed_for_ever_and_weights_come_back_at_zero():
    levels = jnp.array([0.5, 0.75, 0.25])
    step, state = start(magnitude(lambda t: levels[t % 3], every=2))
    for t in range(6):
        before = state.transform["prune"]["mask"]
        state, _ = step(state, BATCH)
        level = [0.5, 0.5, 0.25, 0.25, 0.75, 0.75][t]
        mask = state.transform["prune"]["mask"]
        assert {p: int(jnp.sum(~m)) for p, m in mask.items()} == {
            p: expected(level, size) for p, size in SIZES.items()
        }
        if t == 2:
            returned = mask["body/kernel"] & ~before["body/kernel"]
            assert int(jnp.sum(returned)) == 60
            assert float(jnp.max(jnp.abs(state.vars.model["body"]["kernel"][returned]))) == 0.0


def test_a_selector_chooses_what_is_pruned():
    step, state = start(magnitude(0.5, select="^body/"))
    assert list(state.transform["prune"]["mask"]) == ["body/bias", "body/kernel"]
    state, _ = step(state, BATCH)
    assert int(jnp.sum(state.vars.model["body"]["bias"] == 0)) == 10
    assert zeros(state.vars.model) == {"body/kernel": 120, "head/kernel": 0}


def test_a_global_threshold_leaves_every_layer_a_weight_and_says_how_sparse_it_is():
    params, _ = init(jax.random.key(0), BATCH)
    params["head"]["kernel"] *= 1e-3
    step, state = start(magnitude(0.5, budget="global"), optax.sgd(0.0), params=params)
    state, metrics = step(state, BATCH)
    assert zeros(state.vars.model) == {"body/kernel": 61, "head/kernel": 119}
    assert float(metrics["prune/sparsest"]) == pytest.approx(119 / 120)


# Gradients, views, exports.


def test_the_gradient_of_the_view_is_that_of_kept_weights_and_exactly_zero_for_pruned_ones():
    prune = magnitude(0.5)
    params, _ = init(jax.random.key(0), BATCH)
    mask = {"body/kernel": jnp.asarray(RNG.random((12, 20)) < 0.5)}
    mask["head/kernel"] = jnp.ones((20, 6), bool)
    ctx = Ctx(jnp.int32(0), jax.random.key(0))

    def objective(params, through):
        return loss(apply(through(params), {}, BATCH, None, True)[0], BATCH)

    grads = jax.grad(objective)(params, lambda p: prune.view(p, {}, {"mask": mask}, ctx))
    pruned = {**params, "body": {**params["body"]}}
    pruned["body"]["kernel"] = jnp.where(mask["body/kernel"], params["body"]["kernel"], 0)
    dense = jax.grad(objective)(pruned, lambda p: p)
    wanted = np.where(mask["body/kernel"], dense["body"]["kernel"], 0)
    np.testing.assert_array_equal(grads["body"]["kernel"], wanted)
    np.testing.assert_array_equal(grads["head"]["kernel"], dense["head"]["kernel"])
    np.testing.assert_array_equal(grads["body"]["bias"], dense["body"]["bias"])
    assert np.any(np.asarray(dense["body"]["kernel"])[~np.asarray(mask["body/kernel"])] != 0)


def test_export_is_the_view_bit_for_bit_and_describe_gives_the_sparsity():
    step, state = start(magnitude(0.9, 0, 2))
    for _ in range(3):
        state, _ = step(state, BATCH)
    prune = magnitude(0.9, 0, 2)
    own = state.transform["prune"]
    view = prune.view(state.vars.model, {}, own, Ctx(state.step, state.key, train=False))
    jax.tree.map(np.testing.assert_array_equal, view, prune.export(state.vars.model, {}, own))
    facts = prune.describe(state.vars.model, {}, own)
    assert facts == {path: {"sparsity": 0.9} for path in SIZES}


# Pruned weights are zero and stay zero.

DECAYED = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True))
OPTIMIZERS = {
    "adam": optax.adam(0.05),
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov and decay": DECAYED,
    "lion": optax.lion(0.01),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.05)),
    "rmsprop": optax.rmsprop(0.01, momentum=0.9, centered=True),
    "average": optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "bfloat16 moments": optax.adam(0.05, mu_dtype=jnp.bfloat16),
    "accumulated": optax.MultiSteps(optax.adam(0.05), 2),
}


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_pruned_weights_and_their_moments_stay_zero_in_every_optimizer(tx):
    step, state = start(magnitude(0.8, 1, 4, 3), tx)
    owned = 0
    before = None
    for t in range(8):
        state, _ = step(state, BATCH)
        mask = state.transform["prune"]["mask"]
        if before is not None:
            for path in SIZES:  # a rising sparsity never brings a weight back
                assert not np.any(np.asarray(mask[path]) & ~np.asarray(before[path]))
        before = mask
        belongs = ej.select.owners(state.opt, state.vars.model)
        for name, path in belongs.items():
            if path in mask:
                owned += 1
                moment = np.asarray(leaves(state.opt)[name], np.float32)
                np.testing.assert_array_equal(moment[~np.asarray(mask[path])], 0.0, err_msg=name)
        for path in SIZES:
            weights = np.asarray(leaves(state.vars.model)[path])
            np.testing.assert_array_equal(weights[~np.asarray(mask[path])], 0.0)
        if t >= 4:
            assert {p: int(jnp.sum(~m)) for p, m in mask.items()} == {
                "body/kernel": 192,
                "head/kernel": 96,
            }
    assert owned > 0


@pytest.mark.parametrize(
    "tx",
    [optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)), optax.contrib.muon(0.05)],
    ids=["noise", "muon"],
)
def test_weights_stay_zero_even_where_the_optimizer_moves_all_of_them(tx):
    step, state = start(magnitude(0.5), tx)
    for _ in range(4):
        state, _ = step(state, BATCH)
        for path, mask in state.transform["prune"]["mask"].items():
            weights = np.asarray(leaves(state.vars.model)[path])
            np.testing.assert_array_equal(weights[~np.asarray(mask)], 0.0)
            assert int(np.sum(weights == 0)) == SIZES[path] // 2


def test_an_average_of_the_weights_has_the_zeros_of_the_weights():
    # What a training loop or `optax.ema` keeps beside the optimizer, in an optimizer's state.
    def average(decay):
        def update(updates, state, params):
            after = optax.apply_updates(params, updates)
            mixed = jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, state, after)
            return updates, mixed

        return optax.GradientTransformation(lambda params: jax.tree.map(jnp.copy, params), update)

    step, state = start(magnitude(0.8, 1, 4, 3), optax.chain(optax.adam(0.05), average(0.9)))
    for _ in range(7):
        state, _ = step(state, BATCH)
        mask = state.transform["prune"]["mask"]["body/kernel"]
        averaged = np.asarray(state.opt[1].model["body"]["kernel"])
        np.testing.assert_array_equal(averaged[~np.asarray(mask)], 0.0)
    assert np.all(averaged[np.asarray(mask)] != 0)


def test_a_run_that_goes_on_from_a_copy_of_its_state_is_the_run_that_did_not_stop():
    step, state = start(magnitude(0.8, 0, 6, 2))
    for t in range(8):
        if t == 3:
            copy = jax.tree.map(lambda x: jnp.array(x, copy=True), state)
        state, _ = step(state, BATCH)
    again, _ = start(magnitude(0.8, 0, 6, 2))
    for _ in range(5):
        copy, _ = again(copy, BATCH)
    state, copy = (s._replace(key=jax.random.key_data(s.key)) for s in (state, copy))
    jax.tree.map(np.testing.assert_array_equal, state, copy)


# Models, populations, devices.


class Linen(nn.Module):
    """Two layers; the paths of `MODEL` with biases."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="head")(jnp.tanh(nn.Dense(20, name="body")(x)))


class NNX(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.body, self.head = nnx.Linear(12, 20, rngs=rngs), nnx.Linear(20, 6, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.body(x)))


def test_linen_and_nnx_get_the_same_masks():
    linen, net = ej.from_linen(Linen(), "x"), ej.from_nnx(NNX, "x")
    params, _ = linen.init(jax.random.key(3), BATCH)
    masks = []
    for model in (linen, net):
        step, state = start(magnitude(0.8, 0, 4, 2), model=model, params=params)
        for _ in range(6):
            state, _ = step(state, BATCH)
        assert zeros(state.vars.model) == {"body/kernel": 192, "head/kernel": 96}
        masks.append(state.transform["prune"]["mask"])
    jax.tree.map(np.testing.assert_array_equal, *masks)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_pruned_exactly_too(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), init(jax.random.key(0), BATCH)[0])
    step, state = start(magnitude(0.8), optax.sgd(0.0), params=params)
    state, _ = step(state, BATCH)
    assert zeros(state.vars.model) == {"body/kernel": 192, "head/kernel": 96}
    assert state.vars.model["head"]["kernel"].dtype == dtype


def test_a_population_with_traced_sparsities_is_the_single_runs_and_moves_masks_rarely():
    sparsities = jnp.array([0.0, 0.5, 0.8])
    tx = optax.adam(0.05)

    def one(sparsity):
        transform = ej.chain(prune=magnitude(sparsity, 0, 4, 2))
        step = ej.make_step(apply, transform, loss, tx)
        return ej.init_state(jax.random.key(0), MODEL, transform, tx, BATCH), step

    axes = ej.TrainState(None, 0, 0, 0, 0, 0)

    def many(sparsities, state):
        return jax.vmap(
            lambda s, state: one(s)[1](state, BATCH), in_axes=(0, axes), out_axes=(axes, 0)
        )(sparsities, state)

    states = [one(float(s))[0] for s in sparsities]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[s._replace(step=()) for s in states])
    stacked = stacked._replace(step=jnp.int32(0))
    step = jax.jit(many)
    for _ in range(6):
        stacked, _ = step(sparsities, stacked)
    for i, s in enumerate(sparsities):
        alone = jax.jit(one(float(s))[1])
        state = states[i]
        for _ in range(6):
            state, _ = alone(state, BATCH)
        for path, mask in state.transform["prune"]["mask"].items():
            np.testing.assert_array_equal(stacked.transform["prune"]["mask"][path][i], mask)

    # The search is inside a loop of one round or none, and whether it is run is one number for the
    # whole population, so that steps without a move are cheap.
    jaxpr = jax.make_jaxpr(many)(sparsities, stacked)
    outside, inside = loops(jaxpr.jaxpr, inside=False)
    assert outside == 1
    assert inside >= 1
    [rounds] = [e for e in inner_jaxpr(jaxpr.jaxpr).eqns if e.primitive.name == "while"]
    assert [v.aval.shape for v in rounds.params["cond_jaxpr"].jaxpr.outvars] == [()]


def inner_jaxpr(jaxpr):
    """The body of a jaxpr that is one call."""
    while len(jaxpr.eqns) == 1 and "jaxpr" in jaxpr.eqns[0].params:
        jaxpr = jaxpr.eqns[0].params["jaxpr"].jaxpr
    return jaxpr


def loops(jaxpr, inside):
    """(loops and sorts outside of any loop, and inside one)."""
    found = [0, 0]
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        found[inside] += name in ("while", "scan", "sort", "top_k")
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                more = loops(inner, inside or name == "while")
                found = [a + b for a, b in zip(found, more, strict=True)]
    return found


LAYOUTS = {
    "data": (),
    "model": ((r"body/kernel", PartitionSpec(None, "model")), (r"head", PartitionSpec("model"))),
    "both": (
        (r"body/kernel", PartitionSpec("data", "model")),
        (r"head/kernel", PartitionSpec("data", "model")),
    ),
}


@pytest.mark.parametrize("budget", ["uniform", "global"])
@pytest.mark.parametrize("rules", LAYOUTS.values(), ids=LAYOUTS)
def test_on_a_mesh_masks_lie_like_their_weights_and_nothing_is_gathered(rules, budget):
    layout = ej.Layout(jax.make_mesh((4, 2), ("data", "model")), rules)
    prune = magnitude(0.8, 0, 3, budget=budget)
    step, state = start(prune, layout=layout)
    alone, single = start(prune)
    for _ in range(4):
        state, _ = step(state, layout.put_batch(BATCH))
        single, _ = alone(single, BATCH)
    masks = state.transform["prune"]["mask"]
    for path, mask in masks.items():
        kept = int(jnp.sum(mask))
        assert kept == int(jnp.sum(single.transform["prune"]["mask"][path])) or budget == "global"
        weights = leaves(state.vars.model)[path]
        assert mask.sharding.is_equivalent_to(weights.sharding, 2)
    assert sum(int(jnp.sum(m)) for m in masks.values()) == 72

    # From the same weights the same masks, by all-reduces of counts alone.
    def move(vars, opt, own):
        ctx = Ctx(jnp.int32(3), jax.random.key(0))
        return prune.update(vars, opt, own, vars, {}, ctx)

    args = (state.vars._replace(extra={}), state.opt, state.transform["prune"])
    compiled = jax.jit(move).lower(*args).compile()
    assert not re.findall(r"all-gather|all-to-all|collective-permute", compiled.as_text())
    whole = jax.jit(move)(*jax.device_get(args))
    jax.tree.map(np.testing.assert_array_equal, compiled(*args)[2], whole[2])


def test_the_update_lowers_for_other_platforms():
    prune = magnitude(0.8, 0, 3, budget="global")
    step, state = start(prune)
    for platform in ("cpu", "cuda", "tpu"):
        exported = jax.export.export(step, platforms=[platform])(state, BATCH)
        assert "stablehlo.while" in exported.mlir_module()


# What is refused.


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: magnitude(1.0), ScheduleError, r"sparsity is 1.0.*\[0, 1\)"),
        (lambda: magnitude(80), ScheduleError, r"sparsity is 80.*write 0.8"),
        (lambda: magnitude(-0.1, 0, 10), ScheduleError, "final sparsity is -0.1"),
        (lambda: magnitude(jnp.float32(1.5)), ScheduleError, "at step 0 is 1.5"),
        (lambda: magnitude(0.5, 0, 10, initial=1.2), ScheduleError, "initial sparsity is 1.2"),
        (lambda: magnitude(0.5, 10, 5), ScheduleError, "begins at step 10 and ends at step 5"),
        (lambda: magnitude(0.5, 5, 5), ScheduleError, "begins at step 5 and ends at step 5"),
        (lambda: magnitude(0.5, -1), ScheduleError, "happens at step -1"),
        (lambda: magnitude(0.5, 0, 10, 0), ScheduleError, "every 0 steps"),
        (lambda: magnitude(0.5, every=10), ScheduleError, "every=10.*end="),
        (lambda: magnitude(0.5, initial=0.1), ScheduleError, "initial=0.1.*end="),
        (lambda: magnitude(lambda t: 0.5, initial=0.1), ScheduleError, "says itself"),
        (lambda: magnitude(lambda t: 0.1 * t, 0, 10), ScheduleError, "at step 10 is 1.0"),
        (lambda: magnitude(lambda t: 0.5, 10, 5), ScheduleError, "begins at step 10"),
        (lambda: magnitude(0.5, budget="model"), SetupError, r"'model'.*'uniform'"),
        (lambda: magnitude(), ScheduleError, "no sparsity is given"),
        (lambda: magnitude(0.5, pattern=n_m(1, 4)), ScheduleError, "its own, 0.75, but 0.5"),
        (lambda: magnitude(jnp.float32(0.5), pattern=n_m(2, 4)), ScheduleError, "its own, 0.5"),
        (lambda: magnitude(pattern=n_m(2, 4), every=5), ScheduleError, "every=5.*end="),
        (lambda: magnitude(pattern=n_m(2, 4), end=9, initial=0.1), ScheduleError, "initial=0.1"),
        (lambda: start(magnitude(pattern=n_m(2, 7))), SetupError, "7 does not divide"),
        (lambda: start(magnitude(0.5, select=None)), SelectorError, "first and its last"),
        (lambda: start(magnitude(0.5, select="conv")), SelectorError, "'conv' matches no leaf"),
        (lambda: start(magnitude(0.997)), SetupError, "head/kernel has 120 weights"),
        (lambda: start(magnitude(0.9999, budget="global")), SetupError, "the whole selection"),
        (lambda: start(magnitude(lambda t: 0.997)), SetupError, "head/kernel has 120 weights"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_training(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_integer_weights_are_refused():
    params = {"kernel": jnp.ones((4, 4), jnp.int8)}
    with pytest.raises(SetupError, match=r"kernel, which is int8"):
        magnitude(0.5).init(jax.random.key(0), params, None)


def test_init_works_on_shapes():
    params = jax.eval_shape(lambda: init(jax.random.key(0), BATCH)[0])
    extra, state = jax.eval_shape(lambda p: magnitude(0.5).init(None, p, None), params)
    assert extra == {}
    assert {p: (m.shape, m.dtype) for p, m in state["mask"].items()} == {
        "body/kernel": ((12, 20), bool),
        "head/kernel": ((20, 6), bool),
    }


def test_the_hooks_serve_a_loop_of_ones_own():
    prune, tx = magnitude(0.75), optax.adam(0.1)
    params, _ = init(jax.random.key(0), BATCH)
    extra, own = prune.init(jax.random.key(0), params, None)
    opt = tx.init(params)
    for t in range(3):
        ctx = Ctx(jnp.int32(t), jax.random.key(t))
        grads = jax.grad(
            lambda p, own=own, ctx=ctx: loss(
                apply(prune.view(p, extra, own, ctx), {}, BATCH, None, True)[0], BATCH
            )
        )(params)
        updates, opt = tx.update(grads, opt, params)
        vars = Vars(optax.apply_updates(params, updates), extra)
        vars, opt, own = prune.update(vars, opt, own, Vars(grads, extra), {}, ctx)
        params = vars.model
        assert zeros(params) == {"body/kernel": 180, "head/kernel": 90}
        mu = opt[0].mu["body"]["kernel"]
        assert int(jnp.sum(mu == 0)) == 180
