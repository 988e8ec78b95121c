"""Every benchmark runs, ends, leaves nothing behind, and writes a record and a chart. Nothing here says how fast things are."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.common import Case, MeasurementFailed, interleave, quantile, summary

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 110.0

SYSTEMS = {
    "throughput": {"moe", "hivemind"},
    "burst": {"moe"},
    "latency": {"moe"},
    "breakdown": {"moe"},
    "means": {"moe"},
    "moe": {"moe", "hivemind"},
    "kwargs": {"moe"},
    "held": {"moe", "all sent"},
    "footprint": {"moe"},
    "dht": {"moe"},
    "compression": {"moe", "hivemind"},
    "scale": {"moe"},
    "gpu": {"moe", "bare", "bare, from host"},
    "routing": {"moe", "uniform", "max_throughput", "min_latency", "min_latency, pinged"},
    "criteria": {"moe"},
}
ARGUMENTS = {"gpu": ["--device", "cpu"]}


@contextlib.contextmanager
def started(module: str, *arguments: str, temporary: Path) -> Iterator[subprocess.Popen[str]]:
    """A benchmark, which sees ``temporary`` as the place of temporary files."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()  # its guard ends what it has started
        process.communicate(timeout=30)


def workers(temporary: Path) -> list[int]:
    """All processes that have this place for temporary files."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR", "").startswith(str(temporary)):
                found.append(process.pid)
    return found


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short enough for Unix sockets inside."""
    return tmp_path_factory.mktemp("t")


@pytest.mark.parametrize("name", SYSTEMS)
def test_smoke(name: str, tmp_path: Path, temporary: Path) -> None:
    module = "run_criteria" if name == "criteria" else f"benchmark_{name}"
    arguments = ["--smoke", "--out", str(tmp_path), *ARGUMENTS.get(name, [])]
    with started(module, *arguments, temporary=temporary) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    assert workers(temporary) == []
    assert list(temporary.iterdir()) == []
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"), parse_constant=_not_finite)
    assert record["smoke"] is True
    assert record["benchmark"] == name
    assert record["machine"]["cores"] >= 1
    assert record["versions"]["hivemind"].startswith("1.1.")
    assert {system for case in record["cases"] for system in case["systems"]} == SYSTEMS[name]
    for case in record["cases"]:
        assert case["name"] in out
        for values in (*case["systems"].values(), *case["ratios"].values()):
            assert values["min"] <= values["median"] <= values["max"]
            assert all(math.isfinite(value) and value >= 0 for value in values["rounds"])


def _not_finite(text: str) -> Any:
    raise AssertionError(f"{text} in a record")


def test_without_a_gpu_it_says_so(temporary: Path) -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.benchmark_gpu", "--smoke"]
    result = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.returncode == 1
    assert result.stderr.strip().endswith("no CUDA device")


def test_a_killed_benchmark_leaves_no_processes(tmp_path: Path, temporary: Path) -> None:
    arguments = ["--smoke", "--seconds", "60", "--out", str(tmp_path)]
    with started("benchmark_latency", *arguments, temporary=temporary) as process:
        wait_for(lambda: len(workers(temporary)) >= 4)  # the benchmark, its guard, a server, clients
        process.kill()
        wait_for(lambda: workers(temporary) == [])


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- rounds and their statistics -------------------------------------------------------------------------------------


class Scripted:
    """A system that gives these values, or fails where there is none."""

    def __init__(self, name: str, values: Sequence[float | None], log: list[str]):
        self.name, self._values, self._log, self.restarts = name, list(values), log, 0

    def restart(self) -> None:
        self.restarts += 1

    def measure(self) -> dict[str, float]:
        self._log.append(self.name)
        value = self._values.pop(0)
        if value is None:
            raise MeasurementFailed("frozen")
        return {"rate": value}


def rounds_of(*systems: tuple[str, Sequence[float | None]]) -> tuple[Any, list[str]]:
    log: list[str] = []
    subjects = [Scripted(name, values, log) for name, values in systems]
    return interleave(subjects, 2, Scripted.measure, log=lambda line: None), log


def test_rounds_alternate_and_the_first_is_not_counted() -> None:
    found, order = rounds_of(("moe", [1, 2, 3]), ("hivemind", [4, 5, 6]))
    assert order == ["moe", "hivemind"] * 3
    assert found.of("rate") == {"moe": [2, 3], "hivemind": [5, 6]}
    assert found.of("other") == {}
    assert found.notes == []


def test_a_frozen_system_is_started_again() -> None:
    found, order = rounds_of(("moe", [1, 2, 3]), ("hivemind", [4, None, 5, 6]))
    assert order == ["moe", "hivemind", "moe", "hivemind", "hivemind", "moe", "hivemind"]
    assert found.of("rate") == {"moe": [2, 3], "hivemind": [5, 6]}
    assert found.notes == ["hivemind was started again: frozen"]


def test_stock_hivemind_is_left_out_when_it_freezes_again() -> None:
    found, _ = rounds_of(("moe", [1, 2, 3]), ("hivemind", [4, 5, None, None]))
    assert found.of("rate") == {"moe": [2, 3]}
    assert found.notes[-1] == "hivemind is left out: frozen"


def test_this_project_may_not_freeze_twice() -> None:
    with pytest.raises(MeasurementFailed):
        rounds_of(("moe", [None, None]))


def test_ratios_are_taken_within_a_round() -> None:
    case = Case("x", "rows/s", True, {"moe": [10, 40, 90], "hivemind": [5, 4, 3]}, other_ratios={"a to b": [0.5]})
    assert case.ratios == {"moe/hivemind": [2, 10, 30], "a to b": [0.5]}
    assert case.ratio("moe/hivemind") == 10
    assert case.ratio("moe/bare") is None


def test_statistics() -> None:
    assert summary([4, 1, 3, 2]) == {"median": 2.5, "min": 1, "max": 4, "iqr": 1.5, "rounds": [4, 1, 3, 2]}
    assert summary([7]) == {"median": 7, "min": 7, "max": 7, "iqr": 0, "rounds": [7]}
    assert quantile(range(101), 0.95) == 95
