"""Images with a part taken out."""

import jax
import jax.numpy as jnp
from jax import Array

from effjax.augment.images import Operation, check_probability
from effjax.errors import SetupError
from effjax.schedules import Scalar, is_traced


def erasing(
    probability: Scalar = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    fill: Scalar = 0.0,
) -> Operation:
    """Random erasing: with a probability, a rectangle anywhere in the image is filled.

    Its area is uniform in `area`, its height over its width log-uniform in `aspect`; a rectangle
    that is longer than the image is cut to it (the paper draws again; and its aspect is uniform).

    Args:
      probability: in [0, 1], perhaps traced.
      area: (smallest, largest), as fractions of the image's.
      aspect: (smallest, largest).
      fill: the value, 0 being the mean of standardized images. The paper prefers noise.

    Raises:
      SetupError: an area outside (0, 1], or bounds in the wrong order.

    Reference: Zhong et al., "Random erasing data augmentation", 2017,
    https://arxiv.org/abs/1708.04896.
    """
    check_probability(probability, "random erasing")
    if not 0 < area[0] <= area[1] <= 1 or not 0 < aspect[0] <= aspect[1]:
        raise SetupError(
            f"erasing(area={area}, aspect={aspect}): areas are fractions of the image, as "
            "(smallest, largest) in (0, 1]; aspects are (smallest, largest), above 0."
        )

    def apply(key: Array, image: Array) -> Array:
        chance, size, shape, place = jax.random.split(key, 4)
        height, width = image.shape[:2]
        pixels = jax.random.uniform(size, (), minval=area[0], maxval=area[1]) * height * width
        low, high = jnp.log(jnp.array(aspect))
        ratio = jnp.exp(jax.random.uniform(shape, (), minval=low, maxval=high))
        lengths = jnp.round(jnp.sqrt(pixels * jnp.stack([ratio, 1 / ratio])))
        sides = jnp.array([height, width])
        lengths = jnp.clip(lengths.astype(jnp.int32), 1, sides)
        start = jax.random.randint(place, (2,), 0, sides - lengths + 1)
        rows, columns = (
            (jnp.arange(n) >= start[i]) & (jnp.arange(n) < start[i] + lengths[i])
            for i, n in enumerate((height, width))
        )
        inside = (rows[:, None] & columns[None, :])[..., None]
        gone = inside & jax.random.bernoulli(chance, probability)
        return jnp.where(gone, jnp.asarray(fill, image.dtype), image)

    return apply


def cutout(size: Scalar, probability: Scalar = 1.0, fill: Scalar = 0.0) -> Operation:
    """A square of the image is filled; its middle is uniform, what lies outside is cut off.

    Args:
      size: the square's side in pixels, perhaps traced; the paper has 16 for CIFAR-10 and 8 for
        CIFAR-100, with flips and crops.
      probability: in [0, 1], perhaps traced; the paper's is 1.
      fill: the value, 0 being the mean of standardized images.

    Raises:
      SetupError: a negative size.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> image = cutout(8)(jax.random.key(0), jnp.ones((4, 4, 1)))
      >>> bool((image == 0).any())
      True

    Reference: DeVries and Taylor, "Improved regularization of convolutional neural networks with
    cutout", 2017, https://arxiv.org/abs/1708.04552.
    """
    check_probability(probability, "cutout")
    if not is_traced(size) and size < 0:
        raise SetupError(f"cutout({size}): give the side of the square, 0 pixels or more.")

    def apply(key: Array, image: Array) -> Array:
        chance, place = jax.random.split(key)
        sides = jnp.array(image.shape[:2])
        start = jax.random.randint(place, (2,), 0, sides) - jnp.asarray(size) // 2
        rows, columns = (
            (jnp.arange(n) >= start[i]) & (jnp.arange(n) < start[i] + size)
            for i, n in enumerate(image.shape[:2])
        )
        inside = (rows[:, None] & columns[None, :])[..., None]
        gone = inside & jax.random.bernoulli(chance, probability)
        return jnp.where(gone, jnp.asarray(fill, image.dtype), image)

    return apply
