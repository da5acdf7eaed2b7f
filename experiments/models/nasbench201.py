"""The networks of NAS-Bench-201, in Linen and NNX: of one cell, or of all cells at once.

    conv, BatchNorm | cells of C channels | residual block to 2C | cells | residual block to 4C |
    cells | BatchNorm, ReLU, mean, dense classes

with C = 16 and 5 cells a stage in the paper. A cell has nodes 0 to 3 and an operation on every edge
from one node to a later one; a node is the sum of what reaches it:

    none: 0; skip: the node; conv1x1, conv3x3: ReLU, convolution, BatchNorm; pool: mean over 3x3.

In the form of one cell (`cell`: six digits, as the table writes them) only its own operations are
there. In the form of all cells every operation is, and an edge is Σ_o w[o] operation_o, with the
weights float [edges, operations] an argument (`batch["edges"]`; alike for all where they are left
out): one-hot weights make any of the 15,625 cells in one compiled program. Layers have the same
names in both, so the weights of one cell are some of those of all cells: see `inherit`.

Initial weights are PyTorch's, as the published numbers were made: kernels uniform in
±1 / √(inputs of an output). Images are [batch, size, size, channels].

Reference: Dong and Yang, "NAS-Bench-201: Extending the scope of reproducible neural architecture
search", 2020, https://arxiv.org/abs/2001.00326.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import effjax as ej
from effjax.core import PyTree
from effjax.nas.tabular import EDGES, OPERATIONS
from effjax.select import leaves, map_named

Library = Literal["linen", "nnx"]
INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
CONVOLUTIONS = {"conv1x1": 1, "conv3x3": 3}


@dataclass(frozen=True)
class Spec:
    """One network.

    Attributes:
      cell: the operation on each of the six edges, or None for all cells at once.
      width: channels C of the first stage.
      cells: in a stage.
      stages: of C, 2C, 4C, ... channels.
      channels: of the images.
      classes: number of outputs.
      affine: whether the BatchNorm of the cells' operations has a learned scale and shift; searches
        that mix operations do without.
      biases: whether the cells' convolutions have biases: those of the authors of zero-cost proxies
        have, the benchmark's have not; see `with_biases`.
      momentum: of the BatchNorm statistics.
      features: give the last feature maps, before the mean, in place of logits.
    """

    cell: tuple[int, ...] | None = None
    width: int = 16
    cells: int = 5
    stages: int = 3
    channels: int = 3
    classes: int = 10
    affine: bool = True
    biases: bool = False
    momentum: float = 0.9
    features: bool = False

    def __post_init__(self) -> None:
        if min(self.width, self.cells, self.stages, self.channels, self.classes) < 1:
            raise ValueError(f"every size of a network is at least 1; got {self}.")
        if self.cell is not None and (
            len(self.cell) != len(EDGES) or not set(self.cell) <= set(range(len(OPERATIONS)))
        ):
            raise ValueError(
                f"the cell is {self.cell}; it is {len(EDGES)} numbers from 0 to "
                f"{len(OPERATIONS) - 1}, one of {OPERATIONS} for each edge of {EDGES}."
            )

    @property
    def plan(self) -> list[tuple[str, int]]:
        """Names and channels of the blocks: "cell_0", ..., "reduce_1", "cell_5", ..."""
        blocks = []
        for stage in range(self.stages):
            features = self.width * 2**stage
            blocks += [(f"reduce_{stage}", features)] if stage else []
            first = stage * self.cells
            blocks += [(f"cell_{i}", features) for i in range(first, first + self.cells)]
        return blocks

    def operations(self, edge: int) -> tuple[str, ...]:
        """What is on an edge."""
        return OPERATIONS if self.cell is None else (OPERATIONS[self.cell[edge]],)


def one_hot(genes: Sequence[int] | np.ndarray) -> np.ndarray:
    """The weights of a cell: float32 [edges, operations]; of cells [n, edges] with a leading n."""
    return np.eye(len(OPERATIONS), dtype=np.float32)[np.asarray(genes)]


def pool(x: Array) -> Array:
    """Means over windows of 3x3, of the pixels that there are. (Adding slices is several times as
    fast on CPU as XLA's reduction over windows, and so is its derivative.)"""

    def along(x: Array, axis: int) -> Array:
        wide = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)])
        size = x.shape[axis]
        parts = [jax.lax.slice_in_dim(wide, i, i + size, axis=axis) for i in range(3)]
        counts = np.full(size, 3.0) - (np.arange(size) == 0) - (np.arange(size) == size - 1)
        shape = [size if i == axis else 1 for i in range(x.ndim)]
        return (parts[0] + parts[1] + parts[2]) / counts.reshape(shape).astype(x.dtype)

    return along(along(x, 1), 2)


