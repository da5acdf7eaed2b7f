"""Lottery tickets: counts and weights round by round, rewinding, resuming, one compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import ScheduleError, SelectorError, SetupError
from effjax.prune.lottery import Lottery
from effjax.prune.patterns import channel, n_m
from effjax.select import leaves
from tests import nets

PARAMS = {
    "a": {"kernel": jnp.array([[1.0, -2.0, 3.0, -4.0, 5.0]]), "bias": jnp.ones(5)},
    "b": {"kernel": jnp.array([[0.1, 0.2, 0.3, 0.4, 0.5]])},
}


def kept(ticket):
    return {path: int(mask.sum()) for path, mask in ticket.masks.items()}


def test_two_rounds_by_hand():
    """Of 5 weights 40% go: 2, then round(0.64 * 5) = 3 in all."""
    lottery = Lottery(0.4, select="^a/kernel")
    ticket = lottery.start(PARAMS)
    assert kept(ticket) == {"a/kernel": 5}
    trained = {"a": {"kernel": jnp.array([[9.0, -1, 8, -2, 7]]), "bias": jnp.zeros(5)}}
    trained["b"] = PARAMS["b"]
    ticket = lottery.prune(ticket, trained)
    assert int(ticket.round) == 1
    np.testing.assert_array_equal(ticket.masks["a/kernel"], [[1, 0, 1, 0, 1]])
    np.testing.assert_array_equal(ticket.params["a"]["kernel"], [[1, 0, 3, 0, 5]])
    np.testing.assert_array_equal(ticket.params["a"]["bias"], np.ones(5))
    # A kept weight that has become 0 goes before one that is pruned already comes back.
    trained["a"]["kernel"] = jnp.array([[0.0, 0, 6, 0, 7]])
    ticket = lottery.prune(ticket, trained)
    np.testing.assert_array_equal(ticket.masks["a/kernel"], [[0, 0, 1, 0, 1]])
    np.testing.assert_array_equal(ticket.params["a"]["kernel"], [[0, 0, 3, 0, 5]])


def test_learning_rate_rewinding_goes_on_from_the_trained_weights():
    lottery = Lottery(0.4, "rate", select="^a/kernel")
    trained = jax.tree.map(lambda x: 10 * x, PARAMS)
    ticket = lottery.prune(lottery.start(PARAMS), trained)
    np.testing.assert_array_equal(ticket.params["a"]["kernel"], [[0, 0, 30, -40, 50]])
    np.testing.assert_array_equal(ticket.params["a"]["bias"], 10 * np.ones(5))


def test_rewinding_to_a_later_step():
    lottery = Lottery(0.4, select="^a/kernel")
    ticket = lottery.rewind_to(lottery.start(PARAMS), jax.tree.map(lambda x: x + 0.5, PARAMS))
    np.testing.assert_array_equal(ticket.params["a"]["kernel"], PARAMS["a"]["kernel"])
    ticket = lottery.prune(ticket, PARAMS)
    np.testing.assert_array_equal(ticket.params["a"]["kernel"], [[0, 0, 3.5, -3.5, 5.5]])


@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_every_round_keeps_the_exact_number(budget):
    lottery = Lottery(0.2, budget=budget)
    params, _ = nets.raw().init(jax.random.key(0), nets.BATCH)
    ticket = lottery.start(params)
    sizes = {path: mask.size for path, mask in ticket.masks.items()}
    for r in range(1, 8):
        before = ticket.masks
        ticket = lottery.prune(ticket, ticket.params)
        for path, mask in ticket.masks.items():
            assert not np.any(mask & ~before[path])  # what is gone stays gone
        if budget == "uniform":
            expected = {p: n - round((1 - 0.8**r) * n) for p, n in sizes.items()}
            assert kept(ticket) == expected
        else:
            total = sum(sizes.values())
            assert sum(kept(ticket).values()) == total - round((1 - 0.8**r) * total)


def test_fractions_by_path_and_channels():
    lottery = Lottery({"^head": 0.1, "": 0.2})
    params, _ = nets.raw().init(jax.random.key(0), nets.BATCH)
    ticket = lottery.prune(lottery.prune(lottery.start(params), params), params)
    assert kept(ticket) == {"hidden/kernel": 2048 - 737, "head/kernel": 256 - 49}
    whole = Lottery(0.5, pattern=channel())
    ticket = whole.prune(whole.start(params), params)
    columns = np.asarray(ticket.masks["hidden/kernel"]).sum(0)
    assert sorted(columns) == [0] * 16 + [64] * 16


def train_with(steps):
    model, tx = nets.raw(), optax.adam(1e-2)
    jitted = []

    def train(ticket):
        transform = ej.chain(prune=ej.prune.static(masks=ticket.masks))
        if not jitted:
            jitted.append(jax.jit(ej.make_step(model.apply, transform, nets.loss, tx)))
        args = (jax.random.key(1), model, transform, tx, nets.BATCH)
        state = ej.init_state(*args, params=ticket.params)
        for _ in range(steps):
            state, _ = jitted[0](state, nets.BATCH)
        return state.vars.model

    return train, jitted


def test_a_lottery_with_a_train_step_that_compiles_once_and_goes_on_where_it_stopped():
    params, _ = nets.raw().init(jax.random.key(0), nets.BATCH)
    lottery = Lottery(0.5)
    train, jitted = train_with(5)
    rounds = list(lottery.play(lottery.start(params), train, 3))
    assert [int(ticket.round) for ticket, _ in rounds] == [0, 1, 2, 3]
    assert jitted[0]._cache_size() <= 1  # jax may drop entries, in a long process
    for r, (ticket, trained) in enumerate(rounds):
        kernel = np.asarray(trained["hidden"]["kernel"])
        mask = np.asarray(ticket.masks["hidden/kernel"])
        assert mask.sum() == 2048 // 2**r
        np.testing.assert_array_equal(kernel != 0, mask)
        seen, origin = leaves(ticket.params), leaves(params)
        for path in ticket.masks:
            expected = np.where(ticket.masks[path], origin[path], 0)
            np.testing.assert_array_equal(seen[path], expected)
    # From round 2 on, saved and restored.
    saved = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, rounds[2][0]))
    again = list(lottery.play(saved, train, 3))
    jax.tree.map(np.testing.assert_array_equal, again, rounds[2:])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Lottery(1.0), ScheduleError, "1.0"),
        (lambda: Lottery(0.2, "init"), SetupError, "init"),
        (lambda: Lottery(0.2, budget="erk"), SetupError, "erk"),
        (lambda: Lottery({"a": 0.2}, budget="global"), SetupError, "threshold"),
        (lambda: Lottery(pattern=n_m(2, 4)), SetupError, "N:M"),
        (lambda: Lottery(select="nowhere").start(PARAMS), SelectorError, "nowhere"),
        (lambda: Lottery({"^a": 0.2}).start(PARAMS), SelectorError, "b/kernel"),
        (lambda: Lottery({"": 0.2, "^a": 0.1}).start(PARAMS), SelectorError, r"\^a"),
        (
            lambda: Lottery().prune(Lottery().start(PARAMS), {"a": PARAMS["a"]}),
            SetupError,
            "b/kernel",
        ),
    ],
)
def test_what_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
