"""effjax's pruning against jaxpruner's: the same masks, the same sparsities, and the time of both.

`masks`: on random trees, for every score, mask shape and distribution that jaxpruner has. Where it
rounds halves of a count the other way, the masks of equal counts are compared. Its N:M keeps the
last of equal scores where effjax keeps the first: there ours of the reversed weights are compared.
`schedules`: both train the same weights, and the sparsity after every step is compared.
`updates`: one update of all masks, per layer and global, against jaxpruner's and `lax.top_k`.

jaxpruner does not run on today's jax. Give a copy that does:

    git clone https://github.com/google-research/jaxpruner PATH
    grep -rl jax.tree_map PATH --include=*.py | xargs sed -i s/jax.tree_map/jax.tree.map/g
    pip install ml_collections

Expected: all masks and sparsities are the same; at 10^7 weights 25 times faster, on CPU.
Cost: 8 minutes on 2 CPU cores.
Command: python -m experiments bench.jaxpruner --peer PATH
"""

import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import effjax as ej
from effjax.prune import budgets, patterns, scores
from effjax.prune.patterns import Pattern
from effjax.schedules import cubic, linear
from experiments.bench.prune import layers
from experiments.harness.config import as_dict, check
from experiments.harness.errors import ExperimentError
from experiments.harness.provenance import provenance, write_json

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
Named = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared; add 100_000_000 to `sizes` where there are 16 GB and 20 minutes."""

    peer: str = ""
    trees: int = 2
    sizes: tuple[int, ...] = (1_000_000, 10_000_000)
    sparsity: float = 0.8
    samples: int = 3
    save: bool = True

    def __post_init__(self) -> None:
        check(self, trees=(1, 100), sizes=(0, 10**9), sparsity=(0.0, 0.99), samples=(1, 100))


def run(config: Config) -> dict[str, Any]:
    """Compares, and writes `experiments/results/bench_jaxpruner_<platform>.json`."""
    peer = load(config.peer)
    masks = all_masks(peer, config.trees)
    result = {
        "config": {**as_dict(config), "peer": "jaxpruner"},
        "masks_compared": sum(tally["masks"] for tally in masks.values()),
        "masks_different": sum(tally["different"] for tally in masks.values()),
        "masks": masks,
        "schedules": schedules(peer),
        "updates": [row for size in config.sizes for row in updates(peer, size, config)],
        "load": os.getloadavg(),
        "provenance": provenance(),
    }
    if config.save:
        write_json(RESULTS / f"bench_jaxpruner_{jax.default_backend()}.json", result)
    return result


def load(path: str) -> Any:
    """The jaxpruner module below a folder.

    Raises:
      ExperimentError: there is none that works.
    """
    how = "\n".join((__doc__ or "").split("\n\n")[3].splitlines())
    if not path:
        raise ExperimentError(f"give a jaxpruner that runs on today's jax, --peer PATH:\n{how}")
    sys.path.insert(0, str(Path(path).absolute()))
    try:
        peer = importlib.import_module("jaxpruner")
        peer.MagnitudePruning().instant_sparsify({"kernel": jnp.ones((4, 4))})
    except (ImportError, AttributeError) as error:
        raise ExperimentError(
            f"no working jaxpruner in {path} ({error}). Make one:\n{how}"
        ) from error
    finally:
        sys.path.pop(0)
    return peer


# Masks.


@dataclasses.dataclass
class Tally:
    """What a comparison found."""

    masks: int = 0
    weights: int = 0
    different: int = 0  # masks of equal counts that are not the same
    counts: int = 0  # masks whose number of kept units is not the same
    furthest: int = 0  # the largest difference of such numbers

    def add(self, ours: Any, theirs: Any) -> None:
        """Notes two masks that should be the same."""
        self.masks += 1
        self.weights += int(np.size(theirs))
        self.different += not np.array_equal(np.asarray(ours), np.asarray(theirs).astype(bool))


def tree(seed: int, grid: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A random network's weights and gradients: kernels of two to four axes, and a bias.

    Args:
      seed: draws sizes and weights.
      grid: weights are multiples of this, so that many are equal, and sums of them exact.
    """
    rng = np.random.default_rng(seed)
    a, b, c, d = (8 * int(n) for n in rng.integers(1, 6, 4))

    def draw(*shape: int) -> Array:
        w = rng.normal(size=shape)
        w = w if grid is None else np.round(w / grid) * grid
        return jnp.asarray(w.astype(np.float32))

    def one() -> dict[str, Any]:
        return {
            "conv": {"kernel": draw(3, 3, a, b), "bias": draw(b)},
            "mixed": {"kernel": draw(b, c, 4)},
            "dense": {"kernel": draw(c, d)},
            "edges": {"kernel": draw(8 * a + 1, b + 2)},
        }

    return one(), one()


