"""What a checkpoint should hold: its leaves with their digests, and its files with their hashes."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from effjax.bits import Packing
from effjax.core import PyTree
from effjax.digest import is_key
from effjax.errors import CheckpointError
from effjax.select import path_name

FORMAT = 2
_FILES = "files.json"


class DamagedError(Exception):
    """One checkpoint cannot be read."""


def seal_files(folder: Path) -> None:
    """Notes the hashes of a folder's files in it."""
    temporary = folder / f"{_FILES}.tmp"
    temporary.write_text(json.dumps(_file_hashes(folder), indent=1))
    os.replace(temporary, folder / _FILES)


def _file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file by its path below the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(_FILES))
    return {p.relative_to(folder).as_posix(): _hash_file(p) for p in files}


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path) -> None:
    """Finds most damage before orbax meets it, whose readers fail noisily."""
    noted = folder / _FILES
    if not noted.exists():
        return
    try:
        before = json.loads(noted.read_text())
        now = _file_hashes(folder)
        changed = [name for name, sha256 in before.items() if now.get(name) != sha256]
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedError(f"its files cannot be read ({brief(error)})") from error
    if changed:
        missing = sorted(set(before) - set(now))
        what = f"{missing[:3]} are missing" if missing else f"{changed[:3]} changed"
        raise DamagedError(f"its files {what}")


def record_of(
    step: int, tree: PyTree, digests: Sequence[str], packings: Sequence[Packing | None]
) -> dict[str, Any]:
    """The leaves of a tree, as they are noted beside them."""
    noted = zip(entries_of(tree), digests, packings, strict=True)
    entries = [entry | {"digest": digest, "packing": packing} for entry, digest, packing in noted]
    return {"format": FORMAT, "step": step, "leaves": entries}


def entries_of(tree: PyTree) -> list[dict[str, Any]]:
    """What tells the leaves of a tree from those of another."""
    named = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    return [
        {"path": path, "dtype": str(x.dtype), "shape": list(x.shape), "impl": _impl(x)}
        for path, leaf in named
        for x in [as_array(leaf)]
    ]


def check_match(saved: list[dict], wanted: list[dict], folder: Path) -> None:
    """Raises CheckpointError if the leaves that were saved are not those that are wanted."""

    def spec(entry: dict) -> str:
        return f"{entry['dtype']}{entry['shape']}"

    have = {e["path"]: spec(e) for e in saved}
    want = {e["path"]: spec(e) for e in wanted}
    problems = [f"{p!r} is only in the checkpoint" for p in have if p not in want]
    problems += [f"{p!r} is only in the target" for p in want if p not in have]
    problems += [
        f"{p!r} is {have[p]} in the checkpoint and {want[p]} in the target"
        for p in have
        if p in want and have[p] != want[p]
    ]
    if not problems and list(have) != list(want):
        problems = ["the leaves come in another order"]
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"{folder} was saved from another model, transform or optimizer: "
            f"{'; '.join(problems[:8])}{more}. Restore it with the configuration it was made with, "
            "or use another folder."
        )


def as_array(leaf: Any) -> Any:
    """The leaf, if it is an array or the shape of one; else as an array."""
    return leaf if isinstance(leaf, (Array, jax.ShapeDtypeStruct)) else jnp.asarray(leaf)


def _impl(x: Any) -> str | None:
    return str(jax.random.key_impl(x)) if isinstance(x, Array) and is_key(x) else None


def sha256_of(record: Mapping[str, Any]) -> str:
    """A record's own hash."""
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def brief(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}"
