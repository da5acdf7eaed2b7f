"""Test set-up: 8 virtual CPU devices, a compilation cache, and the `slow` mark."""

import os
import tempfile

# Before jax is imported: the sharding tests need more than one device.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

jax.config.update("jax_compilation_cache_dir", f"{tempfile.gettempdir()}/effjax-test-cache")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="needs --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
