"""What each augmentation does to images: a grid of pictures, a row for each.

The first test images of CIFAR-10, each as it is and after draws of every operation, with keys that
follow from the seed; for mixup and cutmix other images of the batch are mixed in. Nothing is
trained, and nothing is expected: the picture is there to be looked at.

Command: python -m experiments augmentation_grid
Cost: less than a minute on 2 CPU cores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import effjax as ej
from effjax.core import Ctx, PyTree
from effjax.report import save
from effjax.report.canvas import new_figure, set_footer, style
from experiments.harness import data
from experiments.harness.config import check
from experiments.harness.provenance import brief, provenance
from experiments.harness.runs import open_run
from experiments.sparse_report import IMAGES

NAME = "augmentation_grid"


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seed: of the draws.
      images: pictures in a row.
      dataset: "cifar10"; "digits" needs no download.
      save: whether to write docs/images.
    """

    seed: int = 0
    images: int = 8
    dataset: Literal["cifar10", "fashion_mnist", "digits"] = "cifar10"
    save: bool = True

    def __post_init__(self) -> None:
        check(self, images=(2, 100))


def operations(side: int) -> dict[str, Any]:
    """{what to write beside the row: an operation, or a transform of a batch}."""
    aug = ej.augment
    return {
        "crop": aug.crop(side // 8),
        "flip": aug.flip(1.0),
        "translate": aug.translate(side // 8),
        "rotate": aug.rotate(30),
        "shear": aug.shear(0.3),
        "scale": aug.scale(0.6, 1.6),
        "brightness": aug.brightness(0.9),
        "contrast": aug.contrast(0.9),
        "colour": aug.colour(0.9),
        "sharpness": aug.sharpness(0.9),
        "autocontrast": aug.autocontrast(1.0),
        "equalise": aug.equalise(1.0),
        "invert": aug.invert(1.0),
        "solarise": aug.solarise(128, 1.0),
        "posterise": aug.posterise(2, 1.0),
        "erasing": aug.erasing(1.0),
        "cutout": aug.cutout(side // 2),
        "mixup": aug.mixup(1.0, classes=10),
        "cutmix": aug.cutmix(1.0, classes=10),
        "autoaugment": aug.autoaugment("cifar10"),
        "randaugment": aug.randaugment(2, 9),
        "trivialaugment": aug.trivialaugment(),
        "augmix": aug.augmix(),
    }


def transformed(what: Any, key: jax.Array, batch: PyTree) -> jax.Array:
    """The batch's images after an operation or a transform."""
    transform = what if isinstance(what, ej.Transform) else ej.augment.images(what)
    ctx = Ctx(jnp.zeros((), jnp.int32), key, None, train=True)
    run: Callable[..., Any] = jax.jit(lambda batch, ctx: transform.batch(batch, {}, ctx)["image"])
    return run(batch, ctx._replace(train=True))


def run(config: Config) -> dict[str, Any]:
    """Draws the grid."""
    here = open_run(NAME, config)
    split = data.load(config.dataset, validation=0).test
    image = split.image[: config.images].astype(np.float32)
    image /= 16 if config.dataset == "digits" else 255
    batch = {"image": jnp.asarray(image), "label": jnp.asarray(split.label[: config.images])}
    rows: dict[str, Any] = {"original": image}
    for i, (name, what) in enumerate(operations(image.shape[1]).items()):
        key = jax.random.fold_in(jax.random.key(config.seed), i)
        rows[name] = np.asarray(transformed(what, key, batch))
    source = brief(provenance(here.config))
    figure = grid(rows, source)
    save(figure, here.path / "report" / NAME, source)
    if config.save:
        save(figure, IMAGES / NAME, source, formats=["png"])
    here.finish({"rows": []})
    return {"rows": len(rows), "changed": sum(bool((x != image).any()) for x in rows.values())}


def grid(rows: dict[str, Any], source: Any) -> Any:
    """A row of pictures for each name."""
    columns = len(rows["original"])
    with style():
        figure, first = new_figure(0.5 * columns + 1.0, 0.5 * len(rows) + 0.2)
        first.remove()
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for line, (name, images) in zip(axes, rows.items(), strict=True):
            for place, picture in zip(line, images, strict=True):
                place.imshow(np.clip(picture.squeeze(), 0, 1), cmap="gray", vmin=0, vmax=1)
                place.set_xticks([])
                place.set_yticks([])
                place.spines[:].set_visible(False)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=6)
        set_footer(figure, source)
    return figure
