"""Footprints by hand: bytes, masks, scales and MACs."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import effjax as ej
from effjax.errors import SelectorError, SetupError
from experiments.models import cnn


class Site(NamedTuple):
    leaf: str
    op: str
    macs: int
    weight: int | None = 1


def params():
    kernel = jnp.zeros((10, 10)).at[:2].set(0.5)  # 80% zeros
    return {"dense": {"kernel": kernel, "bias": jnp.arange(10.0)}}


def test_a_dense_float_model_by_hand():
    found = ej.footprint({"dense": {"kernel": jnp.ones((10, 10)), "bias": jnp.ones(10)}})
    assert found.totals[:5] == (110, 110, 440, 0, 0)
    assert {leaf.format for leaf in found.leaves} == {"dense"}


def test_mask_values_and_scales_are_all_counted():
    facts = {"dense/kernel": {"weight_bits": 8, "scales": 10, "sparsity": 0.8}}
    found = ej.footprint(params(), [Site("dense/kernel", "dot", 100)], facts)
    kernel = next(leaf for leaf in found.leaves if leaf.path == "dense/kernel")
    # 100 bits of mask are 13 bytes; 20 values of one byte; 10 scales of 4.
    assert (kernel.format, kernel.bytes) == ("bitmask", 13 + 20 + 40)
    assert (kernel.macs, kernel.effective_macs) == (100, 20)
    # The bias has one zero: 2 bytes of mask and 9 floats, against 10 floats.
    assert found.totals[:5] == (110, 29, 73 + 38, 100, 20)
    assert found.totals.sparsity == pytest.approx(81 / 110)


def test_four_bits_are_packed():
    found = ej.footprint({"k": jnp.ones(7)}, facts={"k": {"weight_bits": 4}})
    assert found.totals.bytes == 4 + 4  # and a scale


@given(
    st.lists(st.booleans(), min_size=1, max_size=200).map(np.array), st.sampled_from([2, 4, 8, 32])
)
def test_the_cheapest_format_is_taken(nonzero, bits):
    found = ej.footprint({"k": nonzero.astype(np.float32)}, facts={"k": {"weight_bits": bits}})
    count = sum(bool(x) for x in nonzero)
    dense = (len(nonzero) * bits + 7) // 8
    masked = (len(nonzero) + 7) // 8 + (count * bits + 7) // 8
    scale = 4 if bits < 16 else 0
    sizes = found.leaves[0].sizes
    assert (sizes["dense"], sizes["bitmask"]) == (dense + scale, masked + scale)
    assert found.totals.bytes == min(
        sizes.values() if bits == 32 else (sizes[n] for n in ("dense", "bitmask", "csr"))
    )


def test_a_model_may_be_one_array():
    found = ej.footprint(jnp.ones((2, 2)), [Site("", "dot", 4)], {"": {"weight_bits": 8}})
    assert (found.totals.macs, found.leaves[0].macs, found.totals.bitops) == (4, 4, 4 * 8 * 32)
    assert found.weightless_macs == 0


def test_model_state_is_stored_but_holds_no_parameters():
    state = {"batch_stats": {"mean": jnp.ones(4), "var": jnp.ones(4)}, "key": jax.random.key(0)}
    found = ej.footprint({"scale": jnp.ones(4)}, model_state=state)
    assert found.totals[:5] == (4, 4, 16 + 32, 0, 0)


def test_shared_weights_add_up_and_attention_has_no_weights():
    sites = [Site("a", "conv", 30), Site("a", "dot", 10), Site("", "dot", 7, None)]
    found = ej.footprint({"a": jnp.array([1.0, 0.0])}, sites)
    assert found.leaves[0].op == "conv+dot"
    assert (found.totals.macs, found.totals.effective_macs) == (47, 27)
    assert "(between activations)" in str(found)


def test_it_prints_aligned_and_serialises():
    found = ej.footprint(params(), [Site("dense/kernel", "dot", 100_000)])
    lines = str(found).splitlines()
    assert "100,000" in lines[-2]
    assert lines[-2].startswith("total")
    assert lines[-1] == f"as a file: {found.file_bytes:,} bytes"
    assert len({line.index("-  ") for line in lines if line.startswith("--")}) == 1
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["totals"]["parameters"] == 110
    assert [row["shape"] for row in plain["leaves"]] == [[10], [10, 10]]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"sites": [Site("other", "dot", 1)]}, SelectorError, r"the sites name the paths"),
        ({"facts": {"other": {}}}, SelectorError, r"the facts name the paths"),
        ({"facts": {"dense/kernel": {"sparsity": 0.9}}}, SetupError, r"exported params"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        ej.footprint(params(), **arguments)


def test_abstract_params_are_refused():
    with pytest.raises(SetupError, match="abstract"):
        ej.footprint(jax.eval_shape(params))
    with pytest.raises(SetupError, match="outside jit"):
        jax.jit(lambda p: ej.footprint(p).totals.bytes)(params())


def test_macs_of_a_convolutional_network_by_hand():
    spec = cnn.Spec(width=1.0, size=8, channels=1, classes=10, stages=(4, 8), hidden=16)
    model = cnn.model(spec)
    batch = {"image": jnp.zeros((1, 8, 8, 1))}
    params, state = model.init(jax.random.key(0), batch)
    sites = ej.find_sites(model.apply, params, state, batch)
    macs = {x.path: x.macs for x in ej.footprint(params, sites).leaves if x.macs}
    # Pixels x kernel x input channels x output channels; XLA's padded border is counted in.
    assert macs["conv_1/kernel"] == 8 * 8 * 9 * 4 * 4
    assert macs["conv_3/kernel"] == 4 * 4 * 9 * 8 * 8
    assert (macs["dense/kernel"], macs["head/kernel"]) == (2 * 2 * 8 * 16, 16 * 10)
