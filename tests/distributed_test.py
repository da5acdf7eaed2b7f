"""Two processes under jax.distributed, four devices each, make the masks that one process makes."""

import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import effjax as ej
from effjax.testing import compilations
from tests import nets

STEPS = 3


def techniques():
    return ej.chain(
        prune=ej.prune.magnitude(0.75, begin=0, end=2, budget="global", select="kernel$"),
        quant=ej.quantize.qat(ranges="static"),
    )


def train(layout):
    """Trains a few steps on a layout; the masks' sums and positions, and the weights' norms."""
    import optax

    model, tx = nets.linen(dropout=0.0), optax.sgd(0.1, momentum=0.9)
    transform = techniques()
    state = ej.init_state(jax.random.key(0), model, transform, tx, nets.BATCH, layout=layout)
    out = (ej.state_shardings(state, layout), None)
    step = jax.jit(ej.make_step(model.apply, transform, nets.loss, tx), out_shardings=out)
    batch = layout.put_batch(nets.BATCH)
    with compilations("step") as compiled:
        for _ in range(STEPS):
            state, metrics = jax.block_until_ready(step(state, batch))

    @jax.jit
    def digest(state):
        masks = state.transform["prune"]["mask"]
        places = jax.tree.map(lambda m: (m.ravel() * jax.numpy.arange(m.size)).sum(), masks)
        norms = jax.tree.map(lambda w: jax.numpy.sum(w**2), state.vars.model)
        return {"places": places, "norms": norms}

    found = jax.tree.map(lambda x: np.asarray(x).item(), digest(state))
    return found | {"loss": float(metrics["loss"]), "compiles": len(compiled)}


def layout():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    return ej.Layout(mesh, [(r"conv2/kernel$", PartitionSpec(None, None, None, "model"))])


def worker(port, rank):
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    print("RESULT " + json.dumps(train(layout())), flush=True)
    jax.distributed.shutdown()


def test_two_processes_equal_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = (
        "import os; os.environ['XLA_FLAGS']='--xla_force_host_platform_device_count=4';"
        "import jax; jax.config.update('jax_cpu_collectives_implementation', 'gloo');"
        "from tests import distributed_test as t; import sys;"
        f"t.worker({port}, int(sys.argv[1]))"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    results = []
    for process in workers:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()[-3000:]
        line = next(x for x in out.decode().splitlines() if x.startswith("RESULT "))
        results.append(json.loads(line.removeprefix("RESULT ")))
    assert results[0] == results[1]
    want = train(layout())
    assert results[0]["places"] == want["places"]
    assert results[0]["compiles"] == want["compiles"] == 1
    assert results[0]["loss"] == pytest.approx(want["loss"], rel=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), results[0]["norms"], want["norms"]
    )
