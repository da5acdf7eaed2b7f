"""Layouts: where leaves lie, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import effjax as ej
from effjax.errors import ShardingError

MESH = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
BATCH = {"image": jnp.ones((8, 6, 6, 4))}


def depthwise(params, model_state, batch, key, train):
    numbers = ("NHWC", "HWIO", "NHWC")
    kwargs = {"dimension_numbers": numbers, "feature_group_count": 4}
    return lax.conv_general_dilated(
        batch["image"], params["kernel"], (1, 1), "SAME", **kwargs
    ), model_state


MODEL = ej.Model(
    lambda key, batch: ({"kernel": jax.random.normal(key, (3, 3, 1, 4))}, {}), depthwise
)


def init(layout):
    return ej.init_state(jax.random.key(0), MODEL, ej.chain(), optax.sgd(0.1), BATCH, layout=layout)


def loss(outputs, batch):
    return jnp.mean(outputs**2)


def test_grouped_convolutions_with_the_batch_on_one_of_two_axes_are_refused():
    with pytest.raises(ShardingError, match=r"grouped convolutions \['kernel'\].*Split the batch"):
        init(ej.Layout(MESH, batch=("data",)))


def test_with_the_batch_on_all_axes_their_gradient_is_right():
    layout, tx = ej.Layout(MESH), optax.sgd(0.1)
    state = init(layout)
    step = ej.make_step(depthwise, ej.chain(), loss, tx)
    shardings = (ej.state_shardings(state, layout), None)
    after, _ = jax.jit(step, out_shardings=shardings)(state, layout.put_batch(BATCH))
    single = ej.init_state(jax.random.key(0), MODEL, ej.chain(), tx, BATCH)
    want, _ = jax.jit(step)(single, BATCH)
    np.testing.assert_allclose(after.vars.model["kernel"], want.vars.model["kernel"], rtol=1e-5)


def test_a_batch_that_does_not_divide():
    with pytest.raises(ShardingError, match="split its first axis 8 ways"):
        ej.Layout(MESH).put_batch({"image": np.ones((12, 2))})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ((r"nothing", PartitionSpec("model")), "match none of the params"),
        ((r"kernel", PartitionSpec("model")), "axis 0 of kernel has 3 entries"),
        ((r"kernel", PartitionSpec(*[None] * 4, "model")), "too many axes"),
    ],
)
def test_rules_that_cannot_be_meant(rule, message):
    with pytest.raises(ShardingError, match=message):
        init(ej.Layout(MESH, [rule]))


def test_masks_and_moments_lie_where_their_weights_lie():
    layout = ej.Layout(MESH, [(r"kernel", PartitionSpec(None, None, None, "model"))])
    transform = ej.chain(prune=ej.prune.magnitude(0.5, select="kernel$"))
    args = (MODEL, transform, optax.adam(1e-3), BATCH)
    state = ej.init_state(jax.random.key(0), *args, layout=layout)
    want = state.vars.model["kernel"].sharding
    assert want.spec == PartitionSpec(None, None, None, "model")
    assert state.transform["prune"]["mask"]["kernel"].sharding == want
    assert state.opt[0].mu.model["kernel"].sharding == want
    assert state.step.sharding.spec == PartitionSpec()
