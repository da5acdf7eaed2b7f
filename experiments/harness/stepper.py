"""How steps are given to the device: one at a time, or many in one program."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.harness.errors import ConfigError

Batching = Callable[[Array], Any]
Step = Callable[..., tuple[Any, dict[str, Array]]]
# (state, batches, frozen, n) -> (state, the n steps' metrics): the state is donated.
Stepper = Callable[[Any, Any, Any, int], tuple[Any, list[dict[str, Any]]]]

BLOCK = 32


class Pace:
    """How many steps to take before looking up: about a second's worth.

    So that a signal is answered and the bar moves. The number changes no result.
    """

    def __init__(self, seconds: float = 1.0):
        self.block = 1
        self._seconds = seconds

    def took(self, steps: int, seconds: float) -> None:
        """Notes that so many steps took so many seconds."""
        fitting = int(self._seconds * steps / max(seconds, 1e-9))
        # At most twice as many as before: one quick block is no promise.
        self.block = max(1, min(fitting, 2 * self.block, BLOCK))


def make_stepper(step: Step, state: Any, batches: Any, frozen: Any, mode: str = "auto") -> Stepper:
    """A function that takes up to BLOCK steps and brings their metrics home in one transfer.

    "step" calls the program once a step: on XLA CPU convolutions are slower inside a loop. "block"
    runs a loop on the device, without returning to Python: its length is an argument, so that one
    compiled program serves every length and a resumed run computes the same bits. "auto" takes
    "step" on CPU and "block" elsewhere. A step that was given before, with arguments of the same
    shapes, is not compiled again: seeds share their program.

    Raises:
      ConfigError: another mode, or a metric that is not a scalar.
    """
    if mode == "auto":
        mode = "step" if jax.default_backend() == "cpu" else "block"
    if mode not in ("step", "block"):
        raise ConfigError(f"mode is {mode!r}; it is 'auto', 'step' or 'block'.")

    leaves, structure = jax.tree.flatten((state, batches, frozen))
    shapes = tuple(jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)) for x in leaves)
    shardings = tuple(x.sharding for x in jax.tree.leaves(state))
    return _program(step, mode, structure, shapes, shardings)


@functools.lru_cache(maxsize=8)
def _program(step: Step, mode: str, structure: Any, shapes: Any, shardings: Any) -> Stepper:
    """The stepper of a step on arguments of these shapes; runs that differ in values share it."""
    arguments = jax.tree.unflatten(structure, shapes)
    placed = jax.tree.unflatten(jax.tree.structure(arguments[0]), shardings)

    def one(state: Any, batches: Any, frozen: Any) -> tuple[Any, dict[str, Array]]:
        return step(state, batches(state.step), frozen)

    metrics = jax.eval_shape(one, *arguments)[1]
    if wide := {name: x.shape for name, x in metrics.items() if x.shape}:
        raise ConfigError(f"metrics are scalars, but {wide} have axes; reduce them in the step.")
    program = _step_program if mode == "step" else _block_program
    return program(one, metrics, placed)


def _step_program(one: Any, shapes: Any, shardings: Any) -> Stepper:
    compiled = jax.jit(one, donate_argnums=0, out_shardings=(shardings, None))

    def run(state: Any, batches: Any, frozen: Any, n: int) -> tuple[Any, list[dict[str, Any]]]:
        found = []
        for _ in range(n):
            state, metrics = compiled(state, batches, frozen)
            found.append(metrics)
        return state, jax.device_get(found)

    return run


def _block_program(one: Any, shapes: Any, shardings: Any) -> Stepper:
    def block(state: Any, batches: Any, frozen: Any, n: Array) -> tuple[Any, dict[str, Array]]:
        def body(i: Array, carry: tuple[Any, dict[str, Array]]) -> tuple[Any, dict[str, Array]]:
            state, kept = carry
            state, metrics = one(state, batches, frozen)
            return state, {k: kept[k].at[i].set(x) for k, x in metrics.items()}

        kept = {k: jnp.zeros(BLOCK, x.dtype) for k, x in shapes.items()}
        return jax.lax.fori_loop(0, n, body, (state, kept))

    compiled = jax.jit(block, donate_argnums=0, out_shardings=(shardings, None))

    def run(state: Any, batches: Any, frozen: Any, n: int) -> tuple[Any, list[dict[str, Any]]]:
        state, kept = compiled(state, batches, frozen, np.int32(n))
        kept = jax.device_get(kept)
        return state, [{k: x[i] for k, x in kept.items()} for i in range(n)]

    return run
