"""Every transform, and every pair, through the laws. A new transform joins TRANSFORMS."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import effjax as ej
from effjax.distill import Match, embedded
from effjax.testing import LAWS, Case, check_transform
from tests import nets

MODELS = {"linen": nets.linen, "nnx": nets.nnx_, "raw": nets.raw}
TEACHER = nets.linen(features=16)
TAUGHT = ("distill", "dkd", "features")
TAPS = {"raw": "hidden", "linen": "conv2", "nnx": "conv2"}
# Law 1 is about the chain without members.
WITH_ANY = [law for law in LAWS if law != 1]


def width(model):
    groups = (
        {"hidden": r"^hidden/"}
        if model == "raw"
        else {"one": r"^(conv1|norm1)/", "two": r"^(conv2|norm2)/"}
    )
    return ej.nas.width(groups, choices=(0.5, 1.0), samples=1)


@functools.cache
def supernet(model):
    """Elastic in all that the model can be; bits and kernels in the modules alone, for time."""
    nas = ej.nas
    net = MODELS[model]()
    if model == "raw":
        return nas.Supernet(
            net,
            nets.BATCH,
            {
                "width": nas.Width("^hidden/kernel$", (0.5, 1.0)),
                "zeros": nas.Sparsity("^hidden/kernel$", (0.0, 0.5)),
            },
        )
    return nas.Supernet(
        net,
        nets.BATCH,
        {
            "one": nas.Width("^conv1/kernel$", (0.5, 1.0)),
            "two": nas.Width("^conv2/kernel$", (0.5, 1.0)),
            "size": nas.Kernel("^conv2/kernel$", (1, 3), matrices=True),
            "zeros": nas.Sparsity("^conv2/kernel$", (0.0, 0.5)),
            "bits": nas.Bits("^conv2/kernel$", (4, 8), 8),
        },
    )


def fixed(model):
    net = supernet(model)
    return ej.nas.fixed(net, net.smallest)


# name -> (model name -> Transform); the order is the order in which a chain takes them.
TRANSFORMS = {
    "width": width,
    "darts": lambda model: ej.nas.darts({"edges": 1}, ("skip", "flip", "tanh"), auxiliary=0.1),
    "supernet": lambda model: ej.nas.elastic(supernet(model), samples=1),
    "fixed": fixed,
    "magnitude": lambda model: ej.prune.magnitude(0.5, begin=0, end=3, select="kernel$"),
    "magnitude_global": lambda model: ej.prune.magnitude(
        0.8, begin=1, end=3, budget="global", select="kernel$"
    ),
    "saliency": lambda model: ej.prune.saliency(0.5, 0, 3, select="kernel$"),
    "taylor": lambda model: ej.prune.taylor(0.5, 1, 3, 2, select="kernel$", budget="erk"),
    "random": lambda model: ej.prune.random(0.5, 0, 3, select="kernel$"),
    "blocks": lambda model: ej.prune.magnitude(
        0.5, 0, 3, pattern=ej.prune.block((1, 4)), budget="macs", select="kernel$"
    ),
    "channels": lambda model: ej.prune.magnitude(
        0.5, 0, 3, pattern=ej.prune.channel(), select="kernel$"
    ),
    "ste": lambda model: ej.prune.ste(0.5, select="kernel$"),
    "ste_n_m": lambda model: ej.prune.ste(
        every=2, pattern=ej.prune.n_m(2, 4, pad=True), select="kernel$"
    ),
    "movement": lambda model: ej.prune.movement(0.5, 0, 3, select="kernel$"),
    "static": lambda model: ej.prune.static(0.5, select="kernel$"),
    "set": lambda model: ej.prune.set_(0.5, 0, 4, 1, select="kernel$"),
    "rigl": lambda model: ej.prune.rigl(0.5, 0, 4, 2, select="kernel$"),
    "sparse_momentum": lambda model: ej.prune.sparse_momentum(0.5, 0, 4, 2, select="kernel$"),
    "soft_threshold": lambda model: ej.prune.soft_threshold(-2.0, 0.1, select="kernel$"),
    "hard_concrete": lambda model: ej.prune.hard_concrete(
        0.1, pattern=ej.prune.channel(), select="kernel$"
    ),
    "group_lasso": lambda model: ej.prune.group_lasso(0.1, select="kernel$"),
    "proximal_lasso": lambda model: ej.prune.group_lasso(1.0, rate=0.01, select="kernel$"),
    "ema": lambda model: ej.prune.ema(0.9),
    "qat": lambda model: ej.quantize.qat(),
    "qat_static": lambda model: ej.quantize.qat(ranges="static", start=1),
    "qat_integer": lambda model: ej.quantize.qat(forward="integer"),
    "lsq": lambda model: ej.quantize.lsq(8, 8),
    "lsq_plus": lambda model: ej.quantize.lsq_plus(8, 8, per_channel=True),
    "pact": lambda model: ej.quantize.pact(8, 8),
    "dorefa": lambda model: ej.quantize.dorefa(4, 8),
    "binary": lambda model: ej.quantize.binary(),
    "ternary": lambda model: ej.quantize.ternary(8),
    "quant_noise": lambda model: ej.quantize.quant_noise(4),
    "soft_to_hard": lambda model: ej.quantize.soft_to_hard(4, 8, end=3),
    "bit_search": lambda model: ej.quantize.bit_search(3.0, (2, 4, 8), temperature=0.5),
    "distill": lambda model: ej.distill.logits(TEACHER.apply, temperature=2.0),
    "cached": lambda model: ej.distill.logits(ej.distill.Cached(classes=8, k=3), temperature=2.0),
    "mean_teacher": lambda model: ej.distill.mean_teacher(MODELS[model]().apply, decay=0.9),
    "mutual": lambda model: ej.distill.mutual(temperature=2.0),
    "dkd": lambda model: ej.distill.logits(TEACHER.apply, ej.distill.dkd),
    "features": lambda model: ej.distill.features(
        TEACHER.apply,
        {
            "alike": Match(TAPS[model], "conv2", ej.distill.similarity),
            "contrast": Match(f"{TAPS[model]}:in", "head:in", embedded(size=4), alpha=0.1),
        },
    ),
    "augment": lambda model: ej.augment.images(
        ej.augment.flip(), ej.augment.translate(2), ej.augment.erasing()
    ),
    "randaugment": lambda model: ej.augment.images(
        ej.augment.randaugment(bounds=(-4, 4), operations=("rotate", "equalise", "sharpness"))
    ),
    "autoaugment": lambda model: ej.augment.images(ej.augment.autoaugment(bounds=(-4, 4))),
    "trivialaugment": lambda model: ej.augment.images(ej.augment.trivialaugment(bounds=(-4, 4))),
    "augmix": lambda model: ej.augment.images(ej.augment.augmix(depth=1, bounds=(-4, 4))),
    "mixup": lambda model: ej.augment.mixup(classes=8),
    "cutmix": lambda model: ej.augment.cutmix(classes=8),
    "tokens": lambda model: ej.augment.tokens(
        ej.augment.token_dropout(0.2, mask=0), ej.augment.swap(2), ej.augment.span_mask(0.1, mask=0)
    ),
}


# Those that the pair tests go through: one of each kind of view, wrap, loss and update.
PAIRED = ("width", "magnitude", "magnitude_global", "ste", "qat", "qat_static", "distill")
PAIRS = list(itertools.combinations(PAIRED, 2))
# The others meet quantization alone.
PAIRS += [(name, "qat") for name in ("rigl", "sparse_momentum", "soft_threshold", "hard_concrete")]
PAIRS += [(name, "qat") for name in ("group_lasso", "proximal_lasso", "ema")]
PAIRS += [("qat", "features"), ("darts", "qat"), ("darts", "distill")]


def teacher():
    return ej.distill.Teacher(*jax.jit(TEACHER.init)(jax.random.key(9), nets.BATCH))


def batch_of(transforms):
    """The batch, with a cache's rows or tokens where one of the transforms reads them."""
    if "tokens" in transforms:
        tokens = np.random.default_rng(4).integers(1, 9, (24, 64)).astype(np.int32)
        return {**nets.BATCH, "tokens": tokens}
    if "cached" not in transforms:
        return nets.BATCH
    values, indices = jax.lax.top_k(jax.random.normal(jax.random.key(3), (24, 8)), 3)
    return {**nets.BATCH, "teacher_values": values, "teacher_indices": indices}


