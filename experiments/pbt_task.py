"""What the arms of the `pbt` experiment share: a training with traced hyper-parameters, and how a
population of it goes through its rounds, in one program or in a process for each member."""

import functools
import json
import multiprocessing
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import effjax as ej
from effjax.checkpoint import Checkpoints
from effjax.nas import pbt
from experiments.harness import data
from experiments.harness.batches import Batches, evaluator, make_batches
from experiments.harness.errors import ExperimentError
from experiments.harness.runs import Run
from experiments.models import mlp
from experiments.sparse_report import cross_entropy, scores

PRIORS = {
    "learning_rate": pbt.Prior(1e-3, 1.0, log=True),
    "weight_decay": pbt.Prior(1e-6, 1e-2, log=True),
}
COSINE = "cosine"  # 1 anneals the learning rate to 0, 0 leaves it as it is


class Plan(NamedTuple):
    """How a population is trained.

    members, rounds, steps: of the population, of the search, and of a round.
    fraction: of the members that copy in each round.
    validation: how many examples a score is the accuracy on.
    """

    dataset: str
    members: int
    rounds: int
    steps: int
    batch: int
    hidden: int
    fraction: float
    validation: int
    seed: int


class Network(NamedTuple):
    """What is compiled: the sizes of the network, and how many steps the learning rate anneals."""

    inputs: int
    hidden: int
    classes: int
    steps: int

    @property
    def model(self) -> ej.Model:
        """An MLP."""
        return ej.from_linen(mlp.LinenMLP(mlp.Spec(self.inputs, (self.hidden,), self.classes)))

    def build(self, hyper: Mapping[str, Any]) -> ej.Run:
        """The functions of a run; see `effjax.population`."""
        anneal = optax.cosine_decay_schedule(1.0, self.steps)

        def rate(step: Array) -> Array:
            return hyper["learning_rate"] * (1 + hyper[COSINE] * (anneal(step) - 1))

        decay = optax.add_decayed_weights(hyper["weight_decay"])
        tx = optax.chain(decay, optax.sgd(rate, momentum=0.9))
        model = self.model

        def init(key: Array, batch: Any, frozen: Any) -> ej.TrainState:
            return ej.init_state(key, model, ej.chain(), tx, batch)

        return ej.Run(init, ej.make_step(model.apply, ej.chain(), cross_entropy, tx))


@functools.cache
def population(
    network: Network, members: int, mode: Literal["auto", "map"] = "auto"
) -> ej.Population:
    """Compiled once for all arms and seeds: every step is given its hyper-parameters."""
    ones = {name: [1.0] * members for name in (*PRIORS, COSINE)}
    return ej.population(network.build, ones, mode)


class Task:
    """A data set and the network that is trained on it."""

    def __init__(self, plan: Plan):
        self.plan, self.key = plan, jax.random.key(plan.seed)
        images = data.load(plan.dataset, seed=plan.seed, validation=1 / 6)
        standard = images.standard
        self._batches = make_batches(images.train.as_dict(), plan.batch, plan.seed, **standard)
        size = images.train.image[0].size
        self.network = Network(size, plan.hidden, images.classes, plan.rounds * plan.steps)
        evaluate = ej.make_eval(self.network.model.apply, ej.chain(), scores)
        seen = data.Split(*(x[: plan.validation] for x in images.validation))
        self.validate = evaluator(evaluate, seen.as_dict(), size=plan.validation, **standard)
        self.test = evaluator(evaluate, images.test.as_dict(), size=2000, **standard)

    def batch(self, step: int) -> dict[str, Array]:
        """What all members see at a step."""
        return _made(self._batches, np.int32(step))

    def hypers(self, cosine: bool = False) -> pbt.Hypers:
        """The first hyper-parameters of all members."""
        drawn = pbt.draw(jax.random.fold_in(self.key, 1), PRIORS, self.plan.members)
        return {**drawn, COSINE: jnp.full(self.plan.members, float(cosine))}

    def keys(self) -> Array:
        """Of the members' weights and dropout."""
        return jax.random.split(jax.random.fold_in(self.key, 2), self.plan.members)

    def decide(self, number: int, hypers: pbt.Hypers, found: Array) -> pbt.Event:
        """What a round ends with: a function of the scores alone."""
        key = jax.random.fold_in(jax.random.fold_in(self.key, 3), number)
        return _decide(key, hypers, found, self.plan.fraction)


@jax.jit
def _made(batches: Batches, step: Array) -> dict[str, Array]:
    return batches(step)


@functools.partial(jax.jit, static_argnums=3)
def _decide(key: Array, hypers: pbt.Hypers, found: Array, fraction: float) -> pbt.Event:
    return pbt.decide(key, hypers, found, PRIORS, fraction=fraction)


copied = jax.jit(pbt.copied)


def line(number: int, event: pbt.Event) -> dict[str, Any]:
    """A round as JSON: the scores, who copied whom, and with what they went on."""
    plain = jax.tree.map(lambda x: np.asarray(x).tolist(), event._asdict())
    return {"step": number, **plain}


