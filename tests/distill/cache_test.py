"""Cached teachers: what is on disk, the step that learns from it, and what does not belong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.distill import Teacher, read_cache, write_cache

N, FEATURES, CLASSES = 11, 4, 5
RNG = np.random.default_rng(0)
DATA = {"x": RNG.normal(size=(N, FEATURES)).astype(np.float32)}
WEIGHTS = Teacher({"kernel": RNG.normal(size=(FEATURES, CLASSES)).astype(np.float32)}, {})
TRUE = DATA["x"] @ WEIGHTS.params["kernel"]


def linear(params, model_state, batch, key, train):
    return batch["x"] @ params["kernel"], model_state


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "caches" / "teacher"


def write(folder, **settings):
    return write_cache(folder, linear, WEIGHTS, DATA, **{"batch": 4, **settings})


@pytest.mark.parametrize(("dtype", "rtol"), [("float16", 2e-3), ("float32", 1e-5)])
def test_all_logits_of_every_example(folder, dtype, rtol):
    cache = write(folder, dtype=dtype)
    found = cache.arrays["teacher_logits"]
    assert isinstance(found, np.memmap)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, TRUE, rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(cache.batch([7, 2])["teacher_logits"], found[[7, 2]])
    assert not folder.with_name("teacher.partial").exists()


def test_the_k_largest_and_the_probability_left_out(folder):
    cache = write(folder, k=2, dtype="float32")
    order = np.argsort(-TRUE, axis=-1)[:, :2]
    np.testing.assert_array_equal(cache.arrays["teacher_indices"], order)
    np.testing.assert_allclose(
        cache.arrays["teacher_values"], np.take_along_axis(TRUE, order, -1), rtol=1e-5
    )
    p = np.exp(TRUE) / np.exp(TRUE).sum(-1, keepdims=True)
    kept = np.take_along_axis(p, order, -1).sum(-1)
    np.testing.assert_allclose(cache.left_out, 1 - kept, atol=1e-6)


def test_the_teacher_runs_once(folder):
    runs = []

    def counted(params, model_state, batch, key, train):
        jax.debug.callback(lambda: runs.append(train), ordered=True)
        return linear(params, model_state, batch, key, train)

    write_cache(folder, counted, WEIGHTS, DATA, batch=4)
    jax.effects_barrier()
    assert runs == [False] * 3
    write_cache(folder, counted, WEIGHTS, DATA, batch=4)  # looks at the first batch alone
    read_cache(folder, WEIGHTS, DATA)
    jax.effects_barrier()
    assert len(runs) == 4


@pytest.mark.parametrize("k", [None, 2])
def test_after_a_kill_it_goes_on_where_it_stood(folder, monkeypatch, k):
    monkeypatch.setattr("effjax.distill.cache._CHUNK", 4)
    seen = []

    def prepare(batch):
        jax.debug.callback(lambda x: seen.append(float(x[0, 0])), batch["x"], ordered=True)
        return batch

    expected = write(folder.with_name("whole"), k=k)
    from effjax.distill import cache as module

    note, calls = module._note, []

    def killed(*args):
        note(*args)
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_note", killed)
    with pytest.raises(KeyboardInterrupt):
        write(folder, k=k)
    assert not folder.exists()
    monkeypatch.setattr(module, "_note", note)
    found = write(folder, k=k, prepare=prepare)
    jax.effects_barrier()
    # The last batch alone, which reaches back to example 7.
    assert seen == [float(DATA["x"][7, 0])]
    for name, x in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], x)


def test_what_was_begun_for_another_teacher_is_begun_anew(folder):
    partial = folder.with_name("teacher.partial")
    partial.mkdir(parents=True)
    (partial / "progress.json").write_text(json.dumps({"wanted": {}, "done": 8}))
    np.testing.assert_allclose(write(folder).arrays["teacher_logits"], TRUE, rtol=2e-3, atol=2e-3)


def model():
    kernel = jax.random.normal(jax.random.key(1), (FEATURES, CLASSES))
    return ej.Model(lambda key, batch: ({"kernel": kernel}, {}), linear)


def nothing(outputs, batch):
    return jnp.zeros(())


def run(kd, batch, frozen=None):
    chain, tx = ej.chain(kd=kd), optax.sgd(0.5)
    state = ej.init_state(jax.random.key(0), model(), chain, tx, batch, frozen)
    step = jax.jit(ej.make_step(linear, chain, nothing, tx))
    for _ in range(3):
        state, metrics = step(state, batch, frozen)
    return state.vars.model["kernel"], metrics


@pytest.mark.parametrize("k", [None, CLASSES])
def test_a_student_of_the_cache_is_the_student_of_the_teacher(folder, k):
    cache = write(folder, k=k, dtype="float32")
    places = np.array([3, 1, 8])
    batch = {"x": DATA["x"][places]}
    live, expected = run(
        ej.distill.logits(linear, temperature=2.0, alpha=lambda step: 1 / (1.0 + step)),
        batch,
        {"kd": WEIGHTS},
    )
    kd = ej.distill.logits(cache.targets, temperature=2.0, alpha=lambda step: 1 / (1.0 + step))
    found, metrics = run(kd, {**batch, **cache.batch(places)})
    np.testing.assert_allclose(found, live, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["kd/agreement"], expected["kd/agreement"])
    name = "kd/top_k_kl" if k else "kd/kl"
    np.testing.assert_allclose(metrics[name], expected["kd/kl"], rtol=1e-4)


def test_other_losses_take_cached_logits(folder):
    cache = write(folder, dtype="float32")
    batch = {"x": DATA["x"][:6], **cache.batch(np.arange(6))}
    found, _ = run(ej.distill.logits(cache.targets, ej.distill.mse), batch)
    live, _ = run(ej.distill.logits(linear, ej.distill.mse), {"x": DATA["x"][:6]}, {"kd": WEIGHTS})
    np.testing.assert_allclose(found, live, rtol=1e-5, atol=1e-6)


OTHER = Teacher({"kernel": WEIGHTS.params["kernel"] + 1}, {})
ELSE = {"x": DATA["x"] + 1}
TURNED = {"x": DATA["x"][::-1]}


@pytest.mark.parametrize(
    ("weights", "data", "says"),
    [
        (OTHER, DATA, "other weights than the teacher's"),
        (WEIGHTS, ELSE, "is of other data"),
        (WEIGHTS, {"image": DATA["x"]}, "is of other data"),
        (WEIGHTS, TURNED, "same data in another order"),
        (WEIGHTS, {"x": DATA["x"][:9]}, "is of other data"),
        (WEIGHTS, {"x": DATA["x"], "y": DATA["x"][:2]}, "first axis"),
    ],
)
def test_a_cache_of_something_else(folder, weights, data, says):
    write(folder)
    with pytest.raises(ej.errors.SetupError, match=says):
        read_cache(folder, weights, data)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"k": 3}, "another number of logits"),
        ({"dtype": "float32"}, "another dtype"),
        ({"prepare": lambda b: {"x": 2 * b["x"]}}, "`prepare`"),
    ],
)
def test_a_cache_written_otherwise(folder, settings, says):
    write(folder)
    with pytest.raises(ej.errors.SetupError, match=says):
        write(folder, **settings)


def test_a_file_cut_short_or_gone(folder):
    write(folder)
    file = folder / "teacher_logits.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(ej.errors.SetupError, match=r"(?s)teacher_logits.npy cannot be.*cut short"):
        read_cache(folder, WEIGHTS, DATA)
    np.save(file, np.zeros((N, 2), np.float16))
    with pytest.raises(ej.errors.SetupError, match="the manifest says"):
        read_cache(folder, WEIGHTS, DATA)
    file.unlink()
    with pytest.raises(ej.errors.SetupError, match="missing"):
        read_cache(folder, WEIGHTS, DATA)
    with pytest.raises(ej.errors.SetupError, match="no cache is there"):
        read_cache(folder.with_name("nowhere"), WEIGHTS, DATA)


def test_batches_that_do_not_fit_the_cache(folder):
    full = write(folder)
    best = write(folder.with_name("best"), k=2)
    batch = {"x": DATA["x"][:3]}
    kd = ej.distill.logits
    with pytest.raises(ej.errors.SetupError, match=r"lacks \['teacher_logits'\]; it has \['x'\]"):
        run(kd(full.targets), batch)
    with pytest.raises(ej.errors.SetupError, match=r"teacher_values.*teacher_indices"):
        run(kd(best.targets), {**batch, **full.batch([0, 1, 2])})
    with pytest.raises(ej.errors.SetupError, match="another cache"):
        run(kd(best.targets._replace(k=3)), {**batch, **best.batch([0, 1, 2])})
    for cache in (full, best):
        other = cache.targets._replace(classes=CLASSES + 1)
        with pytest.raises(ej.errors.SetupError, match=r"another cache|5 classes"):
            run(kd(other), {**batch, **cache.batch([0, 1, 2])})
    with pytest.raises(ej.errors.SetupError, match="as frozen input as well"):
        run(kd(full.targets), {**batch, **full.batch([0, 1, 2])}, {"kd": WEIGHTS})


def test_mixed_examples_have_no_cached_logits(folder):
    places = np.arange(4)
    label = np.arange(4, dtype=np.int32)
    batch = {"image": DATA["x"][:4, None, :, None], "label": label, **write(folder).batch(places)}

    def apply(params, model_state, batch, key, train):
        return batch["image"][:, 0, :, 0] @ params["kernel"], model_state

    one, tx = model()._replace(apply=apply), optax.sgd(0.1)
    kd = {"kd": ej.distill.logits(ej.distill.Cached(CLASSES, 0))}
    for mixing in ({}, {"mix": ej.augment.mixup(1.0, classes=CLASSES)}):
        chain = ej.chain(**mixing, **kd)
        state = ej.init_state(jax.random.key(0), one, chain, tx, batch)
        step = ej.make_step(apply, chain, nothing, tx)
        if not mixing:
            assert float(step(state, batch)[1]["kd/kl"]) > 0
            continue
        with pytest.raises(ej.errors.SetupError, match=r"mixup.*in the step.*argmax"):
            step(state, batch)


def test_what_cannot_be_written(folder):
    with pytest.raises(ej.errors.SetupError, match=r"float16 cannot hold.*float32"):
        write(folder, prepare=lambda b: {"x": 1e6 * b["x"]})
    with pytest.raises(ej.errors.SetupError, match="k=9 of the teacher's 5"):
        write(folder, k=9)
    with pytest.raises(ej.errors.SetupError, match="dtype='int8'"):
        write(folder, dtype="int8")
    with pytest.raises(ej.errors.SetupError, match=r"\[batch, classes\]"):
        write(folder, teacher_logits=lambda out: out[None])
    assert not folder.exists()
