"""Lottery tickets: LeNet-300-100 on MNIST, pruned by iterative magnitude and rewound to its start.

A dense network is trained, the 20% of its weights with the smallest magnitudes are pruned in each
layer (10% in the output layer), what is left is set back to its values before training, and so on:
after 7 rounds 21% of the weights are left, the "winning ticket". In each round it is compared with
the same masks on weights drawn anew, and with as many weights in random places.

Each training reports the iteration at which the validation loss was smallest (early stopping), the
test accuracy there, and that at the end. The validation split are 5,000 of the 60,000 training
images; of each training two models see the test set, chosen without it.

Published (50,000 iterations; figures 1, 3 and 4): at 21% the ticket reaches its smallest validation
loss 2.5 times sooner than with weights drawn anew, and is half a point more accurate there.

Here a training has fewer iterations, so that five seeds take minutes; the paper's are
`--iterations 50000`. As in the paper: Adam at 1.2e-3, batches of 60, Glorot normal weights. Pixels
are scaled to [0, 1]; weights are drawn anew once a round and seed, in the paper three times.

Command: python -m experiments lottery_ticket
Cost: 15 minutes on 2 CPU cores (110 trainings).

Paper: Frankle and Carbin, "The lottery ticket hypothesis: finding sparse, trainable neural
networks", 2019, https://arxiv.org/abs/1803.03635.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import effjax as ej
from effjax.core import PyTree
from effjax.report import Column, Table, summarise
from effjax.select import leaves, map_named
from experiments.harness import data
from experiments.harness.batches import Batches, evaluator, make_batches
from experiments.harness.config import check
from experiments.harness.loop import fit
from experiments.harness.progress import say
from experiments.harness.runs import Run, open_run, read_metrics
from experiments.models import mlp
from experiments.sparse_report import Panel, cross_entropy, panels_plot, publish, scores

NAME = "lottery_ticket"
Masks = dict[str, Array]
TICKET, ANEW, RANDOM = "winning ticket", "weights drawn anew", "random masks"
PUBLISHED = {"times sooner": 2.5, "points more accurate": 0.5}


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seeds: how many times all is done.
      seed: the first.
      rounds: of pruning; after 7, 21% of the weights are left.
      iterations: of each training; the paper's are 50,000.
      batch: images an iteration.
      learning_rate: Adam's.
      rate: the fraction of each layer's weights that a round prunes.
      head_rate: that of the output layer.
      every: iterations from one look at the validation split to the next.
      dataset: "mnist"; "digits" needs no download.
      save: whether to write experiments/results and docs/images.
    """

    seeds: int = 5
    seed: int = 0
    rounds: int = 7
    iterations: int = 15_000
    batch: int = 60
    learning_rate: float = 1.2e-3
    rate: float = 0.2
    head_rate: float = 0.1
    every: int = 100
    dataset: Literal["mnist", "digits"] = "mnist"
    save: bool = True

    def __post_init__(self) -> None:
        check(
            self,
            seeds=(1, 100),
            rounds=(1, 40),
            iterations=(1, 10**7),
            batch=(1, 1_000),
            learning_rate=(1e-8, 10),
            rate=(0, 0.99),
            head_rate=(0, 0.99),
            every=(1, 10**6),
        )


class Trained(NamedTuple):
    """What one training gave."""

    params: PyTree  # at the end, unmasked leaves included
    row: dict[str, float]


