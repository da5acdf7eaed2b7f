"""A table of measured latencies, one for each kind of operation, that is looked up afterwards."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax.core import Apply, PyTree, abstract_key
from effjax.cost.latency import device_name, latency
from effjax.errors import SetupError
from effjax.interpret import Operation, intercept
from effjax.sites import Site


class Entry(NamedTuple):
    """One site's latency by the table.

    site: where it is.
    seconds: of one operation, alone in a program.
    times: how often a forward pass does it (the iterations of a scan).
    """

    site: Site
    seconds: float
    times: int


class LatencyTable:
    """The measured seconds of operations, kept in a JSON file; each is measured once.

    An entry's key is the operation as jax writes it (primitive, parameters, shapes, dtypes), with
    the device's name and jax's version: times of another machine or version are never taken for
    this one's. An operation is timed alone, with random operands, so a network's sum leaves out
    what XLA fuses and what lies between the sites; `fit_latency` learns the difference.

    Args:
      path: of the file; without it the table is kept in memory.
      samples: of each measurement; the median counts.

    Raises:
      SetupError: the file is no table.

    Example:
      >>> import jax.numpy as jnp
      >>> import effjax as ej
      >>> def apply(params, model_state, batch, key, train):
      ...     return batch["x"] @ params["kernel"], model_state
      >>> table = ej.cost.LatencyTable(samples=2)
      >>> found = table.sites(apply, {"kernel": jnp.ones((4, 2))}, {"x": jnp.ones((8, 4))})
      >>> [(entry.site.path, entry.times, entry.seconds > 0) for entry in found]
      [('kernel', 1, True)]

    Reference: the lookup tables of Cai et al., "ProxylessNAS", 2019,
      https://arxiv.org/abs/1812.00332.
    """

    def __init__(self, path: Path | str | None = None, *, samples: int = 20):
        self.path, self.samples = None if path is None else Path(path), samples
        self._entries = self._read()

    def sites(
        self, apply: Apply, params: PyTree, batch: PyTree, model_state: PyTree = None
    ) -> list[Entry]:
        """A model's sites with their latencies, in the order of execution; products of activations
        are among them. What the table lacks is measured, all in turns.

        Args:
          apply: `Model.apply`; traced with `train=False`.
          params, batch, model_state: arrays, or ShapeDtypeStructs.

        Raises:
          SiteError: a site lies in a function with a derivative rule of its own.
        """
        found = operations(apply, params, {} if model_state is None else model_state, batch)
        known = self._entries.setdefault(_here(), {})
        missing = {key: call for _, key, call in found if key not in known}
        if missing:
            known |= self._measured(missing)
            self._write()
        return [Entry(site, known[key], _count(site)) for site, key, _ in found]

    def __len__(self) -> int:
        """How many operations of this device and jax version it holds."""
        return len(self._entries.get(_here(), {}))

    def _measured(self, missing: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        calls = {key: make() for key, make in missing.items()}
        times = latency(calls, batch_size=1, samples=self.samples)
        return {key: found.median for key, found in times.items()}

    def _read(self) -> dict[str, dict[str, float]]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            found = json.loads(self.path.read_text())
            return {where: dict(entries) for where, entries in found.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise SetupError(
                f"{self.path} is no table of latencies ({error}). Give another path, or move it "
                "away to measure anew."
            ) from error

    def _write(self) -> None:
        if self.path is None:
            return
        with _alone(self.path):
            before = self._read()  # of other processes; what was measured first is kept
            for where, entries in self._entries.items():
                before[where] = entries | before.get(where, {})
            self._entries = before
            part = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            part.write_text(json.dumps(before, indent=1))
            part.replace(self.path)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Within this, no other process writes the file; not on Windows, where the last one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def operations(
    apply: Apply, params: PyTree, model_state: PyTree, batch: PyTree
) -> list[tuple[Site, str, Callable[[], Callable[[], Any]]]]:
    """A model's sites, each with its operation as text, and what makes a call of it to time."""
    found: dict[str, tuple[Site, str, Callable[[], Callable[[], Any]]]] = {}

    def note(op: Operation) -> tuple[Any, tuple[()]]:
        operands = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in op.operands]
        text = " ".join(str(jax.make_jaxpr(op.run)(*operands)).split())
        found.setdefault(op.site.path, (op.site, text, lambda: _call(op.run, operands)))
        return op.run(*op.operands), ()

    def forward(params: PyTree, model_state: PyTree, batch: PyTree, key: Any) -> PyTree:
        return apply(params, model_state, batch, key, False)[0]

    jax.eval_shape(
        intercept(forward, lambda site: note), params, model_state, batch, abstract_key()
    )
    return list(found.values())


def _call(run: Callable[..., Any], shapes: list[Any]) -> Callable[[], Any]:
    rng = np.random.default_rng(0)

    def operand(shape: Any) -> Any:
        if np.issubdtype(shape.dtype, np.integer):  # indices of a table's rows
            return jax.numpy.asarray(rng.integers(0, shapes[0].shape[0], shape.shape), shape.dtype)
        return jax.numpy.asarray(rng.normal(size=shape.shape), shape.dtype)

    compiled, operands = jax.jit(run), [operand(shape) for shape in shapes]
    return lambda: compiled(*operands)


def _count(site: Site) -> int:
    """How often a forward pass does the operation: the site's MACs by those of one."""
    if not site.macs:
        return math.prod(site.stack)
    if site.op == "dot_general":
        one = math.prod(site.out) * math.prod(site.lhs[axis] for axis in site.contracting[0])
    else:
        features = math.prod(site.rhs[axis] for axis in site.channels[1])
        one = math.prod(site.out) * math.prod(site.rhs) // features
    return max(1, round(site.macs / one))


def _here() -> str:
    return f"{device_name(jax.devices()[0])}, jax {jax.__version__}"