def named(tree: Mapping[str, Any]) -> Named:
    """The kernels by path, in jaxpruner's order."""
    return {f"{name}/kernel": tree[name]["kernel"] for name in sorted(tree)}


def all_masks(peer: Any, trees: int) -> dict[str, dict[str, int]]:
    """Every score with every mask shape and distribution; {what: Tally}."""
    types = importlib.import_module("jaxpruner.sparsity_types")
    shapes: dict[str, tuple[Any, Callable[[int], Pattern]]] = {
        "unstructured": (types.Unstructured(), lambda ndim: patterns.unstructured()),
        "channel": (types.Channel(-1), lambda ndim: patterns.channel(-1)),
        "channel of axis 0": (types.Channel(0), lambda ndim: patterns.channel(0)),
        "block 2x4": (types.Block((2, 4)), lambda ndim: block(ndim, 2, 4)),
        "block 2x4, largest": (types.Block((2, 4), False), lambda ndim: block(ndim, 2, 4)),
        "2:4": (types.NByM(2, 4), lambda ndim: patterns.n_m(2, 4, axis=-1)),
        "1:8 of axis -2": (types.NByM(1, 8, -2), lambda ndim: patterns.n_m(1, 8, axis=-2)),
    }
    found: dict[str, dict[str, int]] = {}
    sparsities = (0.5, 0.8, 0.93)

    def compare(key: str, ties: bool, one: Callable[..., None], *leave: str) -> None:
        tally = Tally()
        for seed in range(trees):
            both = tree(seed, 1 / 16 if ties else None)
            params, grads = ({k: w for k, w in t.items() if k not in leave} for t in both)
            for sparsity in sparsities:
                one(params=params, grads=grads, sparsity=sparsity, tally=tally)
        found[key + (", equal scores" if ties else "")] = dataclasses.asdict(tally)
        print(f"{key}{', equal scores' if ties else ''}: {dataclasses.asdict(tally)}", flush=True)

    for score in ("magnitude", "saliency", "random"):
        for name, (kind, pattern) in shapes.items():
            # Groups have to divide; blocks are over two axes.
            leave = ("edges",) if ":" in name else ("conv", "mixed") if "block" in name else ()
            one = functools.partial(_layerwise, peer, score, kind, pattern, "uniform")
            for ties in (False, True):
                compare(f"{score}, {name}, uniform", ties, one, *leave)
    for score in ("magnitude", "saliency"):
        one = functools.partial(_layerwise, peer, score, *shapes["unstructured"], "erk")
        compare(f"{score}, unstructured, erk", False, one)
        for normalized in (False, True):
            one = functools.partial(_globally, peer, score, normalized)
            for ties in (False, True):
                what = ", normalized" if normalized else ""
                compare(f"{score}, unstructured, global{what}", ties, one)
    return found


def block(ndim: int, rows: int, columns: int) -> Pattern:
    """jaxpruner's blocks lie over the first two axes, and over all of the others."""
    assert ndim == 2
    return patterns.block((rows, columns), axes=(0, 1), pad=True)


