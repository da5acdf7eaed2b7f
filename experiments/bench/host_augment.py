"""Augmentation on the host, as a data loader does it: NumPy on the batch, Pillow on each image.

Each function takes a NumPy generator and a batch, uint8 [batch, height, width, 3] or tokens int
[batch, length], and returns the augmented batch. Draws are NumPy's.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from effjax.augment import ops, policies
from effjax.augment.augmix import OPERATIONS as AUGMIX
from effjax.augment.randaugment import OPERATIONS

Host = Callable[[np.random.Generator, np.ndarray], np.ndarray]
OnImage = Callable[[Image.Image, float], Image.Image]  # (image, a draw in -1 .. 1)


def _affine(matrix: Callable[[float], tuple[float, ...]], method: int = 0) -> OnImage:
    def run(image: Image.Image, draw: float) -> Image.Image:
        transform, resample = Image.Transform.AFFINE, Image.Resampling(method)
        return image.transform(image.size, transform, matrix(draw), resample)

    return run


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> OnImage:
    return lambda image, draw: kind(image).enhance(1 + 0.9 * draw)


PILLOW: dict[str, OnImage] = {
    "identity": lambda image, draw: image,
    "shear_x": _affine(lambda d: (1, 0.3 * d, 0, 0, 1, 0)),
    "shear_y": _affine(lambda d: (1, 0, 0, 0.3 * d, 1, 0)),
    "translate_x": _affine(lambda d: (1, 0, 14 * d, 0, 1, 0)),
    "translate_y": _affine(lambda d: (1, 0, 0, 0, 1, 14 * d)),
    "rotate": lambda image, draw: image.rotate(30 * draw),
    "colour": _enhance(ImageEnhance.Color),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "brightness": _enhance(ImageEnhance.Brightness),
    "contrast": _enhance(ImageEnhance.Contrast),
    "posterise": lambda image, draw: ImageOps.posterize(image, 4),
    "solarise": lambda image, draw: ImageOps.solarize(image, 128),
    "invert": lambda image, draw: ImageOps.invert(image),
    "autocontrast": lambda image, draw: ImageOps.autocontrast(image),
    "equalise": lambda image, draw: ImageOps.equalize(image),
}
"""What the policies draw from, by the names of `effjax.augment.ops`."""


def each(operation: OnImage) -> Host:
    """One of Pillow's operations on each image of a batch."""

    def run(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
        draws = rng.uniform(-1, 1, len(images)).tolist()
        done = (operation(Image.fromarray(x), d) for x, d in zip(images, draws, strict=True))
        return np.stack([np.asarray(x) for x in done])

    return run


def flip(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    return np.where(rng.random((len(images), 1, 1, 1)) < 0.5, images[:, :, ::-1], images)


def cropped(padding: int, mode: str) -> Host:
    """A crop of the padded image, of its own size."""

    def run(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
        side = [(padding, padding)] * 2
        padded = np.pad(images, [(0, 0), *side, (0, 0)], mode=mode)  # type: ignore[call-overload]
        starts = rng.integers(0, 2 * padding + 1, (len(images), 2)).tolist()
        height, width = images.shape[1:3]
        crops = (p[y : y + height, x : x + width] for p, (y, x) in zip(padded, starts, strict=True))
        return np.stack(list(crops))

    return run


def erased(length: int) -> Host:
    """A square of each image is filled, which may reach over the border."""

    def run(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
        found = images.copy()
        middles = rng.integers(0, images.shape[1:3], (len(images), 2)).tolist()
        for image, (y, x) in zip(found, middles, strict=True):
            top, left = max(0, y - length // 2), max(0, x - length // 2)
            image[top : y + length // 2, left : x + length // 2] = 0
        return found

    return run


def mixup(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    share = rng.beta(1, 1, (len(images), 1, 1, 1)).astype(np.float32)
    return share * images + (1 - share) * images[rng.permutation(len(images))]


def cutmix(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    found, other = images.copy(), images[rng.permutation(len(images))]
    sides = np.array(images.shape[1:3])
    half = (sides * np.sqrt(1 - rng.beta(1, 1, (len(images), 1)))).astype(int) // 2
    middle = rng.integers(0, sides, (len(images), 2))
    starts, ends = np.maximum(middle - half, 0).tolist(), (middle + half).tolist()
    for i, ((top, left), (bottom, right)) in enumerate(zip(starts, ends, strict=True)):
        found[i, top:bottom, left:right] = other[i, top:bottom, left:right]
    return found


def drawn(names: tuple[str, ...], count: int) -> Host:
    """RandAugment, or TrivialAugment where `count` is 1."""

    def run(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
        choices = rng.integers(0, len(names), (len(images), count)).tolist()
        signs = rng.choice([-1.0, 1.0], (len(images), count)).tolist()
        found = np.empty_like(images)
        for i, image in enumerate(images):
            picture = Image.fromarray(image)
            for choice, sign in zip(choices[i], signs[i], strict=True):
                picture = PILLOW[names[choice]](picture, 0.9 * sign)
            found[i] = picture
        return found

    return run


def autoaugment(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    policy = policies.CIFAR10
    choices = rng.integers(0, len(policy), len(images)).tolist()
    chances, draws = (x.tolist() for x in rng.uniform(-1, 1, (2, len(images), 2)))
    found = np.empty_like(images)
    for i, image in enumerate(images):
        picture = Image.fromarray(image)
        for step, chance, draw in zip(policy[choices[i]], chances[i], draws[i], strict=True):
            name, probability, _ = step
            if abs(chance) < probability:
                picture = PILLOW[name](picture, draw)
        found[i] = picture
    return found


def mixed(width: int = 3, depth: int = 3) -> Host:
    """AugMix."""

    def run(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
        weights = rng.dirichlet([1.0] * width, len(images)).astype(np.float32)
        share = rng.beta(1, 1, (len(images), 1, 1, 1)).astype(np.float32)
        lengths = rng.integers(1, depth + 1, (len(images), width)).tolist()
        total = np.zeros(images.shape, np.float32)
        for i, image in enumerate(images):
            for chain, length in enumerate(lengths[i]):
                picture = Image.fromarray(image)
                for choice in rng.integers(0, len(AUGMIX), length):
                    picture = PILLOW[AUGMIX[choice]](picture, 0.3)
                total[i] += weights[i, chain] * np.asarray(picture)
        return share * images + (1 - share) * total

    return run


def token_dropout(rng: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
    return np.where(rng.random(tokens.shape) < 0.1, 0, tokens)


def swap(rng: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
    found, rows = tokens.copy(), np.arange(len(tokens))
    first = rng.integers(0, tokens.shape[1], len(tokens))
    second = (first + rng.integers(1, tokens.shape[1], len(tokens))) % tokens.shape[1]
    found[rows, first], found[rows, second] = tokens[rows, second], tokens[rows, first]
    return found


def span_mask(rng: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
    found = tokens.copy()
    starts = rng.random(tokens.shape) < 0.04
    for row, start in zip(*np.nonzero(starts), strict=True):
        found[row, start : start + min(rng.geometric(0.2), 10)] = 0
    return found


SMOOTH = int(Image.Resampling.BILINEAR)
HOST: dict[str, Host] = {
    "flip": flip,
    "crop": cropped(4, "constant"),
    "translate": cropped(4, "reflect"),
    "rotate": each(lambda image, d: image.rotate(30 * d, Image.Resampling.BILINEAR)),
    "shear": each(_affine(lambda d: (1, 0.3 * d, 0, 0.3 * d, 1, 0), SMOOTH)),
    "scale": each(_affine(lambda d: (1 + d / 3, 0, -5 * d, 0, 1 + d / 3, -5 * d), SMOOTH)),
    **{n: each(PILLOW[n]) for n in (*ops.BLENDS, *ops.LEVELS)},
    "erasing": erased(14),
    "cutout": erased(16),
    "mixup": mixup,
    "cutmix": cutmix,
    "autoaugment": autoaugment,
    "randaugment": drawn(OPERATIONS, 2),
    "trivialaugment": drawn(OPERATIONS, 1),
    "augmix": mixed(),
    "token_dropout": token_dropout,
    "swap": swap,
    "span_mask": span_mask,
}
"""By the names of `effjax.augment`."""
