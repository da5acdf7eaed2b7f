"""Checkpoints that are known to be whole: saved by orbax, digested leaf by leaf, and read from the
newest that still holds what was written."""

import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array

from effjax.bits import Packing, pack, packed_sharding, packing, unpack
from effjax.core import PyTree
from effjax.digest import digests, is_key, plain
from effjax.errors import CheckpointError
from effjax.manifest import (
    FORMAT,
    DamagedError,
    as_array,
    brief,
    check_files,
    check_match,
    entries_of,
    record_of,
    seal_files,
    sha256_of,
)


class CheckpointWarning(UserWarning):
    """A checkpoint could not be read, and an earlier one was taken."""


class Restored(NamedTuple):
    """What was read, and what could not be."""

    step: int
    tree: PyTree
    metadata: dict[str, Any]
    skipped: tuple[tuple[int, str], ...]  # (step, why) of the newer ones that were passed over


class Checkpoints:
    """A folder of checkpoints, one subfolder a step.

    Writing is asynchronous and atomic: `save` returns when the values are copied, so that the
    caller may donate them to the next step, and the folder gets its name when it is complete. Then
    the SHA-256 of its files is noted in it, and with every leaf goes a digest of its bits as they
    were on the device. `restore` compares both: a flipped byte, a cut or missing file or a
    half-written folder is noticed, and the checkpoint before is taken instead, with a warning.
    Masks are stored as bits, which every device packs for its own shard (`effjax.bits`).

    Args:
      directory: made when something is saved.
      keep: how many to keep; 2 or more, so that there is one to fall back to.

    Raises:
      CheckpointError: `keep` is less than 2.

    Example:
      >>> import tempfile
      >>> import jax, jax.numpy as jnp
      >>> from effjax.checkpoint import Checkpoints
      >>> state = {"key": jax.random.key(0), "kernel": jnp.arange(3.0)}
      >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
      ...     checkpoints.save(10, state, {"epoch": 1})
      ...     found = checkpoints.restore(state)
      >>> found.step, found.metadata, found.tree["kernel"].tolist()
      (10, {'epoch': 1}, [0.0, 1.0, 2.0])
    """

    def __init__(self, directory: str | Path, *, keep: int = 2):
        if keep < 2:
            raise CheckpointError(
                f"keep={keep} checkpoints; keep 2 or more, so that a damaged one has one before it."
            )
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._good: set[int] = set()  # saved or restored by this object
        self._unreadable: set[int] = set()
        self._saving: tuple[int, Future] | None = None
        self._sealing = ThreadPoolExecutor(1)
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                leaves=ocp.StandardCheckpointHandler(), record=ocp.JsonCheckpointHandler()
            )
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, in order; they may turn out to be damaged."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if re.fullmatch(r"\d+", p.name))

    def save(self, step: int, tree: PyTree, metadata: Mapping[str, Any] | None = None) -> None:
        """Begins to save a tree; waits for the one before it.

        Args:
          step: later than every readable checkpoint of the folder.
          tree: arrays of any dtype, sharded or not, with typed PRNG keys; donating them after this
            call is safe.
          metadata: small and JSON-like: a configuration's hash, a position in a file.

        Raises:
          CheckpointError: the folder has a checkpoint of this step or a later one, or the metadata
            is not JSON. An error of the save before this one (a full disk) is raised here too.
        """
        self.wait()
        self._tidy()
        if later := [s for s in self.steps() if s >= step]:
            raise CheckpointError(
                f"cannot save step {step}: {self.directory} has step {later[-1]}. Restore it and "
                "go on from there, or save to another folder."
            )
        arrays = [as_array(leaf) for leaf in jax.tree.leaves(tree)]
        packings = [_packing(x) for x in arrays]
        kept = [pack(x, p) if p else plain(x) for x, p in zip(arrays, packings, strict=True)]
        record = record_of(step, tree, digests(kept), packings)
        record["metadata"] = dict(metadata or {})
        try:
            record["sha256"] = sha256_of(record)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the metadata {metadata!r:.200} is not JSON: {error}."
            ) from error
        stored = {
            _slot(i): x if packings[i] else _own_buffer(x) for i, x in enumerate(kept) if x.size
        } or {"none": jnp.zeros(1)}
        self.directory.mkdir(parents=True, exist_ok=True)
        self._orbax.save(
            self.directory / str(step),
            args=ocp.args.Composite(
                leaves=ocp.args.StandardSave(stored), record=ocp.args.JsonSave(record)
            ),
        )
        self._saving = step, self._sealing.submit(self._seal, self.directory / str(step))

    def wait(self) -> None:
        """Returns when everything is on disk, and deletes what is older than the `keep` newest."""
        if self._saving is not None:
            (step, sealed), self._saving = self._saving, None
            sealed.result()
            self._good.add(step)
        # Only what is known to be whole counts: a damaged newest one must not cost the one before.
        kept = sorted(self._good)[-self.keep :]
        if len(kept) == self.keep and jax.process_index() == 0:
            for step in self.steps():
                if step < kept[0]:
                    _delete(self.directory / str(step))

    def restore(self, target: PyTree, step: int | None = None) -> Restored:
        """Reads the newest checkpoint that is whole.

        Args:
          target: a tree of arrays or ShapeDtypeStructs as was saved; each leaf is restored with its
            sharding, or on the default device where it has none.
          step: read this one, and no other.

        Raises:
          CheckpointError: there is none; none can be read; or its leaves are not the target's.
        """
        self.wait()
        steps = self.steps()
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory} has no step {step}; it has {steps}.")
        if not steps:
            raise CheckpointError(
                f"no checkpoints in {self.directory}: nothing was saved there. Is it the right "
                "folder?"
            )
        skipped: list[tuple[int, str]] = []
        for candidate in reversed(steps) if step is None else [step]:
            try:
                tree, metadata = self._read(candidate, target)
            except DamagedError as error:
                skipped.append((candidate, str(error)))
                continue
            self._good.add(candidate)
            if skipped:
                self._unreadable |= {s for s, _ in skipped}
                warnings.warn(
                    f"{_list(skipped)} in {self.directory}: going back to step {candidate}, the "
                    "newest checkpoint that is whole.",
                    CheckpointWarning,
                    stacklevel=2,
                )
            return Restored(candidate, tree, metadata, tuple(skipped))
        raise CheckpointError(
            f"no checkpoint in {self.directory} can be read: {_list(skipped)}. Move the folder "
            "away to start anew."
        )

    def close(self) -> None:
        """Waits, and ends the writing thread."""
        try:
            self.wait()
        finally:
            self._sealing.shutdown()
            self._orbax.close()

    def _seal(self, folder: Path) -> None:
        self._orbax.wait_until_finished()
        # A kill before this leaves a checkpoint with its digests only, which do for what matters.
        if jax.process_index() == 0:
            seal_files(folder)

    def _read(self, step: int, target: PyTree) -> tuple[PyTree, dict[str, Any]]:
        folder = self.directory / str(step)
        restore = self._orbax.restore
        check_files(folder)
        # Damage shows as any exception at all: orbax and its storage raise a dozen kinds.
        try:
            record = restore(folder, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
            sha256, record = record["sha256"], {k: v for k, v in record.items() if k != "sha256"}
            intact = sha256 == sha256_of(record) and record["step"] == step
        except Exception as error:
            raise DamagedError(f"its record cannot be read ({brief(error)})") from error
        if not intact:
            raise DamagedError("its record is not what was written")
        if record["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} has checkpoint format {record['format']}; this version of effjax reads "
                f"{FORMAT}."
            )
        wanted = [as_array(leaf) for leaf in jax.tree.leaves(target)]
        check_match(record["leaves"], entries_of(target), folder)
        packings = [e["packing"] and Packing(*e["packing"]) for e in record["leaves"]]
        kept = list(zip(wanted, packings, strict=True))
        stored = {_slot(i): _stored_spec(x, p) for i, (x, p) in enumerate(kept) if x.size}
        try:
            args = ocp.args.Composite(
                leaves=ocp.args.StandardRestore(stored or {"none": _stored_spec(jnp.zeros(1))})
            )
            leaves = restore(folder, args=args).leaves
            found = [
                # Of size 0: there was nothing to save.
                leaves[_slot(i)] if x.size else _empty(x)
                for i, x in enumerate(wanted)
            ]
            read = digests(found)
        except Exception as error:
            raise DamagedError(f"its leaves cannot be read ({brief(error)})") from error
        entries = zip(record["leaves"], read, strict=True)
        if changed := [e["path"] for e, digest in entries if e["digest"] != digest]:
            raise DamagedError(f"the leaves {changed[:3]} are not what was written")
        arrays = [
            _restored(x, p, leaf, entry["impl"])
            for x, p, leaf, entry in zip(found, packings, wanted, record["leaves"], strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(target), arrays), record["metadata"]

    def _tidy(self) -> None:
        """Renames what was found damaged, so that its step can be saved again, and removes what a
        killed process left half-written or half-deleted."""
        if jax.process_index() == 0 and self.directory.is_dir():
            for step in sorted(self._unreadable):
                folder = self.directory / str(step)
                aside = folder.with_name(folder.name + ".unreadable")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
            for pattern in ("*.orbax-checkpoint-tmp*", "*.deleted"):
                for left in self.directory.glob(pattern):
                    shutil.rmtree(left, ignore_errors=True)
        self._unreadable.clear()


def _slot(index: int) -> str:
    return f"leaf{index:05d}"


def _own_buffer(x: Array) -> Array:
    # On CPU "copying to the host" is looking at the same memory, which a donated buffer reuses.
    return jnp.copy(x) if all(d.platform == "cpu" for d in x.devices()) else x


def _sharding(x: Any) -> jax.sharding.Sharding:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return getattr(x, "sharding", None) or default


def _packing(x: Array) -> Packing | None:
    return packing(x.shape, x.sharding) if x.dtype == bool else None


def _stored_spec(x: Any, packing: Packing | None = None) -> jax.ShapeDtypeStruct:
    """What orbax is to read for a leaf, and onto which devices."""
    sharding = _sharding(x)
    if packing is not None:
        lies = packed_sharding(sharding, packing, x.shape)
        return jax.ShapeDtypeStruct(packing.shape(x.shape), jnp.uint8, sharding=lies)
    if is_key(x):
        x = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _empty(x: Any) -> Array:
    spec = _stored_spec(x)
    return jax.device_put(jnp.zeros(spec.shape, spec.dtype), spec.sharding)


def _restored(found: Array, packing: Packing | None, wanted: Any, impl: str | None) -> Array:
    if packing is not None:
        return unpack(found, packing, wanted.shape, _sharding(wanted))
    return jax.random.wrap_key_data(found, impl=impl) if is_key(wanted) else found


def _delete(folder: Path) -> None:
    # Under another name first: a kill halfway must leave nothing that looks like a checkpoint.
    doomed = folder.with_name(folder.name + ".deleted")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _list(skipped: list[tuple[int, str]]) -> str:
    return "; ".join(f"the checkpoint of step {step} is damaged: {why}" for step, why in skipped)
