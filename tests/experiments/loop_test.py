"""The loop: the same bits however it is stopped, started and dispatched; and what it refuses."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import effjax as ej
from effjax.checkpoint import Checkpoints
from effjax.errors import CheckpointError
from experiments.harness.batches import make_batches
from experiments.harness.errors import ConfigError, DivergedError, Interrupted
from experiments.harness.loop import fit
from experiments.harness.progress import Progress
from experiments.harness.runs import open_run
from experiments.harness.signals import Stop
from experiments.harness.stepper import BLOCK, Pace
from tests.experiments import small_run
from tests.experiments.killing import compare


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def linear(transform=None, *, width=3, layout=None, metrics=None):
    """The first arguments of `fit` for a linear model with noise from the step's key."""
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(50, 8)).astype(np.float32)}
    data["y"] = data["x"] @ rng.normal(size=(8, width)).astype(np.float32)
    batches = make_batches(data, 8, 0)

    def init(key, batch):
        return {"out": {"kernel": jax.random.normal(key, (8, width)), "bias": jnp.zeros(width)}}, {}

    def apply(params, model_state, batch, key, train):
        noise = 0.1 * jax.random.normal(key, (width,)) if train else 0.0
        out = params["out"]
        return batch["x"] @ out["kernel"] + out["bias"] + noise, model_state

    transform = transform or ej.chain(
        prune=ej.prune.magnitude(0.5, begin=2, end=8, every=3, select="kernel$")
    )
    tx = optax.adam(0.05)

    def loss(outputs, batch):
        return jnp.mean((outputs - batch["y"]) ** 2)

    state = ej.init_state(
        jax.random.key(1), ej.Model(init, apply), transform, tx, batches.example, layout=layout
    )
    if layout is not None:
        batches = batches.on(layout)
    return ej.make_step(apply, transform, loss, tx, metrics), state, batches


def assert_same_state(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_metrics_evaluations_and_checkpoints_come_when_they_are_due():
    run = open_run("x", {"seed": 0})
    done = fit(
        run,
        *linear(),
        steps=23,
        log_every=5,
        eval_every=10,
        checkpoint_every=8,
        evaluate=lambda state: {"e": float(state.step)},
    )
    lines = run.metrics.read()
    assert [(r["step"], r.get("e")) for r in lines] == [
        (5, None),
        (10, None),
        (10, 10.0),
        (15, None),
        (20, None),
        (20, 20.0),
        (23, None),
        (23, 23.0),
    ]
    assert {"step", "loss", "task", "prune/sparsity", "prune/target"} <= set(lines[0])
    assert sorted(int(p.name) for p in run.checkpoints.iterdir()) == [16, 23]
    assert int(done.state.step) == 23
    assert done.metrics["e"] == 23.0
    assert done.metrics["loss"] == lines[-2]["loss"]
    assert done.resumed is None


def test_a_run_that_is_done_only_restores():
    run, arguments = open_run("x", {"seed": 0}), linear()
    done = fit(run, *arguments, steps=12)
    before = run.metrics.path.read_bytes()
    again = fit(run, *arguments, steps=12)
    assert again.resumed == 12
    assert again.metrics == done.metrics
    assert_same_state(again.state, done.state)
    assert run.metrics.path.read_bytes() == before


@pytest.mark.parametrize("mode", ["step", "block"])
def test_saved_at_any_step_and_restored_it_goes_on_bit_for_bit(mode):
    arguments = linear()
    whole = fit(open_run("x", {}, id="whole"), *arguments, steps=14, mode=mode)
    lines = open_run("x", {}, id="whole").metrics.path.read_bytes()
    for stop in (1, 2, 6, 13):
        run = open_run("x", {}, id=f"stop{stop}")
        fit(run, *arguments, steps=stop, mode=mode)
        done = fit(run, *arguments, steps=14, mode=mode)
        assert done.resumed == stop
        assert_same_state(done.state, whole.state)
        assert run.metrics.path.read_bytes() == lines


def test_many_steps_in_one_program_equal_single_steps():
    arguments = linear()
    a, b = (
        fit(open_run("x", {}, id=mode), *arguments, steps=BLOCK + 9, mode=mode)
        for mode in ("step", "block")
    )
    assert_same_state(a.state, b.state)
    assert a.metrics == b.metrics


def test_the_step_compiles_once_and_the_callers_state_is_left_to_him():
    step, state, batches = linear()
    traces = []

    def counted(*arguments):
        traces.append(1)
        return step(*arguments)

    fit(open_run("x", {}), counted, state, batches, steps=40)
    assert len(traces) == 1
    assert int(state.step) == 0
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(signum):
    arguments = linear()
    whole = fit(open_run("x", {}, id="whole"), *arguments, steps=30, eval_every=6, evaluate=nothing)
    run = open_run("x", {}, id="stopped")
    sent = []

    def evaluate(state):
        if not sent:
            sent.append(os.kill(os.getpid(), signum))
        return {}

    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted) as stopped:
        fit(run, *arguments, steps=30, eval_every=6, evaluate=evaluate, checkpoint_every=100)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert stopped.value.code == 128 + signum
    assert "saved at step" in stopped.value.message
    assert str(run.path) in stopped.value.message
    assert "Give the same command again" in stopped.value.message
    done = fit(run, *arguments, steps=30, eval_every=6, evaluate=nothing)
    assert done.resumed == 6
    assert_same_state(done.state, whole.state)