def halve(x: Array) -> Array:
    """Means over windows of 2x2, two apart; a last odd row or column is left out."""
    n, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def run_cell(x: Array, spec: Spec, edges: Array | None, convolve: Any) -> Array:
    """A cell: `convolve(edge's name, operation, x)` runs what has weights."""
    nodes = [x]
    for node in (1, 2, 3):
        total = jnp.zeros_like(x)
        for e, (start, end) in enumerate(EDGES):
            if end != node:
                continue
            for o in spec.operations(e):
                name, source = f"edge_{start}{end}", nodes[start]
                if o == "none":
                    continue
                if o in CONVOLUTIONS:
                    out = convolve(name, o, source)
                else:
                    out = pool(source) if o == "pool" else source
                total += out if edges is None else edges[e, OPERATIONS.index(o)] * out
        nodes.append(total)
    return nodes[-1]


def weights(spec: Spec, edges: Array | None) -> Array | None:
    """The edges' weights, as far as the form has any."""
    if spec.cell is not None:
        return None
    if edges is None:
        return jnp.full((len(EDGES), len(OPERATIONS)), 1 / len(OPERATIONS), jnp.float32)
    return edges


def with_biases(key: Array, shape: Sequence[int], dtype: Any) -> Array:
    """Initial weights of a convolution whose last input is 1 everywhere: of that one's weights the
    middle ones of the window are the biases, uniform as the kernel, and the others are 0. (So a
    bias belongs to what the convolution computes, for what reads activations by convolution.)"""
    *window, inputs, features = shape
    kernel = INIT(key, (*window, inputs - 1, features), dtype)
    bound = 1 / np.sqrt(np.prod(window) * (inputs - 1))
    biases = jax.random.uniform(jax.random.fold_in(key, 1), (features,), dtype, -bound, bound)
    middle = tuple(size // 2 for size in window)
    ones = jnp.zeros((*window, 1, features), dtype).at[(*middle, 0)].set(biases)
    return jnp.concatenate([kernel, ones], axis=-2)


def with_ones(x: Array) -> Array:
    """x with one more channel, of ones."""
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)


