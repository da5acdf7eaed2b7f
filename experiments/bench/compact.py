"""What channels that are gone are worth: measured speed-up against the MACs removed.

Half of the channels of every group of a residual network for CIFAR are pruned by magnitude
(`prune.group_masks`) and removed (`prune.compact`). The masked network, which is as slow as the
dense one, and the smaller one are compiled and timed in turns in one process, at batch 32 and 1,
with the weights as arguments. Where onnx and onnxruntime are installed (`pip install onnx
onnxruntime`), both are also timed in ONNX Runtime. `efficiency` is the speed-up over the MAC
reduction.

Expected: outputs equal within 1e-5. On CPU the efficiency depends on the width: with 8 to 32
channels left (ResNet-20 itself) 0.4 to 0.6 in XLA and in ONNX Runtime, below the 0.6 and 0.8 aimed
at; with twice as many about 0.8 in both; with four times as many 0.8 to 1.
Cost: 1 minute on 2 CPU cores.
Command: python -m experiments bench.compact
"""

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import effjax as ej
from effjax.prune import compact, group_masks, group_scores, groups, masks
from effjax.select import leaves, map_named
from experiments.harness.config import as_dict, check
from experiments.harness.provenance import provenance, write_json
from experiments.models import resnet

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed: ResNet-20 with its widths multiplied by each of `widths`.

    ONNX Runtime's threads wait for each other by spinning, which on a machine that is not idle
    measures the other programs: one thread by default.
    """

    widths: tuple[int, ...] = (1, 2, 4)
    sparsity: float = 0.5
    batches: tuple[int, ...] = (32, 1)
    samples: int = 15
    onnx: bool = True
    onnx_threads: int = 1
    save: bool = True

    def __post_init__(self) -> None:
        check(self, widths=(1, 64), sparsity=(0.0, 0.99), batches=(1, 4096), samples=(1, 1000))
        check(self, onnx_threads=(1, 256))


def run(config: Config) -> dict[str, Any]:
    """Measures and writes `experiments/results/bench_compact_<platform>.json`."""
    backends: dict[str, Callable[..., Callable[[], Any]]] = {"xla": in_xla}
    if config.onnx and all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
        backends["onnxruntime"] = partial(in_onnxruntime, threads=config.onnx_threads)
    elif config.onnx:
        print("onnx and onnxruntime are not installed; XLA only", flush=True)
    load = os.getloadavg()[0]
    rows = [row for width in config.widths for row in network(width, backends, config)]
    result = {
        "config": as_dict(config),
        "networks": rows,
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "provenance": provenance(config),
    }
    if config.save:
        write_json(RESULTS / f"bench_compact_{jax.default_backend()}.json", result)
    return result


def network(
    width: int, backends: dict[str, Callable[..., Callable[[], Any]]], config: Config
) -> list[dict[str, Any]]:
    """A row for each backend and batch size."""
    spec = resnet.Spec(stages=(16 * width, 32 * width, 64 * width), shortcut="B")
    model = resnet.model(spec)
    batch = {"image": jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)}
    params, state = map(drawn, jax.eval_shape(model.init, jax.random.key(0), batch))
    found = groups(model, params, state, batch)
    chosen = group_masks(found, group_scores(found.prunable, params), config.sparsity)
    start = time.perf_counter()
    small = compact(model, params, state, batch, chosen)
    seconds = time.perf_counter() - start
    smaller = resnet.compacted(spec, small.params, small.entries)
    masked = masks.apply(params, chosen)
    reduction = small.macs_before / small.macs_after
    rows = []
    for size in config.batches:
        image = np.random.default_rng(1).normal(size=(size, 32, 32, 3)).astype(np.float32)
        for backend, prepare in backends.items():
            calls = {
                "dense": prepare(spec, masked, state, image),
                "compact": prepare(smaller, small.params, small.model_state, image),
            }
            large, less = (np.asarray(call()) for call in calls.values())
            timed = ej.latency(calls, batch_size=size, samples=config.samples)
            faster = timed["dense"].median / timed["compact"].median
            row = {
                "network": f"ResNet-20 x{width}",
                "backend": backend,
                "batch": size,
                "macs": (small.macs_before, small.macs_after),
                "mac_reduction": reduction,
                "ms": {name: 1e3 * latency.median for name, latency in timed.items()},
                "times_faster": faster,
                "efficiency": faster / reduction,
                "largest_output": float(np.abs(large).max()),
                "difference": float(np.abs(large - less).max()),
                "compact_seconds": seconds,
            }
            rows.append(row)
            print(
                f"{row['network']}, batch {size}, {backend}: {faster:.2f}x faster at "
                f"{reduction:.2f}x fewer MACs, efficiency {faster / reduction:.2f}; outputs within "
                f"{row['difference']:.1e}",
                flush=True,
            )
    return rows


def drawn(shapes: Any) -> Any:
    """Random weights with BatchNorm statistics that are not the initial ones."""
    rng = np.random.default_rng(0)

    def draw(path: str, leaf: Any) -> Any:
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path.endswith(("var", "scale")):
            return jnp.asarray(1 + 0.3 * np.tanh(noise))
        return jnp.asarray(noise / np.sqrt(max(np.prod(leaf.shape[:-1]), 9)).astype(np.float32))

    return map_named(draw, shapes)


def in_xla(spec: resnet.Spec, params: Any, state: Any, image: np.ndarray) -> Callable[[], Any]:
    """The network compiled by XLA."""
    apply, key, x = resnet.model(spec).apply, jax.random.key(0), jnp.asarray(image)
    compiled = jax.jit(lambda p, s, x: apply(p, s, {"image": x}, key, False)[0])
    return lambda: compiled(params, state, x)


def in_onnxruntime(
    spec: resnet.Spec, params: Any, state: Any, image: np.ndarray, threads: int
) -> Callable[[], Any]:
    """The network in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    graph = onnx_graph(spec, params, state, image.shape[0])
    session = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])
    x = np.ascontiguousarray(image.transpose(0, 3, 1, 2))
    # As a jax array, for `ej.latency` to wait for: ten numbers an image.
    return lambda: jnp.asarray(session.run(None, {"x": x})[0])


