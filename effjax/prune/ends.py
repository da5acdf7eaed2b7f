"""What is pruned where nobody says: all kernels but those of the model's two ends."""

from effjax.core import PyTree, Setup
from effjax.errors import SelectorError, SetupError
from effjax.select import KERNELS
from effjax.select import select as select_leaves
from effjax.sites import find_sites


def inner_kernels(params: PyTree, setup: Setup | None) -> list[str]:
    """The paths of all kernels but those of the first and the last operation with a weight.

    The first layer (which sees the data's few channels) and the last (which has one output a class)
    are small and hurt most where they are pruned, so they are usually left dense.

    Raises:
      SetupError: there is no model to look at.
      SelectorError: no kernel lies between the two ends.
    """
    if setup is None:
        raise SetupError(
            "which layers are the model's first and last is seen in the model, and `init` was "
            r"given none. Pass a Setup, or say what to prune: select=r'kernel$'."
        )
    sites = find_sites(setup.apply, params, setup.model_state, setup.batch)
    ends = [sites[0].leaf, sites[-1].leaf] if sites else []
    kernels = list(select_leaves(params, KERNELS))
    if inner := [path for path in kernels if path not in ends]:
        return inner
    raise SelectorError(
        f"the model's kernels {kernels} are those of its first and its last operation, {ends}, "
        "which are left dense unless they are named. To prune them too, say so: "
        r"select=r'kernel$'."
    )
