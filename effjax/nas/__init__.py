"""Architecture search: sub-networks that share the weights of one."""

from effjax.nas.groups import WidthSpace, width_space
from effjax.nas.subnet import make_recalibrate, subnet
from effjax.nas.width import width

__all__ = ["WidthSpace", "make_recalibrate", "subnet", "width", "width_space"]
