"""Tests of the evaluation with handlers, on a program for each primitive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from effjax.errors import SiteError
from effjax.interpret import intercept
from tests.programs import PROGRAMS, SQUARE, X, dense, loop, normal

DIFFERENTIABLE = [name for name in PROGRAMS if name not in ("while", "condition")]
DIRECT = [name for name, program in PROGRAMS.items() if program.direct]
KEY = jax.random.key(0)


def run(f, handler, params, x, **kwargs):
    """f with one handler at all of its sites: (outputs, measured)."""

    def forward(params, model_state, x, key):
        return f(params, x)

    return intercept(forward, lambda site: handler, **kwargs)(params, {}, x, KEY)


def untouched(op):
    return op.run(*op.operands), jnp.max(jnp.abs(op.operands[0]))


def rounded(op):
    operands = list(op.operands)
    if op.site.weight is not None:
        operands[op.site.weight] = jnp.round(operands[op.site.weight])
    return op.run(*operands), {}


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def loss(outputs):
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_without_handlers_nothing_changes(name, jit):
    f, params, x, *_ = PROGRAMS[name]
    wrap = jax.jit if jit else lambda f: f

    outputs, measured = wrap(lambda p, x: run(f, None, p, x))(params, x)

    assert_same(outputs, wrap(f)(params, x))
    assert measured == {}


@pytest.mark.parametrize("name", PROGRAMS)
def test_handlers_that_change_nothing_leave_every_bit(name):
    f, params, x, sites, _ = PROGRAMS[name]

    # Without the measurements, for whose sake XLA may compile the rest in another way.
    outputs = jax.jit(lambda p, x: run(f, untouched, p, x)[0])(params, x)

    assert_same(outputs, jax.jit(f)(params, x))
    _, measured = jax.eval_shape(lambda p, x: run(f, untouched, p, x), params, x)
    # What is measured in the condition of a loop is not kept.
    assert sorted(measured) == sorted([] if name == "condition" else sites)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_handlers_that_change_nothing_leave_the_gradients(name):
    f, params, x, *_ = PROGRAMS[name]

    grad = jax.jit(jax.grad(lambda p: loss(run(f, untouched, p, x)[0])))(params)

    wanted = jax.jit(jax.grad(lambda p: loss(f(p, x))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), grad, wanted)


@pytest.mark.parametrize("name", DIRECT)
def test_a_handler_reaches_every_use_of_a_weight(name):
    f, params, x, *_ = PROGRAMS[name]

    outputs, _ = jax.jit(lambda p, x: run(f, rounded, p, x))(params, x)

    wanted = jax.jit(f)(jax.tree.map(jnp.round, params), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), outputs, wanted)
    plain = jax.tree.leaves(jax.jit(f)(params, x))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(wanted), plain, strict=True))


def test_measurements_of_layers_are_stacked_and_those_of_time_merged():
    f, params, x, *_ = PROGRAMS["nested scans"]
    _, measured = run(f, untouched, params, x)
    h, inputs = x, np.zeros((2, 3))
    for i in (1, 0):  # this program's outer scan runs in reverse
        for j in range(3):
            inputs[i, j] = np.abs(h).max()
            h = jnp.tanh(h @ params["kernel"][i, j])
    np.testing.assert_allclose(measured["kernel"], inputs, rtol=1e-6)

    f, params, x, *_ = PROGRAMS["rnn"]
    _, measured = run(f, untouched, params, x)
    np.testing.assert_array_equal(measured["in/kernel"], jnp.max(jnp.abs(x)))


def test_measurements_of_a_while_loop_are_merged():
    def handler(op):
        return op.run(*op.operands), {"calls": jnp.ones(()), "largest": jnp.max(op.operands[0])}

    _, measured = run(loop, handler, {"kernel": SQUARE}, X, merge=jnp.add)
    assert measured["kernel"]["calls"] == 3


def test_a_branch_that_does_not_run_measures_zeros():
    f, params, x, *_ = PROGRAMS["cond"]
    for first, second_runs in ((1.0, False), (-1.0, True)):
        _, measured = run(f, untouched, params, x.at[0, 0].set(first))
        assert measured["a/kernel"] > 0
        assert (measured["b/kernel"] > 0) == second_runs


def test_measurements_of_shards_are_merged():
    f, params, x, *_ = PROGRAMS["shard_map"]
    _, measured = jax.jit(lambda p, x: run(f, untouched, p, x))(params, x)
    np.testing.assert_array_equal(measured["a/kernel"], jnp.max(jnp.abs(x)))


def test_layers_read_their_own_slice():
    f, params, x, *_ = PROGRAMS["scan of layers"]

    def handler(op):
        return op.run(op.operands[0], op.operands[1] * op.given), {}

    factors = jnp.array([1.0, 2.0, 3.0])
    (outputs, _), _ = run(f, handler, params, x, given={"kernel": factors})

    scaled = {"kernel": params["kernel"] * factors[:, None, None]}
    np.testing.assert_allclose(outputs, f(scaled, x)[0], rtol=1e-6)


def test_run_takes_other_operands_and_parameters():
    def handler(op):
        x, w = (jnp.round(4 * a).astype(jnp.int8) for a in op.operands)
        out = op.run(x, w, preferred_element_type=jnp.int32)
        assert out.dtype == jnp.int32
        return out.astype(jnp.float32) / 16, {}

    quarter = {"kernel": jnp.round(4 * SQUARE) / 4}
    outputs, _ = run(lambda p, x: x @ p["kernel"], handler, quarter, jnp.round(4 * X) / 4)
    np.testing.assert_array_equal(outputs, (jnp.round(4 * X) / 4) @ quarter["kernel"])


def test_under_vmap():
    params = {"kernel": normal(5, 4, 4)}
    outputs, measured = jax.vmap(lambda p: run(dense, rounded, p, X))(params)
    assert measured == {"kernel": {}}
    for i in range(5):
        wanted = dense({"kernel": jnp.round(params["kernel"][i])}, X)
        np.testing.assert_allclose(outputs[i], wanted, rtol=1e-6)


def test_side_effects_run_once(capfd):
    def f(params, x):
        jax.debug.print("before {}", 1)
        h = dense(params, x)
        jax.debug.print("after {}", 2)
        return h

    run(f, untouched, {"kernel": SQUARE}, X)
    jax.effects_barrier()
    assert sorted(capfd.readouterr().out.split("\n")) == ["", "after 2", "before 1"]


@pytest.mark.parametrize("kind", ["custom_jvp", "custom_vjp"])
def test_a_site_behind_a_derivative_rule_is_an_error(kind):
    multiply = getattr(jax, kind)(lambda w, x: x @ w)
    if kind == "custom_jvp":
        multiply.defjvp(lambda primals, tangents: (multiply(*primals), tangents[1] @ primals[0]))
    else:
        multiply.defvjp(lambda w, x: (x @ w, w), lambda w, g: (jnp.zeros_like(w), g @ w.T))

    def f(params, x):
        return multiply(params["inner"], x) @ params["outer"]

    params = {"inner": SQUARE, "outer": SQUARE}
    with pytest.raises(SiteError, match=f"inner.*inside the {kind} function.*selector"):
        run(f, untouched, params, X)

    def outer_only(site):
        return untouched if site.path == "outer" else None

    def forward(params, model_state, x, key):
        return f(params, x)

    outputs, measured = intercept(forward, outer_only)(params, {}, X, KEY)
    assert_same(outputs, f(params, X))
    assert list(measured) == ["outer"]


def test_a_handler_of_another_shape_or_dtype_is_an_error():
    def f(params, x):
        return x @ params["kernel"]

    with pytest.raises(SiteError, match=r"returned bfloat16\[8, 4\].*float32\[8, 4\]"):
        run(f, lambda op: (op.run(*op.operands).astype(jnp.bfloat16), {}), {"kernel": SQUARE}, X)
    with pytest.raises(SiteError, match=r"returned float32\[4\]"):
        run(f, lambda op: (op.run(*op.operands)[0], {}), {"kernel": SQUARE}, X)


def test_typed_keys_and_integer_outputs_pass():
    def forward(params, model_state, x, key):
        noise = jax.random.normal(key, x.shape)
        return {"y": (x + noise) @ params["kernel"], "key": key, "n": jnp.int32(3)}

    outputs, _ = intercept(forward, lambda site: untouched)({"kernel": SQUARE}, {}, X, KEY)
    wanted = forward({"kernel": SQUARE}, {}, X, KEY)
    np.testing.assert_array_equal(outputs["y"], wanted["y"])
    assert outputs["key"] == KEY
    assert outputs["n"] == 3


def test_what_is_closed_over_keeps_its_gradient():
    def scaled(s):
        def forward(params, model_state, x, key):
            return lax.scan(lambda c, w: (c @ w * s, None), x, params["kernel"])[0]

        outputs, _ = intercept(forward, lambda site: untouched)(
            {"kernel": SQUARE[None]}, {}, X, KEY
        )
        return outputs.sum()

    np.testing.assert_allclose(jax.grad(scaled)(2.0), (X @ SQUARE).sum(), rtol=1e-5)
