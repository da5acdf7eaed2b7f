"""What exported files take beside their integers, for published architectures.

Each is quantized by one batch and frozen, with weights of 8 and of 4 bits. The weights are the
initial ones, and vectors are moved at random: biases of zeros would be stored once. Of each: bytes
of the integers (weights packed as their bits allow, biases of int32); what else the network needs
to be computed, a float32 scale for each channel of a weight, and what is no integer (LayerNorm,
embeddings, BatchNorm that folds into no layer); then the files. ONNX and LiteRT have no 4-bit
convolutions that compute as trained, and are written at 8 bits. StableHLO is the compressed program
and its weights beside it, as they are; or one file, with the weights in the program and compressed
with it: codes that are not all equally frequent take less than their bits.

A channel's integers are k k c bits / 8 bytes for k x k kernels over c channels, and its scale 4
bytes: at 4 bits scales alone are 2% where k k c is 400. ONNX stores a channel's scale twice, for
its weights and for its bias, and a zero point of one byte; LiteRT the scales twice.

Expected: 1.1 at most for ONNX and LiteRT at 8 bits; for StableHLO at 4 bits 1.02 in one file, and
in two where layers are wide, as in VGG-small, and above where a channel has few weights.
Cost: 6 minutes of one CPU core.
Command: python -m experiments bench.file_sizes
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import effjax as ej
from effjax.export import litert, onnx
from effjax.export.stablehlo import to_stablehlo
from experiments.harness.config import check
from experiments.harness.errors import ConfigError
from experiments.harness.progress import say
from experiments.harness.provenance import provenance, write_json
from experiments.models import mlp, mobilenet, resnet, vgg, vit, wrn

ONE = "StableHLO, one file"
RESULTS = Path(__file__).parents[2] / "experiments" / "results"
TINY = vit.Spec(features=192, heads=(3,) * 12, dim=64, hidden=(768,) * 12)
NETWORKS: dict[str, tuple[Callable[[], ej.Model], tuple[int, ...]]] = {
    "MLP 784-1200-1200-10": (lambda: mlp.model(mlp.Spec(hidden=(1200, 1200))), (28, 28, 1)),
    "ResNet-20": (lambda: resnet.model(resnet.Spec()), (32, 32, 3)),
    "WRN-16-4": (lambda: wrn.model(wrn.Spec(16, 4)), (32, 32, 3)),
    "VGG-small": (lambda: vgg.model(vgg.Spec()), (32, 32, 3)),
    "ViT-tiny": (lambda: vit.model(TINY), (32, 32, 3)),
    "MobileNetV2": (lambda: mobilenet.model(mobilenet.Spec()), (96, 96, 3)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is exported."""

    networks: tuple[str, ...] = tuple(NETWORKS)
    examples: int = 4  # to calibrate on
    save: bool = True

    def __post_init__(self) -> None:
        check(self, examples=(1, 10_000))
        if unknown := set(self.networks) - set(NETWORKS):
            raise ConfigError(f"networks are {sorted(unknown)}; there are {list(NETWORKS)}.")


def run(config: Config) -> dict[str, Any]:
    """Measures, and writes `experiments/results/bench_file_sizes_<platform>.json`."""
    rows = [row for name in config.networks for row in measure(name, config.examples)]
    found = {"rows": rows, "provenance": provenance(config)}
    if config.save:
        write_json(RESULTS / f"bench_file_sizes_{jax.default_backend()}.json", found)
    return found


def measure(name: str, examples: int) -> list[dict[str, Any]]:
    """A row for each number of bits."""
    make, shape = NETWORKS[name]
    model = make()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, *shape)).astype(np.float32)
    batch = {"image": jnp.asarray(x)}
    params, model_state = model.init(jax.random.key(0), batch)
    params = jax.tree.map(lambda x: _moved(x, rng) if x.ndim == 1 else x, params)
    rows = []
    for bits in (8, 4):
        small = ej.quantize.ptq(model, params, model_state, [batch], bits, 8)
        frozen = ej.quantize.freeze(model.apply, small.transform, small.state, [batch])
        files = {
            "StableHLO": to_stablehlo(frozen).nbytes,
            ONE: to_stablehlo(frozen, weights="inside").nbytes,
        }
        if bits == 8:
            marked = _marked(frozen)
            one = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
            files["ONNX"] = len(onnx.to_onnx(marked, one))
            files["LiteRT"] = len(litert.to_litert(marked, one))
        held = {n: x.nbytes for n, x in frozen.weights.items()}
        floats = {n: x for n, x in held.items() if _is_float(frozen.weights[n])}
        scales = sum(x for n, x in floats.items() if n.endswith(":scale"))
        rows.append(
            {
                "network": name,
                "bits": bits,
                "integers": frozen.nbytes,
                "scales": scales,
                "floats": sum(floats.values()) - scales,
                "files": files,
            }
        )
        shown = ", ".join(f"{kind} {size / frozen.nbytes:.3f}x" for kind, size in files.items())
        say(f"{name}, {bits} bits: {frozen.nbytes:,} bytes of integers; {shown}")
    return rows


def _moved(x: Any, rng: np.random.Generator) -> Any:
    return x + rng.normal(0, 0.01, x.shape).astype(x.dtype)


def _marked(frozen: Any) -> Callable[[Any], Any]:
    weights = frozen.floats()
    return lambda image: frozen.marked(weights, {"image": image})


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))
