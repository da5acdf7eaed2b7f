"""Paths, selectors, label trees, and whose moments an optimizer's state holds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effjax import select
from effjax.core import Vars
from effjax.errors import SelectorError

PARAMS = {
    "body": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
    "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
}
PATHS = ["body/bias", "body/kernel", "head/bias", "head/kernel"]


class Pair(NamedTuple):
    """A NamedTuple in a tree."""

    first: object
    second: object


def test_paths_of_dicts_lists_and_named_tuples():
    tree = {"layers": [jnp.zeros(1), {"w": jnp.zeros(2)}], "pair": Pair(jnp.zeros(3), None)}
    named = select.leaves(tree)
    assert list(named) == ["layers/0", "layers/1/w", "pair/first"]
    assert named["layers/1/w"].shape == (2,)
    doubled = select.map_named(lambda name, x: f"{name}:{x.size}", tree)
    assert doubled["layers"][1]["w"] == "layers/1/w:2"


def test_replace_exchanges_leaves_and_refuses_unknown_ones():
    found = select.replace(PARAMS, {"head/bias": jnp.zeros(2)})
    assert found["head"]["bias"].tolist() == [0, 0]
    assert found["body"]["bias"] is PARAMS["body"]["bias"]
    with pytest.raises(SelectorError, match=r"no leaves \['head/scale'\].*body/bias"):
        select.replace(PARAMS, {"head/scale": 0.0})


@pytest.mark.parametrize(
    ("pattern", "min_ndim", "wanted"),
    [
        (select.KERNELS, 0, ["body/kernel", "head/kernel"]),
        ("", 0, PATHS),
        ("", 2, ["body/kernel", "head/kernel"]),
        ("^head/", 0, ["head/bias", "head/kernel"]),
        (r"^(?!head).*kernel$", 0, ["body/kernel"]),
    ],
)
def test_select_by_pattern(pattern, min_ndim, wanted):
    found = select.select(PARAMS, pattern, min_ndim=min_ndim)
    assert list(found) == wanted
    shapes = jax.eval_shape(lambda: PARAMS)
    assert list(select.select(shapes, pattern, min_ndim=min_ndim)) == wanted


def test_kernels_are_whole_names():
    tree = {"kernel": 1.0, "a": {"kernel": 1.0, "kernel_scale": 1.0, "my_kernel": 1.0}}
    assert list(select.select(tree)) == ["a/kernel", "kernel"]


@pytest.mark.parametrize(
    ("pattern", "min_ndim", "words"),
    [
        ("conv", 0, "'conv' matches no leaf.*body/bias, body/kernel"),
        ("bias", 2, "with at least 2 axes"),
        ("(", 0, "not a regular expression"),
    ],
)
def test_a_selector_that_chooses_nothing_is_an_error(pattern, min_ndim, words):
    with pytest.raises(SelectorError, match=words):
        select.select(PARAMS, pattern, min_ndim=min_ndim)


def test_label_tree_takes_the_first_rule_and_wants_every_rule_used():
    tree = Vars(PARAMS, {"quant": {"step": jnp.ones(())}})
    rules = [("^extra/", "scales"), ("bias$", "none"), ("", "default")]
    labels = select.label_tree(tree, rules)
    assert labels.extra == {"quant": {"step": "scales"}}
    assert labels.model["head"] == {"kernel": "default", "bias": "none"}
    with pytest.raises(SelectorError, match=r"no rule labels 'model/body/bias'"):
        select.label_tree(tree, [("kernel$", "a"), ("extra", "b")])
    with pytest.raises(SelectorError, match=r"\['conv'\] label no leaf"):
        select.label_tree(tree, [("conv", "a"), ("", "b")])


# Whose moments: every optimizer state is searched by path and shape, whatever its types.


def everything(prefixes, paths=PATHS):
    return {f"{prefix}/{path}": path for prefix in prefixes for path in paths}


KERNEL_MASK = {p: {"kernel": True, "bias": False} for p in PARAMS}
LABELS = {p: {"kernel": "adam", "bias": "sgd"} for p in PARAMS}
KERNELS = ["body/kernel", "head/kernel"]
BIASES = ["body/bias", "head/bias"]
SPLIT = optax.partition({"adam": optax.adam(0.1), "sgd": optax.sgd(0.1, momentum=0.9)}, LABELS)
STATES = {
    "sgd": (optax.sgd(0.1), {}),
    "adam": (optax.adam(0.1), everything(["0/mu", "0/nu"])),
    "momentum": (optax.sgd(0.1, momentum=0.9), everything(["0/trace"])),
    "chained": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
        everything(["1/0/mu", "1/0/nu"]),
    ),
    "masked": (
        optax.masked(optax.adam(0.1), KERNEL_MASK),
        everything(["inner_state/0/mu", "inner_state/0/nu"], KERNELS),
    ),
    "partition": (
        SPLIT,
        everything(
            [f"inner_states/adam/inner_state/0/{moment}" for moment in ("mu", "nu")], KERNELS
        )
        | everything(["inner_states/sgd/inner_state/0/trace"], BIASES),
    ),
}


@pytest.mark.parametrize(("tx", "wanted"), STATES.values(), ids=STATES)
def test_owners_finds_every_moment_and_nothing_else(tx, wanted):
    assert select.owners(tx.init(PARAMS), PARAMS) == wanted


@pytest.mark.parametrize(("tx", "wanted"), STATES.values(), ids=STATES)
def test_map_owned_changes_the_moments_of_the_named_leaves_alone(tx, wanted):
    opt = tx.init(PARAMS)
    opt = jax.tree.map(jnp.ones_like, opt)
    mask = jnp.arange(12).reshape(3, 4) % 2 == 0
    found = select.map_owned(lambda x, m: jnp.where(m, x, 0), opt, PARAMS, {"body/kernel": mask})
    assert jax.tree.structure(found) == jax.tree.structure(opt)
    before, after = select.leaves(opt), select.leaves(found)
    for name, leaf in after.items():
        if wanted.get(name) == "body/kernel":
            np.testing.assert_array_equal(leaf, mask)
        else:
            assert leaf is before[name]


def test_owners_of_a_train_state_with_vars():
    vars = Vars(PARAMS, {"lsq": {"body/kernel": jnp.ones(())}})
    found = select.owners(optax.adam(0.1).init(vars), vars.model)
    assert found == everything(["0/mu/model", "0/nu/model"])  # the step size has another shape


def test_owners_in_an_nnx_optimizer():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.body, self.head = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(0.1), wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    pure = nnx.to_pure_dict(nnx.state(optimizer, nnx.optimizer.OptState))
    for tree in (nnx.state(optimizer), pure):
        found = select.owners(tree, params)
        moments = [name for name in select.leaves(tree) if "/mu/" in name or "/nu/" in name]
        assert len(moments) == 8
        assert sorted(found) == sorted(moments)
        for name, path in found.items():
            assert path in name
    zeroed = select.map_owned(lambda x, m: x + m, pure, params, {"head/kernel": jnp.ones((4, 2))})
    ones = [n for n, x in select.leaves(zeroed).items() if x.ndim == 2 and jnp.all(x == 1)]
    assert len(ones) == 2
    assert all(n.endswith("head/kernel") for n in ones)


def test_the_longest_path_and_the_shape_decide_whose_a_leaf_is():
    params = {"kernel": jnp.ones((2, 2)), "a": {"kernel": jnp.ones((2, 2))}, "b": jnp.ones(3)}
    tree = {
        "mu": params,
        "mask": {"a/kernel": jnp.ones((2, 2), bool)},
        "scale": {"a/kernel": jnp.ones(2)},  # another shape: it belongs to nobody
        "other": {"kernel": jnp.ones((2, 2))},
    }
    assert select.owners(tree, params) == {
        "mu/kernel": "kernel",
        "mu/a/kernel": "a/kernel",
        "mu/b": "b",
        "mask/a/kernel": "a/kernel",
        "other/kernel": "kernel",
    }