class Trainer:
    """Trains any weights under any masks: both are arguments, so that all trainings are one
    program."""

    def __init__(self, config: Config, images: data.Dataset):
        self.config = config
        spec = mlp.Spec(inputs=images.train.image[0].size, classes=images.classes)
        self.model = mlp.model(spec)
        self.tx = optax.adam(config.learning_rate)
        pixels = {"scale": 1.0 / images.train.image.max()}

        def batches(seed: int) -> Batches:
            return make_batches(images.train.as_dict(), config.batch, seed, **pixels)

        self.batches = batches
        self.example = self.batches(0).example
        shapes = leaves(jax.eval_shape(self._start, jax.random.key(0)))
        self.full: Masks = {p: jnp.ones(x.shape, bool) for p, x in shapes.items() if x.ndim == 2}
        transform = self._masked(self.full)
        self.step = ej.make_step(self.model.apply, transform, cross_entropy, self.tx)
        measured = ej.make_eval(self.model.apply, transform, scores)
        splits = {"validation": images.validation, "test": images.test}
        self.measure = {
            name: evaluator(measured, split.as_dict(), size=5_000, prefix=f"{name}/", **pixels)
            for name, split in splits.items()
        }
        self.start = jax.jit(self._start)
        self._state = jax.jit(self._make_state)

    def _start(self, key: Array) -> PyTree:
        """Weights before training: Glorot normal kernels, biases of 0."""
        draw = jax.nn.initializers.glorot_normal()
        params, _ = self.model.init(key, {n: jnp.zeros(x.shape) for n, x in self.example.items()})
        keys = iter(jax.random.split(key, len(leaves(params))))

        def leaf(path: str, value: Array) -> Array:
            own = next(keys)
            return draw(own, value.shape) if value.ndim == 2 else jnp.zeros_like(value)

        return map_named(leaf, params)

    def _masked(self, masks: Mapping[str, Array]) -> ej.Transform:
        return ej.chain(prune=ej.prune.static(masks=masks))

    def _make_state(self, key: Array, params: PyTree, masks: Masks) -> ej.TrainState:
        transform = self._masked(masks)
        return ej.init_state(key, self.model, transform, self.tx, self.example, params=params)

    def train(self, part: Run, seed: int, params: PyTree, masks: Masks) -> Trained:
        """One training, or what an earlier process found of it."""
        config = self.config
        best: dict[str, Any] = {"loss": float("inf")}

        def evaluate(state: ej.TrainState) -> dict[str, float]:
            found = self.measure["validation"](state)
            if found["validation/loss"] < best["loss"]:
                copy = jax.tree.map(jnp.copy, state)
                best.update(loss=found["validation/loss"], state=copy, found=found)
            if int(state.step) < config.iterations:
                return found
            early = {**best["found"], **self.measure["test"](best["state"])}
            return {
                **found,
                **self.measure["test"](state),
                "early/iteration": int(best["state"].step),
                **{f"early/{name}": value for name, value in early.items()},
            }

        fitted = fit(
            part,
            self.step,
            self._state(jax.random.key(seed), params, masks),
            self.batches(seed),
            steps=config.iterations,
            evaluate=evaluate,
            eval_every=config.every,
            # Seconds long: a training that is stopped begins again, with its best model so far.
            checkpoint_every=config.iterations,
            log_every=config.every,
            mode="block",  # without convolutions, a loop on the device is faster on CPU too
        )
        last = fitted.metrics
        names = ("test/accuracy", "validation/accuracy", "validation/loss")
        row = {"iteration": last["early/iteration"]}
        row |= {f"early {name}": last[f"early/{name}"] for name in names}
        row |= {f"final {name}": last[name] for name in names}
        return Trained(fitted.state.vars.model, row)


def scattered(key: Array, masks: Masks) -> Masks:
    """As many weights in each layer, in random places."""
    keys = jax.random.split(key, len(masks))
    order = {
        p: jax.random.uniform(k, m.shape) for k, (p, m) in zip(keys, masks.items(), strict=True)
    }
    return ej.prune.threshold.largest(order, {p: int(m.sum()) for p, m in masks.items()})


def remaining(masks: Masks) -> float:
    """The fraction of the kernels' weights that masks keep."""
    return 1.0 - float(ej.prune.masks.sparsity(masks))


def compete(
    here: Run, trainer: Trainer, lottery: ej.prune.Lottery, seed: int, rounds: int
) -> Iterator[list[dict[str, Any]]]:
    """Yields each round's rows: of the ticket, and of its rivals where something is pruned."""
    prune = jax.jit(lottery.prune)  # one compilation for all rounds
    ticket = lottery.start(trainer.start(key_of(seed, TICKET, 0)))
    for round_ in range(rounds + 1):
        arms = {TICKET: (ticket.params, ticket.masks)}
        if round_:
            places = scattered(key_of(seed, RANDOM, round_), ticket.masks)
            arms[ANEW] = (trainer.start(key_of(seed, ANEW, round_)), ticket.masks)
            arms[RANDOM] = (ticket.origin, places)
        trained = {
            arm: trainer.train(here.part(folder(seed, round_, arm)), seed, params, masks)
            for arm, (params, masks) in arms.items()
        }
        which = {"round": round_, "seed": seed, "remaining": remaining(ticket.masks)}
        layers = {
            path: {"sparsity": 1.0 - float(mask.mean()), "bits": 32}
            for path, mask in ticket.masks.items()
        }  # of random masks as well: they have as many weights in each layer
        yield [
            {
                "name": f"{arm}, round {round_}",
                "series": arm,
                "part": folder(seed, round_, arm),
                "layers": layers,
                "arm": arm,
                **which,
                **found.row,
            }
            for arm, found in trained.items()
        ]
        ticket = prune(ticket, trained[TICKET].params)


