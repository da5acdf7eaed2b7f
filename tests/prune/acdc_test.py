"""AC/DC: what is pruned in which phase, and what comes back."""

import jax
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import ScheduleError
from tests import nets


def test_phases_take_turns_and_the_last_is_sparse():
    model, tx = nets.raw(), optax.adam(0.1)
    chain = ej.chain(prune=ej.prune.acdc(0.75, 2, 12, 2, 3, select="kernel$"))
    state = ej.init_state(jax.random.key(0), model, chain, tx, nets.BATCH)
    step = jax.jit(ej.make_step(model.apply, chain, nets.loss, tx))
    zeros, masks = [], []
    for _ in range(15):
        state, metrics = step(state, nets.BATCH)
        mask = np.asarray(state.transform["prune"]["mask"]["hidden/kernel"])
        kernel = np.asarray(state.vars.model["hidden"]["kernel"])
        assert np.all(kernel[~mask] == 0)
        masks.append(mask)
        zeros.append(float(metrics["prune/sparsity"]))
        assert zeros[-1] == float(metrics["prune/target"])
    dense, sparse = 0.0, 0.75
    # Compressed at 2-3, decompressed at 4-6, compressed at 7-8, then the end's at 10 and on.
    assert zeros == [dense] * 2 + [sparse] * 2 + [dense] * 3 + [sparse] * 2 + [dense] + [sparse] * 5
    np.testing.assert_array_equal(masks[2], masks[3])
    assert np.any(masks[7] != masks[3])  # something that was pruned came back for good


def test_phases_that_do_not_fit_are_refused():
    with pytest.raises(ScheduleError):
        ej.prune.acdc(0.75, begin=0, end=3, compressed=5)
