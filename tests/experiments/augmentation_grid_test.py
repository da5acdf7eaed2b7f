"""The grid of augmented pictures."""

from effjax import augment
from experiments import augmentation_grid


def test_every_augmentation_of_images_has_a_row():
    text = {"TokenOperation", "tokens", "token_dropout", "swap", "span_mask"}
    others = {"Operation", "images", "random_affine"}  # the last by rotate, shear and scale
    assert set(augmentation_grid.operations(32)) == set(augment.__all__) - text - others


def test_rows_are_drawn_and_change_something(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    shown = augmentation_grid.operations(8)
    few = {name: shown[name] for name in ("flip", "colour", "cutout", "mixup")}
    monkeypatch.setattr(augmentation_grid, "operations", lambda side: few)
    found = augmentation_grid.run(augmentation_grid.Config(images=4, dataset="digits", save=False))
    assert found["rows"] == 5
    assert found["changed"] >= 3  # colour leaves grey images as they are, but for rounding
    assert next(tmp_path.glob("*/*/report/augmentation_grid.png")).stat().st_size > 3_000