def onnx_graph(spec: resnet.Spec, params: Any, state: Any, batch: int) -> bytes:
    """The network with projections as an ONNX file.

    Written out node by node: jax2onnx 0.17.1 moves transposes across residual additions wrongly.
    """
    from onnx import TensorProto, helper, numpy_helper

    weights, stats = leaves(params), leaves(state)
    nodes: list[Any] = []
    values: dict[str, Any] = {}

    def node(op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op}_{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def weight(name: str, array: Any) -> str:
        values[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def conv(x: str, path: str, norm: str, stride: int = 1) -> str:
        kernel = np.asarray(weights[f"{path}/kernel"]).transpose(3, 2, 0, 1)
        strides = [stride, stride]
        x = node("Conv", x, weight(path, kernel), strides=strides, auto_pad="SAME_UPPER")
        learned = [weight(f"{norm}/{n}", weights[f"{norm}/{n}"]) for n in ("scale", "bias")]
        found = [f"batch_stats/{norm}/{n}" for n in ("mean", "var")]
        moments = [weight(path, stats[path]) for path in found]
        return node("BatchNormalization", x, *learned, *moments, epsilon=1e-5)

    x = node("Relu", conv("x", "conv", "norm"))
    for i, plan in enumerate(spec.plan()):
        block = f"block_{i}"
        y = node("Relu", conv(x, f"{block}/conv_0", f"{block}/norm_0", plan.stride))
        y = conv(y, f"{block}/conv_1", f"{block}/norm_1")
        if plan.projected:
            x = conv(x, f"{block}/shortcut", f"{block}/shortcut_norm", plan.stride)
        x = node("Relu", node("Add", x, y))
    x = node("Flatten", node("GlobalAveragePool", x))
    head = [weight(f"head/{n}", weights[f"head/{n}"]) for n in ("kernel", "bias")]
    nodes.append(helper.make_node("Gemm", [x, *head], ["logits"]))
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, spec.channels, 32, 32])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, spec.classes])
    graph = helper.make_graph(nodes, "resnet", [image], [logits], list(values.values()))
    opsets = [helper.make_opsetid("", 17)]
    found = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return bytes(found.SerializeToString())


if __name__ == "__main__":
    run(Config())
