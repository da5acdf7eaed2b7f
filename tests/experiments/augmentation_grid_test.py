"""The grid of augmented pictures."""

from experiments import augmentation_grid


def test_every_operation_is_drawn_and_changes_something(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path))
    shown = augmentation_grid.operations(32)
    found = augmentation_grid.run(augmentation_grid.Config(images=4, dataset="digits", save=False))
    assert found["rows"] == len(shown) + 1
    assert found["changed"] >= len(shown) - 1  # colour leaves grey images as they are
    assert next(tmp_path.glob("*/*/report/augmentation_grid.png")).stat().st_size > 10_000