def model_of(transforms, model):
    """The model and its loss; two peers of it where they teach each other."""
    if "mutual" in transforms:
        return ej.distill.peers(model, model), ej.distill.each(nets.loss)
    if "tokens" in transforms:
        return reading(model), nets.loss
    if "darts" in transforms:
        return mixing(model), nets.loss
    return model, soft if {"mixup", "cutmix"} & {*transforms} else nets.loss


def reading(model):
    """The model on tokens, 64 of them as its 8 x 8 image."""

    def seen(batch):
        return {**batch, "image": batch["tokens"].reshape(-1, 8, 8, 1) / 4 - 1}

    def apply(params, state, batch, key, train):
        return model.apply(params, state, seen(batch), key, train)

    return ej.Model(lambda key, batch: model.init(key, seen(batch)), apply)


def mixing(model):
    """The model behind one edge of three operations, whose weights the batch may hold."""

    def seen(batch):
        x, p = batch["image"], batch.get("edges", np.full((1, 3), 1 / 3, np.float32))[0]
        return {**batch, "image": p[0] * x + p[1] * x[:, ::-1] + p[2] * jnp.tanh(x)}

    def apply(params, state, batch, key, train):
        return model.apply(params, state, seen(batch), key, train)

    return ej.Model(lambda key, batch: model.init(key, seen(batch)), apply)


