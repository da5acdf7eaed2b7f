"""Images mirrored and shifted by whole pixels."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from effjax.augment.images import Operation, check_probability
from effjax.errors import SetupError
from effjax.schedules import Scalar

Border = Literal["zero", "edge", "reflect"]
_MODES = {"zero": "constant", "edge": "edge", "reflect": "reflect"}


def flip(probability: Scalar = 0.5) -> Operation:
    """Mirrors left and right with a probability in [0, 1], perhaps traced.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> flip(1.0)(jax.random.key(0), jnp.array([[[1.0], [2.0]]])).ravel().tolist()
      [2.0, 1.0]
    """
    check_probability(probability, "a flip")

    def apply(key: Array, image: Array) -> Array:
        return jnp.where(jax.random.bernoulli(key, probability), image[:, ::-1], image)

    return apply


def translate(pixels: int, border: Border = "reflect") -> Operation:
    """Shifts by a whole number of pixels in -pixels .. pixels along each axis, uniformly.

    The same as a random crop of the padded image; see `crop`.

    Args:
      pixels: the largest shift.
      border: what comes in: zeros, the nearest pixel, or the image mirrored at its border pixel.

    Raises:
      SetupError: a negative number of pixels or an unknown border; when traced, a reflection of
        more pixels than an image has.

    Reference: He et al., "Deep residual learning for image recognition", 2016,
    https://arxiv.org/abs/1512.03385, section 4.2.
    """
    return _shifted(pixels, border, "translate")


def crop(padding: int = 4, border: Border = "zero") -> Operation:
    """A crop of the image's own size, anywhere in the image padded on all sides, uniformly.

    The usual "random crop with padding" of CIFAR-10; the same as `translate(padding, border)`.

    Args:
      padding: pixels added on each side.
      border: what they are: zeros (the mean of standardized images), the nearest pixel ("edge"),
        or the image mirrored at its border pixel ("reflect").

    Raises:
      SetupError: a negative padding or an unknown border; when traced, a reflection of more pixels
        than an image has.

    Reference: He et al., "Deep residual learning for image recognition", 2016,
    https://arxiv.org/abs/1512.03385, section 4.2.
    """
    return _shifted(padding, border, "crop")


def _shifted(pixels: int, border: Border, name: str) -> Operation:
    if pixels < 0 or border not in _MODES:
        raise SetupError(
            f"{name}({pixels}, {border!r}): give 0 pixels or more, and a border of {list(_MODES)}."
        )

    def apply(key: Array, image: Array) -> Array:
        if border == "reflect" and pixels >= min(image.shape[:2]):
            raise SetupError(
                f"{name}({pixels}) reflects more than an image of {image.shape[:2]} has; take "
                "fewer pixels, or border='edge'."
            )
        around = [(pixels, pixels), (pixels, pixels), (0, 0)]
        padded = jnp.pad(image, around, mode=_MODES[border])
        y, x = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
        return lax.dynamic_slice(padded, (y, x, 0), image.shape)

    return apply