def run(config: Config) -> dict[str, Any]:
    """Finds the tickets, trains their rivals, and reports."""
    began = time.monotonic()
    here = open_run(NAME, config)
    held = 0.2 if config.dataset == "digits" else 1 / 12
    trainer = Trainer(config, data.load(config.dataset, seed=config.seed, validation=held))
    lottery = ej.prune.Lottery({"^head/": config.head_rate, "": config.rate})
    rows: list[dict[str, Any]] = []
    for seed in range(config.seed, config.seed + config.seeds):
        for round_ in compete(here, trainer, lottery, seed, config.rounds):
            rows += round_
            say(f"seed {seed}, round {round_[0]['round']}: {_line(round_)}")
    results: dict[str, Any] = {
        "rows": rows,
        "seconds": time.monotonic() - began,
        "curves": curves(here, config),
    }
    results |= {"published": PUBLISHED, "measured": compare(rows, config.rounds)}
    results |= {"columns": [column._asdict() for column in COLUMNS], "baseline": TICKET}
    publish(here, results, tables, figures, config.save)
    return {name: f"{x['mean']:.2f} ± {x['std']:.2f}" for name, x in results["measured"].items()}


def key_of(seed: int, arm: str, round_: int) -> Array:
    """The key that an arm draws its weights or places with."""
    which = (TICKET, ANEW, RANDOM).index(arm)
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), which), round_)


def folder(seed: int, round_: int, arm: str) -> str:
    """The name of a training's folder in the run's."""
    return f"seed{seed}-round{round_}-{arm.replace(' ', '-')}"


def _line(rows: list[dict[str, Any]]) -> str:
    return f"{rows[0]['remaining']:.1%} left; " + "; ".join(
        f"{r['arm']} {r['iteration']:,}, {r['early test/accuracy']:.2%}" for r in rows
    )


# What is reported. The columns are those of `python -m experiments report`.

COLUMNS = (
    Column("early test/accuracy", "test accuracy at early stopping (%)", ".2f", "max", 100),
    Column("final test/accuracy", "test accuracy at the end (%)", ".2f", "max", 100),
    Column("iteration", "early-stop iteration", ",.0f", "min"),
    Column("remaining", "weights left (%)", ".3g", "min", 100),
)


def at_round(rows: list[dict[str, Any]], arm: str, round_: int, key: str) -> np.ndarray:
    """A result by seed; round 0, which is dense, is the ticket's for all arms."""
    arm = arm if round_ else TICKET
    mine = [r for r in rows if (r["arm"], r["round"]) == (arm, round_)]
    return np.array([r[key] for r in sorted(mine, key=lambda r: r["seed"])], np.float64)


def compare(rows: list[dict[str, Any]], round_: int) -> dict[str, dict[str, Any]]:
    """The paper's two numbers: the ticket against weights drawn anew, seed by seed; and both
    against random masks."""
    found = {}
    for rival, tag in ((ANEW, ""), (RANDOM, " (random masks)")):
        early = [at_round(rows, arm, round_, "iteration") for arm in (TICKET, rival)]
        right = [at_round(rows, arm, round_, "early test/accuracy") for arm in (TICKET, rival)]
        final = [at_round(rows, arm, round_, "final test/accuracy") for arm in (TICKET, rival)]
        found["times sooner" + tag] = early[1] / early[0]
        found["points more accurate" + tag] = 100 * (right[0] - right[1])
        found["points more accurate at the end" + tag] = 100 * (final[0] - final[1])
    return {
        name: {
            "mean": float(x.mean()),
            "std": float(x.std(ddof=1)) if len(x) > 1 else 0.0,
            "seeds": x.tolist(),
        }
        for name, x in found.items()
    }


