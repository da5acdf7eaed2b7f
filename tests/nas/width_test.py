"""Elastic width: the spaces, masks equal to slices, and the sandwich rule in a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import effjax as ej
from effjax.select import leaves, map_named

BATCH = {
    "image": jax.random.normal(jax.random.key(1), (4, 6, 6, 2)),
    "label": jnp.array([0, 1, 2, 0]),
}
GROUPS = {"one": [r"conv1/", r"bn1/"], "two": [r"conv2/", r"bn2/"], "three": r"hidden/"}


class LinenCnn(linen.Module):
    """Two convolutions with BatchNorm and two dense layers."""

    widths: tuple[int, int, int] = (8, 10, 6)
    dropout: float = 0.0

    @linen.compact
    def __call__(self, x, train):
        for i, width in enumerate(self.widths[:2], 1):
            x = linen.Conv(width, (3, 3), name=f"conv{i}")(x)
            x = linen.BatchNorm(use_running_average=not train, momentum=0.9, name=f"bn{i}")(x)
            x = linen.relu(x)
        x = x.mean((1, 2))
        x = linen.Dropout(self.dropout, deterministic=not train)(x)
        x = linen.gelu(linen.Dense(self.widths[2], name="hidden")(x))
        return linen.Dense(3, name="head")(x)


class NnxCnn(nnx.Module):
    def __init__(self, rngs, widths=(8, 10, 6)):
        one, two, three = widths
        self.conv1 = nnx.Conv(2, one, (3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(one, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(one, two, (3, 3), rngs=rngs)
        self.bn2 = nnx.BatchNorm(two, momentum=0.9, rngs=rngs)
        self.hidden = nnx.Linear(two, three, rngs=rngs)
        self.head = nnx.Linear(three, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(self.bn2(self.conv2(x)))
        return self.head(nnx.gelu(self.hidden(x.mean((1, 2)))))


def model_of(flavour, widths=(8, 10, 6)):
    if flavour == "linen":
        return ej.from_linen(LinenCnn(widths))
    return ej.from_nnx(lambda rngs: NnxCnn(rngs, widths))


def trained_like(model):
    """Weights and statistics away from their initial zeros and ones."""
    key = jax.random.key(7)

    def noisy(name, leaf):
        noise = jax.random.uniform(jax.random.fold_in(key, len(name)), leaf.shape, minval=0.1)
        return leaf + noise

    return tuple(map_named(noisy, tree) for tree in model.init(jax.random.key(2), BATCH))


def cross_entropy(outputs, batch):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()


def start(model, transform, tx=None, **given):
    tx = tx or optax.sgd(0.1)
    state = ej.init_state(jax.random.key(0), model, transform, tx, BATCH, **given)
    return state, jax.jit(ej.make_step(model.apply, transform, cross_entropy, tx))


def logits_of(model, transform):
    return jax.jit(ej.make_eval(model.apply, transform, lambda out, batch: {"x": out}))


# --- the space ---------------------------------------------------------------------------------


def test_channels_are_the_ceiling_of_the_width():
    params = {"a": {"kernel": jnp.ones((3, 30)), "bias": jnp.ones(30)}, "b": jnp.ones((2, 5))}
    space = ej.nas.width_space(params, {"a": "^a/", "b": "^b$"}, (1.0, 0.1, 0.3))
    assert space.choices == (0.1, 0.3, 1.0)
    # 0.1 * 30 and 0.3 * 30 are a little more than 3 and 9 in floats; 0.1 * 5 = 0.5 -> 1.
    assert space.kept.tolist() == [[3, 9, 30], [1, 2, 5]]
    assert space.groups == {"a": ("a/bias", "a/kernel"), "b": ("b",)}
    arch = space.architecture({"a": 0.3})
    assert arch.tolist() == [1, 2]
    assert space.widths(arch) == {"a": 0.3, "b": 1.0}
    assert space.channels(arch).tolist() == [9, 5]
    masked = space.mask(params, arch)
    assert [int(x.sum()) for x in jax.tree.leaves(masked)] == [9, 27, 10]
    assert jnp.array_equal(masked["a"]["bias"], jnp.arange(30) < 9)


def test_enumeration_is_complete_and_samples_cover_it():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((2, 4))}
    space = ej.nas.width_space(params, {"a": "a", "b": "b"}, (0.25, 0.5, 1.0))
    everything = space.enumerate().tolist()
    assert len(everything) == space.size == 9
    assert len({tuple(a) for a in everything}) == 9
    drawn = space.sample(jax.random.key(0), 900)
    assert drawn.dtype == jnp.int32
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 9
    # Chi-squared with 8 degrees of freedom: 26.1 is its 99.9th percentile.
    assert ((counts - 100) ** 2 / 100).sum() < 26.1


def test_a_mask_hides_even_nan():
    params = {"a": jnp.array([1.0, jnp.nan])}
    space = ej.nas.width_space(params, {"a": "a"}, (0.5, 1.0))
    assert space.mask(params, space.smallest)["a"].tolist() == [1.0, 0.0]


PARAMS = {
    "conv": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
    "dense": {"kernel": jnp.ones((4, 6))},
    "s": jnp.ones(()),
}


@pytest.mark.parametrize(
    ("groups", "choices", "says"),
    [
        ({"a": "missing"}, (1.0,), "'missing' matches no leaf"),
        ({"a": "kernel"}, (1.0,), "different channel counts"),
        ({"a": "^s$"}, (1.0,), "different channel counts"),
        ({"a": []}, (1.0,), "lists no patterns"),
        ({"a": "conv/", "b": "^conv"}, (1.0,), "groups 'a' and 'b'"),
        ({"a": "conv/kernel"}, (1.0,), "has conv/kernel but not conv/bias"),
        ({}, (1.0,), "no groups"),
        ({"a": "conv/"}, (0.5, 0.5), "each width once"),
        ({"a": "conv/"}, (), "each width once"),
        ({"a": "conv/"}, (0.0, 1.0), r"\[0.0\] are not in \(0, 1\]"),
        ({"a": "conv/"}, (0.5, 1.5), r"\[1.5\] are not in"),
    ],
)
def test_wrong_spaces_are_errors(groups, choices, says):
    with pytest.raises(ej.errors.EffjaxError, match=says):
        ej.nas.width_space(PARAMS, groups, choices)


def test_wrong_architectures_are_errors():
    space = ej.nas.width_space(PARAMS, {"a": "conv/"}, (0.5, 1.0))
    with pytest.raises(ej.errors.SelectorError, match=r"no groups \['b'\].*\['a'\]"):
        space.architecture({"b": 1.0})
    with pytest.raises(ej.errors.SelectorError, match=r"0.75.*not among"):
        space.architecture({"a": 0.75})


# --- evaluation --------------------------------------------------------------------------------


def sliced(tree, small):
    """Each leaf cut to the shape that it has in the smaller network."""
    shapes = {name: leaf.shape for name, leaf in leaves(small).items()}
    return map_named(lambda n, x: x[tuple(slice(s) for s in shapes[n])], tree)


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_a_masked_network_computes_what_the_sliced_one_computes(flavour):
    model, nas = model_of(flavour), ej.chain(nas=ej.nas.width(GROUPS, (0.25, 0.5, 0.75, 1.0)))
    params, model_state = trained_like(model)
    state, _ = start(model, nas, params=params, model_state=model_state)
    evaluate = logits_of(model, nas)
    space = ej.nas.width_space(params, GROUPS)
    for widths in ({"one": 0.25, "two": 0.5}, {"one": 0.75, "two": 0.25, "three": 0.5}, {}):
        arch = space.architecture(widths)
        # 0.25 * 8 = 2, 0.5 * 10 = 5, 0.75 * 8 = 6, 0.25 * 10 -> 3, 0.5 * 6 = 3.
        counts = tuple(space.channels(arch).tolist())
        small = model_of(flavour, counts)
        shapes = jax.eval_shape(small.init, jax.random.key(0), BATCH)
        found = small.apply(
            sliced(params, shapes[0]),
            sliced(model_state, shapes[1]),
            BATCH,
            jax.random.key(0),
            False,
        )[0]
        mine = evaluate(ej.nas.subnet(state, arch), BATCH)["x"]
        np.testing.assert_allclose(mine.total, found.sum(), rtol=2e-5)
        whole = model.apply(space.mask(params, arch), model_state, BATCH, jax.random.key(0), False)[
            0
        ]
        np.testing.assert_allclose(whole, found, rtol=2e-5, atol=2e-5)
    assert counts == (8, 10, 6)
    assert evaluate._cache_size() <= 1  # jax may drop entries, in a long process


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_sliced_networks_train_alike(flavour):
    """In training mode too: BatchNorm's batch statistics of the channels that are kept."""
    model = model_of(flavour)
    params, model_state = trained_like(model)
    space = ej.nas.width_space(params, GROUPS)
    arch = space.architecture({"one": 0.5, "two": 0.5, "three": 0.5})
    small = model_of(flavour, tuple(space.channels(arch).tolist()))
    shapes = jax.eval_shape(small.init, jax.random.key(0), BATCH)
    key = jax.random.key(0)

    def loss(params, masked):
        network, weights, s = (model, space.mask(params, arch), model_state)
        if not masked:
            network, weights, s = (small, sliced(params, shapes[0]), sliced(model_state, shapes[1]))
        return cross_entropy(network.apply(weights, s, BATCH, key, True)[0], BATCH)

    grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    masked, cut = grads(params, True), grads(params, False)
    np.testing.assert_allclose(masked[0], cut[0], rtol=1e-5)
    for name, grad in leaves(masked[1]).items():
        np.testing.assert_allclose(grad, leaves(cut[1])[name], atol=3e-5, err_msg=name)
        kept = leaves(shapes[0])[name].shape
        if name.split("/")[0] != "head":
            assert not np.any(grad[..., kept[-1] :]), name


