"""A hivemind user's script does the same with ``hivemind.moe`` replaced by ``moe``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.peers import ROOT, end_group

SCRIPT = Path(__file__).with_name("user_script.py")
TIMEOUT_S = 100.0


@pytest.fixture
def groups() -> Iterator[list[int]]:
    """Process groups that are ended after the test."""
    groups: list[int] = []
    yield groups
    for group in groups:
        end_group(group)


def start(script: Path, groups: list[int]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    groups.append(process.pid)
    return process


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_a_users_script_runs_with_another_import(tmp_path: Path, groups: list[int]) -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    switched = tmp_path / "user_script.py"
    switched.write_text(re.sub(r"^from hivemind\.moe", "from moe", text, flags=re.MULTILINE), encoding="utf-8")
    print(start(SCRIPT, groups).communicate(timeout=TIMEOUT_S)[0])
    print(start(switched, groups).communicate(timeout=TIMEOUT_S)[0])
