"""Tests of quantization-aware training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import effjax as ej
from effjax.errors import ChainError, ScheduleError, SelectorError, SetupError, SiteError
from effjax.quantize import Bits, numerics, qat
from tests import nets
from tests.programs import PROGRAMS, SQUARE, X, dense, normal

KEY = jax.random.key(0)
MATRICES = r"kernel|embedding"


def fake(x, bits, channels=()):
    g = numerics.grid(bits)
    return numerics.fake_quant(x, numerics.scale_of(numerics.absmax(x, channels), g), g)


def apply_of(f):
    """f(params, x) as an apply."""
    return lambda params, model_state, x, key, train: (f(params, x), model_state)


def init(f, transform, params, x):
    return transform.init(KEY, params, ej.Setup(apply_of(f), {}, x))[1]


def run(f, transform, params, x, state=None, step=0, train=True):
    """(outputs, aux) of f under the transform."""
    if state is None:
        state = init(f, transform, params, x)

    def forward(params, model_state, x, key, train):
        return f(params, x), model_state, {"before": 1.0}

    ctx = ej.Ctx(jnp.int32(step), KEY, train=train)
    outputs, _, aux = transform.wrap(forward, {}, state, ctx)(params, {}, x, KEY, train)
    assert aux.pop("before") == 1.0
    return outputs, aux


def loss(outputs):
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs))


def close(a, b, **kwargs):
    kwargs = {"rtol": 1e-5, "atol": 1e-6, **kwargs}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), a, b)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# The arithmetic at the sites


def test_by_hand():
    def f(params, x):
        return x @ params["kernel"]

    params = {"kernel": jnp.array([[3.0, 0.0], [-1.6, 0.7], [0.4, 0.2]])}
    x = jnp.array([[7.0, -2.4, 0.6]])
    outputs, aux = run(f, qat(weights=3, activations=4), params, x)
    # 3 bits: columns on multiples of 3/3 and 0.7/3; 4 bits: x on multiples of 7/7.
    kernel = np.array([[3.0, 0.0], [-2.0, 0.7], [0.0, 0.7 / 3]])
    np.testing.assert_allclose(outputs, np.array([[7.0, -2.0, 1.0]]) @ kernel, rtol=1e-6)
    assert aux["ranges"] == {"kernel": 7.0}
    outputs, _ = run(f, qat(3, 32, per_channel=False), params, x)
    kernel = np.array([[3.0, 0.0], [-2.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(outputs, x @ kernel, rtol=1e-6)


def test_two_layers_against_fake_quantizing_by_hand():
    f, params, x, *_ = PROGRAMS["two"]

    def by_hand(params):
        h = jnp.tanh(fake(x, 5) @ fake(params["a"]["kernel"], 3, (1,)))
        return jnp.tanh(fake(h, 5) @ fake(params["b"]["kernel"], 3, (1,)))

    transform = qat(3, 5)
    outputs, aux = jax.jit(lambda p: run(f, transform, p, x))(params)
    equal(outputs, jax.jit(by_hand)(params))
    h = jnp.tanh(fake(x, 5) @ fake(params["a"]["kernel"], 3, (1,)))
    close(aux["ranges"], {"a/kernel": jnp.abs(x).max(), "b/kernel": jnp.abs(h).max()})
    grad = jax.grad(lambda p: loss(run(f, transform, p, x)[0]))(params)
    close(grad, jax.grad(lambda p: loss(by_hand(p)))(params))


def test_gradients_pass_rounding_and_skip_what_a_static_range_clips():
    def f(params, x):
        return x["x"] @ params["kernel"]

    params, x = {"kernel": SQUARE}, {"x": X}
    transform = qat(2, 4, ranges="static", decay=0.5)
    state = init(f, transform, params, x)
    state = {**state, "ranges": {"kernel": jnp.float32(1.0)}, "count": {"kernel": jnp.int32(1)}}

    def objective(params, x):
        return run(f, transform, params, x, state, train=False)[0].sum()

    dw, dx = jax.grad(objective, argnums=(0, 1))(params, x)
    g = numerics.grid(4)
    rounded = numerics.fake_quant(X, numerics.scale_of(jnp.ones((1, 1)), g), g)
    assert jnp.abs(rounded).max() <= 1.0
    # Rounded to 0 or to the extreme, a weight gets its rounded value's gradient.
    close(dw["kernel"], jnp.broadcast_to(rounded.sum(0)[:, None], (4, 4)))
    wanted = jnp.where(jnp.abs(X) <= 1.0, fake(SQUARE, 2, (1,)).sum(1), 0.0)
    close(dx["x"], wanted)
    assert (wanted == 0).any()


@pytest.mark.parametrize("name", PROGRAMS)
def test_weights_of_every_program(name):
    f, params, x, sites, direct = PROGRAMS[name]
    kwargs = {"select": MATRICES, "embeddings": "embedding"} if name == "embedding" else {}
    transform = qat(3, 32, per_channel=False, **kwargs)
    state = jax.eval_shape(lambda p: init(f, transform, p, x), params)
    assert {*state["scales"], *state["tables"]} == {s for s in sites if not s.startswith("@")}

    outputs, _ = jax.jit(lambda p, x: run(f, transform, p, x))(params, x)

    if direct:
        stack = {"scan of layers": 1, "nested scans": 2}.get(name, 0)
        rounded = jax.tree.map(lambda w: fake(w, 3, tuple(range(stack))), params)
        close(outputs, jax.jit(f)(rounded, x))
    plain = jax.tree.leaves(f(params, x))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(outputs), plain, strict=True))


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in ("while", "condition")])
def test_from_16_bits_on_every_program_is_itself(name):
    f, params, x, *_ = PROGRAMS[name]
    kwargs = {"embeddings": name == "embedding", "products": name == "attention"}

    @jax.jit
    def ours(params, bits):
        transform = qat(bits, bits, ranges="static", **kwargs)

        def objective(params):
            outputs = run(f, transform, params, x)[0]
            return loss(outputs), outputs

        return jax.grad(objective, has_aux=True)(params)

    def objective(params):
        outputs = f(params, x)
        return loss(outputs), outputs

    grad, outputs = ours(params, jnp.int32(16))
    wanted_grad, wanted = jax.jit(jax.grad(objective, has_aux=True))(params)
    close(outputs, wanted)
    close(grad, wanted_grad)
    # Compiled, XLA fuses otherwise around a select, which moves the last bit on some CPUs.
    with jax.disable_jit():
        equal(run(f, qat(jnp.int32(16), jnp.int32(16), **kwargs), params, x)[0], f(params, x))


@pytest.mark.parametrize("name", PROGRAMS)
def test_from_16_bits_on_known_when_traced_nothing_is_computed(name):
    f, params, x, *_ = PROGRAMS[name]
    transform = qat(16, 32, embeddings=name == "embedding", products=name == "attention")
    state = init(f, transform, params, x)
    ours = jax.make_jaxpr(lambda p: run(f, transform, p, x, state)[0])(params)
    names = [eqn.primitive.name for eqn in ours.eqns]
    assert not {"round", "custom_jvp_call", "stop_gradient"} & set(names) - {
        eqn.primitive.name for eqn in jax.make_jaxpr(lambda p: f(p, x))(params).eqns
    }


def test_weight_norm_and_low_rank_updates_are_rounded_where_they_are_used():
    f, params, x, *_ = PROGRAMS["weight norm"]
    w = params["kernel"]
    normed = w / jnp.sqrt(jnp.sum(w**2, axis=0)) * params["gain"]
    close(run(f, qat(4, 32), params, x)[0], x @ fake(normed, 4, (1,)))
    f, params, x, *_ = PROGRAMS["lora"]
    merged = params["kernel"] + params["up"] @ params["down"]
    close(run(f, qat(4, 32), params, x)[0], x @ fake(merged, 4, (1,)))


def test_zeros_stay_zeros():
    f, params, x, *_ = PROGRAMS["mask"]
    grad = jax.grad(lambda x: run(f, qat(2, 32), params, x)[0].sum())(x)
    pruned = (params["mask"] <= 0).all(axis=1)
    assert np.all(np.asarray(grad)[:, pruned] == 0)
    for bits in range(2, 9):
        w = jnp.where(params["mask"] > 0, params["kernel"], 0.0)
        outputs, _ = run(lambda p, x: x @ p["kernel"], qat(bits, 32), {"kernel": w}, jnp.eye(4))
        assert np.all(np.asarray(outputs)[w == 0] == 0)


def test_kernels_have_a_scale_for_each_output_channel():
    f, params, x, *_ = PROGRAMS["depthwise"]
    state = init(f, qat(), params, x)
    assert state["scales"] == {"kernel": 4}
    close(run(f, qat(3, 32), params, x)[0], f({"kernel": fake(params["kernel"], 3, (3,))}, x))
    f, params, x, *_ = PROGRAMS["transposed conv"]
    assert init(f, qat(), params, x)["scales"] == {"kernel": 5}
    close(run(f, qat(3, 32), params, x)[0], f({"kernel": fake(params["kernel"], 3, (3,))}, x))
    f, params, x, *_ = PROGRAMS["einsum"]
    close(run(f, qat(3, 32), params, x)[0], f({"kernel": fake(params["kernel"], 3, (1, 2))}, x))


def test_embeddings_are_left_alone_unless_asked_for():
    f, params, x, *_ = PROGRAMS["embedding"]
    state = init(f, qat(), params, x)
    assert state == {"scales": {"kernel": 4}, "tables": {}}
    transform = qat(3, 32, embeddings=True)
    state = init(f, transform, params, x)
    assert state["tables"] == {"embedding": 4}
    assert set(state["scales"]) == {"kernel", "embedding#1"}
    rounded = {
        name: fake(w, 3, (0,) if name == "embedding" else (1,)) for name, w in params.items()
    }
    close(run(f, transform, params, x)[0], f(rounded, x))
    facts = transform.describe(params, {}, state)
    assert facts["embedding"] == {"weight_bits": 3, "scales": 4}


def test_products_of_activations_are_left_alone_unless_asked_for():
    f, params, x, *_ = PROGRAMS["attention"]
    assert set(init(f, qat(), params, x)["scales"]) == {"q/kernel", "k/kernel", "v/kernel"}

    def by_hand(params, x):
        q, k, v = (x @ params[n]["kernel"] for n in "qkv")
        scores = jax.nn.softmax(fake(q, 5) @ fake(k, 5).T)
        return fake(scores, 5) @ fake(v, 5)

    rules = [("kernel", Bits(32, 32))]
    transform = qat(8, 5, products=True, rules=rules)
    outputs, aux = run(f, transform, params, x)
    close(outputs, by_hand(params, x))
    sides = {f"@dot_general{n}/{side}" for n in ("", "#1") for side in ("lhs", "rhs")}
    assert set(aux["ranges"]) == sides
    transform = qat(products=r"^@dot_general$", ranges="static")
    state = init(f, transform, params, x)
    assert "@dot_general" in state["scales"]
    assert "@dot_general#1" not in state["scales"]
    outputs, aux = run(f, transform, params, x, state)
    assert {"@dot_general/lhs", "@dot_general/rhs"} < set(aux["ranges"])


# Ranges and state


def test_dynamic_ranges_hold_no_state_and_read_the_batch():
    transform = qat()
    state = init(dense, transform, {"kernel": SQUARE}, X)
    assert state == {"scales": {"kernel": 4}, "tables": {}}
    for train in (True, False):
        _, aux = run(dense, transform, {"kernel": SQUARE}, 3 * X, state, train=train)
        np.testing.assert_array_equal(aux["ranges"]["kernel"], jnp.abs(3 * X).max())


def test_static_ranges_are_the_bias_corrected_average():
    transform = qat(ranges="static", decay=0.9)
    params = {"kernel": SQUARE}
    state = init(dense, transform, params, X)
    seen = []
    for step, factor in enumerate((1.0, 4.0, 0.5)):
        outputs, aux = run(dense, transform, params, factor * X, state, step)
        _, _, state = transform.update(None, None, state, None, aux, None)
        seen.append(float(jnp.abs(factor * X).max()))
        weights = 0.9 ** np.arange(len(seen))[::-1]
        np.testing.assert_allclose(
            state["ranges"]["kernel"], weights @ seen / weights.sum(), rtol=1e-5
        )
        # A step rounds with the average that includes its own batch.
        g = numerics.grid(8)
        scale = numerics.scale_of(state["ranges"]["kernel"].reshape(1, 1), g)
        rounded = numerics.fake_quant(factor * X, scale, g)
        close(outputs, jnp.tanh(rounded @ fake(SQUARE, 8, (1,))))
    assert state["count"]["kernel"] == 3


def test_the_first_observation_is_taken_whole():
    transform = qat(ranges="static")
    state = init(dense, transform, {"kernel": SQUARE}, X)
    _, aux = run(dense, transform, {"kernel": SQUARE}, X, state)
    _, _, state = transform.update(None, None, state, None, aux, None)
    assert state["ranges"]["kernel"] == jnp.abs(X).max()
    report = transform.report(None, state, aux, None)
    assert (report["saturated"], report["uncalibrated"]) == (0.0, 0)


def test_evaluation_reads_static_ranges_and_never_the_batch():
    transform = qat(ranges="static")
    params = {"kernel": SQUARE}
    state = init(dense, transform, params, X)
    _, aux = run(dense, transform, params, X, state)
    _, _, state = transform.update(None, None, state, None, aux, None)
    outputs, aux = run(dense, transform, params, 10 * X, state, train=False)
    assert aux["ranges"] == {}
    bound = jnp.abs(X).max()
    close(
        outputs, run(dense, transform, params, jnp.clip(10 * X, -bound, bound), state, 9, False)[0]
    )
    # Row by row, the same: no row depends on another.
    rows = [run(dense, transform, params, 10 * X[i : i + 1], state, 9, False)[0] for i in range(8)]
    close(outputs, jnp.concatenate(rows))


def test_without_a_range_evaluation_leaves_activations_alone_and_says_so():
    transform = qat(ranges="static")
    params = {"kernel": SQUARE}
    state = init(dense, transform, params, X)
    outputs, _ = run(dense, transform, params, X, state, train=False)
    equal(outputs, jnp.tanh(X @ fake(SQUARE, 8, (1,))))
    assert transform.describe(params, {}, state) == {"kernel": {"weight_bits": 8, "scales": 4}}
    report = transform.report(None, state, {"ranges": {"kernel": jnp.float32(1)}}, None)
    assert report["uncalibrated"] == 1


def test_layers_of_a_scan_have_ranges_of_their_own():
    f, params, x, *_ = PROGRAMS["nested scans"]
    transform = qat(ranges="static")
    state = init(f, transform, params, x)
    assert state["ranges"]["kernel"].shape == (2, 3)
    assert state["scales"]["kernel"] == 24
    _, aux = run(f, transform, params, x, state)
    _, _, state = transform.update(None, None, state, None, aux, None)
    assert np.unique(state["ranges"]["kernel"]).size == 6
    first = run(f, transform, params, x, state, train=False)[0]
    doubled = {**state, "ranges": {"kernel": state["ranges"]["kernel"].at[0, 1].multiply(8)}}
    assert np.any(first != run(f, transform, params, x, doubled, train=False)[0])


def test_a_branch_that_does_not_run_teaches_its_range_nothing():
    f, params, x, *_ = PROGRAMS["cond"]
    transform = qat(ranges="static", decay=0.5)
    state = init(f, transform, params, x)
    _, aux = run(f, transform, params, x.at[0, 0].set(1.0), state)
    _, _, state = transform.update(None, None, state, None, aux, None)
    assert (state["count"]["a/kernel"], state["count"]["b/kernel"]) == (1, 0)
    assert state["ranges"]["b/kernel"] == 0


def test_numbers_that_are_not_finite_teach_nothing():
    transform = qat(ranges="static")
    state = init(dense, transform, {"kernel": SQUARE}, X)
    for bad in (jnp.inf, jnp.nan):
        aux = {"ranges": {"kernel": jnp.float32(bad)}}
        _, _, after = transform.update(None, None, state, None, aux, None)
        equal(after, state)


def test_delayed_start():
    transform = qat(4, 4, start=2, ranges="static")
    params = {"kernel": SQUARE}
    state = init(dense, transform, params, X)
    for step in range(2):
        outputs, aux = run(dense, transform, params, X, state, step)
        equal(outputs, dense(params, X))
        _, _, state = transform.update(None, None, state, None, aux, None)
    assert state["count"]["kernel"] == 2  # observed from the first step on
    quantized = jnp.tanh(fake(X, 4) @ fake(SQUARE, 4, (1,)))
    close(run(dense, transform, params, X, state, 2)[0], quantized)
    # Evaluation shows what would be shipped.
    close(run(dense, transform, params, X, state, 0, train=False)[0], quantized)


# Rules, and what is said


def test_rules_give_sites_their_bits():
    f, params, x, *_ = PROGRAMS["two"]
    transform = qat(4, 4, rules=[("^a/", Bits(8, 32)), ("kernel", Bits(2, 3))])
    h = jnp.tanh(x @ fake(params["a"]["kernel"], 8, (1,)))
    close(
        run(f, transform, params, x)[0],
        jnp.tanh(fake(h, 3) @ fake(params["b"]["kernel"], 2, (1,))),
    )
    assert transform.describe(params, {}, init(f, transform, params, x)) == {
        "a/kernel": {"weight_bits": 8, "scales": 4},
        "b/kernel": {"weight_bits": 2, "act_bits": 3, "scales": 4},
    }


def test_two_uses_of_a_leaf_may_have_two_widths():
    def f(params, x):
        return jnp.tanh(x @ params["kernel"]) @ params["kernel"]

    params = {"kernel": SQUARE}
    transform = qat(8, 32, rules=[("#1$", Bits(2, 32))])
    wanted = jnp.tanh(X @ fake(SQUARE, 8, (1,))) @ fake(SQUARE, 2, (1,))
    close(run(f, transform, params, X)[0], wanted)
    facts = transform.describe(params, {}, init(f, transform, params, X))
    assert facts["kernel"]["weight_bits"] == 8
    assert facts["@kernel#1"]["weight_bits"] == 2


def test_export_is_the_params():
    params = {"kernel": SQUARE}
    assert qat().export(params, {}, {}) is params


def test_quantization_comes_after_pruning():
    with pytest.raises(ChainError, match=r"prune=\.\.\., quant=\.\.\."):
        ej.chain(quant=qat(), prune=ej.prune.magnitude(0.5))


# Whole steps

DATA = {"x": normal(8, 4), "label": jnp.arange(8) % 4}


def small():
    """Two dense layers, without Flax."""

    def apply(params, model_state, batch, key, train):
        return jnp.tanh(batch["x"] @ params["a"]["kernel"]) @ params["b"]["kernel"], model_state

    return ej.Model(lambda key, batch: (PROGRAMS["two"].params, {}), apply)


def train_step(model, transform, steps=3, batch=nets.BATCH, tx=None):
    tx = tx or optax.adam(1e-2)
    state = ej.init_state(KEY, model, transform, tx, batch)
    step = jax.jit(ej.make_step(model.apply, transform, nets.loss, tx))
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert step._cache_size() <= 1  # jax may drop entries, in a long process
    return state, losses


@pytest.mark.parametrize(
    "kwargs", [{}, {"ranges": "static", "start": 2}], ids=["dynamic", "static"]
)
@pytest.mark.parametrize("model", [nets.linen(), ej.from_nnx(nets.NNXCNN)], ids=["linen", "nnx"])
def test_a_cnn_with_batchnorm_and_dropout_trains_and_compiles_once(model, kwargs):
    state, losses = train_step(model, ej.chain(q=qat(4, 4, **kwargs)), steps=12)
    assert losses[-1] < 0.9 * losses[0]
    assert set(state.transform["q"]["scales"]) == {"conv1/kernel", "conv2/kernel", "head/kernel"}


@pytest.mark.parametrize("model", [nets.linen(), ej.from_nnx(nets.NNXCNN)], ids=["linen", "nnx"])
def test_a_cnn_at_16_bits_is_the_plain_cnn(model):
    params, model_state = model.init(KEY, nets.BATCH)
    setup = ej.Setup(model.apply, model_state, nets.BATCH)

    def forward(*args):
        return *model.apply(*args), {}

    def gradients(forward):
        def objective(params):
            outputs, changed, _ = forward(params, model_state, nets.BATCH, KEY, True)
            return nets.loss(outputs, nets.BATCH), (outputs, changed)

        return jax.jit(jax.grad(objective, has_aux=True))(params)

    grad, plain = gradients(forward)
    for transform in (qat(32, 32), qat(start=99)):
        state = transform.init(KEY, params, setup)[1]
        ctx = ej.Ctx(jnp.int32(0), KEY)
        same, outputs = gradients(transform.wrap(forward, {}, state, ctx))
        equal(outputs, plain)
        close(same, grad, rtol=1e-4, atol=1e-5)


def test_one_trace_serves_every_width():
    traces = []

    def f(params, x):
        traces.append(1)
        return dense(params, x)

    params = {"kernel": SQUARE}
    state = init(f, qat(), params, X)
    traces.clear()

    @jax.jit
    def outputs(bits):
        return jax.vmap(lambda b: run(f, qat(b, b), params, X, state)[0])(bits)

    widths = jnp.array([*range(2, 9), 16])
    rows = outputs(widths)
    assert len(traces) == 1
    for row, bits in zip(rows, [*range(2, 9), 16], strict=True):
        close(row, run(f, qat(bits, bits), params, X, state)[0])
    np.testing.assert_array_equal(rows[-1], dense(params, X))


def test_a_population_of_widths():
    model, tx = small(), optax.sgd(0.1)

    def final(bits):
        transform = ej.chain(q=qat(bits, bits))
        state = ej.init_state(KEY, model, transform, tx, DATA)
        step = ej.make_step(model.apply, transform, nets.loss, tx)
        return step(step(state, DATA)[0], DATA)[1]["loss"]

    losses = jax.jit(jax.vmap(final))(jnp.array([2, 4, 8]))
    for row, bits in zip(losses, (2, 4, 8), strict=True):
        close(row, jax.jit(final)(jnp.int32(bits)), rtol=1e-4)
    assert np.unique(losses).size == 3


def test_between_other_wraps_measurements_survive():
    def measure(name):
        def wrap(forward, extra, state, ctx):
            def measured(*args):
                outputs, model_state, aux = forward(*args)
                return outputs, model_state, {**aux, "mean": jnp.mean(outputs)}

            return measured

        return ej.Transform(
            wrap=wrap,
            loss=lambda outputs, batch, aux, extra, state, ctx: {"mean": 0 * aux["mean"]},
            report=lambda vars, state, aux, ctx: {name: aux["mean"]},
        )

    transform = ej.chain(a=measure("outer"), q=qat(ranges="static"), b=measure("inner"))
    state, losses = train_step(nets.linen(), transform)
    assert state.transform["q"]["count"]["head/kernel"] == 3
    assert np.isfinite(losses).all()


def test_transformer_layers_under_scan_and_remat():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            return x + nn.Dense(4)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x)))), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(8, 4)
            kwargs = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
            x, _ = nn.scan(nn.remat(Layer), **kwargs)(name="layers")(embed(tokens), None)
            return embed.attend(x.mean(axis=1))

    model = ej.from_linen(Net(), inputs="tokens")
    batch = {"tokens": jnp.arange(12).reshape(3, 4) % 8, "label": jnp.array([1, 2, 3])}
    transform = ej.chain(q=qat(ranges="static", embeddings=True, products=True))
    state, losses = train_step(model, transform, steps=8, batch=batch)
    assert losses[-1] < losses[0]
    ranges = state.transform["q"]["ranges"]
    assert ranges["Embed_0/embedding#1"].shape == ()
    assert all(r.shape == (2,) for name, r in ranges.items() if name.startswith(("layers", "@")))
    assert sum(name.startswith("@") for name in ranges) == 4


def test_recurrent_cells():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(nn.GRUCell(8))(x)[:, -1]

    model = ej.from_linen(Net(), inputs="x")
    batch = {"x": normal(3, 6, 4), "label": jnp.array([1, 2, 3])}
    state, losses = train_step(model, ej.chain(q=qat(ranges="static")), steps=5, batch=batch)
    assert losses[-1] < losses[0]
    assert all(r.shape == () and r > 0 for r in state.transform["q"]["ranges"].values())


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("ranges", ["dynamic", "static"])
def test_shards_share_one_range(ranges, axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    f, params, x, *_ = PROGRAMS["two"]
    split = PartitionSpec("data")
    specs = {"in_specs": (PartitionSpec(), split), "out_specs": split}

    def sharded(params, x):
        return jax.shard_map(f, mesh=mesh, **specs)(params, x)

    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, split))
        transform = qat(4, 4, ranges=ranges)
        whole = jax.jit(lambda p, x: run(f, transform, p, x))(params, x)
        shards = jax.jit(lambda p, x: run(sharded, transform, p, x))(params, x)
        close(shards, whole)

        @jax.jit
        def traced(params, x, bits, start):
            return run(sharded, qat(bits, bits, ranges=ranges, start=start), params, x, step=3)

        close(traced(params, x, jnp.int32(4), jnp.int32(3)), whole)
        close(traced(params, x, jnp.int32(4), jnp.int32(4))[0], f(params, x))


def test_sharded_batches_have_the_range_of_the_whole():
    transform, tx, model = ej.chain(q=qat(ranges="static")), optax.sgd(0.1), small()
    layout = ej.Layout(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)))
    step = ej.make_step(model.apply, transform, nets.loss, tx)
    alone = jax.jit(step)(ej.init_state(KEY, model, transform, tx, DATA), DATA)[0]
    state = ej.init_state(KEY, model, transform, tx, DATA, layout=layout)
    split = jax.jit(step)(state, layout.put_batch(DATA))[0]
    close(split.transform["q"]["ranges"], alone.transform["q"]["ranges"])
    close(split.vars.model, alone.vars.model)


# What quantization by interception gets wrong


@pytest.mark.parametrize("teacher_first", [True, False])
def test_a_float_teacher_of_the_same_layers_neither_hides_the_student_nor_is_quantized(
    teacher_first,
):
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))  # one function, and one cache, for both

    def f(params, x):
        return layer(params["kernel"], x)

    params, teacher = {"kernel": SQUARE}, {"kernel": normal(4, 4)}
    state = init(f, qat(3, 3), params, X)

    @jax.jit
    def both(params, teacher):
        if teacher_first:
            target = f(teacher, X)
            return run(f, qat(3, 3), params, X, state)[0], target
        student = run(f, qat(3, 3), params, X, state)[0]
        return student, f(teacher, X)

    student, target = both(params, teacher)
    close(student, jnp.tanh(fake(X, 3) @ fake(SQUARE, 3, (1,))))
    close(target, jnp.tanh(X @ teacher["kernel"]))


def test_a_mask_inside_the_module():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("kernel", nn.initializers.normal(1.0), (4, 4))
            mask = self.variable("masks", "kernel", lambda: jnp.eye(4))
            return x @ (w * mask.value)

    model = ej.from_linen(Masked(), inputs=lambda x: x)
    params, model_state = model.init(KEY, X)
    transform = qat(3, 32)
    state = transform.init(KEY, params, ej.Setup(model.apply, model_state, X))[1]

    def forward(*args):
        return *model.apply(*args), {}

    wrapped = transform.wrap(forward, {}, state, ej.Ctx(jnp.int32(0), KEY, train=False))
    outputs = wrapped(params, model_state, X, KEY, False)[0]
    close(outputs, X @ fake(params["kernel"] * jnp.eye(4), 3, (1,)))


def test_a_convolution_with_4_bit_weights_and_8_bit_activations():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(8, (3, 3), name="conv")(x).mean(axis=(1, 2))

    _, losses = train_step(ej.from_linen(Net()), ej.chain(q=qat(4, 8)))
    assert losses[-1] < losses[0]


def test_two_weights_of_one_shape_are_told_apart():
    def f(params, x):
        return x @ params["first"]["kernel"] + x @ params["second"]["kernel"]

    params = {"first": {"kernel": SQUARE}, "second": {"kernel": SQUARE}}
    transform = qat(8, 32, rules=[("^second/", Bits(2, 32))])
    wanted = X @ fake(SQUARE, 8, (1,)) + X @ fake(SQUARE, 2, (1,))
    close(run(f, transform, params, X)[0], wanted)


# Errors


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"weights": 0}, SetupError, r"weights of qat\(\) has 0 bits.*1 to 8"),
        ({"activations": 12}, SetupError, r"activations of qat\(\) has 12 bits"),
        ({"rules": [("head", Bits(9, 8))]}, SetupError, "weights of the rule 'head' has 9 bits"),
        ({"ranges": "ema"}, SetupError, "'ema'.*'dynamic' or 'static'"),
        ({"ranges": "static", "decay": 1.0}, ScheduleError, "decay"),
    ],
)
def test_wrong_settings(kwargs, error, message):
    with pytest.raises(error, match=message):
        qat(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"select": "weight$"}, SelectorError, "'weight\\$' matches no leaf.*conv1/kernel"),
        ({"select": "["}, SelectorError, "not a regular expression"),
        ({"select": "bias"}, SelectorError, "none of which is a matrix"),
        ({"rules": [("tail/", Bits())]}, SelectorError, r"\['tail/'\] match none.*head/kernel"),
        ({"embeddings": True}, SelectorError, "embedding"),
        ({"products": True}, SelectorError, r"\['\^@'\]"),
    ],
)
def test_settings_that_do_not_fit_the_model(kwargs, error, message):
    model = nets.linen()
    with pytest.raises(error, match=message):
        ej.init_state(KEY, model, ej.chain(q=qat(**kwargs)), optax.sgd(0.1), nets.BATCH)


def test_a_selected_weight_that_reaches_no_site():
    def f(params, x):
        return x @ params["a"]["kernel"] + x * params["b"]["kernel"]

    params = {"a": {"kernel": SQUARE}, "b": {"kernel": SQUARE}}
    with pytest.raises(SiteError, match=r"b/kernel \(met data in: mul\)"):
        init(f, qat(), params, SQUARE)


def test_an_embedding_that_is_only_indexed_is_reached_with_embeddings():
    params = {"table": normal(4, 4)}
    f = lambda params, x: params["table"][x]  # noqa: E731
    with pytest.raises(SiteError, match="gather"):
        init(f, qat(select="table"), params, jnp.arange(3))
    assert init(f, qat(select="table", embeddings="table"), params, jnp.arange(3))["tables"]


def test_a_site_behind_a_derivative_rule_is_an_error_at_init():
    @jax.custom_vjp
    def multiply(w, x):
        return x @ w

    multiply.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))
    with pytest.raises(SiteError, match="inside the custom_vjp function multiply"):
        init(lambda p, x: multiply(p["kernel"], x), qat(), {"kernel": SQUARE}, X)


def test_another_forward_pass_than_at_init_is_an_error():
    params = {"kernel": SQUARE}
    state = init(dense, qat(ranges="static"), params, X)

    def closed_over(_, x):
        return dense(params, x)

    def twice(params, x):
        return dense(params, dense(params, x))

    with pytest.raises(SiteError, match=r"missing \['kernel'\]"):
        run(closed_over, qat(ranges="static"), params, X, state)
    with pytest.raises(SiteError, match=r"added \['kernel#1'\]"):
        run(twice, qat(ranges="static"), params, X, state)


def test_init_works_on_shapes_and_keeps_strong_dtypes():
    model = nets.linen()
    params, model_state = jax.eval_shape(model.init, KEY, nets.BATCH)
    setup = ej.Setup(model.apply, model_state, jax.eval_shape(lambda b: b, nets.BATCH))
    state = jax.eval_shape(lambda p: qat(ranges="static").init(KEY, p, setup)[1], params)
    assert not any(x.weak_type for x in jax.tree.leaves(state))
    assert {str(x.dtype) for x in jax.tree.leaves(state)} == {"int32", "float32"}


def test_the_while_loop_is_observed():
    f, params, x, *_ = PROGRAMS["while"]
    _, aux = run(f, qat(), params, x)
    assert aux["ranges"]["kernel"] == jnp.abs(x).max()
