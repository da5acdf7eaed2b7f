"""Products with matrices most of whose blocks are zero, computed from the other blocks alone.

Zeros cost as much as other numbers, unless whole blocks of them are never touched. Here the input
blocks that meet something are gathered, and one batched dense product does the rest, so that XLA
runs it on every device.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from effjax.errors import SetupError

Block = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Structure:
    """Which blocks of a matrix are kept: known when a program is traced, and constant in it.

    shape: of the matrix, (in, out).
    block: rows and columns of a block. Sizes that don't divide are filled up with zeros.
    columns: for each column of blocks the row indices of the kept ones, in order.
    """

    shape: tuple[int, int]
    block: Block
    columns: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> int:
        """How many blocks a full column has."""
        return -(-self.shape[0] // self.block[0])

    @property
    def depth(self) -> int:
        """How many blocks are stored for each column: as many as the fullest one keeps."""
        return max(1, *map(len, self.columns))

    @functools.cached_property
    def index(self) -> np.ndarray:
        """int32 [columns, depth]: the stored blocks' rows; `rows` where a column has no more."""
        found = np.full((len(self.columns), self.depth), self.rows, np.int32)
        for column, kept in enumerate(self.columns):
            found[column, : len(kept)] = kept
        return found

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.block, self.columns))

    def __hash__(self) -> int:
        # Asked for in every call of a jitted function.
        return self._hash


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["structure"]
)
@dataclasses.dataclass(frozen=True)
class BlockSparse:
    """A matrix [in, out] of which only some blocks are stored. A pytree with one array.

    It stands for the dense matrix D with `D[block] = values` for kept blocks and 0 elsewhere, and
    `sparse.matmul(x)` is `x @ D`, to rounding, differentiable with respect to x and to the values.

    values: float [columns of blocks, depth * block rows, block columns]: the kept blocks of each
      column, one above the other. Columns that keep fewer than the fullest one are filled up with
      blocks that never reach a product and have a gradient of 0.
    structure: which blocks these are.

    Example:
      >>> import jax.numpy as jnp
      >>> from effjax.prune.block_sparse import BlockSparse
      >>> w = jnp.zeros((4, 6)).at[:2, 2:4].set(5.0)
      >>> sparse = BlockSparse.from_dense(w, block=(2, 2))
      >>> sparse.density, sparse.matmul(jnp.ones((1, 4))).tolist()
      (0.16666666666666666, [[0.0, 0.0, 10.0, 10.0, 0.0, 0.0]])
    """

    values: Array
    structure: Structure

    @classmethod
    def from_dense(
        cls, w: Any, mask: Any = None, block: int | Sequence[int] = (32, 32)
    ) -> "BlockSparse":
        """The blocks of a matrix in which the mask keeps a weight. Outside of `jit`.

        Args:
          w: float [in, out].
          mask: bool [in, out]; by default the weights that are not 0. What it prunes is stored
            as 0.
          block: rows and columns of a block, or one number for both.

        Raises:
          SetupError: w is no matrix or is traced, the mask has another shape, or a block without
            rows or columns.
        """
        rows, columns = (block, block) if isinstance(block, int) else block
        if isinstance(w, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
            raise SetupError(
                "BlockSparse.from_dense met a traced array; which blocks are kept shapes the "
                "program, so call it on concrete weights, outside of jit."
            )
        w = np.asarray(w)
        kept = np.asarray(w != 0 if mask is None else mask).astype(bool)
        if w.ndim != 2 or kept.shape != w.shape or min(rows, columns) < 1:
            raise SetupError(
                f"BlockSparse.from_dense got weights {list(w.shape)}, a mask {list(kept.shape)} "
                f"and blocks of {rows} x {columns}; it takes a matrix [in, out], a mask of that "
                "shape, and blocks of at least 1 x 1. Reshape a kernel with more axes."
            )
        grid = _blocks(np.pad(kept, _margins(kept.shape, (rows, columns))), (rows, columns))
        where = grid.any(axis=(2, 3))
        structure = Structure(
            (w.shape[0], w.shape[1]),
            (rows, columns),
            tuple(tuple(int(i) for i in np.flatnonzero(column)) for column in where.T),
        )
        # One row of empty blocks below, which is what missing blocks are taken from.
        (_, below), right = _margins(kept.shape, (rows, columns))
        dense = np.where(kept, w, np.zeros((), w.dtype))
        blocks = _blocks(np.pad(dense, ((0, below + rows), right)), (rows, columns))
        taken = blocks[structure.index, np.arange(blocks.shape[1])[:, None]]
        return cls(jnp.asarray(taken.reshape(len(taken), -1, columns)), structure)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense matrix, (in, out)."""
        return self.structure.shape

    @property
    def density(self) -> float:
        """The fraction of blocks that are kept."""
        kept = sum(map(len, self.structure.columns))
        return kept / (self.structure.rows * len(self.structure.columns))

    @property
    def work(self) -> float:
        """The fraction of the dense product's multiplications that are done, filling included."""
        return self.structure.depth / self.structure.rows

    def matmul(self, x: Array, preferred_element_type: Any = None) -> Array:
        """x times the matrix.

        Args:
          x: float [..., in].
          preferred_element_type: of the result, as in `jnp.matmul`.

        Returns:
          [..., out].

        Raises:
          SetupError: x's last axis is not `in` long.
        """
        (rows, _), (size, out) = self.structure.block, self.shape
        if x.ndim < 1 or x.shape[-1] != size:
            raise SetupError(
                f"a block-sparse matrix {list(self.shape)} cannot multiply x {list(x.shape)}; its "
                f"last axis must be {size} long."
            )
        flat = x.reshape(-1, size)
        padding = self.structure.rows * rows - size
        blocks = jnp.pad(flat, ((0, 0), (0, padding))).reshape(len(flat), -1, rows)
        # Where a column keeps fewer, zeros are taken for x, and so the filling's gradient is 0.
        full = all(len(kept) == self.structure.depth for kept in self.structure.columns)
        mode = {"mode": "promise_in_bounds"} if full else {"mode": "fill", "fill_value": 0}
        gathered = blocks.at[:, self.structure.index].get(**mode)
        y = lax.dot_general(
            gathered.reshape(len(flat), len(self.structure.columns), -1),
            self.values,
            (((2,), (1,)), ((1,), (0,))),
            preferred_element_type=preferred_element_type,
        )
        y = jnp.moveaxis(y, 0, 1).reshape(len(flat), -1)[:, :out]
        return y.reshape(*x.shape[:-1], out)

    def to_dense(self) -> Array:
        """The dense matrix [in, out]."""
        (rows, columns), (size, out) = self.structure.block, self.shape
        index, count = self.structure.index, len(self.structure.columns)
        blocks = jnp.zeros((self.structure.rows, count, rows, columns), self.values.dtype)
        values = self.values.reshape(count, -1, rows, columns)
        blocks = blocks.at[index, np.arange(count)[:, None]].set(values, mode="drop")
        return jnp.moveaxis(blocks, 2, 1).reshape(-1, count * columns)[:size, :out]


def _margins(shape: Sequence[int], block: Block) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a matrix lacks below and on the right to be made of whole blocks, as `pad` takes it."""
    return (0, -shape[0] % block[0]), (0, -shape[1] % block[1])


def _blocks(w: Any, block: Block) -> Any:
    """A matrix of whole blocks as [block row, block column, row, column]."""
    split = w.reshape(w.shape[0] // block[0], block[0], -1, block[1])
    return split.transpose(0, 2, 1, 3)