def curves(here: Run, config: Config) -> dict[str, Any]:
    """Validation losses in training at the last round: {arm: [seeds][looks]}, and the looks."""
    found: dict[str, Any] = {"iterations": []}
    wanted = [("dense", TICKET, 0)]
    wanted += [(arm, arm, config.rounds) for arm in (TICKET, ANEW, RANDOM)]
    for name, arm, round_ in wanted:
        found[name] = []
        for seed in range(config.seed, config.seed + config.seeds):
            part = here.path / folder(seed, round_, arm)
            records = [r for r in read_metrics(part / "metrics.jsonl") if "validation/loss" in r]
            found["iterations"] = [r["step"] for r in records]
            found[name].append([round(r["validation/loss"], 6) for r in records])
    return found


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """The paper's two numbers beside ours, and every round."""
    measured, config = results["measured"], results["config"]
    seeds = config["seeds"]
    rows = []
    for name, found in measured.items():
        for seed, value in enumerate(found["seeds"]):
            row = {"name": name, "seed": seed, "measured": value}
            rows.append(row | ({"published": PUBLISHED[name]} if name in PUBLISHED else {}))
    left = 100 * np.mean(
        [r["remaining"] for r in results["rows"] if r["round"] == config["rounds"]]
    )
    claim = summarise(
        rows,
        [Column("published", "published", ".2f"), Column("measured", "measured", ".2f")],
        heading=f"winning ticket at {left:.1f}% of the weights",
        caption=(
            f"Against weights drawn anew, unless said otherwise. {seeds} seeds, "
            f"{config['iterations']:,} iterations a training; mean ± standard deviation of the "
            "comparisons within a seed. Published: 50,000 iterations."
        ),
    )
    columns = []
    for arm in (TICKET, ANEW, RANDOM):
        columns.append(Column(f"{arm} iteration", f"{arm}: early-stop iteration", ",.0f"))
        columns.append(Column(f"{arm} early", "test accuracy there (%)", ".2f", None, 100))
        columns.append(Column(f"{arm} final", "at the end (%)", ".2f", None, 100))
    wide = []
    for round_ in range(config["rounds"] + 1):
        mine = [r for r in results["rows"] if r["round"] == round_]
        share = f"{100 * mine[0]['remaining']:.1f}%"
        for seed in sorted({r["seed"] for r in mine}):
            row = {"name": share, "seed": seed}
            for r in mine:
                if r["seed"] == seed:
                    row |= {
                        f"{r['arm']} iteration": r["iteration"],
                        f"{r['arm']} early": r["early test/accuracy"],
                        f"{r['arm']} final": r["final test/accuracy"],
                    }
            wide.append(row)
    every = summarise(
        wide,
        columns,
        heading="weights left",
        caption=f"LeNet-300-100 on {config['dataset']}, mean ± deviation of {seeds} seeds.",
    )
    return {NAME: claim, f"{NAME}_rounds": every}


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Early stopping, accuracy, and validation losses, as in the paper's figures 3 and 4."""
    rows, rounds = results["rows"], range(results["config"]["rounds"] + 1)
    left = [100 * float(at_round(rows, TICKET, r, "remaining").mean()) for r in rounds]
    places = (-np.log(left)).tolist()
    ticks = {place: f"{x:.0f}" for place, x in zip(places, left, strict=True)}

    def series(key: str, scale: float) -> dict[str, Any]:
        return {
            arm: (places, scale * np.stack([at_round(rows, arm, r, key) for r in rounds], axis=1))
            for arm in (TICKET, ANEW, RANDOM)
        }

    across = "weights left (%)"
    found = results["curves"]
    losses = {
        name: (found["iterations"], np.asarray(found[name]))
        for name in (TICKET, ANEW, RANDOM, "dense")
    }
    low = min(float(values.mean(axis=0).min()) for _, values in losses.values())
    share = f"{left[-1]:.0f}%"
    panels = [
        Panel(series("iteration", 1e-3), across, "iterations (thousands)", "Early stopping", ticks),
        Panel(
            series("early test/accuracy", 100), across, "test accuracy (%)", "… and there", ticks
        ),
        Panel(
            losses,
            "iteration",
            "validation loss",
            f"Training at {share}",
            bars=False,
            limits=(0.9 * low, 2.5 * low),
        ),
    ]
    return {NAME: panels_plot(panels, source, width=7.0, height=2.7)}
