"""What the distilling transforms are set by: a temperature, and the weights of their terms."""

from effjax.errors import SetupError
from effjax.schedules import Scalar, Schedule, as_schedule, is_traced


def temperature_schedule(temperature: Scalar | Schedule) -> Schedule:
    """A temperature as a schedule.

    Raises:
      SetupError: a number that is not above 0; traced values and schedules pass.
    """
    if callable(temperature):
        return temperature
    if not is_traced(temperature) and not 0 < temperature < float("inf"):
        raise SetupError(f"the temperature is {temperature}; it divides logits, so it is > 0.")
    return as_schedule(temperature)


def weight_schedule(alpha: Scalar | Schedule, what: str = "alpha") -> Schedule:
    """The weight of a loss as a schedule.

    Raises:
      SetupError: a number below 0; traced values and schedules pass.
    """
    if callable(alpha):
        return alpha
    if not is_traced(alpha) and not 0 <= alpha < float("inf"):
        raise SetupError(f"{what} is {alpha}; it weights a loss, so it is >= 0.")
    return as_schedule(alpha)
