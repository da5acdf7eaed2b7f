"""Scores: how much each weight matters. Higher is kept. They know no step, no mask and no
budget.

Where a score is a product, it is computed in float32 at least, whatever the weights' dtype: two
half-precision factors would tie, or vanish. `grasp` and `movement` are signed, and so is `obd`
where a curvature is negative; the others are never negative.
"""

import jax
import jax.numpy as jnp
from jax import Array

from effjax.errors import SetupError


def magnitude(weight: Array) -> Array:
    """The magnitude score: s = |w|.

    Args:
      weight: float [...].

    Returns:
      The score of each weight, of the same shape and dtype, never negative.

    Example:
      >>> import jax.numpy as jnp
      >>> magnitude(jnp.array([0.5, -2.0, 0.0])).tolist()
      [0.5, 2.0, 0.0]

    Reference: Han et al., "Learning both weights and connections", 2015,
    https://arxiv.org/abs/1506.02626.
    """
    return jnp.abs(weight)


def random(key: Array, weight: Array) -> Array:
    """A random score, s ~ U[0, 1): the baseline that any other has to beat.

    Args:
      key: one PRNG key; another for each leaf.
      weight: float [...], read for its shape alone.

    Returns:
      float32, shaped like the weight.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> random(jax.random.key(0), jnp.zeros((2, 3))).shape
      (2, 3)
    """
    return jax.random.uniform(key, weight.shape, jnp.float32)


def saliency(weight: Array, grad: Array) -> Array:
    """The gradient saliency: s = |g w|, to first order the change of the loss without w.

    Args:
      weight: float [...].
      grad: the loss's gradient g, of the same shape.

    Returns:
      float32 (or wider), shaped like the weight, never negative.

    Raises:
      SetupError: the shapes differ, as in every function here that takes two arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> saliency(jnp.array([0.5, -2.0]), jnp.array([-4.0, 0.5])).tolist()
      [2.0, 1.0]

    Reference: Mozer and Smolensky, "Skeletonization", 1988,
    https://proceedings.neurips.cc/paper/1988/hash/07e1cd7dca89a1678042477183b7ac3f-Abstract.html.
    """
    weight, grad = _alike(weight, grad, "gradient")
    return jnp.abs(grad * weight)


def snip(weight: Array, grad: Array, total: float | Array = 1.0) -> Array:
    """SNIP's connection sensitivity: s = |∂L/∂c| / Σ|∂L/∂c|, where c = 1 multiplies the weight.

    As L depends on c·w, the derivative is g w. The sum is over all the network's connections and
    changes no ranking.

    Args:
      weight: float [...], at initialization.
      grad: the loss's gradient g = ∂L/∂w, of the same shape.
      total: the sum; left out, the scores are not normalized.

    Returns:
      float32 (or wider), shaped like the weight, never negative.

    Example:
      >>> import jax.numpy as jnp
      >>> snip(jnp.array([0.5, -2.0]), jnp.array([-3.0, 0.25]), total=2.0).tolist()
      [0.75, 0.25]

    Reference: Lee et al., "SNIP: Single-shot network pruning based on connection sensitivity",
    2019, https://arxiv.org/abs/1810.02340.
    """
    return saliency(weight, grad) / total


def grasp(weight: Array, product: Array) -> Array:
    """GraSP's gradient signal preservation: s = w (H g). Signed.

    Removing w changes the squared norm of the gradient by -2 w (H g) to first order. What would
    lower it most is kept; a weight with a negative score is one whose removal raises it. (The paper
    removes the largest -w (H g).)

    Args:
      weight: float [...], at initialization.
      product: H g, the Hessian times the gradient, of the same shape.

    Returns:
      float32 (or wider), shaped like the weight, of either sign.

    Example:
      >>> import jax.numpy as jnp
      >>> grasp(jnp.array([0.5, -2.0]), jnp.array([4.0, 1.0])).tolist()
      [2.0, -2.0]

    Reference: Wang et al., "Picking winning tickets before training by preserving gradient flow",
    2020, https://arxiv.org/abs/2002.07376.
    """
    weight, product = _alike(weight, product, "Hessian-gradient product")
    return weight * product


