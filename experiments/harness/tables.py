"""NAS-Bench-201 as a table: fetched once, checked by SHA-256, and cached."""

import difflib
import functools
import io
import pickle
from typing import Any

import numpy as np

from effjax.nas.tabular import Table, nasbench201
from experiments.harness.errors import ConfigError, DataError
from experiments.harness.fetch import NASBENCH201, fetch

DATASETS = ("cifar10", "cifar100", "imagenet")


@functools.cache
def load_table(dataset: str) -> Table:
    """The networks of NAS-Bench-201 trained for 200 epochs on a data set.

    Values are validation accuracies in per cent of two or three seeds. The published test
    accuracies are not in the package. The columns: "latency" in seconds and "parameters" in
    millions, medians over seeds (one number for all seeds, but for 204 cells, of which the package
    has different parameters for different seeds).

    Args:
      dataset: "cifar10" (trained on half of the training set, validated on the other half),
        "cifar100", or "imagenet" for ImageNet16-120.

    Raises:
      ConfigError: no such data set.
      DataError: the table cannot be had, or is not what it should be.
    """
    if dataset not in DATASETS:
        near = difflib.get_close_matches(dataset, DATASETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"there is no table {dataset!r}; there are {', '.join(DATASETS)}.{hint}")
    files, _ = fetch(NASBENCH201)
    return parse(files[f"{dataset}.pkl"])


class _Plain(pickle.Unpickler):
    """Reads dicts, lists, texts and numbers, and nothing that would run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise DataError(f"the table holds {module}.{name}; it should be plain dicts of numbers.")


def parse(content: bytes) -> Table:
    """A table from {six digits: {"val_acc", "train_time", "latency", "model_size": a number by
    seed}}, pickled."""
    raw = _Plain(io.BytesIO(content)).load()
    space = nasbench201()
    keys = ["".join(map(str, row)) for row in space.enumerate().tolist()]
    if sorted(raw) != sorted(keys):
        raise DataError(f"the table has {len(raw)} cells; it should have {len(keys)}.")
    seeds = max(len(raw[key]["val_acc"]) for key in keys)
    values = np.full((len(keys), seeds), np.nan)
    for row, key in enumerate(keys):
        found = raw[key]["val_acc"]
        values[row, : len(found)] = found

    def column(name: str) -> np.ndarray:
        return np.array([np.median(raw[key][name]) for key in keys])

    columns = {"latency": column("latency"), "parameters": column("model_size")}
    return Table(space, values, column("train_time"), columns)
