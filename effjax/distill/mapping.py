"""Which layer of the student learns from which of a deeper teacher's."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jax import Array

from effjax.distill.features import Match, Taps
from effjax.distill.hints import hint
from effjax.distill.learned import Learned
from effjax.errors import SetupError
from effjax.schedules import Scalar, Schedule

Mapping = Literal["uniform", "top", "bottom"]


def layer_to_layer(
    student: Sequence[Taps],
    teacher: Sequence[Taps],
    loss: Callable[[Any, Any], Array] | Learned = hint,
    *,
    mapping: Mapping = "uniform",
    alpha: Scalar | Schedule = 1.0,
) -> dict[str, Match]:
    """Matches each of the student's M layers with one of the teacher's N >= M, for `features`.

    Layer m of 1 .. M learns from the teacher's layer n(m): round(m N / M) where "uniform", so that
    the last learns from the last; m + N - M where "top", m where "bottom". All terms have the same
    loss, each with trained leaves of its own, and the same weight.

    Args:
      student, teacher: the taps of their layers, from the first to the last.
      loss: of the features of two layers.
      mapping: "uniform", "top" or "bottom".
      alpha: weight of each term.

    Returns:
      {"layer_1": Match, ...}, to be merged with other matches.

    Raises:
      SetupError: no layers, fewer of the teacher's than of the student's, an unknown mapping.

    Example:
      >>> from effjax.distill import layer_to_layer
      >>> found = layer_to_layer(["a", "b"], ["0", "1", "2", "3", "4"])
      >>> {match.student: match.teacher for match in found.values()}
      {'a': '2', 'b': '4'}

    Reference: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2020,
      https://arxiv.org/abs/1909.10351.
    """
    few, many = len(student), len(teacher)
    if not 0 < few <= many:
        raise SetupError(
            f"layer_to_layer got {few} taps of the student and {many} of the teacher; each of the "
            "student's layers, one or more, learns from a layer of its own. Leave some of the "
            "student's out."
        )
    chosen = {
        "uniform": [(2 * m * many + few) // (2 * few) for m in range(1, few + 1)],
        "top": range(many - few + 1, many + 1),
        "bottom": range(1, few + 1),
    }
    if mapping not in chosen:
        raise SetupError(f"layer_to_layer has mapping={mapping!r}; there are {list(chosen)}.")
    return {
        f"layer_{m}": Match(mine, teacher[n - 1], loss, alpha)
        for m, (mine, n) in enumerate(zip(student, chosen[mapping], strict=True), start=1)
    }
