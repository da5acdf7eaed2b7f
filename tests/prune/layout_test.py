"""Rules for operations go by their names, which have to be those that JAX gives them."""

import jax
import pytest
from jax import lax
from jax.extend.core import primitives

from effjax.prune import constants, layout

NAMES = {getattr(primitives, p).name for p in dir(primitives) if p.endswith("_p")}
SPLIT = jax.ShapeDtypeStruct((3,), "float32")
# Not among those that JAX lists.
NAMES |= {eqn.primitive.name for eqn in jax.make_jaxpr(lambda x: lax.split(x, (1, 2)))(SPLIT).eqns}
RULES = {
    name[1:]
    for name, method in vars(layout.Layout).items()
    if name.startswith("_") and not name.startswith("__") and callable(method)
}


@pytest.mark.parametrize(
    "names",
    [
        layout.ELEMENTWISE,
        layout.REDUCTIONS,
        layout.WINDOWS,
        layout.ALONG,
        constants.MOVES,
        RULES,
    ],
    ids=["elementwise", "reductions", "windows", "along", "moves", "rules"],
)
def test_every_name_is_a_primitives(names):
    assert names
    assert sorted(set(names) - NAMES) == []


def test_no_operation_has_two_rules():
    lists = [layout.ELEMENTWISE, layout.REDUCTIONS, layout.WINDOWS, set(layout.ALONG), RULES]
    assert sum(map(len, lists)) == len(frozenset().union(*lists))
