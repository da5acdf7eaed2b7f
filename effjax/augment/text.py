"""Token sequences with tokens dropped, swapped or masked in spans; lengths stay as they are."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from effjax.augment.images import check_probability, in_turn, on_each
from effjax.core import PyTree, Setup, Transform
from effjax.errors import SetupError
from effjax.schedules import Scalar, is_traced

# (key, tokens int [length]) -> tokens, of the same shape and dtype.
TokenOperation = Callable[[Array, Array], Array]


def tokens(*operations: TokenOperation, field: str = "tokens") -> Transform:
    """Applies operations, one after another, to each training sequence with a key of its own.

    Args:
      operations: for example `token_dropout(0.1, mask=1)`.
      field: the batch's entry with the tokens, integers [batch, length].

    Raises:
      SetupError: no operations; at `init`, a batch without such tokens.
    """
    if not operations:
        raise SetupError("augment.tokens() got no operations; give it some: tokens(swap(2)).")

    def init(key: Array, params: PyTree, setup: Setup) -> tuple[PyTree, PyTree]:
        found = setup.batch.get(field) if isinstance(setup.batch, dict) else None
        if found is None or found.ndim != 2 or not jnp.issubdtype(found.dtype, jnp.integer):
            raise SetupError(
                f"augment.tokens() looks for integers [batch, length] in batch[{field!r}], but the "
                f"batch is {jax.tree.map(jnp.shape, setup.batch)}. Name the entry: field=...."
            )
        return {}, {}

    return Transform(init=init, batch=on_each(in_turn(operations), field))


def token_dropout(probability: Scalar, mask: int, protect: tuple[int, ...] = ()) -> TokenOperation:
    """Each token becomes `mask` with a probability, perhaps traced ("word dropout").

    Args:
      probability: in [0, 1].
      mask: the id that is put in.
      protect: ids that stay: padding, separators.

    Reference: Iyyer et al., "Deep unordered composition rivals syntactic methods", 2015.
    """
    check_probability(probability, "token dropout")

    def apply(key: Array, sequence: Array) -> Array:
        gone = jax.random.bernoulli(key, probability, sequence.shape) & _free(sequence, protect)
        return jnp.where(gone, jnp.asarray(mask, sequence.dtype), sequence)

    return apply


def swap(count: int, protect: tuple[int, ...] = ()) -> TokenOperation:
    """Exchanges two tokens at random places, `count` times, one after another.

    A sequence with fewer than two tokens that are not protected stays.

    Reference: Wei and Zou, "EDA: easy data augmentation techniques", 2019,
    https://arxiv.org/abs/1901.11196.
    """
    if count < 1:
        raise SetupError(f"swap({count}): exchange at least once.")

    def apply(key: Array, sequence: Array) -> Array:
        # Two unequal ranks among the free places, which an exchange leaves free.
        rank = jnp.cumsum(_free(sequence, protect))
        total = rank[-1]
        one, other = jax.random.split(key)
        first = jax.random.randint(one, (count,), 0, jnp.maximum(total, 1))
        step = jax.random.randint(other, (count,), 1, jnp.maximum(total, 2))
        second = (first + step) % jnp.maximum(total, 1)
        places = jnp.arange(sequence.shape[0])

        def once(sequence: Array, ranks: tuple[Array, Array]) -> tuple[Array, None]:
            i, j = (jnp.argmax(rank == r + 1) for r in ranks)
            swapped = jnp.where(places == i, sequence[j], sequence)
            return jnp.where(places == j, sequence[i], swapped), None

        return lax.scan(once, sequence, (first, second), unroll=min(count, 4))[0]

    return apply


def span_mask(
    fraction: Scalar,
    mask: int,
    stop: float = 0.2,
    longest: int = 10,
    protect: tuple[int, ...] = (),
) -> TokenOperation:
    """Spans of tokens become `mask`; their lengths are geometric, cut at `longest`.

    A span begins at each place with probability p = -log(1 - fraction) / E[length], so that about
    `fraction` of the tokens are covered, those near the beginning a little more seldom: spans may
    overlap. (SpanBERT draws until a budget is spent.)

    Args:
      fraction: of tokens masked in the mean, in [0, 1), perhaps traced.
      mask: the id that is put in.
      stop: the geometric distribution's chance to end after each token.
      longest: the longest span.
      protect: ids that stay.

    Reference: Joshi et al., "SpanBERT", 2019, https://arxiv.org/abs/1907.10529.
    """
    if not is_traced(fraction) and not 0 <= fraction < 1:
        raise SetupError(f"span_mask({fraction}): mask a fraction in [0, 1) of the tokens.")
    if not 0 < stop <= 1 or longest < 1:
        raise SetupError(f"span_mask(stop={stop}, longest={longest}): 0 < stop <= 1, longest >= 1.")
    mean = (1 - (1 - stop) ** longest) / stop

    def apply(key: Array, sequence: Array) -> Array:
        begin, length = jax.random.split(key)
        chance = 1 - jnp.exp(jnp.log1p(-jnp.asarray(fraction, jnp.float32)) / mean)
        starts = jax.random.bernoulli(begin, chance, sequence.shape)
        draws = jax.random.uniform(length, sequence.shape, minval=1e-7)
        decay = math.log1p(-stop) if stop < 1 else -math.inf
        lengths = 1 + jnp.minimum(jnp.floor(jnp.log(draws) / decay), longest - 1)
        places = jnp.arange(sequence.shape[0])
        ends = lax.cummax(jnp.where(starts, places + lengths.astype(jnp.int32), 0))
        gone = (places < ends) & _free(sequence, protect)
        return jnp.where(gone, jnp.asarray(mask, sequence.dtype), sequence)

    return apply


def _free(sequence: Array, protect: tuple[int, ...]) -> Array:
    free = jnp.ones(sequence.shape, bool)
    for token in protect:
        free &= sequence != token
    return free
