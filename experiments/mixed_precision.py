"""Mixed precision: bits of each layer within an average, found in three ways, against uniform.

A small CNN is trained on Fashion-MNIST in floating point, three seeds. Then each layer gets bits,
so that a weight has 3 (or 4) on average:

- by HAWQ-V2: the layers' mean Hessian traces times the squared rounding errors of their weights;
- by drop-one: the rise of the loss when one layer alone is rounded (both are measured on training
  images, before any training, and the best within the budget is found by integer programming);
- by search: widths are trained with the weights for an epoch by Gumbel-softmax, under a penalty on
  the expected size, and the most probable ones within the budget are taken;
- at random within the budget: what is chosen by nothing, as a control.

A layer's bits are those of its weights and of its input, whose ranges are dynamic and asymmetric.
All layers take part, the first and the last too. From the same float weights each choice goes on
with quantization-aware training, as the uniform one does, with the same steps, batches and
schedule. Bits are arguments of the program: one compilation serves all choices, budgets and seeds.
The average is over weights, so that small layers may take many bits; what all multiplications take
(BitOps) is in the table.

Expected: at an average of 3 bits mixed beats uniform. Published, for orientation (HAWQ-V2,
ResNet-50 on ImageNet, top-1): mixed 75.76, uniform 3 bits by PACT 75.30 and by DoReFa 69.90.

The test set is used at the end of each training and before it, and chooses no bits and no step.
The task itself, this network with one width for a layer's weights and input, was settled on after
test accuracies of one or two seeds of others: with weights alone quantized, a scale for each
channel and 8-bit activations, mixed came out 0.2 points below uniform bits after training.

Command: python -m experiments mixed_precision
Cost: 5 minutes on 2 CPU cores that others share (39 trainings).

Papers: Dong et al., "HAWQ-V2", 2020, https://arxiv.org/abs/1911.03852; Cai and Vasconcelos,
"Rethinking differentiable search for mixed-precision neural networks", 2020,
https://arxiv.org/abs/2004.05795; Wu et al., "Mixed precision quantization of ConvNets via
differentiable neural architecture search", 2018, https://arxiv.org/abs/1812.00090.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import effjax as ej
from effjax.core import PyTree
from effjax.quantize.budget import Table as Costs
from effjax.report import Column, Table, summarise, welch
from experiments.harness import data
from experiments.harness.batches import evaluator, make_batches
from experiments.harness.config import check
from experiments.harness.errors import ConfigError
from experiments.harness.loop import fit
from experiments.harness.progress import say
from experiments.harness.runs import Run, open_run
from experiments.models import strided
from experiments.sparse_report import Panel, cross_entropy, panels_plot, publish, scores

NAME = "mixed_precision"
FLOAT, UNIFORM, RANDOM = "float", "uniform", "random"
METHODS = (UNIFORM, RANDOM, "HAWQ", "drop-one", "search")


@dataclass(frozen=True)
class Config:
    """What may be changed.

    Attributes:
      seeds: runs of each arm.
      seed: the first.
      averages: bits of a weight, on average.
      widths: bits that a layer may have.
      epochs: passes over the 60,000 training images in floating point.
      further: passes of each arm after them.
      searching: passes of the search, which begins at the float weights, too.
      batch: images a step.
      learning_rate: the largest, of a cosine schedule.
      further_rate: likewise, of the passes after the first.
      logit_rate: of the search's logits.
      strength: of the search's penalty on size.
      probes: Hutchinson's, for each of the batches.
      measured: batches of training images that sensitivities are measured on.
      channels: of the convolutions.
      hidden: units of the dense layer.
      dataset: "fashion_mnist"; "digits" needs no download.
      save: whether to write experiments/results and docs/images.
    """

    seeds: int = 3
    seed: int = 0
    averages: tuple[int, ...] = (4, 3)
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    epochs: int = 5
    further: int = 3
    searching: int = 1
    batch: int = 128
    learning_rate: float = 3e-3
    further_rate: float = 1e-3
    logit_rate: float = 0.03
    strength: float = 2.0
    probes: int = 16
    measured: int = 16
    channels: tuple[int, ...] = (8, 16, 32, 32)
    hidden: int = 32
    dataset: Literal["fashion_mnist", "mnist", "digits"] = "fashion_mnist"
    save: bool = True

    def __post_init__(self) -> None:
        check(
            self,
            seeds=(1, 100),
            averages=(2, 8),
            widths=(2, 8),
            epochs=(1, 10_000),
            further=(1, 10_000),
            searching=(1, 10_000),
            batch=(1, 10_000),
            learning_rate=(1e-8, 10),
            further_rate=(1e-8, 10),
            logit_rate=(1e-8, 10),
            strength=(0, 1e6),
            probes=(1, 10_000),
            measured=(1, 10_000),
            channels=(1, 4_096),
            hidden=(1, 65_536),
        )
        if not set(self.averages) <= set(self.widths):
            raise ConfigError(
                f"averages {self.averages} are compared with uniform bits, which are {self.widths}."
            )


def joint(widths: Mapping[str, Array]) -> ej.Transform:
    """Quantization-aware training with these bits of each layer's weights and of its input."""
    both = {path: ej.quantize.Bits(b, b) for path, b in widths.items()}
    return ej.quantize.qat(8, 8, symmetric=False, rules=ej.quantize.by_leaf(both))


