"""Real data sets in memory, with a validation split held out of the training set."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.errors import ConfigError
from experiments.harness.fetch import SOURCES, Source, fetch

# Digits come without a test set of their own: this many examples, the same whatever the seed.
_DIGITS_TEST = 360


class Split(NamedTuple):
    """Examples of a data set."""

    image: np.ndarray  # uint8 [examples, height, width, channels]
    label: np.ndarray  # int32 [examples]

    def as_dict(self) -> dict[str, np.ndarray]:
        """{"image", "label"}, as `make_batches` and `evaluator` take it."""
        return self._asdict()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images with labels.

    shift, scale: float32 [channels]; (image - shift) * scale has mean 0 and deviation 1 over the
      training split, a channel at a time.
    route: where the data came from: "scikit-learn", "cache", "address", "npm", "apt".
    """

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split
    shift: np.ndarray
    scale: np.ndarray
    route: str

    @property
    def standard(self) -> dict[str, Any]:
        """{"shift", "scale"}, for `make_batches(..., **data.standard)` and `evaluator`."""
        return {"shift": self.shift, "scale": self.scale}


def load(name: str, *, seed: int = 0, validation: float = 0.1) -> Dataset:
    """Loads a data set: "digits", "mnist", "fashion_mnist" or "cifar10".

    digits is part of scikit-learn: 1,797 images of 8 x 8, values 0 to 16, of which 360 are the test
    set. The others are fetched once, checked by SHA-256 and cached; see `fetch`.

    Args:
      name: which.
      seed: chooses which training examples are held out for validation; the test set is the same
        for every seed.
      validation: the fraction of the training set that is held out, in [0, 0.9].

    Raises:
      ConfigError: no such data set, or a fraction outside its range.
      DataError: the data cannot be had, or is not what it should be.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"there is no data set {name!r}; there are {', '.join(NAMES)}.{hint}")
    if not 0.0 <= validation <= 0.9:
        raise ConfigError(f"validation is {validation}; it is a fraction between 0 and 0.9.")
    if name == "digits":
        train, test, route = *_digits(), "scikit-learn"
    else:
        files, route = fetch(SOURCES[name])
        train, test = parse(SOURCES[name], files)
    order = np.random.default_rng([seed, 0x5A11D]).permutation(len(train.label))
    held = round(validation * len(order))
    out, kept = np.sort(order[:held]), np.sort(order[held:])
    train, valid = _take(train, kept), _take(train, out)
    return Dataset(name, 10, train, valid, test, *_standard(train.image), route)


NAMES = ("digits", *SOURCES)


def _take(split: Split, indices: np.ndarray) -> Split:
    return Split(split.image[indices], split.label[indices])


def _standard(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each channel's mean and 1 / deviation, from exact integer sums."""
    channels = [image[..., c] for c in range(image.shape[-1])]
    sums = np.array([c.sum(dtype=np.uint64) for c in channels], np.float64)
    squares = np.array([np.square(c, dtype=np.uint16).sum(dtype=np.uint64) for c in channels])
    pixels = image[..., 0].size
    mean = sums / pixels
    deviation = np.sqrt(squares / pixels - mean**2)
    return mean.astype(np.float32), (1.0 / deviation).astype(np.float32)


def _digits() -> tuple[Split, Split]:
    from sklearn.datasets import load_digits

    raw = load_digits()
    whole = Split(raw.images[..., None].astype(np.uint8), raw.target.astype(np.int32))
    order = np.random.default_rng(1797).permutation(len(whole.label))
    return (
        _take(whole, np.sort(order[_DIGITS_TEST:])),
        _take(whole, np.sort(order[:_DIGITS_TEST])),
    )


def parse(source: Source, files: Mapping[str, bytes]) -> tuple[Split, Split]:
    """The train and test splits in a data set's canonical files."""
    if source.format == "idx":
        train, test = (
            Split(
                read_idx(files[f"{part}-images-idx3-ubyte"])[..., None],
                read_idx(files[f"{part}-labels-idx1-ubyte"]).astype(np.int32),
            )
            for part in ("train", "t10k")
        )
        return train, test
    names = [n for n in source.files if n != "test_batch.bin"]
    return read_records([files[n] for n in names]), read_records([files["test_batch.bin"]])


def read_idx(content: bytes) -> np.ndarray:
    """An array in the IDX format of unsigned bytes: two zeros, type 8, the number of axes, their
    sizes as big-endian 32-bit integers, the values."""
    axes = content[3]
    shape = tuple(np.frombuffer(content, ">u4", axes, 4).tolist())
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def read_records(contents: list[bytes]) -> Split:
    """CIFAR-10's binary files: records of a label and 3 x 32 x 32 values."""
    rows = np.concatenate([np.frombuffer(c, np.uint8).reshape(-1, 3073) for c in contents])
    image = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(image), rows[:, 0].astype(np.int32))


def shrunk(images: np.ndarray, pixels: int) -> np.ndarray:
    """Means over squares of pixels: float [n, pixels, pixels, channels].

    Raises:
      ConfigError: the size does not divide the images'.
    """
    n, size, _, channels = images.shape
    if size % pixels:
        raise ConfigError(f"images of {size} pixels have no equal squares for {pixels}.")
    square = size // pixels
    parts = images.reshape(n, pixels, square, pixels, square, channels)
    return parts.mean((2, 4), dtype=np.float32)


def smaller(found: Dataset, pixels: int) -> Dataset:
    """The data set with larger images shrunk."""
    if found.train.image.shape[1] <= pixels:
        return found
    return dataclasses.replace(
        found,
        **{
            name: (split := getattr(found, name))._replace(image=shrunk(split.image, pixels))
            for name in ("train", "validation", "test")
        },
    )
