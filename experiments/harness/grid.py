"""The grid of a sweep, from words such as `sparsity=0.5,0.8 seed=0..4` to configs."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import shlex
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from experiments.harness.config import as_dict
from experiments.harness.errors import UsageError

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


def parse_over(words: Sequence[str]) -> dict[str, list[str]]:
    """{field: its values as words} of `field=a,b,c` and `field=0..4`, both ends included.

    Raises:
      UsageError: no values, a value or field twice, a range backwards or with one end only.

    Example:
      >>> from experiments.harness.grid import parse_over
      >>> parse_over(["sparsity=0.5,0.8", "seed=0..2,7"])
      {'sparsity': ['0.5', '0.8'], 'seed': ['0', '1', '2', '7']}
    """
    if not words:
        raise UsageError("a sweep needs --over field=value,value ...: --over seed=0..4")
    found: dict[str, list[str]] = {}
    for word in words:
        field, equals, text = word.partition("=")
        field = field.strip().replace("-", "_")
        if not equals or not field:
            raise UsageError(f"--over {word!r} is not field=value,value: --over seed=0..4")
        if field in found:
            raise UsageError(f"--over names {field} twice; put its values together with commas.")
        found[field] = [v for part in text.split(",") for v in _values(field, part.strip(), word)]
    return found


def _values(field: str, part: str, word: str) -> list[str]:
    if not part:
        raise UsageError(
            f"--over {word!r} has an empty value; write {field}=1,2,3 without spaces after commas."
        )
    if found := _RANGE.fullmatch(part):
        first, last = int(found[1]), int(found[2])
        if first > last:
            raise UsageError(
                f"the range {part} of {field} runs backwards; write {last}..{first}, both included."
            )
        return [str(i) for i in range(first, last + 1)]
    if re.fullmatch(r"[-\d.]*\.\.[-\d.]*", part):
        raise UsageError(
            f"{part} of {field} is no range: a range goes from a whole number to another, 0..4; "
            "for others list the values, 0.1,0.2."
        )
    return [part]


class Grid(typing.NamedTuple):
    """All configs of a sweep.

    over: {field: its values, as JSON}.
    base: the fields that are the same for all, as JSON.
    points: one {field: value} a run, the first field moving slowest.
    configs: their configs.
    """

    over: dict[str, list[Any]]
    base: dict[str, Any]
    points: list[dict[str, Any]]
    configs: list[Any]


def make_grid(config: type, over: Mapping[str, list[str]], fixed: Sequence[str], prog: str) -> Grid:
    """Parses every value as the experiment's own command line would.

    Args:
      config: the experiment's dataclass; fields of dataclasses in it are `outer.inner`.
      over: see `parse_over`; the entries of a tuple are separated by spaces: "8 16,16 32".
      fixed: further `--field value` words.
      prog: the command, for the usage line.

    Raises:
      UsageError: an unknown field (with those that come near), a value that does not parse or
        that the config refuses, a field both swept and fixed, a value twice.
    """
    base, values = parse_values(config, over, fixed, prog)
    points = [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]
    configs = []
    for point in points:
        made = base
        for field, value in point.items():
            made = replace(made, field, value)
        configs.append(made)
    plain = fixed_fields(base, over)
    return Grid(as_dict(values), plain, [as_dict(point) for point in points], configs)


def parse_values(
    config: type, over: Mapping[str, list[str]], fixed: Sequence[str], prog: str
) -> tuple[Any, dict[str, list[Any]]]:
    """A config with the first value of every field, and all values of each; see `make_grid`."""
    kinds = dict(_fields(config))
    for field in over:
        _check_field(field, kinds, fixed)
    first = {field: values[0] for field, values in over.items()}

    def parsed(chosen: Mapping[str, str]) -> Any:
        words = [w for field, text in chosen.items() for w in _flags(field, text, kinds[field])]
        return _tyro(config, [*fixed, *words], prog)

    base = parsed(first)
    values: dict[str, list[Any]] = {}
    for field, texts in over.items():
        values[field] = [_get(parsed({**first, field: text}), field) for text in texts]
        _check_distinct(field, values[field], texts)
    if "save" in kinds and "save" not in over and "--save" not in fixed:
        base = replace(base, "save", False)  # runs of a sweep are none that is published
    return base, values


def fixed_fields(base: Any, over: Iterable[str]) -> dict[str, Any]:
    """The fields of a config that `over` does not name, as JSON."""
    plain = as_dict(base)
    for field in over:
        _remove(plain, field.split("."))
    return plain


def _fields(config: type, before: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _fields(kind, f"{before}{field.name}.")
        else:
            yield before + field.name, kind


def _check_field(field: str, kinds: Mapping[str, Any], fixed: Sequence[str]) -> None:
    if field not in kinds:
        near = difflib.get_close_matches(field, kinds, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"there is no field {field!r}.{hint} There are {', '.join(kinds)}.")
    flag = "--" + field
    if any(word.split("=")[0].replace("_", "-") == flag.replace("_", "-") for word in fixed):
        raise UsageError(f"{field} is both in --over and given as {flag}; leave one out.")


def _flags(field: str, text: str, kind: Any) -> list[str]:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{text!r} is no value for {field}, which is true or false.")
        outer, dot, name = field.rpartition(".")
        return [f"--{field}" if text.lower() == "true" else f"--{outer}{dot}no-{name}"]
    if kind is str:
        return [f"--{field}={text}"]
    words = shlex.split(text)
    # With "=", a negative number is not taken for an option.
    return [f"--{field}={words[0]}"] if len(words) == 1 else [f"--{field}", *words]


def _tyro(config: type, words: list[str], prog: str) -> Any:
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(config, args=words, prog=prog)
    except SystemExit as stop:
        if not stop.code:  # --help
            print(said.getvalue(), end="")
            raise
        raise UsageError(f"{shlex.join(words)} cannot be parsed.\n{said.getvalue()}") from stop


def _check_distinct(field: str, values: list[Any], texts: list[str]) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            before = texts[values.index(value)]
            raise UsageError(
                f"--over {field} has the same value twice, {before} and {texts[i]}: the two runs "
                "would have one id. Leave one out."
            )


def _get(config: Any, field: str) -> Any:
    for name in field.split("."):
        config = getattr(config, name)
    return config


def replace(config: Any, field: str, value: Any) -> Any:
    """The config with another value of a field; `outer.inner` is one of a dataclass in it."""
    name, _, rest = field.partition(".")
    inner = replace(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: inner})


def _remove(plain: dict[str, Any], names: list[str]) -> None:
    for name in names[:-1]:
        plain = plain[name]
    del plain[names[-1]]
