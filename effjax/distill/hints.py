"""Losses of one layer's features, example by example: hints and what is computed from them."""

import jax
import jax.numpy as jnp
from jax import Array

from effjax.distill.numerics import check_features, unit, wide
from effjax.errors import SetupError

MAPS = "batch height width channels"


def hint(student: Array, teacher: Array) -> Array:
    """FitNets' hint: the mean squared difference of two layers' features.

    mean (student - teacher)^2 over all axes but the first. (The paper has half the sum.) Layers of
    different widths take a trained projection: `projected(hint)`.

    Args:
      student, teacher: floating [batch, ...], of one shape.

    Returns:
      [batch], float32 or float64.

    Raises:
      SetupError: the shapes differ.

    Reference: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015,
      https://arxiv.org/abs/1412.6550.
    """
    check_features("hint", student, teacher, "batch ...", "batch", "...")
    student, teacher = wide(student, teacher)
    return jnp.mean(((student - teacher) ** 2).reshape(len(student), -1), axis=-1)


def attention_transfer(student: Array, teacher: Array, power: float = 2.0) -> Array:
    """Attention transfer: where in the image a layer is active, whatever its channels.

    mean over places of (a_s / ||a_s|| - a_t / ||a_t||)^2, with a = mean over channels of |f|^power.
    (The mean of squares is the authors' code; the paper has the norm.) A map of zeros stays zeros.

    Args:
      student, teacher: floating [batch, height, width, channels]; the channels may differ.
      power: > 0; 1 and above have a gradient at 0, which is 0.

    Returns:
      [batch], float32 or float64.

    Raises:
      SetupError: batches or places differ, or a power below 1.

    Reference: Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017,
      https://arxiv.org/abs/1612.03928.
    """
    check_features("attention_transfer", student, teacher, MAPS, "batch", "height", "width")
    if power < 1:
        raise SetupError(f"attention_transfer has power {power}; below 1 no gradient exists at 0.")

    def attention(x: Array) -> Array:
        # Features of any size: a constant factor does not change the normalised map.
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), (1, 2, 3), keepdims=True))
        x = x / jnp.where(largest > 1e-20, largest, 1.0)
        return unit(jnp.mean(jnp.abs(x) ** power, axis=-1).reshape(len(x), -1))

    maps = [attention(x) for x in wide(student, teacher)]
    return jnp.mean((maps[0] - maps[1]) ** 2, axis=-1)


def nst(student: Array, teacher: Array) -> Array:
    """Neuron selectivity transfer: the channels' spatial patterns as a set, by their MMD.

    mean_{ij} k(s_i, s_j) + mean_{ij} k(t_i, t_j) - 2 mean_{ij} k(s_i, t_j), k(x, y) = (x . y)^2, of
    the channels' activations over places, each of norm 1. Channels need not correspond, and may be
    of different number.

    Args:
      student, teacher: floating [batch, height, width, channels]; the channels may differ.

    Returns:
      [batch], float32 or float64, >= 0 up to rounding.

    Raises:
      SetupError: batches or places differ.

    Reference: Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity
      Transfer", 2017, https://arxiv.org/abs/1707.01219 (polynomial kernel, d = 2, c = 0).
    """
    check_features("nst", student, teacher, MAPS, "batch", "height", "width")
    flat = [unit(x.reshape(len(x), -1, x.shape[-1]), axis=1) for x in wide(student, teacher)]

    def kernel(x: Array, y: Array) -> Array:
        return jnp.mean(jnp.einsum("bpi,bpj->bij", x, y) ** 2, axis=(1, 2))

    s, t = flat
    return kernel(s, s) + kernel(t, t) - 2.0 * kernel(s, t)


def vid(student_mean: Array, teacher: Array, raw_variance: Array) -> Array:
    """Variational information distillation: the likelihood of the teacher's features.

    mean over all axes but the first of ((teacher - mean)^2 / v + log v) / 2, with one variance
    v = softplus(raw_variance) + 1e-5 a channel: a lower bound on the information that the student
    has of the teacher, up to a constant. `variational()` trains the mean's projection and v.

    Args:
      student_mean: floating [batch, ..., channels], the student's features projected to the
        teacher's shape.
      teacher: floating, of the same shape.
      raw_variance: floating [channels], trained.

    Returns:
      [batch], float32 or float64; may be negative.

    Raises:
      SetupError: the shapes differ, or the variance has another number of channels.

    Reference: Ahn et al., "Variational Information Distillation for Knowledge Transfer", 2019,
      https://arxiv.org/abs/1904.05835.
    """
    check_features("vid", student_mean, teacher, "batch ...", "batch", "...")
    if raw_variance.shape != teacher.shape[-1:]:
        raise SetupError(
            f"vid has a raw variance of shape {list(raw_variance.shape)} for features of shape "
            f"{list(teacher.shape)}; it takes one for each channel, {list(teacher.shape[-1:])}."
        )
    mean, teacher, raw = wide(student_mean, teacher, raw_variance)
    v = jax.nn.softplus(raw) + 1e-5
    values = 0.5 * ((teacher - mean) ** 2 / v + jnp.log(v))
    return jnp.mean(values.reshape(len(values), -1), axis=-1)


def fsp(student: tuple[Array, Array], teacher: tuple[Array, Array]) -> Array:
    """Flow of the solution procedure: how the features of two layers go together.

    mean over (i, j) of (G_s - G_t)^2, G_ij = mean over places of first_i * second_j.

    Args:
      student, teacher: the features of two layers each, floating [batch, height, width, channels].
        Both layers of a model have the same places (pool the larger), and the student's have the
        teacher's channels.

    Returns:
      [batch], float32 or float64.

    Raises:
      SetupError: not two layers, or the shapes differ.

    Reference: Yim et al., "A Gift from Knowledge Distillation", 2017 (CVPR).
    """

    def gram(who: str, layers: tuple[Array, Array]) -> Array:
        if not isinstance(layers, tuple | list) or len(layers) != 2:
            raise SetupError(
                f"fsp relates two layers of each model; the {who}'s features are one "
                f"{type(layers).__name__}. Give two taps, such as ('conv1', 'conv2')."
            )
        check_features(f"fsp ({who}'s first and second layer)", *layers, MAPS, "batch")
        if layers[0].shape[1:3] != layers[1].shape[1:3]:
            raise SetupError(
                f"fsp: the {who}'s layers have shapes {list(layers[0].shape)} and "
                f"{list(layers[1].shape)}; they need the same height and width. Tap layers of one "
                "resolution."
            )
        first, second = (x.reshape(len(x), -1, x.shape[-1]) for x in wide(*layers))
        return jnp.einsum("bpi,bpj->bij", first, second) / first.shape[1]

    found = gram("student", student), gram("teacher", teacher)
    check_features("fsp (flow matrices)", *found, "batch first second", "batch", "first", "second")
    s, t = wide(*found)
    return jnp.mean((s - t) ** 2, axis=(1, 2))
