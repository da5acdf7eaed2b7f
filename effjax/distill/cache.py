"""A teacher's logits on disk: it runs once over a data set, and students learn from the file."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.core import Apply, PyTree
from effjax.digest import digest, digests
from effjax.distill.losses import check_logits
from effjax.distill.targets import top_k
from effjax.distill.teachers import Teacher, cast, check_apply, check_teacher
from effjax.errors import SetupError
from effjax.select import leaves

_MANIFEST, _PROGRESS = "manifest.json", "progress.json"
_CHUNK = 1024  # examples hashed at a time, and written between two notes of progress
LOGITS, VALUES, INDICES = "teacher_logits", "teacher_values", "teacher_indices"


class Cached(NamedTuple):
    """Logits that come with the batch instead of from a teacher: `distill.logits(cache.targets)`.

    classes: of the teacher.
    k: how many of them are kept; 0 for all.
    """

    classes: int
    k: int


class Cache(NamedTuple):
    """A teacher's logits for each example of a data set, as memory-mapped arrays.

    arrays: {"teacher_logits": [examples, classes]}, or of the k largest {"teacher_values":
      [examples, k], "teacher_indices": int32 [examples, k]}; entries of a batch, by example.
    left_out: [examples], the probability, at temperature 1, of the classes that were not kept.
    targets: what `distill.logits` takes in the place of a teacher.
    """

    arrays: dict[str, np.ndarray]
    left_out: np.ndarray
    targets: Cached

    def batch(self, indices: Any) -> dict[str, np.ndarray]:
        """The entries of these examples: `{**batch, **cache.batch(indices)}`."""
        return {name: np.asarray(x[indices]) for name, x in self.arrays.items()}


def write_cache(
    folder: str | os.PathLike[str],
    teacher: Apply,
    weights: Teacher,
    data: Mapping[str, Any],
    *,
    k: int | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    batch: int = 256,
    prepare: Callable[[dict[str, Array]], PyTree] = lambda batch: batch,
    teacher_logits: Callable[[PyTree], Array] = lambda outputs: outputs,
    teacher_dtype: Any = None,
) -> Cache:
    """Runs a teacher over a data set once, in its order, and keeps its logits in a folder.

    The folder appears, by a rename, when it is complete. Its parts are in FOLDER.partial before:
    after a kill the same call goes on where it stood. A folder that is there is opened as by
    `read_cache`, and the teacher then runs on the first batch alone, to see that it still says what
    is in the file.

    Targets belong to the examples as they are in `data`: a student that sees augmented images
    learns what the teacher says of the originals. Images that are mixed (mixup, cutmix) have other
    targets than any in a file; run the teacher in the step for those.

    Args:
      folder: where; its parent is made.
      teacher: `model.apply`, run in evaluation mode.
      weights: `Teacher(params, model_state)`.
      data: {name: array}, the examples along the first axis.
      k: keep the k largest logits of each example; all by default.
      dtype: of the values on disk.
      batch: examples the teacher sees at a time.
      prepare: from the data's entries to the batch that the teacher reads (standardizing).
      teacher_logits: from the teacher's outputs to its logits, floating [batch, classes].
      teacher_dtype: run the teacher in this dtype (`jnp.bfloat16`).

    Returns:
      The `Cache`.

    Raises:
      SetupError: the folder has the cache of another teacher, of other data or in another order, of
        another k or dtype; logits that are no [batch, classes], or beyond the dtype's range.

    Example:
      >>> import jax.numpy as jnp, numpy as np, tempfile
      >>> import effjax as ej
      >>> def apply(params, model_state, batch, key, train):
      ...     return batch["x"] @ params, model_state
      >>> data = {"x": np.eye(3, dtype=np.float32)}
      >>> folder = tempfile.mkdtemp() + "/teacher"
      >>> teacher = ej.distill.Teacher(jnp.eye(3), {})
      >>> cache = ej.distill.write_cache(folder, apply, teacher, data, k=1)
      >>> cache.batch([2, 0])["teacher_indices"].tolist()
      [[2], [0]]
    """
    check_apply("distill.write_cache", teacher)
    weights = check_teacher("distill.write_cache", weights)
    if dtype not in ("float16", "float32") or batch < 1:
        raise SetupError(
            f"write_cache got dtype={dtype!r}, batch={batch}; values are kept as 'float16' or "
            "'float32', of one example at a time or more."
        )
    path, examples = Path(folder), _examples(data)

    @jax.jit
    def run(weights: Teacher, rows: dict[str, Array]) -> Array:
        params, given = cast((weights.params, prepare(rows)), teacher_dtype)
        found, _ = teacher(params, weights.model_state, given, jax.random.key(0), False)
        return teacher_logits(found).astype(jnp.float32)

    def rows_at(start: int) -> dict[str, Array]:
        # The last batch reaches back, so that one program serves all.
        return {n: jnp.asarray(x[start : start + batch]) for n, x in data.items()}

    batch = min(batch, examples)
    shape = jax.eval_shape(run, weights, jax.eval_shape(lambda: rows_at(0)))
    check_logits(shape, shape)
    if shape.shape[:-1] != (batch,):
        raise SetupError(
            f"the teacher's logits for {batch} examples have shape {list(shape.shape)}; a cache "
            "keeps [batch, classes]."
        )
    classes = shape.shape[-1]
    if k is not None and not 1 <= k <= classes:
        raise SetupError(f"k={k} of the teacher's {classes} classes; 1 <= k <= classes.")
    wanted = {
        **_fingerprints(weights, data),
        "examples": examples,
        "classes": classes,
        "k": k or 0,
        "dtype": dtype,
    }

    def fields(start: int) -> dict[str, np.ndarray]:
        return jax.device_get(_kept(run(weights, rows_at(start)), k))

    if path.exists():
        cache = _open(path, wanted)
        name = VALUES if k else LOGITS
        now, then = fields(0)[name], np.asarray(cache.arrays[name][:batch], np.float32)
        # The same program on another machine rounds otherwise, float16 at its eleventh bit.
        if not np.allclose(now, then, rtol=2e-2, atol=2e-2 * max(1.0, float(np.abs(then).max()))):
            raise SetupError(
                f"the cache in {path} is of this teacher's weights and this data, but the teacher "
                f"now gives other logits, by up to {np.abs(now - then).max():.3g}: its function, "
                "`prepare` or `teacher_logits` has changed. Give another folder."
            )
        return cache
    partial = path.with_name(path.name + ".partial")
    files, done = _resume(partial, wanted)
    for start in range(done, examples, batch):
        begin = min(start, examples - batch)
        for name, found in fields(begin).items():
            with np.errstate(over="ignore"):
                values = found.astype(files[name].dtype)
            if not np.isfinite(values).all():
                raise SetupError(
                    f"the teacher's logits of examples {begin} to {begin + batch - 1} reach "
                    f"{np.abs(found).max():.3g}, which {dtype} cannot hold. Use dtype='float32', "
                    "or look for NaN in the teacher."
                )
            files[name][begin : begin + batch] = values
        if start // _CHUNK != (start + batch) // _CHUNK:
            _note(partial, files, wanted, start + batch)
    for file in files.values():
        file.flush()
    (partial / _PROGRESS).unlink(missing_ok=True)
    _write_json(partial / _MANIFEST, wanted)
    os.replace(partial, path)
    return _open(path, wanted)


def read_cache(folder: str | os.PathLike[str], weights: Teacher, data: Mapping[str, Any]) -> Cache:
    """Opens what `write_cache` has written, for this teacher and this data in this order.

    Args:
      folder: the cache's.
      weights: of the teacher that is meant.
      data: {name: array} as it was given to `write_cache`.

    Raises:
      SetupError: there is no cache, or it is another teacher's, of other data or in another order,
        or a file of it is damaged.
    """
    return _open(Path(folder), {**_fingerprints(weights, data), "examples": _examples(data)})


def _kept(logits: Array, k: int | None) -> dict[str, Array]:
    if k is None:
        return {LOGITS: logits, "left_out": jnp.zeros(len(logits), jnp.float32)}
    best = top_k(logits, k)
    share = jnp.sum(
        jnp.exp(best.values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)), axis=-1
    )
    left_out = jnp.clip(1.0 - share, 0.0, 1.0)
    return {VALUES: best.values, INDICES: best.indices, "left_out": left_out}


def _files(manifest: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape)} of the cache's arrays."""
    n, k, dtype = manifest["examples"], manifest["k"], manifest["dtype"]
    found = {VALUES: (dtype, (n, k)), INDICES: ("int32", (n, k))} if k else {}
    return (found or {LOGITS: (dtype, (n, manifest["classes"]))}) | {"left_out": ("float32", (n,))}


