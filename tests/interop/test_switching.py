"""A hivemind user's script does the same with ``hivemind.moe`` replaced by ``moe``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.peers import ROOT, alive_in_group, end_group

SCRIPT = Path(__file__).with_name("user_script.py")
TIMEOUT_S = 150.0  # about 15 s on two idle cores
STOCK_PATIENCE_S = 75.0  # with stock hivemind, which may hang


class Run:
    """A script in a process group of its own, with what it prints kept in a file."""

    def __init__(self, script: Path, output: Path):
        self.output = output
        with output.open("w") as stdout, output.with_suffix(".err").open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, script],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    def lines(self, timeout_s: float = TIMEOUT_S) -> list[str]:
        """What it printed, when it has ended or its time is over."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return ["timed out"]
        errors = self.output.with_suffix(".err").read_text(errors="replace")
        return self.output.read_text().splitlines() if code == 0 else [f"exit code {code}", *errors.splitlines()[-30:]]

    def close(self) -> None:
        """End whatever is left of it."""
        end_group(self.process.pid)
        self.process.wait()


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    """Runs that are ended after the test."""
    runs: list[Run] = []
    yield runs
    for run in runs:
        run.close()


@pytest.mark.timeout(3 * TIMEOUT_S)
def test_a_users_script_runs_with_another_import(tmp_path: Path, runs: list[Run]) -> None:
    switched = tmp_path / "switched.py"
    text, replaced = re.subn(r"(?m)^from hivemind\.moe", "from moe", SCRIPT.read_text(encoding="utf-8"))
    assert replaced == 4
    switched.write_text(text, encoding="utf-8")
    runs += [Run(SCRIPT, tmp_path / "stock"), Run(switched, tmp_path / "ours")]
    expected, actual = runs[0].lines(STOCK_PATIENCE_S), runs[1].lines()
    while expected[-1] != "done" and len(runs) < 5:  # stock servers sometimes hang at their start; ours may not
        runs.append(Run(SCRIPT, tmp_path / f"stock_{len(runs)}"))
        expected = runs[-1].lines(STOCK_PATIENCE_S)
    assert expected[-1] == "done"
    assert actual == expected

    deadline = time.monotonic() + 5.0
    while left := alive_in_group(runs[1].process.pid):
        assert time.monotonic() < deadline, f"the script has ended, but left behind {left}"
        time.sleep(0.05)
