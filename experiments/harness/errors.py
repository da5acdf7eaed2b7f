"""What can go wrong around a run, told to the person who started it."""


class ExperimentError(Exception):
    """The base of the harness's errors; the command line prints them without a traceback."""


class UsageError(ExperimentError):
    """A command that cannot be meant."""


class ConfigError(ExperimentError, ValueError):
    """A configuration whose values cannot be meant."""


class DataError(ExperimentError):
    """A data set that cannot be had, or that is not what it should be."""


class RunError(ExperimentError):
    """A run folder that belongs to another run, or that another process is using."""


class DivergedError(ExperimentError):
    """The loss or a weight became NaN or infinite."""


class Interrupted(SystemExit):
    """A signal stopped the run after its state was saved; the exit code is 128 + the signal."""

    def __init__(self, signum: int, message: str):
        super().__init__(128 + signum)
        self.signum = signum
        self.message = message

    def __str__(self) -> str:
        return self.message