def _examples(data: Mapping[str, Any]) -> int:
    lengths = {name: len(x) for name, x in data.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise SetupError(
            f"a cache is of examples along the first axis of every array; these have {lengths}."
        )
    return next(iter(lengths.values()))


def _fingerprints(weights: Teacher, data: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the teacher's weights, of the examples whatever their order, and in order."""
    named = leaves(tuple(weights))
    hashed = zip(named, digests(list(named.values())), strict=True)
    in_order, content = hashlib.sha256(), np.zeros(2, np.uint32)
    for start in range(0, _examples(data), _CHUNK):
        rows = [_each(jnp.asarray(data[name][start : start + _CHUNK])) for name in sorted(data)]
        of_examples = np.asarray(_each(jnp.concatenate(rows, axis=1)))
        in_order.update(of_examples.tobytes())
        content += of_examples.sum(axis=0, dtype=np.uint32)
    return {
        "teacher": hashlib.sha256(json.dumps(list(hashed)).encode()).hexdigest()[:16],
        "data": "".join(f"{int(word):08x}" for word in content) + "-" + "+".join(sorted(data)),
        "order": in_order.hexdigest()[:16],
    }


_each = jax.jit(jax.vmap(digest))

_MEANS = {
    "teacher": "was written with other weights than the teacher's that is given",
    "data": "is of other data (the examples or their entries differ)",
    "order": "is of the same data in another order: its rows would go to the wrong examples",
    "examples": "is of another number of examples",
    "classes": "has another number of classes",
    "k": "keeps another number of logits an example (k, 0 for all)",
    "dtype": "has values of another dtype",
}


def _open(path: Path, wanted: Mapping[str, Any]) -> Cache:
    """The cache in a folder, after its manifest and the sizes of its files were checked."""
    if not (path / _MANIFEST).exists():
        raise SetupError(f"{path} has no {_MANIFEST}: no cache is there. Make it by write_cache.")
    manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    for name, means in _MEANS.items():
        if name in wanted and manifest.get(name) != wanted[name]:
            raise SetupError(
                f"the cache in {path} {means}: it has {name} {manifest.get(name)!r}, not "
                f"{wanted[name]!r}. Give what it was written with, or write one in another folder."
            )
    arrays = {}
    for name, (dtype, shape) in _files(manifest).items():
        file = path / f"{name}.npy"
        try:
            arrays[name] = np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise SetupError(
                f"{file} cannot be read: {error}. The file is missing or was cut short; delete the "
                "folder and write the cache again."
            ) from error
        if arrays[name].shape != shape or arrays[name].dtype != dtype:
            raise SetupError(
                f"{file} is {arrays[name].dtype}{list(arrays[name].shape)}, and the manifest says "
                f"{dtype}{list(shape)}. Delete the folder and write the cache again."
            )
    left_out = arrays.pop("left_out")
    return Cache(arrays, left_out, Cached(manifest["classes"], manifest["k"]))


def _resume(partial: Path, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The files being written, and how many examples they have; begun anew unless they fit."""
    try:
        progress = json.loads((partial / _PROGRESS).read_text(encoding="utf-8"))
        if progress["wanted"] == wanted:
            files = {n: np.load(partial / f"{n}.npy", mmap_mode="r+") for n in _files(wanted)}
            return files, progress["done"]
    except (OSError, ValueError, KeyError):
        pass  # Nothing there, or not enough of it.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    create = np.lib.format.open_memmap
    sizes = _files(wanted).items()
    return {n: create(partial / f"{n}.npy", "w+", t, shape) for n, (t, shape) in sizes}, 0


def _note(partial: Path, files: Mapping[str, Any], wanted: Mapping[str, Any], done: int) -> None:
    for file in files.values():
        file.flush()
    _write_json(partial / _PROGRESS, {"wanted": dict(wanted), "done": done})


def _write_json(path: Path, content: Any) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
