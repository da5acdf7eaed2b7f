"""Every operation that policies draw from, against Pillow, on one compiled function for all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from effjax.augment import geometry, ops
from effjax.errors import SetupError

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)
RAMP = np.linspace(40, 180, 20 * 24 * 3).reshape(20, 24, 3).astype(np.uint8)
GREY = RNG.integers(30, 200, (20, 24, 1), dtype=np.uint8)
PICTURES = {"noise": NOISE, "ramp": RAMP, "grey": GREY, "flat": np.full((20, 24, 3), 77, np.uint8)}
FILL = (7, 80, 200)

run = jax.jit(ops.apply)


def ours(image, name, argument):
    fill = jnp.array(FILL[: image.shape[-1]], jnp.uint8)
    return np.asarray(run(image, chosen(name), jnp.float32([argument]), fill))


def chosen(name):
    return jnp.int32([ops.INDEX[name]])


def affine(image, matrix):
    fill = FILL if image.mode == "RGB" else FILL[0]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=fill)


def rotate(image, degrees):
    return image.rotate(degrees, fillcolor=FILL if image.mode == "RGB" else FILL[0])


def enhance(kind):
    return lambda image, factor: kind(image).enhance(factor)


PILLOW = {
    "identity": lambda image, a: image,
    "shear_x": lambda image, a: affine(image, (1, a, 0, 0, 1, 0)),
    "shear_y": lambda image, a: affine(image, (1, 0, 0, a, 1, 0)),
    "translate_x": lambda image, a: affine(image, (1, 0, a, 0, 1, 0)),
    "translate_y": lambda image, a: affine(image, (1, 0, 0, 0, 1, a)),
    "rotate": rotate,
    "colour": enhance(ImageEnhance.Color),
    "sharpness": enhance(ImageEnhance.Sharpness),
    "brightness": enhance(ImageEnhance.Brightness),
    "contrast": enhance(ImageEnhance.Contrast),
    "posterise": lambda image, a: ImageOps.posterize(image, int(a)),
    "solarise": ImageOps.solarize,
    "invert": lambda image, a: ImageOps.invert(image),
    "autocontrast": lambda image, a: ImageOps.autocontrast(image),
    "equalise": lambda image, a: ImageOps.equalize(image),
}
ARGUMENTS = {
    **dict.fromkeys(("shear_x", "shear_y"), (0.27, -0.31, 0.0)),
    **dict.fromkeys(("translate_x", "translate_y"), (3.0, -4.6, 9.0)),
    "rotate": (27.0, -13.0, 90.0, 0.0),
    **dict.fromkeys(("colour", "sharpness", "brightness", "contrast"), (0.1, 0.73, 1.0, 1.9)),
    "posterise": (1.0, 5.0, 8.0),
    "solarise": (0.0, 100.0, 256.0),
}


@pytest.mark.parametrize("name", ops.NAMES)
@pytest.mark.parametrize("picture", PICTURES)
def test_each_operation_is_pillows_to_one_level(picture, name):
    image = PICTURES[picture]
    source = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
    for argument in ARGUMENTS.get(name, (0.0,)):
        wanted = np.asarray(PILLOW[name](source, argument)).reshape(image.shape)
        found = ours(image, name, argument)
        assert found.dtype == np.uint8
        away = np.abs(found.astype(int) - wanted)
        if name in ops.WARPS:
            # A place on the border of two pixels may go either way in another arithmetic.
            assert (away.max(-1) > 0).mean() <= 0.01
        else:
            assert away.max() <= 1


def test_the_table_of_pillows_operations_is_complete():
    assert set(PILLOW) == set(ops.NAMES)


def test_operations_follow_one_another():
    fill = jnp.array(FILL, jnp.uint8)
    names, arguments = ("equalise", "sharpness", "rotate"), (0.0, 1.9, 20.0)
    choices = jnp.concatenate([chosen(name) for name in names])
    wanted = NOISE
    for name, argument in zip(names, arguments, strict=True):
        wanted = ours(wanted, name, argument)
    np.testing.assert_array_equal(run(NOISE, choices, jnp.float32(arguments), fill), wanted)


def test_stages_that_are_left_out_do_not_change_the_others():
    fill = jnp.array(FILL, jnp.uint8)
    for names in (("rotate", "shear_x"), ("colour",), ("equalise", "contrast")):
        for name in names:
            argument = jnp.float32([0.3])
            alone = ops.apply(jnp.asarray(NOISE), chosen(name), argument, fill, names)
            np.testing.assert_array_equal(alone, ours(NOISE, name, 0.3))


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_warps_take_any_number_of_channels(channels):
    image = jnp.asarray(RNG.integers(0, 256, (8, 9, channels), dtype=np.uint8))
    fill = jnp.arange(channels, dtype=jnp.uint8)
    found = ops.apply(image, chosen("shear_x"), jnp.float32([0.4]), fill, ops.WARPS)
    matrix = jnp.array([[1, 0.4, 0], [0, 1, 0]])
    np.testing.assert_array_equal(found, geometry.affine(image, matrix, fill=fill))


def test_what_needs_a_luminance_refuses_other_images():
    with pytest.raises(SetupError, match="no luminance"):
        ours(np.zeros((4, 4, 2), np.uint8), "identity", 0.0)
