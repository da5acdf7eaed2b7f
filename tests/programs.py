"""Small programs in plain JAX, one for each way in which weights may meet data.

Each is `f(params, x)`, with the paths of its sites in the order of execution, and whether each
weight reaches its sites as it is (so that rounding it at the site is rounding it in the params).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


class Program(NamedTuple):
    f: Callable[[Any, Any], Any]
    params: Any
    x: Any
    sites: list[str]
    direct: bool = True


X, SQUARE = normal(8, 4), normal(4, 4)
RISING = jnp.linspace(0.55, 0.95, 16).reshape(4, 4)
IMAGE = normal(2, 6, 6, 4)
WEIGHTS = {"a": {"kernel": normal(4, 4)}, "b": {"kernel": normal(4, 4)}}
NHWC = ("NHWC", "HWIO", "NHWC")
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def dense(params, x):
    return jnp.tanh(x @ params["kernel"])


def two(params, x):
    return dense(params["b"], dense(params["a"], x))


def in_jit(params, x):
    inner = jax.jit(dense)
    return inner(params["b"], inner(params["a"], x))


def in_sharded_jit(params, x):
    split = NamedSharding(MESH, PartitionSpec("data"))
    return jax.jit(two, in_shardings=(None, split), out_shardings=split)(params, x)


def in_remat(params, x):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(dense)(params["b"], jax.checkpoint(dense, policy=policy)(params["a"], x))


def layers(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, params["kernel"])


def layers_of_layers(params, x):
    def outer(x, ws):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)

    return lax.scan(outer, x, params["kernel"], reverse=True)[0]


def rnn(params, x):
    def step(h, x):
        h = jnp.tanh(x @ params["in"]["kernel"] + h @ params["re"]["kernel"])
        return h, h

    return lax.scan(step, jnp.zeros((2, 4)), x.reshape(4, 2, 4))[1]


def loop(params, x):
    def body(carry):
        i, x = carry
        return i + 1, jnp.tanh(x @ params["kernel"])

    return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]


def fori(params, x):
    # A static trip count: lowered to a scan, so that it can be differentiated.
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ params["kernel"]), x)


def condition(params, x):
    return lax.while_loop(lambda x: jnp.max(x @ params["kernel"]) < 100.0, lambda x: 1.01 * x, x)


def cond(params, x):
    return lax.cond(x[0, 0] > 0, lambda x: dense(params["a"], x), lambda x: two(params, x), x)


def switch(params, x):
    branches = [lambda x: x, lambda x: dense(params["a"], x), lambda x: dense(params["a"], x) * 2]
    return lax.switch(jnp.asarray(2), branches, x)


def beside_custom(params, x):
    @jax.custom_vjp
    def halved(x):
        return x

    halved.defvjp(lambda x: (x, None), lambda _, g: (g / 2,))
    return jax.nn.relu(halved(x @ params["a"]["kernel"])) @ params["b"]["kernel"]


def ensemble(params, x):
    return jax.vmap(lambda w: jnp.tanh(x @ w))(params["kernel"])


def in_shard_map(params, x):
    spec = PartitionSpec("data")
    return jax.shard_map(two, mesh=MESH, in_specs=(PartitionSpec(), spec), out_specs=spec)(
        params, x
    )


def reduced_in_shard_map(params, x):
    def f(params, x):
        return lax.psum(jnp.sum(dense(params, x)), "data")

    spec = PartitionSpec("data")
    none = PartitionSpec()
    return jax.shard_map(f, mesh=MESH, in_specs=(none, spec), out_specs=none)(params, x)


def einsum(params, x):
    return jnp.einsum("bi,ihd->bhd", x, params["kernel"])


def transposed_operands(params, x):
    return params["kernel"].T @ x.T


def depthwise(params, x):
    kwargs = {"dimension_numbers": NHWC, "feature_group_count": 4}
    return lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", **kwargs)


def transposed_conv(params, x):
    return lax.conv_transpose(x, params["kernel"], (2, 2), "SAME", dimension_numbers=NHWC)


def weight_norm(params, x):
    w = params["kernel"]
    return x @ (w / jnp.sqrt(jnp.sum(w**2, axis=0)) * params["gain"])


def lora(params, x):
    return x @ (params["kernel"] + params["up"] @ params["down"])


def masked(params, x):
    return x @ jnp.where(params["mask"] > 0, params["kernel"], 0.0)


def embedded(params, x):
    indices = jnp.clip(jnp.round(jnp.abs(x[:, 0])), 0, 3).astype(jnp.int32)
    h = params["embedding"][indices]
    return jnp.tanh(h @ params["kernel"]) @ params["embedding"].T


def attention(params, x):
    q, k, v = (x @ params[name]["kernel"] for name in "qkv")
    return jax.nn.softmax(q @ k.T) @ v


PROGRAMS = {
    "two": Program(two, WEIGHTS, X, ["a/kernel", "b/kernel"]),
    "jit": Program(in_jit, WEIGHTS, X, ["a/kernel", "b/kernel"]),
    "sharded jit": Program(in_sharded_jit, WEIGHTS, X, ["a/kernel", "b/kernel"]),
    "remat": Program(in_remat, WEIGHTS, X, ["a/kernel", "b/kernel"]),
    "scan of layers": Program(layers, {"kernel": normal(3, 4, 4)}, X, ["kernel"]),
    "nested scans": Program(layers_of_layers, {"kernel": normal(2, 3, 4, 4)}, X, ["kernel"]),
    "rnn": Program(
        rnn, {"in": {"kernel": SQUARE}, "re": {"kernel": SQUARE}}, X, ["in/kernel", "re/kernel"]
    ),
    "while": Program(loop, {"kernel": SQUARE}, X, ["kernel"]),
    "fori": Program(fori, {"kernel": SQUARE}, X, ["kernel"]),
    "condition": Program(condition, {"kernel": RISING}, jnp.abs(X), ["kernel"]),
    "cond": Program(cond, WEIGHTS, X, ["a/kernel", "b/kernel"]),
    "switch": Program(switch, {"a": WEIGHTS["a"]}, X, ["a/kernel"]),
    "beside custom": Program(beside_custom, WEIGHTS, X, ["a/kernel", "b/kernel"]),
    "vmap": Program(ensemble, {"kernel": normal(3, 4, 4)}, X, ["kernel"]),
    "shard_map": Program(in_shard_map, WEIGHTS, X, ["a/kernel", "b/kernel"]),
    "shard_map, psum": Program(reduced_in_shard_map, {"kernel": SQUARE}, X, ["kernel"]),
    "einsum": Program(einsum, {"kernel": normal(4, 2, 3)}, X, ["kernel"]),
    "transposed operands": Program(transposed_operands, {"kernel": SQUARE}, X, ["kernel"]),
    "depthwise": Program(depthwise, {"kernel": normal(3, 3, 1, 4)}, IMAGE, ["kernel"]),
    "transposed conv": Program(transposed_conv, {"kernel": normal(3, 3, 4, 5)}, IMAGE, ["kernel"]),
    "weight norm": Program(
        weight_norm, {"gain": normal(4), "kernel": SQUARE}, X, ["kernel"], direct=False
    ),
    "lora": Program(
        lora,
        {"down": normal(1, 4), "kernel": SQUARE, "up": normal(4, 1)},
        X,
        ["kernel"],
        direct=False,
    ),
    "mask": Program(masked, {"kernel": SQUARE, "mask": normal(4, 4)}, X, ["kernel"], direct=False),
    "embedding": Program(
        embedded,
        {"embedding": normal(4, 4), "kernel": SQUARE},
        X,
        ["embedding", "kernel", "embedding#1"],
    ),
    "attention": Program(
        attention,
        {name: {"kernel": normal(4, 4)} for name in "qkv"},
        X,
        ["q/kernel", "k/kernel", "v/kernel", "@dot_general", "@dot_general#1"],
    ),
}
