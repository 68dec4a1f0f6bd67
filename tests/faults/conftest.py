"""The warmed process, once for all tests of faults."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.faults.harness")

from tests.faults.harness import Faults, room  # noqa: E402 - its assertions are rewritten first


@pytest.fixture(scope="session")
def faults() -> Iterator[Faults]:
    # Not below pytest's own folder, into which other users cannot look.
    root = room()
    made = Faults(root)
    yield made
    made.close()
    shutil.rmtree(root)


@pytest.fixture(scope="session")
def as_another_user() -> None:
    """Skips where this user cannot become another: only root can, and only root needs to."""
    if os.geteuid() != 0:
        pytest.skip("needs root, whose children become another user")
