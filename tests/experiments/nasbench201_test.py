"""The networks of NAS-Bench-201: published sizes, one cell against all cells, Linen against NNX."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.nas import extract, nasbench201, proxies
from effjax.nas.tabular import OPERATIONS
from effjax.select import leaves
from experiments.models import nasbench201 as bench
from experiments.models import nasbench201_scanned as scanned
from experiments.sparse_report import cross_entropy

IMAGE = jax.random.normal(jax.random.key(1), (4, 6, 6, 3))
SMALL = bench.Spec(width=4, cells=1, stages=2)
KEY = jax.random.key(2)


def shapes_of(spec, library="linen"):
    return jax.eval_shape(bench.model(spec, library).init, KEY, {"image": IMAGE})


def drawn(shapes):
    """Weights and statistics, all above 0."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.1, 1, x.shape), x.dtype), shapes)


def size(spec):
    return sum(x.size for x in jax.tree.leaves(shapes_of(spec)[0]))


def test_parameters_are_the_published_ones():
    """Of the table's best cell on CIFAR-10, and of cells of one operation: in millions."""
    best = (3, 3, 3, 1, 3, 2)
    assert size(bench.Spec(best)) == 1_073_466
    common, edges = bench.counts()
    for cell, published in [
        (best, 1.073466),
        ((3, 3, 3, 3, 3, 3), 1.531546),
        ((1, 1, 1, 1, 1, 1), 0.073306),
        ((4, 4, 4, 4, 4, 4), 0.073306),
    ]:
        found = common + sum(edges[e, o] for e, o in enumerate(cell))
        assert found == pytest.approx(published * 1e6, abs=0.5)


def test_one_program_computes_every_cell():
    whole = bench.model(SMALL)
    params, state = drawn(shapes_of(SMALL))
    traces = []

    @partial(jax.jit, compiler_options=QUICK)
    def all_cells(edges):
        traces.append(1)
        return whole.apply(params, state, {"image": IMAGE, "edges": edges}, KEY, True)

    for cell in [(3, 2, 4, 1, 0, 3), (4, 1, 2, 2, 3, 0)]:
        spec = replace(SMALL, cell=cell)
        own = bench.model(spec)
        inherited = bench.inherit((params, state), shapes_of(spec))
        assert set(leaves(shapes_of(spec, "nnx")[0])) == set(leaves(inherited[0]))
        outputs, moved = all_cells(bench.one_hot(cell))
        run = jax.jit(lambda *given, own=own: own.apply(*given, KEY, True), compiler_options=QUICK)
        alone, own_moved = run(*inherited, {"image": IMAGE})
        close(outputs, alone)
        for name, x in leaves(own_moved).items():
            close(leaves(moved)[name], x)
    assert len(traces) == 1


def test_loops_over_the_cells_of_a_stage_are_the_same_network():
    """Outputs and gradients, by one program for all cells."""
    spec = replace(SMALL, cells=2, stages=1)
    params, state = drawn(shapes_of(spec))
    params = jax.tree.map(lambda x: x - 0.5, params)

    def both(apply):
        def found(edges):
            def loss(params):
                batch = {"image": IMAGE, "edges": edges}
                outputs = apply(params, state, batch, KEY, True)[0]
                return jnp.mean(jnp.square(outputs)), outputs

            slopes, outputs = jax.grad(loss, has_aux=True)(params)
            return outputs, slopes

        return jax.jit(found, compiler_options=QUICK)

    loops, whole = both(scanned.model(spec).apply), both(bench.model(spec).apply)
    for cell in [(3, 2, 4, 1, 0, 3), (4, 1, 2, 2, 3, 0)]:
        (outputs, slopes), (want, others) = loops(bench.one_hot(cell)), whole(bench.one_hot(cell))
        close(outputs, want)
        # Gradients before a BatchNorm that vanish are compared with those that do not.
        largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(others))
        for name, x in leaves(others).items():
            np.testing.assert_allclose(leaves(slopes)[name], x, atol=1e-5 * largest, rtol=1e-4)
    with pytest.raises(ValueError, match="that of all cells"):
        scanned.model(replace(spec, cell=(0,) * 6))


@pytest.mark.parametrize("biases", [False, True])
def test_fisher_saliencies_of_loops_are_those_of_the_layers(biases):
    spec = replace(SMALL, cells=2, stages=1, biases=biases)
    params, state = drawn(shapes_of(spec))
    params = jax.tree.map(lambda x: x - 0.5, params)

    def loss(outputs, batch):
        return jnp.mean(jnp.square(outputs))

    def of(apply, params, state):
        def found(edges):
            batch = {"image": IMAGE, "edges": edges}
            return proxies.fisher(apply, params, state, batch, loss)

        return jax.jit(found, compiler_options=QUICK)

    stacked = (
        scanned.stack(spec, params),
        {"batch_stats": scanned.stack(spec, state["batch_stats"])},
    )
    loops = of(scanned.model(spec, products=False).apply, *stacked)
    whole = of(bench.model(spec).apply, params, state)
    for cell in [(3, 2, 4, 1, 0, 3), (4, 1, 2, 2, 3, 0)]:
        edges = bench.one_hot(cell)
        assert loops(edges) == pytest.approx(float(whole(edges)), rel=1e-3)