def synflow(weight: Array, grad: Array) -> Array:
    """SynFlow's synaptic flow: s = |w ∂R/∂|w||, where R = 1ᵀ (Π |W|) 1.

    R is the sum of the outputs for an input of ones, with every weight replaced by its absolute
    value. The scores of all weights into a hidden unit add up to those of all weights out of it,
    so that iterative pruning by them never cuts the network in two early.

    Args:
      weight: float [...].
      grad: ∂R/∂|w|, of the same shape.

    Returns:
      float32 (or wider), shaped like the weight, never negative.

    Example:
      >>> import jax.numpy as jnp
      >>> synflow(jnp.array([0.5, -2.0]), jnp.array([4.0, 1.0])).tolist()
      [2.0, 2.0]

    Reference: Tanaka et al., "Pruning neural networks without any data by iteratively conserving
    synaptic flow", 2020, https://arxiv.org/abs/2006.05467.
    """
    return saliency(weight, grad)


def movement(weight: Array, grad: Array) -> Array:
    """One step's term of the movement score: s = -g w. Signed.

    The score is the sum of these terms over the training steps. A step of gradient descent moves
    w by -η g: the term is positive where w moves away from zero, negative where it shrinks.

    Args:
      weight: float [...], of one step.
      grad: the loss's gradient g at that step, of the same shape.

    Returns:
      float32 (or wider), shaped like the weight, of either sign.

    Example:
      >>> import jax.numpy as jnp
      >>> movement(jnp.array([0.5, -2.0]), jnp.array([-4.0, -0.5])).tolist()
      [2.0, -1.0]

    Reference: Sanh et al., "Movement pruning: adaptive sparsity by fine-tuning", 2020,
    https://arxiv.org/abs/2005.07683.
    """
    weight, grad = _alike(weight, grad, "gradient")
    return -grad * weight


def taylor(weight: Array, grad: Array) -> Array:
    """The squared first-order Taylor score of one batch: s = (g w)².

    It estimates the squared change of the loss when w is removed. The score is the mean of these
    terms over batches.

    Args:
      weight: float [...].
      grad: the loss's gradient g on the batch, of the same shape.

    Returns:
      float32 (or wider), shaped like the weight, never negative.

    Example:
      >>> import jax.numpy as jnp
      >>> taylor(jnp.array([0.5, -2.0]), jnp.array([-4.0, 0.5])).tolist()
      [4.0, 1.0]

    Reference: Molchanov et al., "Importance estimation for neural network pruning", 2019,
    https://arxiv.org/abs/1906.10771.
    """
    return jnp.square(saliency(weight, grad))


def fisher(weight: Array, grad: Array) -> Array:
    """One example's term of the Fisher score: s = ½ g² w².

    The mean of these terms over examples is ½ F w², with F the diagonal of the empirical Fisher
    information: OBD's estimate of the loss's increase, with F for the Hessian.

    Args:
      weight: float [...].
      grad: the gradient g of one example's loss, of the same shape. Gradients of batches make
        another, much smaller, score: their average is taken before the square.

    Returns:
      float32 (or wider), shaped like the weight, never negative.

    Example:
      >>> import jax.numpy as jnp
      >>> fisher(jnp.array([0.5, -2.0]), jnp.array([-4.0, 0.5])).tolist()
      [2.0, 0.5]

    Reference: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018,
    https://arxiv.org/abs/1801.05787.
    """
    return taylor(weight, grad) / 2


def obd(weight: Array, curvature: Array) -> Array:
    """Optimal brain damage: s = ½ h w², the loss's increase without w if H is diagonal.

    Args:
      weight: float [...], at a minimum of the loss.
      curvature: h, the diagonal of the Hessian (or of an approximation of it), of the same shape.

    Returns:
      float32 (or wider), shaped like the weight, negative where h is.

    Example:
      >>> import jax.numpy as jnp
      >>> obd(jnp.array([0.5, -2.0]), jnp.array([8.0, 1.0])).tolist()
      [1.0, 2.0]

    Reference: LeCun et al., "Optimal brain damage", 1989,
    https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html.
    """
    weight, curvature = _alike(weight, curvature, "diagonal of the Hessian")
    return curvature * jnp.square(weight) / 2