def soft(outputs, batch):
    """The loss of labels that are probabilities, as mixing makes them in training."""
    label = batch["label"]
    if label.ndim == 1:
        label = jax.nn.one_hot(label, outputs.shape[-1])
    return optax.softmax_cross_entropy(outputs, label).mean()


def case(model, **transforms):
    chained = ej.chain(**{name: make(model) for name, make in transforms.items()})
    frozen = {name: teacher() for name in transforms if name in TAUGHT} or None
    net, loss = model_of(transforms, MODELS[model]())
    batch = batch_of(transforms)
    params, _ = jax.eval_shape(net.init, jax.random.key(0), batch)
    rules = [
        (f"^{path}$", PartitionSpec(*[None] * (x.ndim - 1), "model"))
        for path, x in ej.select.leaves(params).items()
        if path.endswith("kernel") and x.shape[-1] % 8 == 0
    ]
    given = {"frozen": frozen, "rules": tuple(rules), "meshes": ((4, 2),), "steps": 4}
    return Case(chained, net, batch, loss, **given)


@pytest.mark.parametrize("model", MODELS)
def test_the_empty_chain(model):
    check_transform(case(model), LAWS if model == "raw" else [1, 3, 4, 5, 6, 7, 12, 13])


# Compiling is what these tests spend their time on. The plain JAX model, which compiles fastest,
# goes through the laws; modules go through those that they could break, for the transforms of which
# all pairs are tested. Grouping, meshes and populations (laws 2, 8 and 9), whose programs are the
# longest, are for those and for one of each further kind. The slow tests leave nothing out. Of the
# policies, which apply what they draw alike and take long to compile, the quick ones see one.
POLICIES = ("autoaugment", "trivialaugment", "augmix")
KINDS = {"rigl", "hard_concrete", "lsq", "bit_search", "features", "mutual", "mixup", "supernet"}


def slow_unless(quick):
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in TRANSFORMS]


@pytest.mark.parametrize("name", slow_unless({*TRANSFORMS} - {*POLICIES}))
def test_every_transform(name):
    check_transform(case("raw", **{name: TRANSFORMS[name]}), [3, 4, 5, 6, 7, 12, 13])


@pytest.mark.parametrize("name", slow_unless({*PAIRED} | KINDS))
def test_every_transform_grouped_on_meshes_and_in_populations(name):
    check_transform(case("raw", **{name: TRANSFORMS[name]}), [2, 8, 9])


def in_modules(names):
    return [
        pytest.param(name, model, marks=[] if name in PAIRED else pytest.mark.slow)
        for name in names
        for model in ("linen", "nnx")
    ]