Start = tuple[PyTree, PyTree]  # (params, model_state)


class Trainer:
    """One kind of training; what is compiled for it serves all settings (bits, a budget) and seeds.

    Leaves that a pattern of `apart` matches have a constant learning rate of their own.
    """

    def __init__(
        self,
        model: ej.Model,
        images: data.Dataset,
        build: Callable[[Array], ej.Transform],
        *,
        steps: int,
        batch: int,
        rate: float,
        apart: Mapping[str, float],
    ):
        self.steps = steps
        self.batches = make_batches(images.train.as_dict(), batch, 0, **images.standard)
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps)
        rates: dict[str, Any] = {pattern: optax.adam(own) for pattern, own in apart.items()}
        rates["weights"] = optax.adamw(schedule, weight_decay=1e-4)
        rules = [*((pattern, pattern) for pattern in apart), ("", "weights")]
        tx = optax.partition(rates, lambda vars: ej.select.label_tree(vars, rules))
        example = self.batches.example

        def init(key: Array, setting: Array, start: Start) -> ej.TrainState:
            params, model_state = start
            given = {"params": params, "model_state": model_state}
            return ej.init_state(key, model, build(setting), tx, example, **given)

        def step(state: ej.TrainState, batch: PyTree, setting: Array) -> Any:
            return ej.make_step(model.apply, build(setting), cross_entropy, tx)(state, batch)

        def measured(given: tuple[ej.TrainState, Array], batch: PyTree, frozen: PyTree) -> Any:
            state, setting = given
            return ej.make_eval(model.apply, build(setting), scores)(state, batch)

        # Random numbers take XLA long to optimize and are drawn once.
        self.init = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})
        self.step = step
        test = images.test.as_dict()
        self.test = evaluator(measured, test, size=1_000, prefix="test/", **images.standard)

    def train(
        self, part: Run, seed: int, setting: Any = 0.0, start: Start = (None, None)
    ) -> tuple[ej.TrainState, float, float]:
        """The trained state, and test accuracies before and after."""
        asked = jnp.asarray(setting, jnp.float32)
        begun = self.init(jax.random.key(seed), asked, start)
        before = self.test((begun, asked))["test/accuracy"]
        fitted = fit(
            part,
            self.step,
            begun,
            dataclasses.replace(self.batches, key=jax.random.key(seed)),
            steps=self.steps,
            frozen=asked,
            evaluate=lambda state: self.test((state, asked)),
            # Seconds long: a training that is stopped begins again.
            checkpoint_every=self.steps,
            log_every=max(1, self.steps // 50),
        )
        return fitted.state, before, fitted.metrics["test/accuracy"]


class Bench:
    """The data, the float networks, what layers cost, and the rows of all arms."""

    def __init__(self, config: Config):
        self.config, self.here = config, open_run(NAME, config)
        self.rows: list[dict[str, Any]] = []
        self.starts: dict[int, Start] = {}
        self.images = images = data.load(config.dataset, validation=0)
        self.model = strided.model(strided.Spec(config.channels, config.hidden, images.classes))
        plain = self.arm(lambda setting: ej.chain(), config.epochs, config.learning_rate)
        apart = dataclasses.replace(plain.batches, key=jax.random.key(99))
        self.batches = [apart(jnp.int32(i)) for i in range(config.measured)]
        one = jax.tree.map(lambda x: x[:1], self.batches[0])
        params, model_state = jax.eval_shape(self.model.init, jax.random.key(0), one)
        sites = ej.find_sites(self.model.apply, params, model_state, one)
        self.costs: Costs = ej.quantize.bit_costs(params, sites, config.widths)
        self.sizes = {p: x.size for p, x in ej.select.leaves(params).items() if p in self.costs}
        self.macs = {site.leaf: site.macs for site in sites}
        for seed in self.seeds:
            state, _, accuracy = plain.train(self.here.part(f"float-seed{seed}"), seed)
            self.starts[seed] = state.vars.model, state.model_state
            self.note(FLOAT, None, seed, dict.fromkeys(self.costs, 32), accuracy, accuracy)
        self.trainer = self.arm(self.mixed, config.further, config.further_rate)
        rates = {r"^extra/.*logits/": config.logit_rate}
        self.searcher = self.arm(self.search, config.searching, config.further_rate, rates)
        self.measured = {seed: self.sensitivities(seed) for seed in self.seeds}

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.seeds)

    def steps(self, epochs: int) -> int:
        return epochs * (len(self.images.train.label) // self.config.batch)

    def arm(self, build: Any, epochs: int, rate: float, apart: Mapping[str, float] = {}) -> Trainer:
        how: dict[str, Any] = {"steps": self.steps(epochs), "batch": self.config.batch}
        return Trainer(self.model, self.images, build, rate=rate, apart=apart, **how)

    def mixed(self, setting: Array) -> ej.Transform:
        """From one number of bits for each layer."""
        bits = {path: setting[i].astype(jnp.int32) for i, path in enumerate(self.costs)}
        return ej.chain(quant=joint(bits))

    def search(self, setting: Array) -> ej.Transform:
        """For bits that are so many on average; cools down to a tenth."""
        config, steps = self.config, self.steps(self.config.searching)

        def temperature(step: Array) -> Array:
            return jnp.exp(math.log(0.1) * step / steps)

        how: dict[str, Any] = {"strength": config.strength, "temperature": temperature}
        how["symmetric"] = False
        return ej.chain(quant=ej.quantize.bit_search(setting, config.widths, "same", **how))

    def sensitivities(self, seed: int) -> dict[str, Costs]:
        """What rounding each layer does to a float network, by both measures."""
        config, q, (params, model_state) = self.config, ej.quantize, self.starts[seed]
        traces = q.hessian_traces(
            q.objective_of(self.model.apply, cross_entropy, model_state),
            params,
            self.batches,
            jax.random.key(seed),
            probes=config.probes,
            together=math.gcd(4, config.probes),
        )
        apply, first = self.model.apply, self.batches[0]
        errors = q.rounding_errors(apply, params, model_state, first, config.widths)
        dropped = q.drop_one(
            apply,
            cross_entropy,
            params,
            model_state,
            self.batches,
            self.costs,
            config.widths,
            build=joint,
        )
        return {"HAWQ": q.hawq(traces, errors), "drop-one": dropped}

    def choose(self, seed: int, average: int) -> dict[str, dict[str, int]]:
        """{method: {layer: bits}}."""
        q, budget = ej.quantize, average * sum(self.sizes.values())
        found = {UNIFORM: dict.fromkeys(self.costs, average), RANDOM: self.drawn(seed, budget)}
        for method, own in self.measured[seed].items():
            found[method] = q.allocate(own, self.costs, budget).bits
        part = self.here.part(f"searching-{average}-seed{seed}")
        state, _, _ = self.searcher.train(part, seed, average, self.starts[seed])
        logits = state.vars.extra["quant"]
        found["search"] = q.within(logits, self.config.widths, self.costs, budget).bits
        return found

    def drawn(self, seed: int, budget: float) -> dict[str, int]:
        """Random bits that use up the budget as far as they can: what costs least at random."""
        rng = np.random.default_rng([seed, int(budget)])
        wish = {p: {b: float(rng.uniform()) for b in own} for p, own in self.costs.items()}
        return ej.quantize.allocate(wish, self.costs, budget).bits

    def note(
        self,
        method: str,
        asked: int | None,
        seed: int,
        bits: Mapping[str, int],
        before: float,
        accuracy: float,
    ) -> None:
        """Adds a row."""
        average = sum(self.sizes[p] * b for p, b in bits.items()) / sum(self.sizes.values())
        self.rows.append(
            {
                "name": method if asked is None else f"{method}, {asked} bits",
                "method": method,
                "asked": asked,
                "seed": seed,
                "bits": dict(bits),
                "average": average,
                "bitops": sum(self.macs[p] * b * b for p, b in bits.items()),
                "before": before,
                "accuracy": accuracy,
            }
        )

    def run(self) -> None:
        """Every choice, before and after training with it."""
        for average in self.config.averages:
            for seed in self.seeds:
                for method, bits in self.choose(seed, average).items():
                    part = self.here.part(f"{method}-{average}-seed{seed}")
                    setting = np.array([bits[path] for path in self.costs])
                    found = self.trainer.train(part, seed, setting, self.starts[seed])
                    _, before, accuracy = found
                    self.note(method, average, seed, bits, before, accuracy)
                    say(
                        f"{method}, {average} bits, seed {seed}: {before:.2%}, trained "
                        f"{accuracy:.2%}; {list(bits.values())}"
                    )


def run(config: Config) -> dict[str, Any]:
    """Trains everything, and reports."""
    began = time.monotonic()
    bench = Bench(config)
    bench.run()
    rows = bench.rows
    results: dict[str, Any] = {"rows": rows, "seconds": time.monotonic() - began}
    results |= {"columns": [column._asdict() for column in COLUMNS], "baseline": FLOAT}
    results |= {"sizes": bench.sizes, "macs": bench.macs}
    results["sensitivities"] = {
        str(seed): {
            method: {p: {str(b): v for b, v in own.items()} for p, own in table.items()}
            for method, table in found.items()
        }
        for seed, found in bench.measured.items()
    }
    results["against"] = {str(a): against_uniform(rows, a) for a in config.averages}
    publish(bench.here, results, tables, figures, config.save)
    return {f"{a} bits on average": results["against"][str(a)] for a in config.averages}


COLUMNS = (
    Column("accuracy", "test accuracy (%)", ".2f", "max", 100),
    Column("before", "before training (%)", ".2f", "max", 100),
    Column("average", "bits of a weight", ".2f", "min"),
    Column("bitops", "BitOps (millions)", ".2f", "min", 1e-6),
)


def of_method(
    rows: list[dict[str, Any]], method: str, asked: int | None, value: str = "accuracy"
) -> np.ndarray:
    """In per cent, by seed."""
    mine = [r for r in rows if (r["method"], r["asked"]) == (method, asked)]
    return np.array([100 * r[value] for r in sorted(mine, key=lambda r: r["seed"])])


def against_uniform(rows: list[dict[str, Any]], asked: int) -> dict[str, Any]:
    """{method: {"points": mean difference from uniform bits after training, "before", "p": Welch's
    for the former}}."""
    base = of_method(rows, UNIFORM, asked)
    found: dict[str, Any] = {}
    for method in METHODS[1:]:
        own = of_method(rows, method, asked)
        apart = of_method(rows, method, asked, "before") - of_method(rows, UNIFORM, asked, "before")
        found[method] = {"points": float((own - base).mean()), "before": float(apart.mean())}
        if len(own) > 1:
            found[method]["p"] = float(welch(own.tolist(), base.tolist()).p)
    return found


def tables(results: dict[str, Any]) -> dict[str, Table]:
    """Arms down: accuracy, and what they take."""
    config = results["config"]
    differences = "; ".join(
        f"{asked} bits: "
        + ", ".join(f"{m} {x['points']:+.2f}" for m, x in results["against"][str(asked)].items())
        for asked in config["averages"]
    )
    caption = (
        f"{config['dataset']}: {config['epochs']} epochs in floating point, then "
        f"{config['further']} of quantization-aware training; mean ± standard deviation of "
        f"{config['seeds']} seeds. Points above uniform bits: {differences}."
    )
    return {NAME: summarise(results["rows"], COLUMNS, heading="bits", caption=caption)}


def figures(results: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy by average bits, and the bits of each layer."""
    rows, averages = results["rows"], results["config"]["averages"]
    places = [float(a) for a in averages]
    panel = Panel(
        {m: (places, np.stack([of_method(rows, m, a) for a in averages], axis=1)) for m in METHODS},
        "bits of a weight, on average",
        "test accuracy (%)",
        "After training",
        {float(a): str(a) for a in averages},
        {FLOAT: of_method(rows, FLOAT, None)},
    )
    layers = list(results["sizes"])
    shown = 3 if 3 in averages else averages[0]
    chosen: dict[str, Any] = {}
    for method in METHODS:
        mine = [r["bits"] for r in rows if (r["method"], r["asked"]) == (method, shown)]
        if method != RANDOM:
            chosen[method] = (range(len(layers)), [[b[layer] for layer in layers] for b in mine])
    names = {float(i): layer.split("/")[0] for i, layer in enumerate(layers)}
    bits = Panel(chosen, "layer", "bits", f"Chosen, {shown} on average", names)
    return {NAME: panels_plot([panel, bits], source, width=7.0, height=3.2)}