def test_a_second_signal_acts_as_it_used_to():
    # A process in a shell's background ignores SIGINT; here it is to raise, as it usually does.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(runs, capsys):
    for id in ("whole", "damaged"):
        config = small_run.Config(steps=30, checkpoint_every=10)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EFFJAX_RUNS", str(runs / id))
            small_run.run(config)
    [run] = (runs / "damaged").glob("small/*")
    [file] = list((run / "checkpoints" / "30" / "leaves" / "d").iterdir())[:1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFJAX_RUNS", str(runs / "damaged"))
        done = small_run.run(config)
    assert done.resumed == 20
    said = capsys.readouterr().err
    assert "the checkpoint of step 30 is damaged" in said
    assert "going back to step 20" in said
    assert "going on from step 20 of 30" in said
    assert compare(runs / "whole", runs / "damaged") == 1


def nothing(state):
    return {}


def bomb(*, loss_at=None, weights_at=None):
    """A transform that breaks the loss, or a weight, at a step."""

    def loss(outputs, batch, aux, extra, state, ctx):
        return {"term": jnp.where(ctx.step == loss_at, jnp.nan, 0.5)}

    def update(vars, opt, state, grads, aux, ctx):
        out = vars.model["out"]
        kernel = out["kernel"].at[1, 1].add(jnp.where(ctx.step == weights_at, jnp.inf, 0.0))
        return vars._replace(model={"out": {**out, "kernel": kernel}}), opt, state

    if loss_at is not None:
        return ej.chain(bomb=ej.Transform(loss=loss))
    return ej.chain(bomb=ej.Transform(update=update))


@pytest.mark.parametrize("mode", ["step", "block"])
def test_a_nan_loss_stops_says_where_and_keeps_the_last_good_checkpoint(mode):
    run, arguments = open_run("x", {}), linear(bomb(loss_at=12))
    for _ in range(2):  # started again it comes to the same end
        with pytest.raises(DivergedError) as error:
            fit(run, *arguments, steps=40, checkpoint_every=5, mode=mode)
        message = str(error.value)
        assert "stopped at step 13: loss=nan, bomb/term=nan at step 13" in message
        assert "computed from weights that were finite" in message
        assert "last good checkpoint is of step 10" in message
        assert "Likely causes" in message
        with Checkpoints(run.checkpoints) as checkpoints:
            assert checkpoints.steps() == [5, 10]
    last = run.metrics.read()[-1]
    assert last["step"] == 13
    assert last["loss"] is None
    assert last["task"] > 0


def test_weights_that_break_are_named_with_the_step_that_broke_them():
    arguments = linear(bomb(weights_at=12))
    with pytest.raises(DivergedError) as error:
        fit(open_run("x", {}), *arguments, steps=40, checkpoint_every=5)
    message = str(error.value)
    assert "the loss at step 13 was finite, but its update broke vars/model/out/kernel" in message
    assert "stopped at step 14" in message
    assert "last good checkpoint is of step 10" in message


def test_a_broken_state_is_never_saved_even_if_the_loss_has_not_shown_it():
    run = open_run("x", {})
    with pytest.raises(DivergedError, match="update broke vars/model/out/kernel"):
        fit(run, *linear(bomb(weights_at=9)), steps=10, checkpoint_every=4)
    with Checkpoints(run.checkpoints) as checkpoints:
        assert checkpoints.steps() == [4, 8]


def test_infinity_in_a_transforms_state_is_an_honest_beginning():
    def init(key, params, setup):
        return {}, {"lowest": jnp.full((), jnp.inf)}

    done = fit(open_run("x", {}), *linear(ej.chain(low=ej.Transform(init=init))), steps=3)
    assert jnp.isinf(done.state.transform["low"]["lowest"])


def test_another_models_checkpoints_are_refused():
    run = open_run("x", {})
    fit(run, *linear(), steps=3)
    with pytest.raises(CheckpointError, match="vars/model/out/kernel"):
        fit(run, *linear(width=4), steps=6)


def test_what_cannot_be_meant_is_an_error():
    run = open_run("x", {})
    with pytest.raises(ConfigError, match=r"\{'steps': 0, 'log_every': -1\}: give a number"):
        fit(run, *linear(), steps=0, log_every=-1)
    with pytest.raises(ConfigError, match="mode is 'fast'"):
        fit(run, *linear(), steps=1, mode="fast")

    def wide(state, batch, frozen):
        return state._replace(step=state.step + 1), {"loss": state.vars.model["out"]["bias"]}

    _, state, batches = linear()
    with pytest.raises(ConfigError, match=r"metrics are scalars, but {'loss': \(3,\)}"):
        fit(run, wide, state, batches, steps=1)


def test_a_sharded_state_trains_resumes_and_stays_sharded():
    rules = [(r"kernel$", PartitionSpec("model", None))]
    layout = ej.Layout(jax.make_mesh((4, 2), ("data", "model")), rules)
    arguments = linear(layout=layout)
    whole = fit(open_run("x", {}, id="whole"), *arguments, steps=12)
    run = open_run("x", {}, id="stopped")
    fit(run, *arguments, steps=5)
    done = fit(run, *arguments, steps=12)
    assert done.resumed == 5
    assert_same_state(done.state, whole.state)
    leaves = jax.tree.leaves(done.state), jax.tree.leaves(arguments[1])
    for found, began in zip(*leaves, strict=True):
        assert found.sharding.is_equivalent_to(began.sharding, found.ndim)
    one = fit(open_run("x", {}, id="one"), *linear(), steps=12)
    for a, b in zip(jax.tree.leaves(one.state.vars), jax.tree.leaves(done.state.vars), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_a_pace_stays_within_a_second_and_within_a_block():
    pace = Pace()
    assert pace.block == 1
    pace.took(1, 0.001)
    assert pace.block == 2
    for _ in range(20):
        pace.took(pace.block, 0.001 * pace.block)
    assert pace.block == BLOCK
    pace.took(BLOCK, 8.0)
    assert pace.block == 4
    pace.took(4, 30.0)
    assert pace.block == 1


def test_progress_is_silent_unless_watched(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as if the captured stderr were a terminal
    for show, shown in ((None, False), (False, False), (True, True)):
        with Progress("a run", 0, 10, show) as bar:
            bar.update(3, 0.25)
        assert ("a run" in capsys.readouterr().err) == shown
