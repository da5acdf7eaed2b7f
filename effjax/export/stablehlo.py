"""StableHLO: a frozen model as a program of XLA's own, for jax on any platform.

Two files. The program is what `jax.export` serializes, for any size of batch and for several
platforms, compressed by xz; the weights lie beside it as safetensors, integers of less than 8
bits several to a byte, and are arguments of the program. Or one file, with the weights as
constants. jax and NumPy read either.
"""

import contextlib
import json
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.cost.container import NAMES
from effjax.errors import ExportError
from effjax.export.files import write_together
from effjax.quantize import kernels
from effjax.quantize.frozen import Frozen, storage_bits

PLATFORMS = ("cpu", "cuda", "tpu")
WEIGHTS = ".safetensors"


class Program(NamedTuple):
    """A frozen model as bytes.

    program: what `jax.export.deserialize` takes.
    weights: the first argument of its `call`, {name: array}; empty where they are constants.
    inputs: the names of the second, {name: array}.
    """

    program: bytes
    weights: dict[str, np.ndarray]
    inputs: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(len(data) for data in files(Path("program"), self).values())

    def run(self) -> Callable[[Mapping[str, Any]], Any]:
        """The model as a function of its inputs, as whoever loads the file calls it."""
        exported = jax.export.deserialize(bytearray(self.program))
        weights = {name: jnp.asarray(x) for name, x in self.weights.items()}
        call = jax.jit(exported.call)
        return lambda inputs: call(weights, dict(inputs))


def to_stablehlo(
    frozen: Frozen,
    *,
    weights: Literal["beside", "inside"] = "beside",
    batch: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> Program:
    """A frozen model as a StableHLO program.

    Args:
      frozen: see `ej.quantize.freeze`.
      weights: "beside" the program as its arguments, or "inside" it as constants.
      batch: its only size; left out, any.
      platforms: of "cpu", "cuda", "rocm", "tpu".

    Raises:
      ExportError: platforms or weights that are not known, a model that jax cannot export (an
        operation whose shape depends on values or that needs a batch of one size).
    """
    if weights not in ("beside", "inside"):
        raise ExportError(f"weights are {weights!r}; they lie 'beside' the program or 'inside'.")
    if not platforms or set(platforms) - {"cpu", "cuda", "rocm", "tpu"}:
        raise ExportError(f"platforms are {tuple(platforms)}; jax has cpu, cuda, rocm and tpu.")
    stored = packed(frozen)
    arguments = stored if weights == "beside" else {}

    def call(arguments: Mapping[str, Array], inputs: Mapping[str, Array]) -> Any:
        held = arguments if weights == "beside" else stored
        return frozen.apply(unpacked(frozen, held), inputs)

    try:
        size = jax.export.symbolic_shape("batch")[0] if batch is None else batch
        inputs = {
            name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
            for name, x in frozen.example.items()
        }
        shapes = jax.eval_shape(lambda: {n: jnp.asarray(x) for n, x in arguments.items()})
        with _without_locations():
            exported = jax.export.export(jax.jit(call), platforms=tuple(platforms))(shapes, inputs)
    except Exception as error:
        raise ExportError(
            f"jax cannot export this model for {tuple(platforms)}: {type(error).__name__}: "
            f"{str(error).splitlines()[0]}. If the model computes with the size of its batch, give "
            "batch=the size; if an operation is not there on a platform, leave that out."
        ) from error
    return Program(bytes(exported.serialize()), arguments, tuple(frozen.example))


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Programs lowered inside do not say which line of which file each operation comes from: that
    is a third of them, and paths on the machine that wrote them."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def save_stablehlo(path: str | Path, program: Program) -> int:
    """Writes a program, and its weights beside it with the suffix ".safetensors".

    Both appear under their names when they are complete.

    Returns:
      The bytes of both.
    """
    return write_together(files(Path(path), program))


def files(path: Path, program: Program) -> dict[Path, bytes]:
    """What `save_stablehlo` writes."""
    # Most of a program is names and repetition.
    found = {path: lzma.compress(program.program)}
    if program.weights:
        found[path.with_suffix(WEIGHTS)] = safetensors(program.weights)
    return found


def load_stablehlo(path: str | Path) -> Program:
    """Reads what `save_stablehlo` wrote.

    Raises:
      ExportError: files that cannot be read, or that do not belong together.
    """
    path = Path(path)
    beside = path.with_suffix(WEIGHTS)
    try:
        program = lzma.decompress(path.read_bytes())
        exported = jax.export.deserialize(bytearray(program))
    except Exception as error:
        raise ExportError(f"{path} cannot be read as a program of jax.export: {error}.") from error
    (weights, inputs), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    found = {}
    if weights:
        if not beside.is_file():
            raise ExportError(f"{path} takes its weights from {beside}, which is not there.")
        found = from_safetensors(beside.read_bytes())
        wanted = {n: (tuple(x.shape), str(x.dtype)) for n, x in weights.items()}
        have = {n: (x.shape, str(x.dtype)) for n, x in found.items()}
        if wanted != have:
            raise ExportError(f"{beside} holds the weights of another program than {path}.")
    return Program(program, found, tuple(inputs))


def packed(frozen: Frozen) -> dict[str, np.ndarray]:
    """The weights of a frozen model as they are stored."""
    found = {}
    for name, x in frozen.weights.items():
        if name.endswith(":weight"):
            x = kernels.pack(jnp.asarray(x), storage_bits(frozen.quantizers[name]))
        found[name] = np.asarray(x)
    return found


def unpacked(frozen: Frozen, stored: Mapping[str, Any]) -> dict[str, Array]:
    """What `packed` stored, as `Frozen.apply` takes it."""
    found = {}
    for name, x in stored.items():
        x = jnp.asarray(x)
        if name.endswith(":weight"):
            shape = frozen.weights[name].shape
            x = kernels.unpack(x, shape, storage_bits(frozen.quantizers[name]))
        found[name] = x
    return found


def safetensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Arrays in the safetensors format, https://github.com/huggingface/safetensors."""
    table: dict[str, Any] = {}
    parts, end = [], 0
    # Wider types first, so that each begins at a multiple of its size.
    for name, x in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        begin, end = end, end + x.nbytes
        letters = NAMES[str(x.dtype)]
        table[name] = {"dtype": letters, "shape": list(x.shape), "data_offsets": [begin, end]}
        parts.append(np.ascontiguousarray(x).astype(x.dtype.newbyteorder("<")).tobytes())
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def from_safetensors(raw: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file."""
    try:
        length = int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8 : 8 + length])
        table.pop("__metadata__", None)
        found = {}
        for name, spec in table.items():
            begin, end = (8 + length + x for x in spec["data_offsets"])
            dtype = np.dtype({v: k for k, v in NAMES.items()}[spec["dtype"]])
            found[name] = np.frombuffer(raw[begin:end], dtype).reshape(spec["shape"])
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"the weights are cut off or damaged: {error!r}. Copy them again."
        ) from error
