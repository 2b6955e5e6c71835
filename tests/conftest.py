# SPDX-License-Identifier: Apache-2.0
"""What every test shares: hypothesis profile, threads, markers, the rooms."""

from __future__ import annotations

import os

# Workers of pytest-xdist share the cores; one thread each, set before any library starts a pool.
if "PYTEST_XDIST_WORKER" in os.environ:
    for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(_name, "1")

import importlib.util
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests import rooms

settings.register_profile(
    "pyfmt",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# For a hunt: `pytest --hypothesis-profile=hunt tests/test_properties.py`.
settings.register_profile("hunt", deadline=None, max_examples=1500)
settings.load_profile("pyfmt")


def _no_gpu() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "no CUDA device is visible"


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") and importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if "gpu" in item.keywords]
    reason = _no_gpu() if marked else None
    for item in marked:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def every_room() -> Iterator[list[rooms.Room]]:
    """All rooms that compute here, each CPU instruction set for itself."""
    yield rooms.every_room()
    rooms.native().set_level("best")


@pytest.fixture(params=["reference", "rooms"])
def implementations(request: pytest.FixtureRequest) -> Iterator[list[rooms.Room]]:
    """The reference alone, then every other room: for checks against independent facts."""
    if request.param == "reference":
        yield [rooms.REFERENCE]
    else:
        yield request.getfixturevalue("every_room")
