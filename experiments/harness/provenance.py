"""Where a number comes from: code, versions, hardware, date; and files that are written whole."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.harness.config import config_hash

PACKAGES = ("effjax", "jax", "jaxlib", "flax", "optax", "qwix", "orbax-checkpoint", "numpy")


def provenance(config: Any = None) -> dict[str, Any]:
    """Commit, versions, hardware and date, as written beside every result.

    Returns:
      {"commit": 40 hex digits with "-dirty" where tracked files other than results and figures
      were changed, or None outside a checkout; "versions": {package: version}; "hardware":
      {"device", "platform", "devices", "cpu", "cores"}; "date": ISO 8601 in UTC; "config_hash"
      where a config is given}.
    """
    found: dict[str, Any] = {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": _hardware(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if config is not None:
        found["config_hash"] = config_hash(config)
    return found


def brief(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Of one provenance, or of several together, what fits under a figure."""

    def each(pick: Callable[[Mapping[str, Any]], Any]) -> list[str]:
        return list(dict.fromkeys(str(found) for s in sources if (found := pick(s))))

    def commit(source: Mapping[str, Any]) -> str:
        whole = source.get("commit") or ""
        return whole[:10] + ("-dirty" if whole.endswith("-dirty") else "")

    def machine(source: Mapping[str, Any]) -> str:
        found = source.get("hardware")
        if not found:
            return ""
        where = f"{found['cpu']}, {found['cores']} cores"
        return where if found["platform"] == "cpu" else f"{found['device']}, {where}"

    configs = each(lambda s: s.get("config_hash"))
    dates = sorted(each(lambda s: s.get("date", "")[:10]))
    return {
        "effjax": ", ".join(each(commit)),
        "jax": ", ".join(each(lambda s: s.get("versions", {}).get("jax"))),
        "on": "; ".join(each(machine)),
        "config": ", ".join(configs) if len(configs) < 4 else f"{len(configs)} of them",
        "date": " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]])),
    }


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, default=_number) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _number(value: Any) -> Any:
    """JAX and NumPy scalars and arrays as Python numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r:.60} is a {type(value).__name__}, which JSON does not have")


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        # Results, and the figures drawn from them, change no number.
        written = (":!experiments/results", ":!docs/images")
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _hardware() -> dict[str, Any]:
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "cpu": _cpu_model(),
        "cores": cores(),
    }


def cores() -> int:
    """CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


# From the newest: what decides how fast products of small integers are, which a model's name may
# not tell ("AMD EPYC").
INSTRUCTIONS = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "asimddp": "dot products",
}


def _cpu_model() -> str:
    """The processor's name and its widest instructions for integers."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    return described(text) or platform.machine()


def described(cpuinfo: str) -> str:
    """What Linux's /proc/cpuinfo says of the first processor: "AMD EPYC with AVX2"."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    found = {name.strip(): value.strip() for name, _, value in reversed(list(lines))}
    flags = found.get("flags", found.get("Features", "")).split()
    best = next((name for flag, name in INSTRUCTIONS.items() if flag in flags), "")
    return " with ".join(part for part in (found.get("model name", ""), best) if part)