QUICK = {"xla_backend_optimization_level": 0}


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_cell_by_hand():
    """Pool and skip alone, no weights: 0 -skip-> 1 -pool-> 3 and 0 -pool-> 2 -skip-> 3."""
    spec = bench.Spec((1, 4, 0, 0, 4, 1))
    x = IMAGE[..., :1]
    found = bench.run_cell(x, spec, None, None)
    np.testing.assert_allclose(found, 2 * bench.pool(x), rtol=1e-6)
    for at, count in (((0, 0), 4), ((0, 3), 6), ((4, 4), 9)):
        rows, columns = (slice(max(a - 1, 0), a + 2) for a in at)
        window = np.asarray(x[0, rows, columns, 0])
        assert window.size == count
        assert bench.pool(x)[0, *at, 0] == pytest.approx(window.mean(), abs=1e-6)
    np.testing.assert_allclose(bench.halve(x)[0, 1, 2, 0], x[0, 2:4, 4:6, 0].mean(), rtol=1e-5)


def test_biases_are_weights_of_an_input_of_ones():
    """One operation by hand, from its initial weights: those of the one without, and biases."""
    x = jax.random.normal(KEY, (2, 5, 5, 3))
    spec = replace(SMALL, affine=False, biases=True)
    with_them = bench.LinenOperation(**bench.linen_operation(spec, 8, "conv3x3"))
    own = {**bench.linen_operation(spec, 8, "conv3x3"), "biases": False}
    variables = with_them.init(KEY, x, True)
    kernel = variables["params"]["conv"]["kernel"]
    assert kernel.shape == (3, 3, 4, 8)
    plain = bench.LinenOperation(**own).init(KEY, x, True)["params"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :, :3], plain)
    biases = kernel[1, 1, 3]
    assert np.count_nonzero(kernel[:, :, 3]) == np.count_nonzero(biases) == 8
    assert np.abs(biases).max() <= 1 / np.sqrt(27)  # PyTorch's bound, of 3 x 3 x 3 inputs
    how = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    sums = jax.lax.conv_general_dilated(nn.relu(x), plain, (1, 1), "SAME", **how) + biases
    spread = jnp.var(sums, (0, 1, 2)) + 1e-5
    found = with_them.apply(variables, x, True, mutable=["batch_stats"])[0]
    close(found, (sums - sums.mean((0, 1, 2))) / jnp.sqrt(spread))


def test_convolutions_of_nothing_make_the_fisher_saliency_large_where_they_have_biases():
    """Their constant results have no variance, so BatchNorm's derivative is 1 / √ε = 316."""

    def saliency(biases):
        spec = replace(SMALL, stages=1, affine=False, biases=biases)
        apply = bench.model(spec).apply
        label = jnp.arange(len(IMAGE))
        params, state = jax.jit(bench.model(spec).init, compiler_options=QUICK)(
            KEY, {"image": IMAGE}
        )

        def found(edges):
            batch = {"image": IMAGE, "label": label, "edges": edges}
            return proxies.fisher(apply, params, state, batch, cross_entropy)

        return jax.jit(found, compiler_options=QUICK)

    # The one convolution reads node 1, which nothing reaches in the second cell.
    whole, cut = bench.one_hot((1, 0, 0, 1, 3, 0)), bench.one_hot((0, 0, 0, 1, 3, 0))
    with_biases, without = saliency(True), saliency(False)
    assert with_biases(cut) > 100 * with_biases(whole)
    assert without(cut) < without(whole)


@pytest.mark.parametrize("biases", [False, True])
def test_linen_and_nnx_are_one_network(biases):
    """Without weights of the edges in Linen, and with equal ones in NNX."""
    spec = replace(SMALL, biases=biases)
    params, state = drawn(shapes_of(spec, "nnx"))
    equal = np.full((6, 5), 0.2, np.float32)

    def run(library, params, state, batch):
        return bench.model(spec, library).apply(params, state, batch, KEY, True)

    jitted = partial(jax.jit, compiler_options=QUICK)
    one, moved = jitted(partial(run, "nnx"))(params, state, {"image": IMAGE, "edges": equal})
    two, others = jitted(partial(run, "linen"))(params, {"batch_stats": state}, {"image": IMAGE})
    close(one, two)
    for name, x in leaves(moved).items():
        close(leaves(others["batch_stats"])[name], x)


def test_a_found_cell_is_a_network_of_its_own():
    """From a search's logits to an exported program, with the search's weights."""
    spec = replace(SMALL, stages=1)
    whole = drawn(shapes_of(spec))
    logits = np.zeros((6, 5), np.float32)
    logits[np.arange(6), [3, 0, 4, 1, 2, 2]] = 1
    genes = extract({"logits": {"edges": logits}}, OPERATIONS)["edges"]
    found = replace(spec, cell=tuple(genes.tolist()))
    own = bench.inherit(whole, shapes_of(found))

    def predict(params, state, image):
        return bench.model(found).apply(params, state, {"image": image}, KEY, False)[0]

    exported = jax.export.export(jax.jit(predict))(*own, IMAGE)
    assert exported.mlir_module().count("stablehlo.convolution") == 1 + 3
    batch = {"image": IMAGE, "edges": bench.one_hot(genes)}

    def all_cells(params, state):
        return bench.model(spec).apply(params, state, batch, KEY, False)[0]

    want = jax.jit(all_cells, compiler_options=QUICK)(*whole)
    close(exported.call(*own, IMAGE), want)


def test_what_cannot_be_built_is_refused():
    assert bench.one_hot(nasbench201().enumerate()[:2]).shape == (2, 6, 5)
    with pytest.raises(ValueError, match="it is 6 numbers from 0 to 4"):
        bench.Spec((0, 1, 2))
    with pytest.raises(ValueError, match="at least 1"):
        bench.Spec(width=0)
