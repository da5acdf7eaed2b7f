"""Pretrained weights: PyTorch's files read without it, and MobileNetV2 as it was trained."""

import io
import pickle
import struct

import jax
import numpy as np
import pytest

from experiments.harness.errors import DataError
from experiments.harness.torch_file import MAGIC, VERSION, read_state_dict
from experiments.models import mobilenet
from tests.experiments.models_test import abstract, count

TINY = mobilenet.Spec(
    width=0.25, classes=5, table=((1, 16, 1, 1), (6, 24, 2, 2)), last=32, activation="relu"
)


class _Pickler(pickle._Pickler):
    """Writes tensors as torch.save does: a call of a function of torch's, storages by their ids."""

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", Named("torch", obj.kind), obj.key, "cpu", len(obj.values))
        return None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Named):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Tensor):
            self.save(Named("torch._utils", "_rebuild_tensor_v2"))
            self.save((obj.storage, obj.offset, obj.size, obj.stride, False, {}))
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


class Named:
    def __init__(self, module, name):
        self.module, self.name = module, name


class Storage:
    def __init__(self, key, kind, values):
        self.key, self.kind, self.values = key, kind, values


class Tensor:
    def __init__(self, storage, offset, size, stride):
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


def written(found, storages):
    file = io.BytesIO()
    for obj in (MAGIC, VERSION, {"little_endian": True}, found, [s.key for s in storages]):
        _Pickler(file, 2).dump(obj)
    for storage in storages:
        file.write(struct.pack("<q", len(storage.values)) + storage.values.tobytes())
    return file.getvalue()


FLOATS = Storage("7", "FloatStorage", np.arange(10, dtype=np.float32))
WHOLE = Storage("8", "LongStorage", np.array([5], np.int64))
TENSORS = {
    "plain": Tensor(FLOATS, 1, (2, 3), (3, 1)),
    "turned": Tensor(FLOATS, 4, (3, 2), (1, 3)),
    "scalar": Tensor(WHOLE, 0, (), ()),
}


def test_a_state_dict_is_read_without_torch():
    found = read_state_dict(written(TENSORS, [FLOATS, WHOLE]))
    assert list(found) == ["plain", "turned", "scalar"]
    np.testing.assert_array_equal(found["plain"], [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(found["turned"], [[4, 7], [5, 8], [6, 9]])
    assert found["scalar"] == 5
    assert found["plain"].dtype == np.float32


def test_other_files_are_refused():
    good = written(TENSORS, [FLOATS, WHOLE])
    with pytest.raises(DataError, match="cut short"):
        read_state_dict(good[:-4])
    with pytest.raises(DataError, match="format 1001"):
        read_state_dict(good[:40])
    with pytest.raises(DataError, match="begins with"):
        read_state_dict(pickle.dumps(1) + pickle.dumps(2) + pickle.dumps(3))
    with pytest.raises(DataError, match="should be a dict of tensors"):
        read_state_dict(written([1, 2], []))
    with pytest.raises(DataError, match="beyond its"):
        read_state_dict(written({"x": Tensor(FLOATS, 8, (3,), (1,))}, [FLOATS]))
    with pytest.raises(DataError, match=r"holds os\.system"):
        read_state_dict(written({"x": Named("os", "system")}, []))


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_mobilenet_has_its_published_size(library):
    params, _ = abstract(mobilenet.model(library=library), (1, 32, 32, 3))
    assert count(params) == 3_504_872


def as_torch_names(params, state):
    """The state dict that torchvision would save, with other axes and names."""
    found = {}
    stats = state["batch_stats"]

    def layer(own, seen, conv, norm):
        found[f"{conv}.weight"] = np.transpose(own["conv"]["kernel"], (3, 2, 0, 1))
        found[f"{norm}.weight"], found[f"{norm}.bias"] = own["norm"]["scale"], own["norm"]["bias"]
        found[f"{norm}.running_mean"] = seen["norm"]["mean"]
        found[f"{norm}.running_var"] = seen["norm"]["var"]
        found[f"{norm}.num_batches_tracked"] = np.int64(3)

    layer(params["stem"], stats["stem"], "features.0.0", "features.0.1")
    blocks = sum(name.startswith("block_") for name in params)
    for i in range(blocks):
        own, seen = params[f"block_{i}"], stats[f"block_{i}"]
        at = f"features.{i + 1}.conv"
        hidden = [name for name in ("expand", "depthwise") if name in own]
        for j, name in enumerate(hidden):
            layer(own[name], seen[name], f"{at}.{j}.0", f"{at}.{j}.1")
        n = len(hidden)
        layer(own["project"], seen["project"], f"{at}.{n}", f"{at}.{n + 1}")
    at = f"features.{blocks + 1}"
    layer(params["last"], stats["last"], f"{at}.0", f"{at}.1")
    found["classifier.1.weight"] = np.transpose(params["head"]["kernel"])
    found["classifier.1.bias"] = params["head"]["bias"]
    return found


def test_linen_nnx_and_converted_weights_compute_the_same():
    linen, other = mobilenet.model(TINY, "linen"), mobilenet.model(TINY, "nnx")
    batch = {"image": jax.random.normal(jax.random.key(1), (2, 16, 16, 3))}
    params, state = linen.init(jax.random.key(0), batch)
    want, _ = linen.apply(params, state, batch, jax.random.key(0), False)
    converted = mobilenet.converted(as_torch_names(params, state), TINY)
    assert jax.tree.all(jax.tree.map(np.array_equal, converted, (params, state)))
    _, theirs = other.init(jax.random.key(0), batch)
    got, _ = other.apply(params, theirs, batch, jax.random.key(0), False)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_weights_of_another_network_are_refused():
    shapes = abstract(mobilenet.model(TINY, "linen"), (1, 16, 16, 3))
    params, state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    names = as_torch_names(params, state)
    with pytest.raises(DataError, match="no place for"):
        mobilenet.converted({**names, "features.99.weight": np.zeros(1)}, TINY)
    del names["features.0.0.weight"]
    with pytest.raises(DataError, match=r"has no 'features\.0\.0\.weight'"):
        mobilenet.converted(names, TINY)


@pytest.mark.slow
def test_the_trained_weights_recognise_real_photographs():
    from PIL import Image
    from sklearn.datasets import load_sample_images

    model = mobilenet.model()
    params, state = mobilenet.load_weights()
    pictures = []
    for pixels in load_sample_images().images:
        side = min(pixels.shape[:2])
        whole = Image.fromarray(pixels)
        left, top = (whole.width - side) // 2, (whole.height - side) // 2
        square = whole.crop((left, top, left + side, top + side)).resize((224, 224))
        pictures.append((np.asarray(square) / 255 - mobilenet.MEAN) / mobilenet.DEVIATION)
    batch = {"image": np.stack(pictures).astype(np.float32)}
    logits, _ = model.apply(params, state, batch, jax.random.key(0), False)
    palace, monastery = 698, 663  # the picture of a Chinese palace
    assert set(np.argsort(logits[0])[-2:].tolist()) == {palace, monastery}
