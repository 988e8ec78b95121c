"""The examples run as a user starts them, say what they should, and leave nothing behind, also after Ctrl+C."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import hivemind.moe
import psutil
import pytest

import moe
from moe import load_peft
from tests.docs.markdown import ROOT
from tests.docs.test_snippets import NOISE

EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
RULER = re.compile(r"^ *# -{20,}$", re.MULTILINE)


def run_example(name: str, *arguments: str) -> str:
    """Run an example to its end.

    :returns: what it printed
    """
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert not NOISE.search(result.stderr), result.stderr
    return result.stdout


def test_all_examples_are_tested() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tested] == []


def test_custom_expert() -> None:
    assert "output (16, 64) gradients [(16, 64), (64, 8), (8, 64)]" in run_example("custom_expert.py")


def test_custom_expert_is_short() -> None:
    _, core, _ = RULER.split((EXAMPLES / "custom_expert.py").read_text(encoding="utf-8"))
    assert len(core.strip().splitlines()) < 30


def test_t8_train_lora() -> None:
    printed = run_example("train_lora.py", "--steps", "60")
    assert "bit-identical after 60 backward calls" in printed
    before, after = (float(number) for number in re.findall(r"loss fell from (\S+) to (\S+)", printed)[0])
    assert after < before / 5


@pytest.mark.timeout(240)  # three servers and a client that import transformers
def test_finetune_lora(tmp_path: Path) -> None:
    printed = run_example("finetune_lora.py", "--steps", "20", "--save", str(tmp_path / "adapter"))
    (difference,) = re.findall(r"differ by at most (\S+) from those of the whole model", printed)
    assert float(difference) <= 1e-5
    assert "step 10: killed the server of blocks 0:3" in printed
    first, last = (float(loss) for loss in re.findall(r"loss (\S+) at first, (\S+) at the end", printed)[0])
    assert last < first / 2
    before, after = (float(part) for part in re.findall(r"Right topics: (\S+)% .*, (\S+)% with it", printed)[0])
    assert after > before + 10
    assert "the same as before, to the last bit" in printed
    assert len(load_peft(tmp_path / "adapter", 6)()) == 6


def test_t8_switch_from_hivemind() -> None:
    printed = run_example("switch_from_hivemind.py")
    assert "two experts in a row: outputs (3, 64)" in printed
    losses = [float(loss) for loss in re.findall(r"mixture, step \d: loss (\S+)", printed)]
    assert losses[-1] < losses[0]


def test_one_import_is_all_that_switches() -> None:
    source = (EXAMPLES / "switch_from_hivemind.py").read_text(encoding="utf-8")
    (before,) = re.findall(r"^# (from hivemind\.moe import .*)$", source, re.MULTILINE)
    assert before.replace("hivemind.moe", "moe") in source
    (names,) = [
        [alias.name for alias in node.names]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module == "moe"
    ]
    assert all(hasattr(hivemind.moe, name) and hasattr(moe, name) for name in names)


def test_digits_demo() -> None:
    printed = run_example("digits_demo.py", "--epochs", "3")
    (accuracy,) = re.findall(r"Test accuracy: ([\d.]+)%", printed)
    assert float(accuracy) >= 90
    rows = {uid: int(count) for uid, count in re.findall(r"(digits\.\d\.\d) +│ \d +│ +(\d+)", printed)}
    assert len(rows) == 8
    assert sum(rows.values()) == 3 * 1437 * 2  # epochs, images, experts per image
    assert ", 0 failed calls" in printed


@pytest.mark.parametrize("moment", ["1. Starting", "3. Training"])
def test_digits_demo_cleans_up_after_ctrl_c(moment: str) -> None:
    demo = [sys.executable, str(EXAMPLES / "digits_demo.py"), "--epochs", "1000"]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    with subprocess.Popen(demo, env=ENVIRONMENT, **options) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout is not None
            while moment not in (line := process.stdout.readline()):
                assert line, process.communicate()
            time.sleep(2.0)  # somewhere in the middle of it
            family = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes in the foreground
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, stderr) == (130, "")
    _, alive = psutil.wait_procs(family, timeout=5)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