def test_export_is_what_evaluation_sees_bit_for_bit():
    model, nas = model_of("linen"), ej.chain(nas=ej.nas.width(GROUPS))
    state, _ = start(model, nas)
    state = ej.nas.subnet(state, jnp.array([1, 2, 0]))
    ctx = ej.Ctx(state.step, state.key, train=False)
    seen = nas.view(state.vars.model, state.vars.extra, state.transform, ctx)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, seen, ej.export(nas, state)))
    assert int(jnp.sum(jnp.any(seen["conv1"]["kernel"] != 0, (0, 1, 2)))) == 4
    facts = nas.describe(state.vars.model, state.vars.extra, state.transform)
    assert facts["bn2/scale"] == {"channels": 8}
    assert facts["hidden/kernel"] == {"channels": 2}
    assert "head/kernel" not in facts


# --- training ----------------------------------------------------------------------------------


def test_a_step_is_the_sandwich_rule_written_by_hand():
    model, nas = model_of("linen"), ej.chain(nas=ej.nas.width(GROUPS, samples=1, alpha=0.7))
    params, model_state = trained_like(model)
    state, step = start(model, nas, optax.sgd(1.0), params=params, model_state=model_state)
    space = ej.nas.width_space(params, GROUPS)
    after, metrics = step(state, BATCH)

    # Which sub-network was drawn shows in the loss alone: try them all.
    def by_hand(params, drawn):
        full, new = model.apply(params, model_state, BATCH, jax.random.key(0), True)
        target = jax.lax.stop_gradient(full)
        subnets = [
            model.apply(space.mask(params, a), model_state, BATCH, jax.random.key(0), True)[0]
            for a in (space.smallest, drawn)
        ]
        distance = sum(ej.distill.kl(s, target).mean() for s in subnets) / 2
        return cross_entropy(full, BATCH) + 0.7 * distance, (distance, new, subnets[0], full)

    every = jax.jit(jax.vmap(lambda a: by_hand(params, a)[0]))(space.enumerate())
    drawn = space.enumerate()[jnp.argmin(jnp.abs(every - metrics["loss"]))]
    (total, rest), grads = jax.value_and_grad(by_hand, has_aux=True)(params, drawn)
    distance, new, smallest, full = rest
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
    np.testing.assert_allclose(metrics["nas/kl"], 0.7 * distance, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["nas/agreement"], (smallest.argmax(-1) == full.argmax(-1)).mean()
    )
    for name, grad in leaves(grads).items():
        moved = leaves(params)[name] - leaves(after.vars.model)[name]
        np.testing.assert_allclose(moved, grad, atol=2e-5, err_msg=name)
    # The statistics are those of the largest network alone.
    assert jax.tree.all(
        jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-6), after.model_state, new)
    )


