"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

# before torch is imported: waiting threads that spin make parallel test processes crawl, see unmask/cli/__init__.py
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from unmask.sandbox.pool import LocalSandbox, SandboxUnavailable


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of published task data; tests that need it are skipped without it."""
    value = os.environ.get("UNMASK_DATA", "")
    if not value:
        pytest.skip("published task data wanted: set the environment variable UNMASK_DATA to its folder")
    return Path(value)


@pytest.fixture(scope="module")
def sandbox():
    """Confinement of programs on this machine: what its kernel lacks is a reason to skip, a hole is not."""
    try:
        found = LocalSandbox(packages=("numpy",))
    except SandboxUnavailable as error:
        assert "a program can" not in str(error)
        pytest.skip(f"programs cannot be confined here: {error}")
    yield found
    found.close()
