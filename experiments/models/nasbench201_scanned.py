"""The network of all cells of NAS-Bench-201 as loops over the cells of a stage.

The same function of the same parameters as `nasbench201.model` where the edges' weights are
one-hot, for networks of many cells: a stage is one `lax.scan`, whose program has one cell however
deep the network is, and an edge runs the one operation that it has. Cells are computed again in the
backward pass, so memory does not grow with the operations of all cells.

What reads activations by layer (`ej.nas.proxies.fisher`) wants the weights of a loop as leaves of
their own, see `stack`, and convolutions as such.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import effjax as ej
from effjax.core import PyTree
from effjax.nas.tabular import EDGES, OPERATIONS
from experiments.models import nasbench201 as bench


def by_products(
    x: Array, kernel: Array, strides: Any, padding: Sequence[tuple[int, int]], **_: Any
) -> Array:
    """A convolution of stride 1 as one matrix product for each tap. (In loops and branches XLA
    leaves the gradients of convolutions to code that takes 90 times as long on CPU.)"""
    assert tuple(strides) == (1, 1), f"strides {strides}: products are of stride 1"
    rows, columns = x.shape[1:3]
    wide = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    return sum(
        (
            wide[:, i : i + rows, j : j + columns] @ kernel[i, j]
            for i, j in np.ndindex(kernel.shape[:2])
        ),
        jnp.zeros((), x.dtype),
    )


def stack(spec: bench.Spec, tree: PyTree) -> PyTree:
    """Params or statistics with the cells of a stage as one subtree, "stage_0" and so on, whose
    leaves have them along the first axis."""
    found = {name: x for name, x in tree.items() if not name.startswith("cell_")}
    for stage in range(spec.stages):
        first = stage * spec.cells
        cells = [tree[f"cell_{i}"] for i in range(first, first + spec.cells)]
        found[f"stage_{stage}"] = jax.tree.map(lambda *xs: jnp.stack(xs), *cells)
    return found


def model(spec: bench.Spec, products: bool = True) -> ej.Model:
    """As `nasbench201.model(spec)`, with `batch["edges"]` one-hot; `init` is that one's.

    `apply` takes params and statistics as that one's, or as `stack` makes them. The new statistics
    of BatchNorm are not kept: it gives back the model_state that it got.

    Args:
      products: compute the cells' convolutions as matrix products, see `by_products`.

    Raises:
      ValueError: the spec is of one cell, which needs neither branches nor other programs.
    """
    if spec.cell is not None:
        raise ValueError(f"the spec is of the cell {spec.cell}; loops are for that of all cells.")
    outer = bench.model(spec)

    def apply(
        params: PyTree, model_state: PyTree, batch: PyTree, key: Array, train: bool
    ) -> tuple[Array, PyTree]:
        params, stats = (
            tree if "stage_0" in tree else stack(spec, tree)
            for tree in (params, model_state["batch_stats"])
        )

        def run(module: nn.Module, own: tuple[PyTree, PyTree], x: Array, *flags: bool) -> Array:
            """What a module makes of x with its own params and statistics."""
            variables = {"params": own[0], "batch_stats": own[1]}
            return module.apply(variables, x, *flags, mutable=["batch_stats"])[0]

        def at(name: str) -> tuple[PyTree, PyTree]:
            return params[name], stats.get(name, {})

        def edge(e: int, x: Array, own: tuple[PyTree, PyTree]) -> Array:
            start, end = EDGES[e]

            def convolution(operation: str) -> Callable[[Array], Array]:
                name = f"edge_{start}{end}_{operation}"
                how = bench.linen_operation(spec, x.shape[-1], operation)
                module = bench.LinenOperation(**how, convolve=by_products if products else None)
                return lambda x: run(module, (own[0][name], own[1][name]), x, train)

            known: dict[str, Callable[[Array], Array]] = {
                "none": jnp.zeros_like,
                "skip": lambda x: x,
                "pool": bench.pool,
                **{name: convolution(name) for name in bench.CONVOLUTIONS},
            }
            index = jnp.argmax(batch["edges"][e])
            return jax.lax.switch(index, [known[name] for name in OPERATIONS], x)

        @jax.checkpoint
        def cell(x: Array, own: tuple[PyTree, PyTree]) -> tuple[Array, None]:
            nodes = [x]
            for node in (1, 2, 3):
                into = [(e, start) for e, (start, end) in enumerate(EDGES) if end == node]
                nodes.append(sum((edge(e, nodes[start], own) for e, start in into), 0 * x))
            return nodes[-1], None

        norm = nn.BatchNorm(not train, momentum=spec.momentum)
        x = run(nn.Conv(spec.width, (3, 3), use_bias=False), at("conv"), batch["image"])
        x = run(norm, at("norm"), x)
        for stage in range(spec.stages):
            if stage:
                block = bench.LinenReduce(spec, spec.width * 2**stage)
                x = run(block, at(f"reduce_{stage}"), x, train)
            x, _ = jax.lax.scan(cell, x, at(f"stage_{stage}"))
        x = nn.relu(run(norm, at("last"), x))
        if not spec.features:
            x = run(nn.Dense(spec.classes), at("head"), x.mean((1, 2)))
        return x, model_state

    return ej.Model(outer.init, apply)
