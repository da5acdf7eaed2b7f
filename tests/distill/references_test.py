"""Every distillation loss against NumPy in float64: values, gradients by finite differences, and
the limits of its numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, rel_entr, softmax

import effjax as ej
from effjax.distill import TopK

B, C = 5, 7
LABELS = np.array([0, 3, 6, 2, 3])
INDICES = np.array([[0, 2, 5], [1, 3, 2], [6, 0, 4], [2, 3, 1], [5, 4, 3]])
RAW = np.linspace(-1.0, 2.0, 4)
VALID = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], bool)


def np_huber(d):
    return np.where(np.abs(d) <= 1, d**2 / 2, np.abs(d) - 0.5)


def np_pearson(x, y):
    return np.corrcoef(x, y)[0, 1]


def np_dist(s, t):
    q, p = softmax(s / 2.0, -1), softmax(t / 2.0, -1)
    inter = np.mean([1 - np_pearson(q[b], p[b]) for b in range(B)])
    intra = np.mean([1 - np_pearson(q[:, c], p[:, c]) for c in range(C)])
    return 4.0 * (0.5 * inter + 2.0 * intra)


def np_dkd(s, t):
    found = []
    for row_s, row_t, label in zip(s / 3.0, t / 3.0, LABELS, strict=True):
        p, q = softmax(row_t), softmax(row_s)
        b_p, b_q = np.array([p[label], 1 - p[label]]), np.array([q[label], 1 - q[label]])
        rest = np.delete(np.arange(C), label)
        within = rel_entr(p[rest] / p[rest].sum(), q[rest] / q[rest].sum()).sum()
        found.append(9.0 * (1.5 * rel_entr(b_p, b_q).sum() + 4.0 * within))
    return np.array(found)


def np_top_k(s, values):
    p = softmax(values / 2.0, -1)
    log_q = np.take_along_axis(log_softmax(s / 2.0, -1), INDICES, -1)
    return 4.0 * (p * (np.log(p) - log_q)).sum(-1)


def np_attention(s, t):
    def attention(x):
        a = (np.abs(x) ** 2).mean(-1).reshape(B, -1)
        return a / np.sqrt((a**2).sum(-1, keepdims=True))

    return ((attention(s) - attention(t)) ** 2).mean(-1)


def np_nst(s, t):
    def rows(x):
        rows = x.reshape(-1, x.shape[-1]).T
        return [row / np.linalg.norm(row) for row in rows]

    def kernel(xs, ys):
        return np.mean([np.dot(x, y) ** 2 for x, y in itertools.product(xs, ys)])

    pairs = [(rows(x), rows(y)) for x, y in zip(s, t, strict=True)]
    return np.array([kernel(x, x) + kernel(y, y) - 2 * kernel(x, y) for x, y in pairs])


def np_vid(s, t):
    v = np.logaddexp(0, RAW) + 1e-5
    return (((t - s) ** 2 / v + np.log(v)) / 2).reshape(B, -1).mean(-1)


def np_fsp(s, t):
    # One tensor holds both layers: channels 0, 1 and 2, 3, 4.
    def gram(x):
        first, second = x[..., :2], x[..., 2:5]
        sums = [[(first[..., i] * second[..., j]).mean((1, 2)) for j in range(3)] for i in range(2)]
        return np.array(sums)

    return ((gram(s) - gram(t)) ** 2).mean((0, 1))


def both_layers(s, t):
    return ej.distill.fsp((s[..., :2], s[..., 2:5]), (t[..., :2], t[..., 2:5]))


def np_similarity(s, t):
    def gram(x):
        g = x.reshape(B, -1) @ x.reshape(B, -1).T
        return g / np.linalg.norm(g, axis=1, keepdims=True)

    return np.linalg.norm(gram(s) - gram(t)) ** 2 / B**2


def np_rkd_distance(s, t):
    pairs = list(itertools.permutations(range(B), 2))

    def distances(x):
        d = np.array([np.linalg.norm(x[i] - x[j]) for i, j in pairs])
        return d / d.mean()

    return np_huber(distances(s) - distances(t)).mean()


def np_rkd_angle(s, t):
    def cosine(a, b):
        return np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)

    def cosines(x):
        triplets = itertools.permutations(range(B), 3)
        return np.array([cosine(x[j] - x[i], x[k] - x[i]) for i, j, k in triplets])

    return np_huber(cosines(s) - cosines(t)).mean()


def np_crd(s, t):
    s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
    return np.mean([logsumexp(t @ s[i] / 0.5) - t[i] @ s[i] / 0.5 for i in range(B)])


def np_minilm(s, t, valid):
    def relation(x, b, head):
        part = np.split(x[b][valid[b]], 2, axis=-1)[head]
        return softmax(part @ part.T / np.sqrt(part.shape[-1]), -1)

    return np.array(
        [
            np.mean([rel_entr(relation(t, b, h), relation(s, b, h)).sum(-1) for h in (0, 1)])
            for b in range(B)
        ]
    )


D = ej.distill
# name -> (loss, reference, student's shape, teacher's shape)
LOSSES = {
    "kl": (lambda s, t: D.kl(s, t, 2.0), None, (B, C), (B, C)),
    "mse": (D.mse, lambda s, t: ((s - t) ** 2).mean(-1), (B, C), (B, C)),
    "cosine": (
        D.cosine,
        lambda s, t: 1 - (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1),
        (B, C),
        (B, C),
    ),
    "dist": (lambda s, t: D.dist(s, t, 2.0, inter=0.5, intra=2.0), np_dist, (B, C), (B, C)),
    "dkd": (
        lambda s, t: D.dkd(s, t, jnp.asarray(LABELS), 3.0, target=1.5, others=4.0),
        np_dkd,
        (B, C),
        (B, C),
    ),
    "hard": (
        D.hard,
        lambda s, t: -np.take_along_axis(log_softmax(s, -1), t.argmax(-1)[:, None], -1)[:, 0],
        (B, C),
        (B, C),
    ),
    "label_smoothing": (
        lambda s, t: D.label_smoothing(s, jnp.asarray(LABELS), 0.3),
        lambda s, t: -((0.7 * np.eye(C)[LABELS] + 0.3 / C) * log_softmax(s, -1)).sum(-1),
        (B, C),
        (B, C),
    ),
    "top_k_kl": (
        lambda s, t: D.top_k_kl(s, TopK(t, jnp.asarray(INDICES)), 2.0),
        np_top_k,
        (B, C),
        (B, 3),
    ),
    "hint": (
        D.hint,
        lambda s, t: ((s - t) ** 2).mean((1, 2, 3)),
        (B, 2, 3, 4),
        (B, 2, 3, 4),
    ),
    "attention_transfer": (D.attention_transfer, np_attention, (B, 2, 3, 4), (B, 2, 3, 6)),
    "nst": (D.nst, np_nst, (B, 2, 3, 4), (B, 2, 3, 6)),
    "vid": (lambda s, t: D.vid(s, t, jnp.asarray(RAW)), np_vid, (B, 2, 3, 4), (B, 2, 3, 4)),
    "fsp": (both_layers, np_fsp, (B, 2, 3, 5), (B, 4, 4, 5)),
    "similarity": (D.similarity, np_similarity, (B, 2, 4), (B, 3, 3)),
    "rkd_distance": (D.rkd_distance, np_rkd_distance, (B, 4), (B, 6)),
    "rkd_angle": (D.rkd_angle, np_rkd_angle, (B, 4), (B, 6)),
    "crd": (lambda s, t: D.crd(s, t, 0.5), np_crd, (B, 4), (B, 4)),
    "minilm": (
        lambda s, t: D.minilm(s, t, heads=2),
        lambda s, t: np_minilm(s, t, np.ones_like(VALID)),
        (B, 3, 4),
        (B, 3, 6),
    ),
    "minilm_valid": (
        lambda s, t: D.minilm(s, t, heads=2, valid=jnp.asarray(VALID)),
        lambda s, t: np_minilm(s, t, VALID),
        (B, 3, 4),
        (B, 3, 6),
    ),
}
REFERENCED = [name for name in LOSSES if LOSSES[name][1] is not None]


def inputs(name, scale=1.0):
    _, _, student, teacher = LOSSES[name]
    rng = np.random.default_rng(list(LOSSES).index(name))
    return rng.normal(0, scale, student), rng.normal(0, scale, teacher)


@pytest.mark.parametrize("name", REFERENCED)
def test_equals_the_reference(name):
    loss, reference, *_ = LOSSES[name]
    s, t = inputs(name)
    expected = reference(s, t)
    single = jax.jit(loss)(jnp.float32(s), jnp.float32(t))
    assert single.dtype == jnp.float32
    assert single.shape == np.shape(expected)
    np.testing.assert_allclose(single, expected, rtol=2e-5, atol=2e-6)
    with jax.enable_x64(True):
        double = jax.jit(loss)(jnp.asarray(s), jnp.asarray(t))
        assert double.dtype == jnp.float64
        np.testing.assert_allclose(double, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", REFERENCED)
def test_gradients_equal_finite_differences_of_the_reference(name):
    loss, reference, *_ = LOSSES[name]
    s, t = inputs(name)
    found = jax.jit(jax.grad(lambda s: loss(s, jnp.float32(t)).sum()))(jnp.float32(s))
    h, expected = 1e-6, np.zeros_like(s)
    for at in np.ndindex(s.shape):
        step = np.zeros_like(s)
        step[at] = h
        expected[at] = np.sum(reference(s + step, t) - reference(s - step, t)) / (2 * h)
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", LOSSES)
def test_finite_with_its_gradients_at_extremes_in_every_dtype(name, dtype):
    loss, _, student, teacher = LOSSES[name]
    rng = np.random.default_rng(0)
    large = [rng.choice([-1e4, 0.0, 1.0, 1e4], shape) for shape in (student, teacher)]
    zeros = [np.zeros(shape) for shape in (student, teacher)]
    mixed = [large[0], zeros[1]]
    same = [np.broadcast_to(x[:1], x.shape) for x in large]  # examples that are all equal
    function = jax.jit(jax.value_and_grad(lambda s, t: jnp.mean(loss(s, t))))
    for s, t in (large, zeros, mixed, same):
        value, grad = function(jnp.asarray(s, dtype), jnp.asarray(t, dtype))
        assert value.dtype == jnp.float32
        assert grad.dtype == jnp.dtype(dtype)
        assert np.isfinite(value)
        assert np.isfinite(np.asarray(grad, np.float32)).all()


SAME = [name for name in LOSSES if LOSSES[name][2] == LOSSES[name][3]]
ZERO_AT_THE_TEACHER = [n for n in SAME if n not in ("hard", "label_smoothing", "vid", "crd")]


@pytest.mark.parametrize("name", ZERO_AT_THE_TEACHER)
def test_nothing_to_learn_from_oneself(name):
    loss = LOSSES[name][0]
    x = jnp.float32(inputs(name)[0])
    value, grad = jax.value_and_grad(lambda s: jnp.sum(loss(s, x)))(x)
    assert abs(float(value)) < 1e-5
    np.testing.assert_allclose(grad, 0, atol=1e-5)


def test_dkd_with_the_weight_of_hintons_loss_is_it():
    s, t = (jnp.float32(x) for x in inputs("dkd"))
    rest = 1 - jax.nn.softmax(t / 2.0)[jnp.arange(B), LABELS]
    found = ej.distill.dkd(s, t, jnp.asarray(LABELS), 2.0, target=1.0, others=rest)
    np.testing.assert_allclose(found, ej.distill.kl(s, t, 2.0), rtol=1e-5)


def test_all_of_the_top_k_is_hintons_loss():
    s, t = (jnp.float32(x) for x in inputs("kl"))
    found = ej.distill.top_k_kl(s, ej.distill.top_k(t, C), 3.0)
    np.testing.assert_allclose(found, ej.distill.kl(s, t, 3.0), rtol=1e-5, atol=1e-6)


def test_top_k_by_hand():
    kept = ej.distill.top_k(jnp.array([[0.5, 3.0, -1.0, 2.0]]), 2)
    np.testing.assert_array_equal(kept.values, [[3.0, 2.0]])
    np.testing.assert_array_equal(kept.indices, [[1, 3]])


def test_relations_do_not_see_rotations_and_sizes():
    s, _ = inputs("rkd_angle")
    turned = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    t = jnp.float32(7.0 * s @ turned + 2.0)
    for loss in (ej.distill.rkd_distance, ej.distill.rkd_angle):
        assert float(loss(jnp.float32(s), t)) < 1e-9
    moved = jnp.float32(7.0 * s @ turned)
    assert float(ej.distill.similarity(jnp.float32(s), moved)) < 1e-9


def zeros(*shape):
    return jnp.zeros(shape)


MISTAKES = {
    "hint": (lambda: D.hint(zeros(2, 3, 3, 4), zeros(2, 3, 3, 8)), r"\[2, 3, 3, 8\].*projected"),
    "hint_kind": (lambda: D.hint(zeros(2, 3).astype(int), zeros(2, 3)), "int32"),
    "hint_none": (lambda: D.hint(None, zeros(2, 3)), "NoneType"),
    "attention_axes": (lambda: D.attention_transfer(zeros(2, 3), zeros(2, 3)), "height width"),
    "attention_places": (
        lambda: D.attention_transfer(zeros(2, 3, 3, 1), zeros(2, 4, 3, 1)),
        "differ in height",
    ),
    "attention_power": (
        lambda: D.attention_transfer(zeros(2, 3, 3, 1), zeros(2, 3, 3, 1), 0.5),
        "power 0.5",
    ),
    "vid": (lambda: D.vid(zeros(2, 4), zeros(2, 4), zeros(3)), r"\[3\].*each channel"),
    "fsp_one": (lambda: D.fsp(zeros(2, 3, 3, 4), zeros(2, 3, 3, 4)), "two layers"),
    "fsp_places": (
        lambda: D.fsp((zeros(2, 3, 3, 4), zeros(2, 2, 2, 4)), (zeros(2, 3, 3, 4),) * 2),
        "student's layers.*same height",
    ),
    "fsp_channels": (
        lambda: D.fsp((zeros(2, 3, 3, 4),) * 2, (zeros(2, 3, 3, 5),) * 2),
        "differ in first",
    ),
    "similarity": (lambda: D.similarity(zeros(2, 4), zeros(3, 4)), "differ in batch"),
    "rkd_batch": (lambda: D.rkd_angle(zeros(2, 4), zeros(2, 4)), "needs 3"),
    "crd": (lambda: D.crd(zeros(2, 4), zeros(2, 5)), "differ in features"),
    "minilm_heads": (lambda: D.minilm(zeros(2, 3, 4), zeros(2, 3, 6), heads=4), "teacher's 6"),
    "minilm_valid": (
        lambda: D.minilm(zeros(2, 3, 4), zeros(2, 3, 4), valid=zeros(2, 3)),
        r"float32\[2, 3\]",
    ),
    "dist": (lambda: D.dist(zeros(2, 3, 4), zeros(2, 3, 4)), r"\[batch, classes\]"),
    "dkd": (
        lambda: D.dkd(zeros(2, 3), zeros(2, 3), zeros(2, 3)),
        r"float32\[2, 3\].*mixed.*distill.kl",
    ),
    "smoothing": (
        lambda: D.label_smoothing(zeros(2, 3), jnp.zeros(3, int)),
        r"int32\[3\] for logits",
    ),
    "top_k": (lambda: D.top_k(zeros(2, 3), 4), "k=4 of 3"),
    "top_k_kl": (lambda: D.top_k_kl(zeros(2, 3), TopK(zeros(2, 2), zeros(2, 2))), "integer"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_fit_is_an_error(name):
    call, says = MISTAKES[name]
    with pytest.raises(ej.errors.SetupError, match=f"(?s){says}"):
        call()
