"""The errors that need a paragraph. Each says what was got, what was wanted, and what to do."""


class EffjaxError(ValueError):
    """The base of effjax's errors."""


class ChainError(EffjaxError):
    """Transforms that cannot be composed as asked: order, names, or a broken hook."""


class SetupError(EffjaxError):
    """A transform does not fit the model, the batch or the frozen inputs it was given."""


class SelectorError(EffjaxError):
    """A selector that matches nothing, or a leaf that no rule covers."""


class ScheduleError(EffjaxError):
    """A schedule whose numbers cannot be meant: it ends before it begins, or leaves its range."""


class ShardingError(EffjaxError):
    """A layout that a mesh cannot hold, or that is known to give wrong gradients."""


class SiteError(EffjaxError):
    """A weight or rule that meets no operation, or an operation that cannot be transformed."""


class CheckpointError(EffjaxError):
    """A checkpoint that cannot be read, or that belongs to another run."""


class ReportError(EffjaxError):
    """Results that cannot be shown as asked: missing seeds, doubled runs, values without order."""


class PackedError(EffjaxError):
    """A packed file that cannot be read, or a model that cannot be written as one."""


class ExportError(EffjaxError):
    """A model that an engine cannot run as it was trained, or an engine that is not installed."""
