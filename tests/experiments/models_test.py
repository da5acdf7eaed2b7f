"""The experiments' models: published sizes, and Linen equal to NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import effjax as ej
from effjax.select import leaves
from experiments.models import cnn, lenet, mlp, resnet, vgg, vit, wrn
from experiments.models.pool import max_pool

# The practitioner's guide's table: width multiplier and parameters, which there include the moving
# mean and variance of BatchNorm.
PUBLISHED = [
    (0.05, 14_713),
    (0.1, 26_044),
    (0.25, 98_570),
    (0.5, 350_058),
    (0.75, 764_874),
    (1.0, 1_343_018),
    (1.4, 2_606_654),
]
SMALL = cnn.Spec(width=0.5, size=8, channels=1, classes=3, stages=(4, 8), hidden=16)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def abstract(model, shape):
    batch = {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return jax.eval_shape(model.init, jax.random.key(0), batch)


@pytest.mark.parametrize("library", ["linen", "nnx"])
@pytest.mark.parametrize(("width", "parameters"), PUBLISHED)
def test_cnn_has_the_published_number_of_parameters(library, width, parameters):
    params, state = abstract(cnn.model(cnn.Spec(width), library), (1, 32, 32, 3))
    statistics = {k: x for k, x in leaves(state).items() if k.endswith(("mean", "var"))}
    assert count(params) + count(statistics) == parameters


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_mlp_has_the_published_number_of_parameters(library):
    params, _ = abstract(mlp.model(library=library), (1, 28, 28, 1))
    assert count(params) == 266_610


# Exact where a paper or its code gives the number, else to the digits that are published.
VIT_TINY = vit.Spec(192, (3,) * 12, 64, (768,) * 12, size=224, patch=16, classes=1000)
SIZES = [
    (lenet, lenet.Spec(), (1, 28, 28, 1), 431_080, 0),
    (vgg, vgg.Spec(), (1, 32, 32, 3), 4.66e6, 5e3),
    (resnet, resnet.Spec(), (1, 32, 32, 3), 269_722, 0),  # 0.27M in the paper's table 6
    (wrn, wrn.Spec(28, 10), (1, 32, 32, 3), 36.5e6, 5e4),
    (wrn, wrn.Spec(16, 8), (1, 32, 32, 3), 11.0e6, 5e4),
    (wrn, wrn.Spec(40, 4), (1, 32, 32, 3), 8.9e6, 5e4),
    (wrn, wrn.Spec(22, 2), (1, 32, 32, 3), 1.1e6, 5e4),
    # DeiT-Ti has 5,717,416, with a class token and its position, which ours does without.
    (vit, VIT_TINY, (1, 224, 224, 3), 5_717_416 - 2 * 192, 0),
]


@pytest.mark.parametrize("library", ["linen", "nnx"])
@pytest.mark.parametrize(("family", "spec", "shape", "parameters", "rounding"), SIZES)
def test_networks_have_their_published_sizes(library, family, spec, shape, parameters, rounding):
    params, _ = abstract(family.model(spec, library), shape)
    assert abs(count(params) - parameters) <= rounding


def test_vgg_small_by_hand():
    convolutions = 9 * (3 * 128 + 128 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 512 * 512)
    params, _ = abstract(vgg.model(), (1, 32, 32, 3))
    assert count(params) == convolutions + 4 * (128 + 256 + 512) + (4 * 4 * 512 + 1) * 10


@pytest.mark.parametrize(
    ("family", "wrong", "says"),
    [
        (wrn, {"depth": 20}, "multiple of 6"),
        (vgg, {"size": 28}, "halve 3 times"),
        (lenet, {"size": 30}, "multiple of 4"),
    ],
)
def test_sizes_that_cannot_be(family, wrong, says):
    with pytest.raises(ValueError, match=says):
        family.Spec(**wrong)


@pytest.mark.parametrize(
    ("family", "spec"), [(cnn, SMALL), (mlp, mlp.Spec(inputs=64, hidden=(12, 8), classes=3))]
)
def test_linen_and_nnx_name_their_leaves_alike_and_compute_the_same(family, spec):
    linen, other = family.model(spec, "linen"), family.model(spec, "nnx")
    batch = {"image": jax.random.normal(jax.random.key(1), (4, 8, 8, 1))}
    params, state = linen.init(jax.random.key(0), batch)
    theirs, their_state = other.init(jax.random.key(0), batch)
    shapes = {name: x.shape for name, x in leaves(params).items()}
    assert shapes == {name: x.shape for name, x in leaves(theirs).items()}

    for train in (False, True) if family is mlp else (False,):
        a, _ = linen.apply(params, state, batch, jax.random.key(2), train)
        b, _ = other.apply(params, their_state, batch, jax.random.key(2), train)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert a.shape == (4, 3)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_cnn_trains_with_batch_statistics_and_dropout(library):
    model = cnn.model(SMALL, library)
    batch = {"image": jax.random.normal(jax.random.key(1), (4, 8, 8, 1))}
    params, state = model.init(jax.random.key(0), batch)
    one, moved = model.apply(params, state, batch, jax.random.key(2), True)
    two, _ = model.apply(params, state, batch, jax.random.key(3), True)
    assert not np.allclose(one, two)
    assert not np.allclose(jax.tree.leaves(state)[0], jax.tree.leaves(moved)[0])


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_narrow_network_is_cut_out_of_the_elastic_one(library):
    spec = cnn.Spec(size=8, channels=1, classes=3, stages=(4, 8), hidden=16)
    model = cnn.model(spec, library)
    batch = {"image": jax.random.normal(jax.random.key(1), (4, 8, 8, 1))}
    params, state = model.init(jax.random.key(0), batch)
    _, state = model.apply(params, state, batch, jax.random.key(2), True)  # move the statistics
    space = ej.nas.width_space(params, cnn.width_groups(spec), (0.5, 0.75, 1.0))
    assert space.sizes == (4, 8, 16)
    arch = space.architecture({"stage_0": 0.75, "stage_1": 0.5})
    masked = space.mask(params, arch)

    smaller = cnn.narrowed(spec, space.channels(arch))
    assert smaller == cnn.Spec(size=8, channels=1, classes=3, stages=(3, 4), hidden=16)
    cut, cut_state = cnn.cut(masked, state, spec, smaller, library)
    narrow = cnn.model(smaller, library)
    shapes = jax.eval_shape(narrow.init, jax.random.key(0), batch)
    assert jax.tree.map(jnp.shape, (cut, cut_state)) == jax.tree.map(jnp.shape, shapes)
    small, _ = narrow.apply(cut, cut_state, batch, jax.random.key(2), False)
    large, _ = model.apply(masked, state, batch, jax.random.key(2), False)
    np.testing.assert_allclose(small, large, rtol=1e-5, atol=1e-5)


def test_specs_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match=r"width 0\.001 leaves a layer without channels"):
        cnn.Spec(width=0.001)
    with pytest.raises(ValueError, match="3 stages halve the image 3 times, but its size 12"):
        cnn.Spec(size=12)


def test_pooling_is_flax_s():
    x = jax.random.normal(jax.random.key(3), (2, 8, 6, 3))
    expected = linen.max_pool(x, (2, 2), (2, 2))
    np.testing.assert_array_equal(max_pool(x), expected)
    # Without equal pixels the gradients are the same, too.
    weights = jax.random.normal(jax.random.key(4), expected.shape)
    ours, theirs = (
        jax.grad(lambda x, pool=pool: jnp.vdot(pool(x), weights))(x)
        for pool in (max_pool, lambda x: linen.max_pool(x, (2, 2), (2, 2)))
    )
    np.testing.assert_array_equal(ours, theirs)
    equal = jax.grad(lambda x: max_pool(x).sum())(jnp.zeros((1, 2, 2, 1)))
    np.testing.assert_array_equal(equal, np.full((1, 2, 2, 1), 0.25))