UPDATERS = {
    "magnitude": "MagnitudePruning",
    "saliency": "SaliencyPruning",
    "random": "RandomPruning",
}


def _layerwise(
    peer: Any,
    score: str,
    kind: Any,
    pattern: Callable[[int], Pattern],
    budget: str,
    params: Any,
    grads: Any,
    sparsity: float,
    tally: Tally,
) -> None:
    """One tree pruned layer by layer by both."""
    distributions = importlib.import_module("jaxpruner.sparsity_distributions")
    spread = functools.partial(getattr(distributions, budget), sparsity=sparsity)
    updater = getattr(peer, UPDATERS[score])(sparsity_type=kind, sparsity_distribution_fn=spread)
    theirs = named(updater.instant_sparsify(params, grads)[1])
    given = named(updater.calculate_scores(params, grads=grads))
    ours_given = _scores(score, params, grads, given)
    allocation = budgets.resolve(budget)
    sizes = {
        path: budgets.Layer(s.shape, pattern(s.ndim).units(s.shape))
        for path, s in ours_given.items()
    }
    kept = allocation(sizes, ours_given, sparsity)
    assert isinstance(kept, dict)
    for path, s in ours_given.items():
        shape = pattern(s.ndim)
        if getattr(kind, "use_avg_pooling", True) is False:
            _by_largest(s, theirs[path], shape, int(kept[path]), tally)
            continue
        backwards = shape.sparsity is not None
        if backwards:
            s = s[(slice(None, None, -1),) * s.ndim]
        # Theirs, by unit.
        number = int(jnp.sum(shape.pool(theirs[path].astype(jnp.float32)) > 0.5))
        keep = budgets.Count.of(number)
        if not backwards and number != int(kept[path]):
            tally.counts += 1
            tally.furthest = max(tally.furthest, abs(number - int(kept[path])))
        mask = shape.choose({path: s}, lambda units, path=path, keep=keep: {path: keep})[path]
        tally.add(mask[(slice(None, None, -1),) * s.ndim] if backwards else mask, theirs[path])