class LinenOperation(nn.Module):
    """ReLU, convolution (as `convolve` computes it, if given), BatchNorm."""

    features: int
    size: int
    stride: int
    momentum: float
    affine: bool
    biases: bool = False
    convolve: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        pads = ((self.size // 2, self.size // 2),) * 2
        window, strides = (self.size, self.size), (self.stride, self.stride)
        init = with_biases if self.biases else INIT
        how: dict[str, Any] = {"padding": pads, "use_bias": False, "kernel_init": init}
        how |= {"conv_general_dilated": self.convolve}
        x = with_ones(nn.relu(x)) if self.biases else nn.relu(x)
        x = nn.Conv(self.features, window, strides, name="conv", **how)(x)
        own: dict[str, Any] = {"use_scale": self.affine, "use_bias": self.affine}
        return nn.BatchNorm(not train, momentum=self.momentum, name="norm", **own)(x)


def linen_operation(spec: Spec, features: int, operation: str) -> dict[str, Any]:
    """The fields of a cell's LinenOperation."""
    return {
        "features": features, "size": CONVOLUTIONS[operation], "stride": 1,
        "momentum": spec.momentum, "affine": spec.affine, "biases": spec.biases,
    }  # fmt: skip


class LinenCell(nn.Module):
    """One cell."""

    spec: Spec
    features: int

    @nn.compact
    def __call__(self, x: Array, edges: Array | None, train: bool) -> Array:
        def convolve(name: str, operation: str, x: Array) -> Array:
            own = linen_operation(self.spec, self.features, operation)
            return LinenOperation(**own, name=f"{name}_{operation}")(x, train)

        return run_cell(x, self.spec, edges, convolve)


class LinenReduce(nn.Module):
    """The residual block between stages."""

    spec: Spec
    features: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def operation(stride: int, name: str) -> LinenOperation:
            return LinenOperation(self.features, 3, stride, self.spec.momentum, True, name=name)

        y = operation(1, "second")(operation(2, "first")(x, train), train)
        short = nn.Conv(self.features, (1, 1), use_bias=False, kernel_init=INIT, name="shortcut")
        return short(halve(x)) + y


class LinenNetwork(nn.Module):
    """The network in Linen. `[batch, size, size, channels] -> logits [batch, classes]`."""

    spec: Spec = Spec()

    @nn.compact
    def __call__(self, image: Array, edges: Array | None = None, train: bool = False) -> Array:
        spec, edges = self.spec, weights(self.spec, edges)

        def norm(name: str) -> nn.BatchNorm:
            return nn.BatchNorm(not train, momentum=spec.momentum, name=name)

        x = nn.Conv(spec.width, (3, 3), use_bias=False, kernel_init=INIT, name="conv")(image)
        x = norm("norm")(x)
        for name, features in spec.plan:
            if name.startswith("cell"):
                x = LinenCell(spec, features, name=name)(x, edges, train)
            else:
                x = LinenReduce(spec, features, name=name)(x, train)
        x = nn.relu(norm("last")(x))
        if spec.features:
            return x
        return nn.Dense(spec.classes, kernel_init=INIT, name="head")(x.mean((1, 2)))


class NNXOperation(nnx.Module):
    """ReLU, convolution, BatchNorm."""

    def __init__(
        self, channels: int, features: int, size: int, stride: int, spec: Spec, affine: bool,
        biases: bool = False, *, rngs: nnx.Rngs,
    ):  # fmt: skip
        pads = ((size // 2, size // 2),) * 2
        init = with_biases if biases else INIT
        how: dict[str, Any] = {"padding": pads, "use_bias": False, "kernel_init": init}
        window, strides = (size, size), (stride, stride)
        self.biases = biases
        self.conv = nnx.Conv(channels + biases, features, window, strides, rngs=rngs, **how)
        own: dict[str, Any] = {"use_scale": affine, "use_bias": affine, "momentum": spec.momentum}
        self.norm = nnx.BatchNorm(features, rngs=rngs, **own)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(x)
        return self.norm(self.conv(with_ones(x) if self.biases else x))


class NNXCell(nnx.Module):
    """One cell."""

    def __init__(self, spec: Spec, features: int, *, rngs: nnx.Rngs):
        self.spec = spec
        for e, (start, end) in enumerate(EDGES):
            for o in spec.operations(e):
                if o in CONVOLUTIONS:
                    own = (features, features, CONVOLUTIONS[o], 1, spec, spec.affine, spec.biases)
                    setattr(self, f"edge_{start}{end}_{o}", NNXOperation(*own, rngs=rngs))

    def __call__(self, x: Array, edges: Array | None) -> Array:
        def convolve(name: str, operation: str, x: Array) -> Array:
            return getattr(self, f"{name}_{operation}")(x)

        return run_cell(x, self.spec, edges, convolve)


class NNXReduce(nnx.Module):
    """The residual block between stages."""

    def __init__(self, spec: Spec, features: int, *, rngs: nnx.Rngs):
        self.first = NNXOperation(features // 2, features, 3, 2, spec, True, rngs=rngs)
        self.second = NNXOperation(features, features, 3, 1, spec, True, rngs=rngs)
        how: dict[str, Any] = {"use_bias": False, "kernel_init": INIT}
        self.shortcut = nnx.Conv(features // 2, features, (1, 1), rngs=rngs, **how)

    def __call__(self, x: Array) -> Array:
        return self.shortcut(halve(x)) + self.second(self.first(x))


class NNXNetwork(nnx.Module):
    """The network in NNX. `[batch, size, size, channels] -> logits [batch, classes]`."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        self.spec = spec
        how: dict[str, Any] = {"use_bias": False, "kernel_init": INIT}
        self.conv = nnx.Conv(spec.channels, spec.width, (3, 3), rngs=rngs, **how)
        self.norm = nnx.BatchNorm(spec.width, momentum=spec.momentum, rngs=rngs)
        for name, features in spec.plan:
            block = NNXCell if name.startswith("cell") else NNXReduce
            setattr(self, name, block(spec, features, rngs=rngs))
        last = spec.width * 2 ** (spec.stages - 1)
        self.last = nnx.BatchNorm(last, momentum=spec.momentum, rngs=rngs)
        if not spec.features:
            self.head = nnx.Linear(last, spec.classes, kernel_init=INIT, rngs=rngs)

    def __call__(self, image: Array, edges: Array | None = None) -> Array:
        edges = weights(self.spec, edges)
        x = self.norm(self.conv(image))
        for name, _ in self.spec.plan:
            block = getattr(self, name)
            x = block(x, edges) if name.startswith("cell") else block(x)
        x = nnx.relu(self.last(x))
        return x if self.spec.features else self.head(x.mean((1, 2)))


def model(spec: Spec = Spec(), library: Library = "linen") -> ej.Model:
    """The network as an `effjax.Model` that reads `batch["image"]`, and `batch["edges"]` if there
    is one."""

    def inputs(batch: PyTree) -> tuple[Any, ...]:
        return batch["image"], batch.get("edges")

    if library == "linen":
        return ej.from_linen(LinenNetwork(spec), inputs)
    return ej.from_nnx(lambda rngs: NNXNetwork(spec, rngs=rngs), inputs)


def inherit(tree: PyTree, shapes: PyTree) -> PyTree:
    """A cell's own weights or statistics from those of all cells.

    Args:
      tree: params or model_state of the network of all cells.
      shapes: those of the cell's own network, of whose values nothing is read.
    """
    found = leaves(tree)
    return map_named(lambda name, _: found[name], shapes)


@lru_cache
def counts(spec: Spec = Spec()) -> tuple[int, np.ndarray]:
    """Parameters: those of every network of the size, and int [edges, operations] of the cells'."""
    edges = np.zeros((len(EDGES), len(OPERATIONS)), np.int64)
    for name, features in spec.plan:
        if name.startswith("cell"):
            for o, size in CONVOLUTIONS.items():
                norm = 2 * features if spec.affine else 0
                kernel = size * size * (features + spec.biases) * features
                edges[:, OPERATIONS.index(o)] += kernel + norm
    image = {"image": jax.ShapeDtypeStruct((1, 8, 8, spec.channels), jnp.float32)}
    bare = Spec(**{**vars(spec), "cell": (0,) * len(EDGES)})
    params, _ = jax.eval_shape(model(bare).init, jax.random.key(0), image)
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params)), edges
