"""Policies: what they draw, strengths, bounds, populations over magnitudes, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import augment
from effjax.augment import ops, policies, strengths
from effjax.errors import SetupError

IMAGE = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3)) / 255, jnp.float32)
KEYS = jax.random.split(jax.random.key(0), 64)
GRADED = tuple(n for n in ops.NAMES if n not in ("invert", "autocontrast", "equalise"))


def test_magnitude_is_traced_zero_is_the_identity_and_a_population_is_one_program():
    traces = []

    @jax.jit
    def run(magnitude):
        traces.append(1)
        operation = augment.randaugment(1, magnitude, operations=GRADED)
        return jax.vmap(operation, (0, None))(KEYS, IMAGE)

    still, strong = run(jnp.float32(0)), run(jnp.float32(10))
    assert len(traces) == 1
    np.testing.assert_allclose(still, jnp.broadcast_to(IMAGE, still.shape), atol=1e-6)
    changed = (jnp.abs(strong - IMAGE).max((1, 2, 3)) > 1e-3).mean()
    assert 0.7 < changed < 1  # the identity is one of 12
    assert strong.min() >= 0
    assert strong.max() <= 1 + 1e-6
    many = jax.vmap(run)(jnp.array([0.0, 10.0]))
    np.testing.assert_allclose(many, jnp.stack([still, strong]), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "at", "wanted"),
    [
        ("shear_x", 1.0, 0.3),
        ("translate_x", 1.0, 90 * 150 / 331),
        ("translate_y", 0.5, 80 * 75 / 331),
        ("rotate", 0.9, 27.0),
        ("contrast", 1.0, 1.9),
        ("posterise", 1.0, 4),
        ("posterise", 0.9, 5),
        ("solarise", 0.25, 192),
    ],
)
def test_strengths_by_hand(name, at, wanted):
    args = (jnp.int32(ops.INDEX[name]), at, jnp.float32(1), (80, 90, 3), strengths.Ranges())
    assert float(strengths.argument(*args)) == pytest.approx(wanted)


def test_autoaugments_factors_go_through_one():
    found = [
        strengths.argument(
            jnp.int32(ops.INDEX["colour"]),
            m / 10,
            jnp.float32(-1),
            (8, 8),
            strengths.Ranges(through=True),
        )
        for m in (0, 5, 9)
    ]
    np.testing.assert_allclose(found, [0.1, 1.0, 1.72], rtol=1e-5)


@pytest.mark.parametrize("policy", policies.POLICIES)
def test_published_policies_have_25_sub_policies_of_known_operations(policy):
    table = policies.POLICIES[policy]
    assert len(table) == 25
    for pair in table:
        assert len(pair) == 2
        for name, probability, magnitude in pair:
            assert name in ops.NAMES
            assert 0 <= probability <= 1
            assert 0 <= magnitude <= 9


BOUNDS = (-1.0, 1.0)


@pytest.mark.parametrize(
    ("operation", "channels", "dtype"),
    [
        (augment.autoaugment("svhn", bounds=BOUNDS), 3, "float32"),
        (augment.trivialaugment(bounds=BOUNDS), 1, "bfloat16"),
        (augment.augmix(bounds=BOUNDS, width=2, operations=("equalise", "rotate")), 3, "bfloat16"),
    ],
    ids=("autoaugment", "trivialaugment", "augmix"),
)
def test_shapes_types_and_bounds_are_kept_also_of_grey_images(operation, channels, dtype):
    image = (2 * IMAGE[..., :channels] - 1).astype(dtype)
    found = jax.jit(jax.vmap(operation, (0, None)))(KEYS[:16], image)
    assert (found.shape, found.dtype) == ((16, *image.shape), jnp.dtype(dtype))
    assert found.min() >= -1.01
    assert found.max() <= 1.01
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: augment.randaugment(0), "one operation or more"),
        (lambda: augment.randaugment(2, 11), "torchvision"),
        (lambda: augment.randaugment(2, -1.0), "0 .. 10"),
        (lambda: augment.randaugment(operations=("color",)), "color"),
        (lambda: augment.randaugment(operations=()), "draws from some"),
        (lambda: augment.autoaugment("cifar-10"), "Did you mean 'cifar10'"),
        (lambda: augment.augmix(0.0), "severity"),
        (lambda: augment.augmix(width=0), "one chain or more"),
        (lambda: augment.augmix(alpha=0.0), "alpha > 0"),
        (lambda: augment.trivialaugment(bounds=(1.0, 0.0)), "black is not below white"),
        (lambda: augment.cutout(-1), "0 pixels or more"),
        (lambda: augment.crop(-1), r"crop\(-1.*0 pixels"),
        (lambda: augment.crop(4, "wrap"), "wrap"),
        (lambda: augment.randaugment()(KEYS[0], jnp.zeros((4, 4, 2))), "no luminance"),
    ],
)
def test_what_is_refused(make, says):
    with pytest.raises(SetupError, match=says):
        make()


def test_cutout_is_one_square_cut_at_the_border():
    run = jax.jit(jax.vmap(augment.cutout(4, fill=-1.0), (0, None)))
    gone = np.asarray(run(KEYS, jnp.ones((12, 10, 1))))[..., 0] == -1
    sizes = gone.sum((1, 2))
    assert sizes.max() == 16
    assert sizes.min() >= 4
    for mask in gone:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


def test_crop_is_a_shift_over_zeros():
    np.testing.assert_array_equal(
        augment.crop(3)(KEYS[0], IMAGE), augment.translate(3, "zero")(KEYS[0], IMAGE)
    )
