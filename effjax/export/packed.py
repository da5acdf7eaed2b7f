"""The packed artefact: a model in one safetensors file, each leaf in its smallest format."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import PyTree
from effjax.cost.coding import code
from effjax.cost.container import MARK, NAMES, NO_HASH, VERSION, contents, entry, header
from effjax.cost.layouts import layout, unpack_bits
from effjax.errors import PackedError, SelectorError
from effjax.select import leaves, map_named

DTYPES = {letters: name for name, letters in NAMES.items()}


class Packed(NamedTuple):
    """What a packed file holds."""

    params: PyTree
    model_state: PyTree
    metadata: dict[str, Any]


def save_packed(
    path: str | Path,
    params: PyTree,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    model_state: PyTree = None,
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Writes a model to one safetensors file, in as many bytes as `ej.footprint` says.

    Each leaf is stored in the smallest of the formats dense, bitmask, CSR and that of its pruning
    pattern. Leaves with "weight_bits" are rounded to integers of so many bits, as they are where
    the model uses them; all others return bit for bit, as rounded ones do once they are rounded.
    The file appears under its name when it is complete.

    Args:
      path: of the file; replaced if it is there.
      params: what is shipped, from `ej.export(transform, state)`; concrete arrays.
      facts: `transform.describe(params, extra, state)`. Read are "weight_bits", "scales",
        "clusters" and "pattern".
      model_state: BatchNorm's statistics, for example; stored as they are.
      metadata: small and JSON-like: classes, a configuration's hash.

    Returns:
      The bytes of the file.

    Raises:
      SelectorError: facts of a path that the params do not have.
      SetupError: a leaf that cannot be stored as its facts say.
      PackedError: two leaves of one path, or metadata that are not JSON.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import effjax as ej
      >>> params = {"kernel": jnp.zeros((64, 8)).at[:8].set(0.5)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     size = ej.save_packed(f"{folder}/model.safetensors", params)
      ...     loaded = ej.load_packed(f"{folder}/model.safetensors")
      >>> bool((loaded.params["kernel"] == params["kernel"]).all())
      True
    """
    facts = facts or {}
    named = _named(params, "params")
    if unknown := sorted(p for p in set(facts) - set(named) if not p.startswith("@")):
        raise SelectorError(f"the facts name the paths {unknown}; the params have {list(named)}.")
    chosen = {f"params/{p}": (x, facts.get(p, {})) for p, x in named.items()}
    for p, x in _named({} if model_state is None else model_state, "model state").items():
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            chosen[f"model_state/{p}"] = (x, {})
    tensors, entries = {}, {}
    for name, (x, fact) in chosen.items():
        coded = code(name, x, fact)
        stored = coded.smallest(fact.get("pattern", ""))
        tensors[name], entries[name] = coded.tensors(stored), entry(coded, stored)
    specs = {p: {n: (t.dtype.name, t.size) for n, t in own.items()} for p, own in tensors.items()}
    try:
        head, order = header(entries, specs, metadata or {})
    except (TypeError, ValueError) as error:
        raise PackedError(f"the metadata {metadata!r:.200} are not JSON: {error}.") from error
    data = b"".join([head, *contents(tensors, order)])
    sha256 = hashlib.sha256(data).hexdigest()
    _write(Path(path), data.replace(NO_HASH.encode(), sha256.encode(), 1))
    return len(data)


def load_packed(path: str | Path, like: PyTree = None) -> Packed:
    """Reads a packed file: dense arrays, as they were stored.

    Args:
      path: of the file.
      like: params of the model, arrays or ShapeDtypeStructs, whose tree the params get; without,
        they are nested dicts by their paths.

    Raises:
      PackedError: a file that is damaged, of another version, or no packed file; or params that
        are not like these.
    """
    path = Path(path)
    record, tensors = _read(path)
    try:
        found = {name: _leaf(spec, tensors[name]) for name, spec in record["leaves"].items()}
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise PackedError(f"{path} has a leaf that cannot be read: {error!r}.") from error
    params, state = (
        {p.removeprefix(kind): x for p, x in found.items() if p.startswith(kind)}
        for kind in ("params/", "model_state/")
    )
    tree = _nested(params) if like is None else _shaped(path, params, like)
    return Packed(tree, _nested(state), record["metadata"])