def _by_largest(s: Array, theirs: Array, shape: Pattern, kept: int, tally: Tally) -> None:
    """Units by their largest score: not a pattern of effjax's, but made of its parts."""
    rows, columns = 2, 4
    margins = [(0, -s.shape[0] % rows), (0, -s.shape[1] % columns)]
    full = jnp.pad(s, margins)  # with zeros: no score is less
    pooled = full.reshape(full.shape[0] // rows, rows, -1, columns).max(axis=(1, 3))
    number = int(jnp.sum(shape.pool(theirs.astype(jnp.float32)) > 0.5))
    if number != kept:
        tally.counts += 1
        tally.furthest = max(tally.furthest, abs(number - kept))
    units = patterns.unstructured().choose({"": pooled}, lambda _: {"": budgets.Count.of(number)})
    tally.add(shape.expand(units[""], s.shape), theirs)


def _scores(score: str, params: Any, grads: Any, given: Named) -> Named:
    """effjax's scores; the random ones are jaxpruner's."""
    if score == "magnitude":
        return {path: scores.magnitude(w) for path, w in named(params).items()}
    if score == "saliency":
        return {p: scores.saliency(w, named(grads)[p]) for p, w in named(params).items()}
    return given


def _globally(
    peer: Any, score: str, normalized: bool, params: Any, grads: Any, sparsity: float, tally: Tally
) -> None:
    """One tree pruned by one threshold by both."""
    make = {"magnitude": peer.GlobalMagnitudePruning, "saliency": peer.GlobalSaliencyPruning}
    updater = make[score](sparsity=sparsity, use_normalization=normalized)
    theirs = named(updater.instant_sparsify(params, grads)[1])
    ours = _scores(score, params, grads, {})
    if normalized:
        ours = {path: s / (jnp.linalg.norm(s) + 1e-8) for path, s in ours.items()}
    sizes = {path: budgets.Layer(s.shape, s.size) for path, s in ours.items()}
    kept = int(budgets.global_(sizes, ours, sparsity))
    number = sum(int(jnp.sum(mask)) for mask in theirs.values())
    if number != kept:
        tally.counts += 1
        tally.furthest = max(tally.furthest, abs(number - kept))
    masks = patterns.unstructured().choose(ours, lambda units: budgets.Count.of(number))
    for path, mask in masks.items():
        tally.add(mask, theirs[path])


# Schedules.


def schedules(peer: Any, sparsity: float = 0.8) -> dict[str, dict[str, float]]:
    """{schedule: steps, the largest difference of sparsity after any, and of masks with a learning
    rate of 0}.

    Masks move before the optimizer's step in jaxpruner and after it in effjax, so that with a
    learning rate the masks may differ, and the sparsity may not.
    """
    magnitude = functools.partial(ej.prune.magnitude, select="kernel")

    def constant(step: Array) -> Array:
        return jnp.float32(sparsity)

    # jaxpruner counts a step more: its polynomial is ours one step earlier.
    pairs = {
        "OneShotSchedule(5)": (peer.OneShotSchedule(5), magnitude(sparsity, begin=5)),
        "PeriodicSchedule(3, 3, 12)": (
            peer.PeriodicSchedule(3, 3, 12),
            magnitude(constant, begin=3, end=12, every=3),
        ),
        "PolynomialSchedule(2, 4, 16)": (
            peer.PolynomialSchedule(2, 4, 16),
            magnitude(cubic(sparsity, 3, 15), begin=4, end=16, every=2),
        ),
        "PolynomialSchedule(1, 2, 9)": (
            peer.PolynomialSchedule(1, 2, 9),
            magnitude(cubic(sparsity, 1, 8), begin=2, end=9, every=1),
        ),
        "PolynomialSchedule(5, 5, 15, power=1)": (
            peer.PolynomialSchedule(5, 5, 15, power=1),
            magnitude(linear(sparsity, 4, 14), begin=5, end=15, every=5),
        ),
    }
    found = {}
    for name, (schedule, transform) in pairs.items():
        row: dict[str, float] = {"steps": 20}
        for rate in (0.1, 0.0):
            theirs, ours = _trained(peer, schedule, transform, sparsity, rate)
            if rate:
                off = np.abs((~theirs).mean((1, 2)) - (~ours).mean((1, 2)))
                row["largest_difference_of_sparsity"] = float(off.max())
                row["final_sparsity"] = float((~ours[-1]).mean())
            else:
                row["different_masks"] = int(np.any(theirs != ours, axis=(1, 2)).sum())
        found[name] = row
        print(f"{name}: {row}", flush=True)
    return found


def _trained(
    peer: Any, schedule: Any, transform: ej.Transform, sparsity: float, rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """The masks of both after each of 20 steps on the same weights, bool [step, in, out]."""
    distributions = importlib.import_module("jaxpruner.sparsity_distributions")
    params = {"kernel": tree(0, None)[0]["dense"]["kernel"]}
    x = jax.random.normal(jax.random.key(0), (8, len(params["kernel"])))

    def apply(params, model_state, batch, key, train):
        return batch @ params["kernel"], model_state

    def loss(outputs, batch):
        return jnp.mean(outputs**2)

    tx = optax.sgd(rate)
    updater = peer.MagnitudePruning(
        scheduler=schedule,
        sparsity_distribution_fn=functools.partial(distributions.uniform, sparsity=sparsity),
    )
    wrapped = updater.wrap_optax(tx)
    opt = wrapped.init(params)

    @jax.jit
    def their_step(params, opt):
        grads = jax.grad(lambda p: loss(x @ p["kernel"], x))(params)
        change, opt = wrapped.update(grads, opt, params)
        return updater.post_gradient_update(optax.apply_updates(params, change), opt), opt

    model = ej.Model(lambda key, batch: (params, {}), apply)
    members = ej.chain(prune=transform)
    state = ej.init_state(jax.random.key(0), model, members, tx, x)
    step = jax.jit(ej.make_step(apply, members, loss, tx))
    theirs, ours = [], []
    for _ in range(20):
        params, opt = their_step(params, opt)
        state, _ = step(state, x)
        theirs.append(np.asarray(opt.masks["kernel"]).astype(bool))
        ours.append(np.asarray(state.transform["prune"]["mask"]["kernel"]))
    return np.stack(theirs), np.stack(ours)


# Updates.


def updates(peer: Any, size: int, config: Config) -> list[dict[str, Any]]:
    """A row for per-layer and global masks of ten layers: milliseconds, and times faster."""
    weights = layers(size)
    nested = {path: {"kernel": w} for path, w in weights.items()}
    total = sum(w.size for w in weights.values())
    sizes = {path: budgets.Layer(w.shape, w.size) for path, w in weights.items()}
    distributions = importlib.import_module("jaxpruner.sparsity_distributions")
    uniform = functools.partial(distributions.uniform, sparsity=config.sparsity)
    rows = []
    for scope in ("uniform", "global"):
        if scope == "global":
            updater = peer.GlobalMagnitudePruning(sparsity=config.sparsity, use_normalization=False)
        else:
            updater = peer.MagnitudePruning(sparsity_distribution_fn=uniform)
        calls = {
            "effjax": functools.partial(
                jax.jit(functools.partial(_ours, scope, sizes, config.sparsity)), weights
            ),
            "jaxpruner": functools.partial(
                jax.jit(lambda w, updater=updater: updater.instant_sparsify(w)[1]), nested
            ),
            "lax.top_k": functools.partial(
                jax.jit(functools.partial(_top_k, scope, config.sparsity)), weights
            ),
        }
        ours, theirs = calls["effjax"](), calls["jaxpruner"]()
        for path, mask in ours.items():
            # Above 2^24 weights jaxpruner's own counts are rounded to what float32 holds.
            if total < 2**24:
                np.testing.assert_array_equal(mask, theirs[path]["kernel"].astype(bool))
        del ours, theirs
        timed = ej.latency(calls, batch_size=1, samples=config.samples, warmup=0)
        ms = {name: 1e3 * found.median for name, found in timed.items()}
        faster = {f"vs {n}": ms[n] / ms["effjax"] for n in ("jaxpruner", "lax.top_k")}
        rows.append({"weights": total, "budget": scope, "ms": ms, "times_faster": faster})
        shown = ", ".join(f"{name} {t:.1f} ms" for name, t in ms.items())
        print(f"{total:.1e} weights, {scope}: {shown}; {faster}", flush=True)
    return rows


def _ours(scope: str, sizes: dict[str, budgets.Layer], sparsity: float, weights: Named) -> Named:
    ranked = {path: scores.magnitude(w) for path, w in weights.items()}
    allocation = budgets.resolve(scope)
    return patterns.unstructured().choose(ranked, lambda units: allocation(sizes, units, sparsity))


def _top_k(scope: str, sparsity: float, weights: Named) -> Named:
    ranked = {path: jnp.abs(w) for path, w in weights.items()}
    if scope == "uniform":
        kept = {path: s.size - round(sparsity * s.size) for path, s in ranked.items()}
        return {p: s >= lax.top_k(s.ravel(), kept[p])[0][-1] for p, s in ranked.items()}
    flat = jnp.concatenate([s.ravel() for s in ranked.values()])
    bound = lax.top_k(flat, flat.size - round(sparsity * flat.size))[0][-1]
    return {path: s >= bound for path, s in ranked.items()}