def obs(weight: Array, inverse: Array) -> Array:
    """Optimal brain surgeon: s = ½ w² / [H⁻¹]ⱼⱼ.

    The loss's increase when w is removed and all other weights move to make up for it. With a
    diagonal H it is `obd`.

    Args:
      weight: float [...], at a minimum of the loss.
      inverse: the diagonal of H⁻¹, positive, of the weight's shape or one that broadcasts to it.

    Returns:
      float32 (or wider), shaped like the weight, never negative.

    Example:
      >>> import jax.numpy as jnp
      >>> obs(jnp.array([0.5, -2.0]), jnp.array([0.125, 1.0])).tolist()
      [1.0, 2.0]

    Reference: Hassibi and Stork, "Second order derivatives for network pruning: optimal brain
    surgeon", 1992,
    https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html.
    """
    weight, inverse = _broadcast(weight, inverse, "diagonal of the inverse Hessian")
    return jnp.square(weight) / (2 * inverse)


def wanda(weight: Array, norm: Array) -> Array:
    """Wanda: s = |w| ‖x‖₂, with x the input feature that w is multiplied with, over all examples.

    The paper compares weights within each output only: see `within`.

    Args:
      weight: float [..., in, out].
      norm: the norm of each input feature, of the weight's shape or one that broadcasts to it:
        [in, 1] for a dense kernel, [height, width, in, 1] for a convolution's, whose features are
        the entries of its input patches.

    Returns:
      float32 (or wider), shaped like the weight, never negative.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.array([[0.5, -2.0], [1.0, 1.0]])
      >>> wanda(kernel, jnp.array([[4.0], [3.0]])).tolist()
      [[2.0, 8.0], [3.0, 3.0]]

    Reference: Sun et al., "A simple and effective pruning approach for large language models",
    2024, https://arxiv.org/abs/2306.11695.
    """
    weight, norm = _broadcast(weight, norm, "norm of the inputs")
    return jnp.abs(weight) * norm


def within(score: Array, groups: Array) -> Array:
    """Scores that compare within groups: the rank r in its group of n, best first, as 1 - r/n.

    The k largest of the result are as evenly spread over groups of one size as k allows: a
    per-layer budget then prunes every group to the layer's sparsity. Order within a group is kept;
    of equal scores the first, in row-major order, ranks higher.

    Args:
      score: float [...], of either sign, without NaN.
      groups: integers of the score's shape or one that broadcasts to it: `jnp.arange(out)` for the
        outputs of a kernel [..., in, out].

    Returns:
      float32, shaped like the score, in (0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> score = jnp.array([[1.0, 20.0], [2.0, 10.0], [3.0, 40.0], [4.0, 30.0]])
      >>> within(score, jnp.arange(2)).tolist()
      [[0.25, 0.5], [0.5, 0.25], [0.75, 1.0], [1.0, 0.75]]
    """
    if not _fits(groups, score):
        raise SetupError(
            f"the groups have the shape {groups.shape}, which does not broadcast to the scores' "
            f"{score.shape}."
        )
    named = jnp.broadcast_to(groups, score.shape).ravel()
    order = jnp.lexsort((-score.ravel(), named))
    ordered, place = named[order], jnp.arange(score.size, dtype=jnp.int32)
    first = jnp.searchsorted(ordered, ordered, side="left")
    size = jnp.searchsorted(ordered, ordered, side="right") - first
    value = 1 - (place - first).astype(jnp.float32) / size.astype(jnp.float32)
    return jnp.zeros(score.size, jnp.float32).at[order].set(value).reshape(score.shape)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _alike(weight: Array, other: Array, what: str) -> tuple[Array, Array]:
    """Both in float32 or wider, after a check that their shapes are the same."""
    if weight.shape != other.shape:
        raise SetupError(
            f"the {what} has the shape {other.shape}, but the weight {weight.shape}. One of them "
            "belongs to another leaf, or was transposed on the way."
        )
    return _wide(weight), _wide(other)


def _broadcast(weight: Array, other: Array, what: str) -> tuple[Array, Array]:
    """Both in float32 or wider, after a check that the second broadcasts to the first."""
    if not _fits(other, weight):
        raise SetupError(
            f"the {what} has the shape {other.shape}, which does not broadcast to the weight's "
            f"{weight.shape}. For one value for each input of a kernel [..., in, out] append an "
            "axis: x[..., None]."
        )
    return _wide(weight), _wide(other)


def _fits(x: Array, like: Array) -> bool:
    """Whether one array broadcasts to another one's shape."""
    try:
        return jnp.broadcast_shapes(x.shape, like.shape) == like.shape
    except ValueError:
        return False