def test_draws_change_from_step_to_step_and_compile_once():
    model, nas = model_of("linen"), ej.chain(nas=ej.nas.width(GROUPS, samples=1))
    state, step = start(model, nas, optax.sgd(0.0))
    losses = []
    for _ in range(4):
        fresh = state._replace(model_state=state.model_state)
        state, metrics = step(fresh, BATCH)
        losses.append(float(metrics["nas/kl"]))
    assert len(set(losses)) == 4
    assert step._cache_size() <= 1  # jax may drop entries, in a long process
    assert state.transform["nas"]["width"].tolist() == [3, 3, 3]


def test_the_smallest_network_learns_to_agree():
    model = model_of("linen")

    def final(alpha):
        nas = ej.chain(nas=ej.nas.width(GROUPS, samples=0, alpha=jnp.float32(alpha)))
        state, step = start(model, nas, optax.adam(1e-2))
        for _ in range(60):
            state, metrics = step(state, BATCH)
        return float(metrics["nas/kl"]) / alpha

    assert final(3.0) < 0.6 * final(1e-6)


def test_the_largest_choice_is_what_trains():
    model, nas = model_of("linen"), ej.chain(nas=ej.nas.width(GROUPS, (0.25, 0.5), samples=0))
    params, model_state = trained_like(model)
    state, step = start(model, nas, optax.sgd(1.0), params=params, model_state=model_state)
    after, _ = step(state, BATCH)
    assert jnp.array_equal(after.vars.model["hidden"]["bias"][3:], params["hidden"]["bias"][3:])
    assert not jnp.any(after.vars.model["hidden"]["bias"][:3] == params["hidden"]["bias"][:3])


