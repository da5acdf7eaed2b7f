"""Colour and geometry against Pillow, on random images of whole levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from effjax import augment
from effjax.augment import geometry, pixels
from effjax.errors import SetupError

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)
SMOOTH = np.linspace(40, 180, 20 * 24 * 3).reshape(20, 24, 3).astype(np.uint8)
GREY = NOISE[..., :1]
PICTURES = {"noise": NOISE, "smooth": SMOOTH, "grey": GREY}


def pillow(function, image):
    source = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
    return np.asarray(function(source), np.float32).reshape(image.shape)


def ours(function, image):
    return np.asarray(jax.jit(function)(jnp.asarray(image, jnp.float32)))


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.7])
@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (pixels.brightness, ImageEnhance.Brightness),
        (pixels.contrast, ImageEnhance.Contrast),
        (pixels.colour, ImageEnhance.Color),
        (pixels.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_blends_are_pillows_to_a_level(picture, factor, mine, theirs):
    image = PICTURES[picture]
    wanted = pillow(lambda source: theirs(source).enhance(factor), image)
    found = ours(lambda x: mine(x, factor), image)
    # Pillow rounds what it blends with, whose weight is 1 - factor, and the result.
    assert np.abs(found - wanted).max() <= 1.0 + abs(1 - factor)


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(
    ("mine", "theirs", "bound"),
    [
        (pixels.invert, ImageOps.invert, 0),
        (pixels.equalise, ImageOps.equalize, 0),
        (lambda x: pixels.solarise(x, 100), lambda x: ImageOps.solarize(x, 100), 0),
        (lambda x: pixels.posterise(x, 3), lambda x: ImageOps.posterize(x, 3), 0),
        (lambda x: pixels.posterise(x, 8), lambda x: ImageOps.posterize(x, 8), 0),
        (pixels.autocontrast, ImageOps.autocontrast, 1),
    ],
)
def test_maps_of_levels_are_pillows(picture, mine, theirs, bound):
    image = PICTURES[picture]
    assert np.abs(ours(mine, image) - pillow(theirs, image)).max() <= bound


@pytest.mark.parametrize("constant", [0, 17, 255])
def test_one_level_stays_one_level(constant):
    image = np.full((5, 4, 3), constant, np.uint8)
    for function in (pixels.equalise, pixels.autocontrast, lambda x: pixels.sharpness(x, 1.9)):
        np.testing.assert_allclose(ours(function, image), image, atol=1e-3)


def matrix(seed):
    rng = np.random.default_rng(seed)
    linear = np.eye(2) + 0.3 * rng.normal(size=(2, 2))
    return np.hstack([linear, rng.normal(size=(2, 1)) * 3]).astype(np.float32)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("method", "resample"), [("nearest", 0), ("bilinear", 2)])
def test_affine_maps_are_pillows(seed, method, resample):
    by = matrix(seed)
    size, fill = (24, 20), (7, 80, 200)
    wanted = pillow(
        lambda x: x.transform(size, Image.Transform.AFFINE, by.ravel(), resample, fillcolor=fill),
        NOISE,
    )
    found = ours(lambda x: geometry.affine(x, by, method, jnp.array(fill)), NOISE)
    near = np.abs(found - wanted).max(-1) <= 1
    # Places that fall on a pixel's border may go either way in another arithmetic.
    assert near.mean() > 0.99


def test_a_quarter_turn_and_a_doubling():
    image = jnp.asarray(NOISE[:20, :20], jnp.float32)
    turned = geometry.affine(image, geometry.about_centre(geometry.turning(90), image.shape))
    assert np.array_equal(turned, np.rot90(image))
    double = geometry.affine(image, geometry.about_centre(jnp.eye(2) / 2, image.shape))
    assert np.array_equal(double, np.repeat(np.repeat(image[5:15, 5:15], 2, 0), 2, 1))


@pytest.mark.parametrize(
    "operation",
    [
        augment.random_affine(),
        augment.rotate(0.0),
        augment.shear(0.0),
        augment.scale(1.0, 1.0),
        *(getattr(augment, n)(0.0) for n in ("brightness", "contrast", "colour", "sharpness")),
        *(getattr(augment, n)(probability=0.0) for n in ("invert", "solarise", "posterise")),
        *(getattr(augment, n)(probability=0.0) for n in ("equalise", "autocontrast")),
    ],
)
def test_strength_zero_changes_nothing(operation):
    image = jnp.asarray(NOISE / 255, jnp.float32)
    found = jax.jit(operation)(jax.random.key(0), image)
    np.testing.assert_allclose(found, image, atol=2e-6)
    assert found.dtype == image.dtype


def test_bounds_are_those_of_the_batch():
    unit = jnp.asarray(NOISE / 255, jnp.float32)
    mean, std = jnp.array([0.5, 0.4, 0.3]), jnp.array([0.2, 0.25, 0.3])
    bounds = ((0 - mean) / std, (1 - mean) / std)
    for make in (augment.invert, augment.equalise, augment.solarise):
        plain = make(probability=1.0)(jax.random.key(0), unit)
        moved = make(probability=1.0, bounds=bounds)(jax.random.key(0), (unit - mean) / std)
        np.testing.assert_allclose(moved * std + mean, plain, atol=1e-5)


def test_angles_and_factors_are_drawn_from_the_whole_range():
    image = jnp.zeros((21, 21, 1)).at[10, 20].set(1.0)  # a point to the right of the middle
    keys = jax.random.split(jax.random.key(1), 300)
    found = jax.jit(jax.vmap(augment.rotate(30.0), (0, None)))(keys, image)[..., 0]
    rows = (found * jnp.arange(21)[:, None]).sum((1, 2)) / found.sum((1, 2))
    angles = np.degrees(np.arcsin((10 - np.asarray(rows)) / 10))
    assert angles.min() < -24
    assert angles.max() > 24
    assert abs(np.mean(angles)) < 4
    grey = jnp.full((3, 3, 3), 0.5)
    levels = jax.vmap(augment.brightness(0.5), (0, None))(keys, grey)[:, 0, 0, 0]
    assert 0.25 <= levels.min() < 0.27
    assert 0.73 < levels.max() <= 0.75


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: augment.rotate(-1.0), "degrees=-1.0"),
        (lambda: augment.scale(2.0, 1.0), "smallest, largest"),
        (lambda: augment.random_affine(method="cubic"), "cubic"),
        (lambda: augment.brightness(-0.5), "strength=-0.5"),
        (lambda: augment.brightness(0.5, bounds=(1.0, 0.0)), "black is not below white"),
        (lambda: augment.posterise(9), "8 bits"),
        (lambda: augment.solarise(300), "0 .. 256"),
        (lambda: augment.invert(2.0), "probability"),
        (lambda: pixels.grey(jnp.zeros((2, 2, 4))), "no luminance"),
    ],
)
def test_what_is_refused(make, says):
    with pytest.raises(SetupError, match=says):
        make()
