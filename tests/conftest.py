"""Test set-up: 8 virtual CPU devices, a compilation cache, and the `slow` mark."""

import os
import tempfile

# Before jax is imported: the sharding tests need more than one device, and on a busy machine
# eight of them may wait for each other for longer than XLA's 40 seconds. The caller's come last and
# count.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
os.environ["XLA_FLAGS"] = " ".join((*FLAGS, os.environ.get("XLA_FLAGS", "")))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_compilation_cache_dir", f"{tempfile.gettempdir()}/effjax-test-cache")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    # Most of the time goes into compiling small programs, which takes half as long without LLVM's
    # optimizations. XLA reads this when it is first used. Slow tests run what users run.
    if not config.getoption("--slow"):
        flags = os.environ["XLA_FLAGS"]
        os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {flags}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="needs --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