@pytest.mark.parametrize(("name", "model"), in_modules(TRANSFORMS))
def test_every_transform_in_modules(name, model):
    laws = {"linen": [3, 5, 6, 7, 8, 13], "nnx": [3, 4, 5, 7, 12, 13]}[model]
    check_transform(case(model, **{name: TRANSFORMS[name]}), laws)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(*pair, marks=pytest.mark.slow if pair == ("darts", "distill") else [])
        for pair in PAIRS
    ],
)
def test_every_pair(first, second):
    pair = {name: TRANSFORMS[name] for name in (first, second)}
    check_transform(case("raw", **pair), laws=[3, 4, 5, 6, 7, 12, 13])


# Pairs whose values lie where the quantizer's rounding turns, so that the last bit of a range or of
# a learned threshold, which devices sum in another order, moves some of them by whole steps.
ROUNDING = {("qat", "qat_static"), ("soft_threshold", "qat")}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_pair_through_every_law(first, second):
    pair = {name: TRANSFORMS[name] for name in (first, second)}
    check_transform(case("raw", **pair), laws=[2, 8, 9])
    left_out = [8] if (first, second) in ROUNDING else []
    check_transform(case("linen", **pair), [law for law in WITH_ANY if law not in left_out])


ALL_FOUR = ("width", "magnitude", "qat_static", "distill")


@pytest.mark.parametrize("model", MODELS)
def test_all_four(model):
    four = {name: TRANSFORMS[name] for name in ALL_FOUR}
    laws = LAWS if model != "nnx" else [3, 4, 5, 7, 12, 13]
    meshes = ((8, 1), (1, 8), (4, 2)) if model == "raw" else ((4, 2),)
    check_transform(dataclasses.replace(case(model, **four), meshes=meshes), laws)


def without_dropout(name, library):
    """A transform of the library's network; the one that runs that network itself, too."""
    if name == "mean_teacher":
        plain = {"linen": nets.linen, "nnx": nets.nnx_}[library]
        return ej.distill.mean_teacher(plain(dropout=0.0).apply, decay=0.9)
    return TRANSFORMS[name](library)


# What reads modules in a way of its own; the others see the same paths in both libraries.
READS_MODULES = {*PAIRED, "lsq", "features", "mutual", "mean_teacher", "supernet", "darts"}


@pytest.mark.parametrize("name", slow_unless(READS_MODULES))
def test_linen_and_nnx_give_the_same_numbers(name):
    """Law 11. Without dropout, whose keys the two libraries derive differently."""
    frozen = {"t": teacher()} if name in TAUGHT else None
    batch, runs = batch_of([name]), []
    model, loss = model_of([name], nets.nnx_(dropout=0.0))
    params, stats = model.init(jax.random.key(0), batch)
    for library in ("nnx", "linen"):
        if library == "linen":
            model, _ = model_of([name], nets.linen(dropout=0.0))
            convert = nets.from_nnx_state
            if name == "mutual":
                stats = {peer: convert(None, found)[1] for peer, found in stats.items()}
            else:
                params, stats = convert(params, stats)
        transform = ej.chain(t=without_dropout(name, library))
        one = Case(transform, model, batch, loss, frozen=frozen)
        state = one.init(params=params, model_state=stats)
        for _ in range(3):
            state, metrics = one.jitted(state, batch, frozen)
        runs.append((state.vars, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), *runs)


def broken(**hooks):
    return Case(ej.Transform(**hooks), nets.raw(), nets.BATCH, nets.loss, rules=())


BREAKERS = {
    3: {
        "init": lambda k, p, s: ({}, {"n": jnp.float32(0)}),
        "update": lambda v, o, s, g, a, c: (v, o, {"n": s["n"].astype("bfloat16")}),
    },
    5: {"view": lambda p, e, s, c: jax.tree.map(lambda x: 0.5 * x, p)},
    6: {"view": lambda p, e, s, c: jax.tree.map(lambda x: jnp.sqrt(0 * x), p)},
}


@pytest.mark.parametrize("law", BREAKERS)
def test_a_broken_transform_is_caught(law):
    with pytest.raises(AssertionError, match=f"law {law} "):
        check_transform(broken(**BREAKERS[law]), laws=[law])


def test_the_table_has_every_law_that_can_be_checked_from_outside():
    assert set(LAWS) == {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13}
