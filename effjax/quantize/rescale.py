"""Channels moved between a layer and what follows it, which leaves the model's outputs as they are.

As relu(x / s) = relu(x) / s for s > 0, output channels of a layer may be divided by s, what is
added to them too, if the weights that they meet next are multiplied by s.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from effjax.core import Apply, PyTree
from effjax.errors import SetupError
from effjax.interpret import Operation
from effjax.prune.calibration import measure
from effjax.quantize.fold import STATISTICS, fold_batchnorm
from effjax.quantize.follow import STATE, Layer, follow
from effjax.select import leaves, replace

KINDS = ("conv", "depthwise", "dense")  # kernels; the scale of a normalization is "scale"
Named = dict[str, Array]  # leaves of params by path, of the model_state with STATE in front


class Rescaling:
    """A model in evaluation, some of whose layers can be rescaled.

    params, model_state: with BatchNorms folded.
    layers: as `follow` found them.
    chosen: the names of those to be rescaled, each with the layers that its outputs reach.
    """

    def __init__(
        self,
        what: str,
        apply: Apply,
        params: PyTree,
        model_state: PyTree,
        batch: PyTree,
        names: Sequence[str] | None,
        kinds: Sequence[str],
        epsilon: float,
    ) -> None:
        self.apply, self.batch, self.before = apply, batch, (params, model_state)
        if norms := _norms(follow(apply, params, model_state, batch), leaves(params)):
            params, model_state = fold_batchnorm(
                params, model_state, norms, epsilon=epsilon, apply=apply, batch=batch
            )
        self.params, self.model_state = params, model_state
        self.layers = follow(apply, params, model_state, batch)
        possible = {n: own for n, own in self.layers.items() if own.kind in kinds}
        if names is None:
            self.chosen = {n: own.reaches for n, own in possible.items() if not _why(own)}
        else:
            self.chosen = {n: _checked(what, possible, n).reaches for n in names}
        if not self.chosen:
            reasons = "; ".join(f"{name}: {_why(own)}" for name, own in possible.items())
            raise SetupError(
                f"{what}() finds no layer whose outputs reach others through a positively "
                f"homogeneous function such as ReLU. {reasons or 'No leaf is the kernel of one'}. "
                "Exchange ReLU6, GELU or SiLU for ReLU, give weights in floating point, or leave "
                "this out."
            )

    def named(self) -> Named:
        """The leaves."""
        return leaves(self.params) | {STATE + p: x for p, x in leaves(self.model_state).items()}

    def inputs(self, named: Named, name: str) -> list[Array]:
        """The weights that a layer's outputs meet: [taps, channels, outputs] of each next layer."""
        own = self.layers[name]
        nexts = [self.layers[n] for n in own.reaches]
        return [n.per_input(named[n.kernel], own.features) for n in nexts]

    def read(
        self,
        batches: Iterable[PyTree],
        handler: Callable[[Operation, int], tuple[Array, PyTree]],
        merge: Callable[[Array, Array], Array],
    ) -> dict[str, PyTree]:
        """What is measured where layers read a chosen one's outputs, {reader: tree of arrays}.

        handler: `(operation, features of what it reads) -> (result, measured)`.
        merge: of two parts of the data; see `intercept`.
        """
        features = {n: self.layers[name].features for name, own in self.chosen.items() for n in own}
        kernels = {self.layers[n].kernel: size for n, size in features.items()}

        def sized(op: Operation) -> tuple[Array, PyTree]:
            return handler(op, kernels[op.site.path])

        look = jax.jit(measure(self.apply, sized, kernels, merge=merge))
        key, found = jax.random.key(0), dict[str, PyTree]()
        for batch in batches:
            for path, own in look(self.params, self.model_state, batch, key).items():
                found[path] = jax.tree.map(merge, found[path], own) if path in found else own
        for n in features:
            own = found[self.layers[n].kernel]
            if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(own)):
                raise SetupError(f"the input of {n!r} is not finite on the calibration batches.")
        return {n: found[self.layers[n].kernel] for n in features}

    def moved(self, named: Named, name: str, s: Array) -> Named:
        """The leaves, with a layer's output channels divided by s [features]."""
        own = self.layers[name]
        new = {}
        for path in (own.kernel, *own.added):
            new[path] = (named[path].reshape(-1, own.features) / s).reshape(named[path].shape)
        for n, kernel in zip(own.reaches, self.inputs(named, name), strict=True):
            path = self.layers[n].kernel
            new[path] = (kernel * s[:, None]).reshape(named[path].shape)
        return named | {path: leaf.astype(named[path].dtype) for path, leaf in new.items()}

    def finished(self, named: Named) -> tuple[PyTree, PyTree]:
        """(params, model_state) of these leaves, if the model computes with them what it did.

        Raises:
          SetupError: it does not.
        """
        after = (
            replace(self.params, {path: named[path] for path in leaves(self.params)}),
            replace(self.model_state, {p: named[STATE + p] for p in leaves(self.model_state)}),
        )

        def run(params: PyTree, model_state: PyTree) -> PyTree:
            return self.apply(params, model_state, self.batch, jax.random.key(0), False)[0]

        want, got = (jax.tree.leaves(jax.jit(run)(*v)) for v in (self.before, after))
        for a, b in zip(want, got, strict=True):
            error = float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(a)), 1e-6))
            if not error < 1e-3:
                raise SetupError(
                    f"rescaling {list(self.chosen)} changes the outputs, by {error:.1e} of the "
                    "largest. Look for weights that are not finite, or for a precision below "
                    "float32."
                )
        return after


def _norms(layers: Mapping[str, Layer], named: Named) -> dict[str, str]:
    """The BatchNorm of each layer of floats: that whose mean is taken off its outputs."""
    found = {}
    for name, own in layers.items():
        means = [p for p in own.added if p.startswith(STATE) and p.endswith("/mean")]
        floats = jnp.issubdtype(named[own.kernel].dtype, jnp.floating)
        if means and own.kind != "scale" and floats:
            found[name] = means[0].removeprefix(STATE).removeprefix(STATISTICS)[: -len("/mean")]
    return found


def _why(layer: Layer) -> str:
    """Why a layer cannot be rescaled, or ""."""
    if layer.blocked:
        return f"its outputs cannot be scaled: {layer.blocked}"
    return "" if layer.reaches else "its outputs reach no layer"


def _checked(what: str, layers: Mapping[str, Layer], name: str) -> Layer:
    if name not in layers:
        raise SetupError(f"{what}() is to rescale {name!r}, but the layers are {list(layers)}.")
    if why := _why(layers[name]):
        raise SetupError(
            f"{what}() cannot rescale {name!r}: {why}. Only ReLU, leaky ReLU, pooling and other "
            "functions with f(s x) = s f(x) may stand between it and the next layers, all with "
            "weights in floating point; exchange ReLU6 for ReLU, or leave the layer out."
        )
    return layers[name]
