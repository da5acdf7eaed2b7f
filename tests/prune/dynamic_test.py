"""Static masks, SET, RigL and sparse momentum: connections by hand, exact counts, gradients,
moments, and what a RigL step costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.core import Ctx
from effjax.errors import ScheduleError, SelectorError, SetupError
from effjax.prune import dynamic
from effjax.prune.counts import Count
from effjax.prune.engine import Scene
from effjax.prune.exchange import exchange, shared_out
from effjax.prune.flops import flops
from effjax.prune.patterns import block, channel, n_m, unstructured
from effjax.select import leaves
from tests import nets

ALL = "kernel$"
METHODS = {
    "static": lambda s, **k: ej.prune.static(s, select=ALL, **k),
    "set": lambda s, **k: dynamic.set_(s, 1, 40, 3, select=ALL, **k),
    "rigl": lambda s, **k: dynamic.rigl(s, 1, 40, 3, select=ALL, **k),
    "momentum": lambda s, **k: dynamic.sparse_momentum(s, 1, 40, 3, select=ALL, **k),
}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=1e-2)),
    "lion": optax.lion(1e-3, weight_decay=1e-2),
    "partition": optax.partition({"w": optax.adam(1e-2)}, lambda v: jax.tree.map(lambda _: "w", v)),
}


def start(prune, tx=None, model=None):
    model = model or nets.raw()
    transform, tx = ej.chain(prune=prune), tx or OPTIMIZERS["adamw"]
    state = ej.init_state(jax.random.key(0), model, transform, tx, nets.BATCH)
    return jax.jit(ej.make_step(model.apply, transform, nets.loss, tx)), state


def mask_of(state):
    return {p: np.asarray(m) for p, m in state.transform["prune"]["mask"].items()}


def counts(state):
    return {path: int(m.sum()) for path, m in mask_of(state).items()}


# By hand: one kernel 2 x 4 whose gradient is given. Plain SGD with a rate of 0 leaves the weights.

MASK = jnp.array([[1, 1, 0, 0], [1, 1, 0, 0]], bool)
WEIGHTS = jnp.array([[0.1, -4.0, 7.0, 7.0], [-0.2, 3.0, 7.0, 7.0]])


def scene(slopes, mask=MASK):
    weights = {"k": jnp.where(mask, WEIGHTS, 0)}
    return Scene(weights, {"k": slopes}, {"k": mask}, {}, {}, jax.random.key(0), jnp.int32(5))


@pytest.mark.parametrize(
    ("slopes", "moved", "expected"),
    [
        # 0.1 and -0.2 are dropped; the largest gradients elsewhere are 9 and -8.
        ([[1, 50, 2, 9], [3, 60, -8, 0]], 2, [[0, 1, 0, 1], [0, 1, 1, 0]]),
        # What was dropped has the largest gradient, and comes back.
        ([[99, 50, 2, 9], [3, 60, -8, 0]], 2, [[1, 1, 0, 1], [0, 1, 0, 0]]),
        # Equal gradients: the first ones.
        ([[0, 0, 0, 0], [0, 0, 0, 0]], 1, [[1, 1, 0, 0], [1, 1, 0, 0]]),
        ([[1, 0, 5, 5], [1, 0, 5, 5]], 2, [[0, 1, 1, 1], [0, 1, 0, 0]]),
        # Nothing moves; everything moves.
        ([[9, 9, 9, 9], [9, 9, 9, 9]], 0, [[1, 1, 0, 0], [1, 1, 0, 0]]),
        ([[0, 1, 9, 8], [0, 2, 7, 6]], 4, [[0, 0, 1, 1], [0, 0, 1, 1]]),
    ],
)
def test_an_exchange_by_hand(slopes, moved, expected):
    slopes = jnp.abs(jnp.array(slopes, jnp.float32))
    n = {"k": Count.of(moved)}
    found = exchange(scene(slopes), {"k": slopes}, n, n, unstructured())["k"]
    np.testing.assert_array_equal(found, np.array(expected, bool))


def test_an_exchange_of_channels_by_hand():
    """The weakest column (mean |w| 0.15) goes, the one with the largest mean gradient comes."""
    slopes = jnp.array([[9.0, 0.0, 1.0, 3.0], [0.0, 0.0, 1.0, 9.0]])
    n = {"k": Count.of(1)}
    found = exchange(scene(slopes), {"k": slopes}, n, n, channel())["k"]
    np.testing.assert_array_equal(found, np.array([[0, 1, 0, 1]] * 2, bool))


def linear(weights, slopes):
    """A model whose loss has the gradient `slopes`, wherever it is."""
    model = ej.Model(
        lambda key, batch: ({"kernel": jnp.asarray(weights), "bias": jnp.zeros(3)}, {}),
        lambda p, s, b, k, t: (jnp.sum(p["kernel"] * b) + 0 * jnp.sum(p["bias"]), s),
    )
    return model, jnp.asarray(slopes, jnp.float32)


def test_a_whole_step_of_rigl_by_hand():
    """4 of 8 weights, alpha = 1 with the cosine at step 2 of 4: k = round(4 * 1/2 * (1 + 0)) = 2.

    The optimizer moves kept weights first: SGD with rate 1 and gradients [.1, .5; .2, 1] turns
    0.1, -4, -0.2, 3 into 0, -4.5, -0.4, 2. Smallest: 0 and -0.4. Largest gradients of the others:
    9 at (0, 3) and 8 at (1, 2).
    """
    model, batch = linear(WEIGHTS, [[0.1, 0.5, 2, 9], [0.2, 1.0, -8, 0]])
    transform = ej.chain(prune=dynamic.rigl(0.5, 2, 4, 9, alpha=1.0, select=ALL))
    tx = optax.sgd(1.0, momentum=0.5)
    state = ej.init_state(jax.random.key(0), model, transform, tx, batch)
    state.transform["prune"]["mask"]["kernel"] = MASK
    state = state._replace(step=jnp.int32(2))
    step = jax.jit(ej.make_step(model.apply, transform, lambda out, b: out, tx))
    state, _ = step(state, batch)
    np.testing.assert_array_equal(mask_of(state)["kernel"], [[0, 1, 0, 1], [0, 1, 1, 0]])
    expected = [[0, -4.5, 0, 0], [0, 2, 0, 0]]
    np.testing.assert_allclose(state.vars.model["kernel"], expected, rtol=1e-6)
    trace = leaves(state.opt)["0/trace/model/kernel"]
    np.testing.assert_allclose(trace, [[0, 0.5, 0, 0], [0, 1.0, 0, 0]])
    # The next step moves nothing: pruned weights get no gradient, and stay 0.
    state, _ = step(state, batch)
    np.testing.assert_array_equal(mask_of(state)["kernel"], [[0, 1, 0, 1], [0, 1, 1, 0]])
    expected = [[0, -4.5 - 0.75, 0, -9], [0, 2 - 1.5, 8, 0]]
    np.testing.assert_allclose(state.vars.model["kernel"], expected, rtol=1e-6)


def test_what_is_dropped_and_grown_at_once_keeps_its_value_and_its_moment():
    model, batch = linear(WEIGHTS, [[99, 0.5, 2, 9], [0.2, 1.0, -8, 0]])
    transform = ej.chain(prune=dynamic.rigl(0.5, 2, 4, 9, alpha=1.0, select=ALL))
    tx = optax.sgd(0.0, momentum=0.5)
    state = ej.init_state(jax.random.key(0), model, transform, tx, batch)
    state.transform["prune"]["mask"]["kernel"] = MASK
    step = ej.make_step(model.apply, transform, lambda out, b: out, tx)
    state, _ = step(state._replace(step=jnp.int32(2)), batch)
    np.testing.assert_array_equal(mask_of(state)["kernel"], [[1, 1, 0, 1], [0, 1, 0, 0]])
    assert float(state.vars.model["kernel"][0, 0]) == float(WEIGHTS[0, 0])
    assert float(leaves(state.opt)["0/trace/model/kernel"][0, 0]) == 99.0


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.3), (25, 0.15 * (1 + 2**-0.5)), (50, 0.15), (100, 0.0)]
)
def test_the_cosine_of_the_paper(step, expected):
    share = dynamic._annealed(0.3, 100, "rigl")
    np.testing.assert_allclose(share(jnp.int32(step)), expected, atol=1e-7)


def moves(prune, steps=12):
    step, state = start(prune)
    found = []
    for t in range(steps):
        before = mask_of(state)
        state, _ = step(state, nets.BATCH)
        if any(np.any(before[p] != m) for p, m in mask_of(state).items()):
            found.append(t)
    return found


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: dynamic.rigl(0.8, 1, 10, 3, select=ALL), [1, 4, 7]),
        (lambda: dynamic.rigl(0.8, 1, 8, 3, select=ALL), [1, 4, 7]),
        (lambda: dynamic.rigl(0.8, 1, 7, 3, select=ALL), [1, 4]),
        (lambda: dynamic.rigl(0.8, end=11, every=4, select=ALL), [4, 8]),
        (lambda: dynamic.rigl(0.8, 0, 1, select=ALL), [0]),
        (lambda: dynamic.set_(0.8, every=5, select=ALL), [5, 10]),
        (lambda: ej.prune.static(0.8, select=ALL), []),
    ],
)
def test_the_steps_in_which_masks_move(make, expected):
    assert moves(make()) == expected


DENSITIES = [("rigl", tx) for tx in OPTIMIZERS] + [
    ("static", "adamw"),
    ("set", "lion"),
    ("momentum", "sgd"),
    ("momentum", "adamw"),
]


@pytest.mark.parametrize(("method", "tx"), DENSITIES)
def test_every_step_has_the_exact_density(method, tx):
    step, state = start(METHODS[method](0.9), OPTIMIZERS[tx])
    first = counts(state)
    for t in range(50):
        before = mask_of(state)
        state, metrics = step(state, nets.BATCH)
        now = counts(state)
        assert sum(now.values()) == sum(first.values())
        assert method == "momentum" or now == first
        if method == "static":
            jax.tree.map(np.testing.assert_array_equal, before, mask_of(state))
        named = {**leaves(state.vars.model), **leaves(state.opt)}
        for name, x in named.items():
            for path, mask in mask_of(state).items():
                if name.endswith(path) and x.shape == mask.shape:
                    assert not np.any(np.asarray(x)[~mask]), f"{name} at step {t}"
        assert float(metrics["prune/sparsity"]) == pytest.approx(0.9, abs=1e-3)
    assert np.isfinite(float(metrics["loss"]))
    assert step._cache_size() <= 1  # jax may drop entries, in a long process


def test_erk_is_met():
    """64 x 32 and 32 x 8 at 90%: eps * (96 + 40) = 230.4, so 162.6 and 67.8 weights."""
    _, state = start(dynamic.rigl(0.9, end=10, every=3, select=ALL))
    assert counts(state) == {"hidden/kernel": 163, "head/kernel": 68}
    _, state = start(dynamic.rigl(0.9, end=10, every=3, select=ALL, budget="uniform"))
    assert counts(state) == {"hidden/kernel": 205, "head/kernel": 26}


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("rigl", block((4, 4))),
        ("rigl", channel(-2)),
        ("set", channel(-2)),
        ("momentum", channel(-2)),
    ],
)
def test_blocks_and_channels_move_whole(method, pattern):
    step, state = start(METHODS[method](0.5, budget="uniform", pattern=pattern))
    first = counts(state)
    seen = [mask_of(state)]
    for _ in range(8):
        state, _ = step(state, nets.BATCH)
        seen.append(mask_of(state))
        units = 0
        for _path, mask in seen[-1].items():
            pooled = np.asarray(pattern.pool(jnp.asarray(mask, jnp.float32)))
            assert set(np.unique(pooled)) <= {0.0, 1.0}
            units += int(pooled.sum())
        wanted = sum(pattern.units(m.shape) for m in seen[0].values()) // 2
        assert units == wanted
        assert method == "momentum" or counts(state) == first
    assert any(np.any(seen[0][p] != m) for p, m in seen[-1].items())


def test_pruned_weights_have_a_gradient_only_in_the_steps_that_move_masks():
    for method, wanted in (("static", 0), ("set", 0), ("rigl", 1), ("momentum", 2)):
        prune = METHODS[method](0.8)
        _, state = start(prune)
        own = state.transform["prune"]
        for step, moving in ((0, False), (1, True), (2, False)):
            ctx = Ctx(jnp.int32(step), jax.random.key(0))

            def total(model, prune=prune, own=own, ctx=ctx):
                seen = prune.view(model, {}, own, ctx)
                return nets.loss(nets.raw().apply(seen, {}, nets.BATCH, None, True)[0], nets.BATCH)

            grads = leaves(jax.grad(total)(state.vars.model))
            dense = any(np.any(np.asarray(grads[p])[~m]) for p, m in mask_of(state).items())
            assert dense == (wanted == 2 or (wanted == 1 and moving))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_where_it_stopped(method):
    step, state = start(METHODS[method](0.9))
    for t in range(9):
        state, _ = step(state, nets.BATCH)
        if t == 4:
            middle = jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))
    again = jax.tree.map(jnp.asarray, middle)
    again = again._replace(key=jax.random.wrap_key_data(again.key))
    for _ in range(4):
        again, _ = step(again, nets.BATCH)
    jax.tree.map(np.testing.assert_array_equal, again.vars, state.vars)
    jax.tree.map(np.testing.assert_array_equal, again.transform, state.transform)


@pytest.mark.parametrize("mode", ["map", "vmap"])
def test_a_population_over_sparsities_and_alphas(mode):
    levels, shares = [0.5, 0.9], [0.1, 0.5]
    model, tx = nets.raw(), optax.adam(1e-2)

    def build(hyper):
        rigl = dynamic.rigl(hyper["sparsity"], 0, 9, 2, alpha=hyper["alpha"], select=ALL)
        transform = ej.chain(prune=rigl)

        def init(key, batch, frozen):
            return ej.init_state(key, model, transform, tx, batch)

        return ej.Run(init, ej.make_step(model.apply, transform, nets.loss, tx))

    runs = ej.population(build, {"sparsity": levels, "alpha": shares}, mode=mode)
    keys = jax.random.split(jax.random.key(0), 2)
    states = runs.init(keys, nets.BATCH)
    for _ in range(3):
        states, _ = runs.step(states, nets.BATCH)
    for i, (level, share) in enumerate(zip(levels, shares, strict=True)):
        alone = ej.chain(prune=dynamic.rigl(level, 0, 9, 2, alpha=share, select=ALL))
        state = ej.init_state(keys[i], model, alone, tx, nets.BATCH)
        step = jax.jit(ej.make_step(model.apply, alone, nets.loss, tx))
        for _ in range(3):
            state, _ = step(state, nets.BATCH)
        found = mask_of(runs.member(states, i))
        jax.tree.map(np.testing.assert_array_equal, found, mask_of(state))


@pytest.mark.parametrize("model", [nets.linen, nets.nnx_])
def test_flax_models(model):
    step, state = start(dynamic.rigl(0.8, 0, 9, 2), model=model())
    first = counts(state)
    assert list(first) == ["conv2/kernel"]  # the ends stay dense
    for _ in range(4):
        state, metrics = step(state, nets.BATCH)
    assert counts(state) == first == {"conv2/kernel": 230}
    assert np.isfinite(float(metrics["loss"]))


# Sparse momentum.


@pytest.mark.parametrize(
    ("total", "room", "weight", "expected"),
    [
        (10, [10, 10], [3.0, 1.0], [8, 2]),  # 7.5 and 2.5: halves of the running sum to even
        (10, [5, 10], [3.0, 1.0], [5, 5]),  # what does not fit goes to the other
        (16, [3, 20, 20], [4.0, 2.0, 2.0], [3, 7, 6]),
        (9, [4, 4, 4], [1.0, 0.0, 0.0], [4, 2, 3]),  # without momentum by room: 2.5 each
        (0, [4, 4], [1.0, 1.0], [0, 0]),
        (8, [4, 4], [1.0, 0.0], [4, 4]),
        (2**26 + 3, [2**26, 2**26], [1.0, 1.0], [2**25, 2**25 + 3]),
    ],
)
def test_what_was_dropped_is_shared_out(total, room, weight, expected):
    room = [Count.of(n) for n in room]
    parts = shared_out(Count.of(total), room, jnp.array(weight))
    found = [int(part) for part in parts]
    assert sum(found) == total
    assert found == pytest.approx(expected, abs=0 if total < 2**24 else 8)
    assert all(0 <= n <= int(own) for n, own in zip(found, room, strict=True))


def test_sparse_momentum_by_hand():
    """Two kernels 1 x 4, half of them kept, alpha 1 and decay 0.5 at a step with cosine 0.

    After one step M = 0.5 g. Each drops round(2 * 1/2) = 1, its smaller. Mean |M| of what was kept:
    a (1 + 0) / 2 * 0.5 = 0.25, b (3 + 3) / 2 * 0.5 = 1.5. Of the 2 dropped b gets
    2 * 1.5 / 1.75 = 1.71, so 2, and a none: the running sums 0.29 and 2 round to 0 and 2.
    """
    weights = {"a": jnp.array([[5.0, 1.0, 0, 0]]), "b": jnp.array([[1.0, 5.0, 0, 0]])}
    slopes = {"a": jnp.array([[1.0, 0, 9, 0]]), "b": jnp.array([[3.0, 3.0, -4, 0]])}
    model = ej.Model(
        lambda key, batch: (weights, {}),
        lambda p, s, b, k, t: (sum(jnp.sum(p[n] * b[n]) for n in p), s),
    )
    prune = dynamic.sparse_momentum(0.5, 2, 4, 9, alpha=1.0, decay=0.5, select="")
    transform, tx = ej.chain(prune=prune), optax.sgd(0.0, momentum=0.9)
    state = ej.init_state(jax.random.key(0), model, transform, tx, slopes)
    half = jnp.array([[True, True, False, False]])
    state.transform["prune"]["mask"] = {"a": half, "b": half}
    step = ej.make_step(model.apply, transform, lambda out, b: out, tx)
    state, _ = step(state._replace(step=jnp.int32(2)), slopes)
    np.testing.assert_array_equal(mask_of(state)["a"], [[1, 0, 0, 0]])
    np.testing.assert_array_equal(mask_of(state)["b"], [[1, 1, 1, 0]])
    np.testing.assert_array_equal(
        state.transform["prune"]["memory"]["b"], 0.5 * np.asarray(slopes["b"])
    )


# Static.


def test_masks_that_are_given_are_what_is_seen():
    rng = np.random.default_rng(0)
    masks = {"hidden/kernel": rng.random((64, 32)) < 0.3}
    step, state = start(ej.prune.static(masks=masks))
    for _ in range(3):
        state, metrics = step(state, nets.BATCH)
        np.testing.assert_array_equal(mask_of(state)["hidden/kernel"], masks["hidden/kernel"])
        found = np.asarray(state.vars.model["hidden"]["kernel"])
        np.testing.assert_array_equal(found != 0, masks["hidden/kernel"])
    assert float(metrics["prune/sparsity"]) == pytest.approx(1 - masks["hidden/kernel"].mean())
    assert list(mask_of(state)) == ["hidden/kernel"]


def test_scores_that_are_given_keep_the_largest():
    scores = {"head/kernel": jnp.asarray(np.random.default_rng(0).normal(size=(32, 8)))}
    _, state = start(ej.prune.static(0.75, scores=scores, budget="uniform"))
    mask = mask_of(state)["head/kernel"]
    found = np.asarray(scores["head/kernel"])
    assert mask.sum() == 64
    assert found[mask].min() > found[~mask].max()


def test_a_random_n_m_mask():
    _, state = start(ej.prune.static(pattern=n_m(2, 4), select=ALL))
    grouped = mask_of(state)["hidden/kernel"].reshape(16, 4, 32).sum(1)
    assert np.all(grouped == 2)
    column = mask_of(state)["hidden/kernel"].reshape(16, 4, 32)[:, :, 0]
    assert len({tuple(group) for group in column}) > 1


# Errors.


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: dynamic.rigl(0.9, end=9, pattern=n_m(2, 4)), SetupError, "ste"),
        (lambda: dynamic.set_(0.9, pattern=n_m(2, 4)), SetupError, "static"),
        (lambda: dynamic.sparse_momentum(0.9, end=9, pattern=n_m(2, 4)), SetupError, "N:M"),
        (lambda: dynamic.rigl(0.9), ScheduleError, "end="),
        (lambda: dynamic.rigl(0.9, end=50), ScheduleError, "100.*50"),
        (lambda: dynamic.rigl(0.9, end=500, alpha=1.5), ScheduleError, "alpha"),
        (lambda: dynamic.rigl(1.0, end=500), ScheduleError, "1.0"),
        (lambda: dynamic.set_(0.9, every=0), ScheduleError, "0 steps"),
        (lambda: dynamic.sparse_momentum(0.9, end=500, decay=1.0), ScheduleError, "decay"),
        (lambda: ej.prune.static(), ScheduleError, "no sparsity"),
        (lambda: ej.prune.static(0.9, masks={"a": MASK}), SetupError, "sparsity"),
        (lambda: ej.prune.static(masks={}), SetupError, "empty"),
    ],
)
def test_what_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("prune", "error", "match"),
    [
        (ej.prune.static(masks={"nowhere": MASK}), SelectorError, "nowhere"),
        (ej.prune.static(masks={"head/kernel": MASK}), SetupError, r"\(32, 8\)"),
        (ej.prune.static(masks={"head/bias": jnp.ones(8)}), SetupError, "bool"),
        (
            ej.prune.static(0.5, scores={"head/kernel": jnp.ones((32, 8))}, select=ALL),
            SelectorError,
            "hidden/kernel",
        ),
    ],
)
def test_what_is_refused_at_init(prune, error, match):
    with pytest.raises(error, match=match):
        start(prune)


# FLOPs.


def two_layers():
    """6 x 10 and 10 x 3 weights without a bias, and a batch of 4."""

    def init(key, batch):
        a, b = jax.random.split(key)
        return {"a": jax.random.normal(a, (6, 10)), "b": jax.random.normal(b, (10, 3))}, {}

    def apply(params, model_state, batch, key, train):
        return jnp.tanh(batch @ params["a"]) @ params["b"], model_state

    return ej.Model(init, apply), jax.random.normal(jax.random.key(1), (4, 6))


def test_a_rigl_step_counts_what_the_formula_of_the_paper_gives():
    """Counted: 2 operations an example for each weight that the forward pass sees, again for the
    way back to the activations, and for each weight that gets a gradient."""
    model, batch = two_layers()
    prune = dynamic.rigl(0.7, 4, 40, 5, select="")
    transform, tx = ej.chain(prune=prune), optax.sgd(0.05)
    state = ej.init_state(jax.random.key(0), model, transform, tx, batch)
    step = jax.jit(ej.make_step(model.apply, transform, lambda out, b: jnp.sum(out**2), tx))
    ones = jax.tree.map(jnp.ones_like, state.vars.model)

    def passed(state):
        ctx = Ctx(state.step, jax.random.key(0))
        return jax.vjp(lambda p: prune.view(p, {}, state.transform["prune"], ctx), ones)

    counted = []
    for _ in range(20):
        seen, back = passed(state)
        grads = back(ones)[0]
        weights, slopes = (sum(int(jnp.sum(x)) for x in jax.tree.leaves(t)) for t in (seen, grads))
        counted.append(2 * len(batch) * (2 * weights + slopes))
        state, _ = step(state, batch)
    found = flops(model.apply, state.vars.model, {}, batch, mask_of(state))
    assert found.dense == 2 * 4 * 90
    assert found.sparse == pytest.approx(2 * 4 * 27)
    assert counted[4] == found.step(moving=True)
    assert counted[5] == found.step()
    # 4 sparse steps and one that moves the masks.
    expected = (3 * found.sparse * 4 + 2 * found.sparse + found.dense) / 5
    assert found.rigl(4) == pytest.approx(expected)
    assert np.mean(counted) == pytest.approx(expected)


def test_flops_of_masks_that_meet_no_data():
    model, batch = two_layers()
    params, _ = model.init(jax.random.key(0), batch)
    with pytest.raises(SelectorError, match="nowhere"):
        flops(model.apply, params, {}, batch, {"nowhere": MASK})
    with pytest.raises(SetupError, match="-1"):
        flops(model.apply, params, {}, batch, {}).rigl(-1)
