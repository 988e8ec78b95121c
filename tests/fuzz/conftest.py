"""Fixtures for tests that run clients and servers in processes of their own."""

from __future__ import annotations

import pytest

from tests.swarm.tools import prepare_processes


@pytest.fixture(scope="session", autouse=True)
def other_processes() -> None:
    """Before the first test, so that no test is said to have left that behind."""
    prepare_processes()