def together(task: Task, here: Run, hypers: pbt.Hypers, evolving: bool) -> dict[str, Any]:
    """All members in one process, as a population; goes on where it was killed.

    Returns:
      rounds: the lines of all rounds. accuracy: on the test set, of the best in the last round.
    """
    began, plan = time.monotonic(), task.plan
    runs = population(task.network, plan.members)
    states, at = runs.init(task.keys(), task.batch(0)), 0
    with Checkpoints(here.checkpoints) as checkpoints:
        if checkpoints.steps():
            restored = checkpoints.restore((states, hypers))
            (states, hypers), at = restored.tree, restored.step
            here.metrics.rewind(restored.metadata["metrics_bytes"])
        else:
            here.metrics.rewind(0)
        for number in range(at, plan.rounds):
            for step in range(number * plan.steps, (number + 1) * plan.steps):
                states, _ = runs.step(states, task.batch(step), hypers=hypers)
            found = [task.validate(runs.member(states, k))["accuracy"] for k in range(plan.members)]
            event = task.decide(number, hypers, jnp.asarray(found, jnp.float32))
            if evolving and number + 1 < plan.rounds:
                states, hypers = copied(states, event.parent), event.after
            else:
                event = event._replace(parent=jnp.arange(plan.members), after=hypers)
            here.metrics.append([line(number, event)])
            if number + 1 == plan.rounds or (number + 1) % 5 == 0:
                checkpoints.save(
                    number + 1, (states, hypers), {"metrics_bytes": here.metrics.position()}
                )
    rounds = here.metrics.read()
    best = int(np.argmax(rounds[-1]["score"]))
    accuracy = task.test(runs.member(states, best))["accuracy"]
    return {"rounds": rounds, "accuracy": accuracy, "seconds": time.monotonic() - began}


def apart(plan: Plan, folder: Path) -> dict[str, Any]:
    """Each member a process of its own; they share scores and weights through files.

    Returns:
      As `together`.

    Raises:
      ExperimentError: a process failed.
    """
    began = time.monotonic()
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    members = [context.Process(target=_member, args=(plan, folder, k)) for k in range(plan.members)]
    for process in members:
        process.start()
    try:
        while any(process.is_alive() for process in members):
            if failed := [k for k, p in enumerate(members) if p.exitcode]:
                raise ExperimentError(f"the processes of members {failed} failed; see above.")
            time.sleep(0.05)
    finally:
        for process in members:
            process.terminate()
            process.join()
    found = [json.loads((folder / f"{k}.json").read_text()) for k in range(plan.members)]
    rounds = found[0]["rounds"]
    assert all(one["rounds"] == rounds for one in found)
    best = int(np.argmax(rounds[-1]["score"]))
    seconds = time.monotonic() - began
    return {"rounds": rounds, "accuracy": found[best]["accuracy"], "seconds": seconds}


def _member(plan: Plan, folder: Path, k: int) -> None:
    """One process: member k of the population, and what all decide alike from all scores."""
    task = Task(plan)
    hypers = task.hypers()

    def own() -> pbt.Hypers:
        return {name: values[k : k + 1] for name, values in hypers.items()}

    runs = population(task.network, 1, "map")
    states: Any = runs.init(task.keys()[k : k + 1], task.batch(0))
    rounds = []
    for number in range(plan.rounds):
        for step in range(number * plan.steps, (number + 1) * plan.steps):
            states, _ = runs.step(states, task.batch(step), hypers=own())
        accuracy = task.validate(states[0])["accuracy"]
        last = number + 1 == plan.rounds
        if not last:
            _write(folder / f"{number}-{k}.npz", states[0])
        (folder / f"{number}-{k}.part").write_text(json.dumps(accuracy))
        (folder / f"{number}-{k}.part").rename(folder / f"{number}-{k}.score")
        every = [_wait(folder / f"{number}-{i}.score") for i in range(plan.members)]
        event = task.decide(number, hypers, jnp.asarray(every, jnp.float32))
        if last:
            event = event._replace(parent=jnp.arange(plan.members), after=hypers)
        elif (parent := int(event.parent[k])) != k:
            states = (_read(folder / f"{number}-{parent}.npz", states[0]),)
        hypers = event.after
        rounds.append(line(number, event))
    found = {"rounds": rounds, "accuracy": task.test(states[0])["accuracy"]}
    (folder / f"{k}.json").write_text(json.dumps(found))


def _wait(path: Path) -> float:
    while not path.exists():
        time.sleep(0.002)
    return json.loads(path.read_text())


def _write(path: Path, state: Any) -> None:
    shared = jax.tree.leaves(state._replace(key=()))
    np.savez(path, *(np.asarray(leaf) for leaf in shared))


def _read(path: Path, state: Any) -> Any:
    """A member's weights and moments, with another's random key."""
    bare = state._replace(key=())
    with np.load(path) as file:
        leaves = [jnp.asarray(file[name]) for name in file.files]
    return jax.tree.unflatten(jax.tree.structure(bare), leaves)._replace(key=state.key)