def _named(tree: PyTree, what: str) -> dict[str, Any]:
    found = leaves(tree)
    if len(found) != len(jax.tree.leaves(tree)):
        raise PackedError(f"two leaves of the {what} have one path: a key has a '/' in it.")
    return found


def _write(path: Path, data: bytes) -> None:
    """All or nothing: the name is given when the bytes are on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    try:
        table = json.loads(raw[8 : 8 + length])
        metadata = table.pop("__metadata__", {})
    except (ValueError, AttributeError) as error:
        raise PackedError(
            f"{path} is cut off or damaged, or no safetensors file: its header cannot be read "
            f"({len(raw)} bytes). Copy or download it again."
        ) from error
    if MARK not in metadata or "sha256" not in metadata:
        raise PackedError(
            f"{path} is a safetensors file, but none that ej.save_packed wrote. Read it with the "
            "safetensors library."
        )
    sha256 = metadata["sha256"]
    whole = raw.replace(sha256.encode(), NO_HASH.encode(), 1)
    if hashlib.sha256(whole).hexdigest() != sha256:
        raise PackedError(
            f"{path} is damaged or cut off: its bytes are not those that were written (SHA-256). "
            "Copy or download it again."
        )
    record = json.loads(metadata[MARK])
    if record["version"] != VERSION:
        raise PackedError(
            f"{path} has packed format {record['version']}; this version of effjax reads {VERSION}."
            " Use the effjax that wrote it, or a newer one."
        )
    tensors: dict[str, dict[str, np.ndarray]] = {name: {} for name in record["leaves"]}
    for name, spec in table.items():
        start, end = (8 + length + x for x in spec["data_offsets"])
        leaf, _, own = name.rpartition(":")
        dtype = np.dtype(DTYPES[spec["dtype"]]).newbyteorder("<")
        tensors[leaf][own] = np.frombuffer(raw[start:end], dtype)
    return record, tensors


def _leaf(spec: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> jax.Array | np.ndarray:
    shape, dtype = tuple(spec["shape"]), jnp.dtype(spec["dtype"])
    positions = layout(spec["layout"], spec).find(dict(tensors), shape)
    if spec["kind"] == "float":
        values = tensors["values"].view(dtype)
    else:
        codes = unpack_bits(tensors["values"], spec["bits"], len(positions))
    inside = positions >= 0
    if spec["kind"] == "cluster":
        values = tensors["codebook"].view(dtype)[codes * inside]
    if spec["kind"] == "int":
        each = [n if a in spec["axes"] else 1 for a, n in enumerate(shape)]
        half = np.full(1, 2 ** (spec["bits"] - 1), np.float32)

        def spread(x: np.ndarray) -> np.ndarray:
            full = np.broadcast_to(x.reshape(each if x.size > 1 else [1] * len(shape)), shape)
            return full.reshape(-1)[np.maximum(positions, 0)]

        scales, zeros = spread(tensors["scales"]), spread(tensors.get("zeros", half))
        values = ((codes.astype(np.float32) - zeros) * scales).astype(dtype)
    full = np.zeros(math.prod(shape), dtype)
    full[positions[inside]] = values[inside]
    x = full.reshape(shape)
    # 64-bit leaves stay NumPy's where jax would halve them.
    return jnp.asarray(x) if jax.dtypes.canonicalize_dtype(dtype) == dtype else x


def _nested(named: Mapping[str, Any]) -> PyTree:
    if list(named) == [""]:
        return named[""]
    tree: dict[str, Any] = {}
    for path, x in named.items():
        *parents, last = path.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = x
    return tree


def _shaped(path: Path, named: Mapping[str, Any], like: PyTree) -> PyTree:
    wanted = {p: (str(x.dtype), tuple(x.shape)) for p, x in leaves(like).items()}
    have = {p: (str(x.dtype), tuple(x.shape)) for p, x in named.items()}
    if differ := sorted(p for p in wanted.keys() | have.keys() if wanted.get(p) != have.get(p)):
        p = differ[0]
        raise PackedError(
            f"{path} holds another model: {len(differ)} leaves differ, first {p!r}, which is "
            f"{have.get(p, 'missing')} in the file and {wanted.get(p, 'missing')} in the params."
        )
    return map_named(lambda name, leaf: named[name], like)