def test_measurements_of_transforms_inside_are_those_of_the_largest_network():
    def wrap(forward, extra, state, ctx):
        def counted(params, model_state, batch, key, train):
            out, model_state, aux = forward(params, model_state, batch, key, train)
            zeros = jnp.sum(params["hidden"]["bias"] == 0)
            return out, model_state, {**aux, "zeros": zeros}

        return counted

    probe = ej.Transform(wrap=wrap, report=lambda vars, state, aux, ctx: dict(aux))
    model = model_of("linen")
    params, model_state = trained_like(model)
    nas = ej.chain(nas=ej.nas.width(GROUPS), probe=probe)
    state, step = start(model, nas, params=params, model_state=model_state)
    assert int(step(state, BATCH)[1]["probe/zeros"]) == 0


def test_dropout_draws_the_same_units_in_every_network():
    model = ej.from_linen(LinenCnn(dropout=0.5))
    nas = ej.chain(nas=ej.nas.width({"three": "hidden/"}, (0.99, 1.0), samples=0))
    # ceil(0.99 * 6) = 6: the smallest network is the largest, so only dropout could part them.
    state, step = start(model, nas)
    np.testing.assert_allclose(step(state, BATCH)[1]["nas/kl"], 0.0, atol=1e-6)


def test_mistakes_are_errors_at_construction_or_init():
    with pytest.raises(ej.errors.SetupError, match="samples=-1"):
        ej.nas.width(GROUPS, samples=-1)
    with pytest.raises(ej.errors.SetupError, match="not in"):
        ej.nas.width(GROUPS, (2.0,))
    with pytest.raises(ej.errors.SelectorError, match="matches no leaf"):
        start(model_of("linen"), ej.chain(nas=ej.nas.width({"a": "nowhere"})))
    pair = ej.nas.width(GROUPS, logits=lambda out: (out, out))
    with pytest.raises(ej.errors.SetupError, match="tuple"):
        start(model_of("linen"), ej.chain(nas=pair))
