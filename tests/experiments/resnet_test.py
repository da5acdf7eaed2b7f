"""Deeper networks and the transformer: Linen equal to NNX, and what trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.select import leaves, map_named
from experiments.models import lenet, resnet, vgg, vit, wrn

RESNET = resnet.Spec(stages=(4, 6), blocks=1, inner=(3, 5), channels=1, classes=3)
CASES = [
    (resnet, RESNET),
    (resnet, resnet.Spec(stages=(4, 6), blocks=1, shortcut="B", channels=1, classes=3)),
    (resnet, resnet.Spec(stages=(4, 6), blocks=1, pads=((0, 2),), channels=1, classes=3)),
    (vit, vit.Spec(features=8, heads=(2,), dim=3, hidden=(6,), size=8, channels=1, classes=3)),
    (vgg, vgg.Spec(size=8, channels=1, stages=(4, 6), classes=3)),
    (wrn, wrn.Spec(depth=10, width=1, channels=1, classes=3)),
    (wrn, wrn.Spec(depth=16, width=2, channels=1, classes=3)),
]
LENET = lenet.Spec(size=16, features=(3, 4), hidden=5, classes=3)
BATCH = {"image": np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)}


@pytest.mark.parametrize(("family", "spec"), [*CASES, (lenet, LENET)])
def test_linen_and_nnx_name_their_leaves_alike_and_compute_the_same(family, spec):
    outputs, shapes = [], []
    side = 16 if family is lenet else 8
    batch = {"image": np.tile(BATCH["image"], (1, side // 8, side // 8, 1))}
    for library in ("linen", "nnx"):
        model = family.model(spec, library)
        params, state = jax.eval_shape(model.init, jax.random.key(0), batch)
        shapes.append({name: x.shape for name, x in leaves(params).items()})

        def draw(path, leaf):
            rng = np.random.default_rng(sum(map(ord, path.removeprefix("batch_stats/"))))
            noise = rng.normal(size=leaf.shape).astype(np.float32)
            return 1 + 0.5 * np.tanh(noise) if path.endswith("var") else 0.3 * noise

        params, state = map_named(draw, params), map_named(draw, state)
        run = jax.jit(lambda p, s, m=model: m.apply(p, s, batch, jax.random.key(0), False)[0])
        outputs.append(run(params, state))
    assert shapes[0] == shapes[1]
    assert outputs[0].shape == (4, 3)
    assert np.std(outputs[0], axis=0).max() > 1e-4
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_residual_networks_train_with_batch_statistics(library):
    model = resnet.model(RESNET, library)
    params, state = jax.jit(model.init)(jax.random.key(0), BATCH)

    def loss(params):
        outputs, moved = model.apply(params, state, BATCH, jax.random.key(1), True)
        return jnp.sum(outputs**2), moved

    grads, moved = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert all(np.abs(g).max() > 0 for name, g in leaves(grads).items())
    assert not np.allclose(leaves(state).popitem()[1], leaves(moved).popitem()[1])


def test_published_numbers_of_parameters():
    batch = {"image": jnp.zeros((1, 32, 32, 3))}
    for library in ("linen", "nnx"):
        for shortcut, size in (("A", 269_722), ("B", 272_474)):
            model = resnet.model(resnet.Spec(shortcut=shortcut), library)
            params, _ = jax.eval_shape(model.init, jax.random.key(0), batch)
            assert sum(x.size for x in jax.tree.leaves(params)) == size


def test_specs_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="need 9"):
        resnet.Spec(inner=(4, 4))
    with pytest.raises(ValueError, match="padded by"):
        resnet.Spec(stages=(4, 8, 8), pads=((1, 1), (0, 0)))
    with pytest.raises(ValueError, match="one pair"):
        resnet.Spec(pads=((8, 8),))
    with pytest.raises(ValueError, match="at least 1"):
        resnet.Spec(stages=(0, 1, 1))
    with pytest.raises(ValueError, match="a number a block"):
        vit.Spec(heads=(2,))
    with pytest.raises(ValueError, match="don't divide"):
        vit.Spec(patch=5)
