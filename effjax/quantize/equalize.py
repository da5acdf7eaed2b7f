"""Cross-layer equalisation: channels of one layer's outputs and the next one's inputs get equal
ranges, so that one scale for a weight serves all of them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from effjax.core import Apply, PyTree
from effjax.errors import SetupError
from effjax.quantize.rescale import KINDS, Rescaling


def equalize(
    apply: Apply,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    layers: Sequence[str] | None = None,
    *,
    epsilon: float = 1e-5,
    steps: int = 20,
) -> tuple[PyTree, PyTree]:
    """Balances the ranges of layers that follow each other; the model's outputs stay as they are.

    As relu(x / s) = relu(x) / s for s > 0, an output channel i of a layer, its bias with it, may be
    divided by s_i if the next layers' weights for it are multiplied by s_i. With r the largest
    magnitude of the channel's weights in the first layer and t in the next ones, s = sqrt(r / t)
    gives both the range sqrt(r t). This is repeated over all layers, so that chains (a convolution,
    a depthwise one, a pointwise one) settle. BatchNorms are folded first.

    It may go through ReLU, leaky ReLU, pooling, flattening and multiplication by constants. ReLU6
    is no such function (6 would have to move): exchange it for ReLU first, if accuracy allows. What
    a residual connection adds up stays as it is; the layers inside the branch are equalised.

    Args:
      apply, params, model_state: a model in evaluation. Kernels are laid out [..., in, out].
      batch: an example, with which the outputs are compared before and after.
      layers: whose outputs are rescaled, by path without "/kernel". Left out, all those of which
        the program shows that it is possible.
      epsilon: the BatchNorms'; 1e-5 is Flax's.
      steps: passes over all layers.

    Returns:
      (params, model_state) of the same structure.

    Raises:
      SetupError: a layer whose outputs reach no other through a positively homogeneous function;
        none to be found; outputs that differ; and as `fold_batchnorm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from effjax.quantize import equalize
      >>> def apply(params, model_state, batch, key, train):
      ...     return jax.nn.relu(batch @ params["a"]["kernel"]) @ params["b"]["kernel"], model_state
      >>> params = {"a": {"kernel": jnp.array([[4.0, 1.0]])}, "b": {"kernel": jnp.ones((2, 1))}}
      >>> equalize(apply, params, {}, jnp.ones((3, 1)))[0]["a"]["kernel"].tolist()
      [[2.0, 1.0]]

    Reference: Nagel et al., "Data-free quantization through weight equalization and bias
    correction", 2019, https://arxiv.org/abs/1906.04721, section 4.1.
    """
    if steps < 1:
        raise SetupError(f"equalize() got steps={steps}; it goes over the layers once at least.")
    model = Rescaling("equalize", apply, params, model_state, batch, layers, KINDS, epsilon)

    def once(_, named):
        for name in model.chosen:
            own = model.layers[name]
            r = jnp.max(jnp.abs(named[own.kernel].reshape(-1, own.features)), axis=0)
            nexts = [jnp.max(jnp.abs(w), axis=(0, 2)) for w in model.inputs(named, name)]
            t = jnp.max(jnp.stack(nexts), axis=0)
            alive = (r > 0) & (t > 0)
            s = jnp.where(alive, jnp.sqrt(r / jnp.where(alive, t, 1)), 1)
            named = model.moved(named, name, s)
        return named

    balance = jax.jit(lambda named: lax.fori_loop(0, steps, once, named))
    return model.finished(balance(model.named()))
