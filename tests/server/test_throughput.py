"""How fast a server says it is: measured within bounds, remembered once for each kind of expert, and never at any price."""

from __future__ import annotations

import fcntl
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe.dht import stop_dht
from moe.schema import BatchTensorProto, TensorProto
from moe.server import throughput
from moe.server.assembly import assemble
from moe.server.expert_backend import ExpertBackend
from moe.server.throughput import (
    LENGTHS,
    Throughput,
    bytes_per_row,
    key_of,
    measure,
    measure_compute,
    measure_loopback_bytes_per_s,
    remembered_or_measured,
)
from tests.experts import linear_backend

MEASURED = Throughput(compute_rows_per_s=1000.0, network_rows_per_s=500.0)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "throughput.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that were measured; nothing really is."""
    names: list[str] = []

    def record(backend: ExpertBackend) -> Throughput:
        names.append(backend.name)
        return MEASURED

    monkeypatch.setattr(throughput, "measure", record)
    return names


class Calls(nn.Module):
    """Remembers how many rows it was called with, and does ``act`` with them."""

    def __init__(self, act: Callable[[int], None] = lambda rows: None):
        super().__init__()
        self.rows: list[int] = []
        self.act = act
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(x))
        self.get_buffer("seen").add_(1)
        self.act(len(x))
        return x


def backend_of(module: nn.Module, **options: Any) -> ExpertBackend:
    proto = BatchTensorProto(4)
    return ExpertBackend("x.0", module, args_schema=(proto,), outputs_schema=proto, **options)


# --- what is said -----------------------------------------------------------------------------------------------------


def test_requests_use_half_of_the_blocks_on_average() -> None:
    fast_line = Throughput(compute_rows_per_s=1000.0, network_rows_per_s=1e9)
    assert [fast_line.served_rows_per_s(n) for n in (1, 3, 9)] == [1000.0, 500.0, 200.0]


def test_the_slower_of_compute_and_network_counts() -> None:
    assert MEASURED.served_rows_per_s() == 500.0
    assert MEASURED.served_rows_per_s(9) == 200.0
    assert MEASURED.served_rows_per_s(relayed=True) == 100.0
    assert MEASURED.served_rows_per_s(99, relayed=True) == 20.0


def test_it_can_be_read() -> None:
    assert str(MEASURED) == "1000.0 rows/s through one expert, 500 rows/s through the network stack"
    tokens = Throughput(compute_rows_per_s=10.0, network_rows_per_s=50.0, tokens_per_row=128)
    assert str(tokens).startswith("10.0 rows/s through one expert (1280 tokens/s in rows of 128), ")


# --- measuring --------------------------------------------------------------------------------------------------------


def test_a_real_expert_is_measured() -> None:
    backend = linear_backend(max_batch_size=64)
    before = backend.module.state_dict()["weight"].clone()
    found = measure(backend)
    assert found.compute_rows_per_s > 1000
    assert found.network_rows_per_s > 1000
    assert found.tokens_per_row == 1
    assert torch.equal(before, backend.module.state_dict()["weight"])
    assert backend.forward_pool.statistics().rows == 0  # nobody was served


def test_rows_of_any_length_are_measured_at_one_length() -> None:
    layer = nn.Linear(8, 8)
    backend = ExpertBackend(
        "seq.0", layer, args_schema=(BatchTensorProto(None, 8),), kwargs_schema={"scale": TensorProto(8)},
        optional_kwargs=("scale",), outputs_schema=BatchTensorProto(None, 8),
    )  # fmt: skip
    assert bytes_per_row(backend, 100) == 2 * 100 * 8 * 4
    assert measure(backend).tokens_per_row == LENGTHS[0]


def test_an_expert_that_takes_short_rows_only() -> None:
    class Short(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[1] > self.most:
                raise ValueError("too long")
            return x

        most = 64

    proto = BatchTensorProto(None, 8)
    backend = ExpertBackend("seq.0", Short(), args_schema=(proto,), outputs_schema=proto)
    assert measure(backend).tokens_per_row == LENGTHS[1]
    Short.most = 4
    with pytest.raises(ValueError, match="too long"):
        measure(backend)


def test_batches_grow_until_they_are_large_enough_and_no_larger_than_the_server_takes() -> None:
    module = Calls()
    measure_compute(backend_of(module, max_batch_size=100))
    assert module.rows[:6] == [1, 1, 4, 16, 64, 100]
    assert set(module.rows[5:]) == {100}
    assert module.get_buffer("seen") == 0  # no trace


def test_slow_experts_are_measured_with_small_batches() -> None:
    pause = threading.Event()
    module = Calls(lambda rows: bool(pause.wait(0.03)) or None)
    rows_per_s = measure_compute(backend_of(module))
    assert set(module.rows) == {1}
    assert 1 < rows_per_s < 34


def test_out_of_memory_ends_the_growth() -> None:
    def out_of_memory(rows: int) -> None:
        if rows > 16:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    module = Calls(out_of_memory)
    assert measure_compute(backend_of(module)) > 0
    assert module.rows == [1, 1, 4, 16, 64]


def test_an_expert_that_fails_is_not_measured() -> None:
    def fail(rows: int) -> None:
        raise ValueError("no zeros, please")

    with pytest.raises(ValueError, match="no zeros"):
        measure_compute(backend_of(Calls(fail)))


def test_loopback() -> None:
    threads = threading.active_count()
    assert measure_loopback_bytes_per_s() > 1e7
    assert threading.active_count() == threads


# --- remembering ------------------------------------------------------------------------------------------------------


def test_each_kind_of_expert_is_measured_once(cache: Path, measured: list[str]) -> None:
    for uid in ("a.0", "a.1"):
        assert remembered_or_measured(linear_backend(uid), cache_path=cache) == MEASURED
    assert remembered_or_measured(backend_of(Calls()), cache_path=cache) == MEASURED
    assert measured == ["a.0", "x.0"]
    assert remembered_or_measured(linear_backend("a.2"), anew=True, cache_path=cache) == MEASURED
    assert measured == ["a.0", "x.0", "a.2"]
    assert len(json.loads(cache.read_text())) == 2  # measuring one anew keeps the others
    assert sorted(path.name for path in cache.parent.iterdir()) == ["throughput.json", "throughput.json.lock"]


def test_what_is_returned_is_not_what_is_remembered(cache: Path, measured: list[str]) -> None:
    first = remembered_or_measured(linear_backend(), cache_path=cache)
    with pytest.raises(AttributeError):
        first.compute_rows_per_s = 1.0  # type: ignore[misc]
    assert remembered_or_measured(linear_backend(), cache_path=cache) == first


def test_keys_tell_machines_versions_modules_and_shapes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        key_of(linear_backend()),
        key_of(linear_backend(max_batch_size=7)),
        key_of(backend_of(Calls())),
        key_of(backend_of(nn.Identity())),
        key_of(backend_of(nn.Linear(4, 4))),
        key_of(backend_of(nn.Linear(4, 4).double())),
    }
    monkeypatch.setattr(torch, "__version__", "9.9")
    keys.add(key_of(linear_backend()))
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    keys.add(key_of(linear_backend()))
    assert len(keys) == 8
    assert key_of(linear_backend("one.0")) == key_of(linear_backend("two.7"))


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", '{"%s": 3}', '{"%s": {"compute_rows_per_s": 1}}', '{"%s": {"no": 1}}',
     '{"%s": {"compute_rows_per_s": "1", "network_rows_per_s": 1}}',
     '{"%s": {"compute_rows_per_s": -1, "network_rows_per_s": 1}}',
     '{"%s": {"compute_rows_per_s": NaN, "network_rows_per_s": 1}}',
     '{"%s": {"compute_rows_per_s": Infinity, "network_rows_per_s": 1}}',
     '{"%s": {"compute_rows_per_s": true, "network_rows_per_s": 1}}'],
)  # fmt: skip
def test_a_damaged_file_is_replaced(damage: str, cache: Path, measured: list[str]) -> None:
    cache.parent.mkdir()
    cache.write_text(damage.replace("%s", key_of(linear_backend())))
    assert remembered_or_measured(linear_backend(), cache_path=cache) == MEASURED
    assert len(measured) == 1
    assert remembered_or_measured(linear_backend(), cache_path=cache) == MEASURED
    assert len(measured) == 1


def test_a_place_that_cannot_be_written_is_no_reason_to_fail(
    tmp_path: Path, measured: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert remembered_or_measured(linear_backend(), cache_path=tmp_path / "file" / "throughput.json") == MEASURED
    assert "throughput is not remembered" in caplog.text


def test_one_process_measures_at_a_time(cache: Path, measured: list[str]) -> None:
    """Here: threads, which have a lock each, as processes do. Those that waited find what the first one has measured."""
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: remembered_or_measured(linear_backend(), cache_path=cache), range(4)))
    assert found == [MEASURED] * 4
    assert len(measured) == 1


def test_a_lock_that_is_never_given_back_is_not_waited_for_for_ever(
    cache: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(throughput, "_LOCK_TIMEOUT_S", 0.2)
    cache.parent.mkdir()
    with open(cache.with_name("throughput.json.lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert remembered_or_measured(linear_backend(), cache_path=cache) == MEASURED
    assert "not waiting" in caplog.text


def test_the_file_does_not_grow_for_ever(cache: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_MAX_REMEMBERED", 2)
    for rows in (1, 2, 3):
        remembered_or_measured(linear_backend(max_batch_size=rows), cache_path=cache)
    assert list(json.loads(cache.read_text())) == [key_of(linear_backend(max_batch_size=rows)) for rows in (2, 3)]


def test_servers_measure_unless_told(measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def served(throughput: Any) -> Any:
        parts = assemble(
            block_indices="0:2", hidden_dim=4, throughput=throughput, device="cpu", host_maddrs=["/ip4/127.0.0.1/tcp/0"]
        )
        stop_dht(parts.dht)
        return parts.server_options["throughput"]

    assert [served("auto"), served("auto"), len(measured)] == [MEASURED, MEASURED, 1]
    assert [served("eval"), len(measured)] == [MEASURED, 2]
    assert [served(7.5), served(None), len(measured)] == [7.5, None, 2]

    def fail(backend: ExpertBackend) -> Throughput:
        raise ValueError("no zeros, please")

    monkeypatch.setattr(throughput, "measure", fail)
    assert served("eval") is None  # it is hosted all the same


def test_the_default_place_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert throughput.default_cache_path() == tmp_path / "moe" / "throughput.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert throughput.default_cache_path() == Path("/home/somebody/.cache/moe/throughput.json")
