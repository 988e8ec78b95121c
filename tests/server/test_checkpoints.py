"""Experts on disk: hivemind reads and writes the same files, kills and damage lose nothing, resuming equals going on."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hivemind.moe.server.checkpoints as stock
import pytest
import torch
from hivemind.moe.server.module_backend import ModuleBackend as StockBackend
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from moe.errors import ConfigError, LifecycleError, MoEError
from moe.schema import BatchTensorProto, Compression, ExpertSchema
from moe.server import checkpoints
from moe.server.checkpoints import CheckpointSaver, find_checkpointed_uids, load_experts, store_experts
from moe.server.layers import build_expert, expert_schema, get_linear_schedule_with_warmup
from moe.server.optim import ClippingWrapper

NOON = 1_800_000_000.0  # a time to name checkpoints by
GENEROUS_S = 60.0


class Backend:
    """A small expert with all that a state holds; trains on data that depend on the step only."""

    def __init__(self, uid: str = "ffn.0", hidden_dim: int = 8, compression: int = 0, outputs: Any = None):
        torch.manual_seed(len(uid))
        self.name = uid
        self.module = build_expert("ffn", hidden_dim)
        described = expert_schema("ffn", hidden_dim, compression)
        self.schema = ExpertSchema(described["args_schema"], outputs=outputs or described["args_schema"][0])
        inner = torch.optim.Adam(self.module.parameters())
        self.optimizer = ClippingWrapper(inner, 0.5)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, 2, 100)
        self.updates = 0

    def train(self, steps: int) -> Backend:
        for _ in range(steps):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(self.updates))
            self.module(x).sin().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.updates += 1
        return self

    def state_dict(self) -> dict[str, Any]:
        state = {
            "module": {name: tensor.clone() for name, tensor in self.module.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        return {**state, "moe": {"uid": self.name, "schema": self.schema.to_plain(), "updates": self.updates}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.module.load_state_dict(state_dict["module"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self.updates = state_dict.get("moe", {}).get("updates", -1)


def make_stock_backend(uid: str = "ffn.0", seed: int = 0) -> StockBackend:
    torch.manual_seed(seed)
    module = build_expert("ffn", 8)
    optimizer = torch.optim.Adam(module.parameters())
    return StockBackend(
        name=uid,
        module=module,
        optimizer=optimizer,
        scheduler=get_linear_schedule_with_warmup(optimizer, 2, 100),
        args_schema=(BatchTensorDescriptor(8),),
        max_batch_size=16,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dated(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("checkpoint_*.pt") if path.name != "checkpoint_last.pt")


def weights(backend: Any) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in backend.module.state_dict().values()]


def same(first: Any, second: Any) -> bool:
    """Equality of nested states."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def wait_until(condition: Callable[[], bool], timeout_s: float = GENEROUS_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


# --- the files --------------------------------------------------------------------------------------------------------


def test_layout(tmp_path: Path) -> None:
    experts = {"ffn.0": Backend("ffn.0"), "ffn.1.2": Backend("ffn.1.2")}
    store_experts(experts, tmp_path, now=NOON)
    assert names(tmp_path) == ["ffn.0", "ffn.1.2"]
    for uid in experts:
        (saved,) = dated(tmp_path / uid)
        assert ":" not in saved.name
        assert names(tmp_path / uid) == [saved.name, "checkpoint_last.pt"]
        assert os.path.samefile(saved, tmp_path / uid / "checkpoint_last.pt"), "a link, not a copy"


def test_round_trip_and_path_types(tmp_path: Path) -> None:
    trained, fresh = Backend().train(3), Backend()
    store_experts({"ffn.0": trained}, str(tmp_path))
    assert load_experts({"ffn.0": fresh}, str(tmp_path)) == ["ffn.0"]
    assert same(fresh.state_dict(), trained.state_dict()) and fresh.updates == 3


def test_resuming_equals_uninterrupted_training(tmp_path: Path) -> None:
    uninterrupted, first = Backend().train(10), Backend().train(5)
    store_experts({"ffn.0": first}, tmp_path)
    resumed = Backend()
    load_experts({"ffn.0": resumed}, tmp_path)
    assert same(resumed.train(5).state_dict(), uninterrupted.state_dict())


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    backend, folder = Backend(), tmp_path / "ffn.0"
    folder.mkdir()
    (folder / "checkpoint_best.pt").write_text("the user's own")
    for i in range(5):
        store_experts({"ffn.0": backend.train(1)}, tmp_path, keep_last=2, now=NOON + i)
        assert len(dated(folder)) == min(i + 1, 2) + 1  # and the user's
    kept = [torch.load(path)["moe"]["updates"] for path in dated(folder) if path.name != "checkpoint_best.pt"]
    assert kept == [4, 5] and (folder / "checkpoint_best.pt").exists()
    assert torch.load(folder / "checkpoint_last.pt")["moe"]["updates"] == 5


@pytest.mark.parametrize("step_s", [0.0, -3600.0])
def test_a_clock_that_stands_or_was_set_back(tmp_path: Path, step_s: float) -> None:
    backend = Backend()
    for i in range(4):
        store_experts({"ffn.0": backend.train(1)}, tmp_path, keep_last=3, now=NOON + i * step_s)
    assert [torch.load(path)["moe"]["updates"] for path in dated(tmp_path / "ffn.0")] == [2, 3, 4]


def test_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_link)
    backend, fresh = Backend(), Backend()
    for i in range(3):
        store_experts({"ffn.0": backend.train(1)}, tmp_path, keep_last=2, now=NOON + i)
    assert len(names(tmp_path / "ffn.0")) == 3
    load_experts({"ffn.0": fresh}, tmp_path)
    assert fresh.updates == 3


def test_find_checkpointed_uids(tmp_path: Path) -> None:
    store_experts({uid: Backend(uid) for uid in ("ffn.1", "ffn.0.7")}, tmp_path)
    (tmp_path / "ffn.2").mkdir()
    (tmp_path / "backup").mkdir()
    (tmp_path / "backup" / "checkpoint_last.pt").touch()
    (tmp_path / "ffn.3").write_text("a file")
    assert find_checkpointed_uids(tmp_path) == ["ffn.0.7", "ffn.1"]


def test_bad_directories_and_uids(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "absent", tmp_path / "file"):
        for use in (lambda p: store_experts({}, p), lambda p: load_experts({}, p), find_checkpointed_uids):
            with pytest.raises(ConfigError, match="not an existing directory"):
                use(path)
        with pytest.raises(ConfigError, match="not an existing directory"):
            CheckpointSaver({}, path)
    for uid in ("/tmp/ffn.0", "a/ffn.0", "..", ""):
        with pytest.raises(ConfigError, match="cannot be the name of a directory"):
            store_experts({uid: Backend()}, tmp_path)
    with pytest.raises(ConfigError, match="keep_last"):
        store_experts({}, tmp_path, keep_last=0)


# --- failures while saving --------------------------------------------------------------------------------------------


class Broken(Backend):
    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("no state today")


class Unloadable(Backend):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "extra": Path("weights_only refuses this")}


def test_one_failing_expert_does_not_stop_the_others(tmp_path: Path) -> None:
    experts = {"ffn.0": Broken("ffn.0"), "ffn.1": Unloadable("ffn.1"), "ffn.2": Backend("ffn.2")}
    with pytest.raises(LifecycleError, match=r"ffn\.0: RuntimeError: no state today.*ffn\.1: ") as caught:
        store_experts(experts, tmp_path)
    assert isinstance(caught.value.__cause__, RuntimeError) and "ffn.2" not in str(caught.value)
    assert find_checkpointed_uids(tmp_path) == ["ffn.2"]
    assert names(tmp_path / "ffn.1") == [], "what could not be loaded again never gets a name"


def test_disk_full_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_experts({"ffn.0": Backend().train(1)}, tmp_path)
    before = names(tmp_path / "ffn.0")

    def disk_full(state: Any, file: Any) -> None:
        file.write(b"half of")
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", disk_full)
        with pytest.raises(LifecycleError, match="no space left"):
            store_experts({"ffn.0": Backend().train(2)}, tmp_path)
    assert names(tmp_path / "ffn.0") == before
    fresh = Backend()
    load_experts({"ffn.0": fresh}, tmp_path)
    assert fresh.updates == 1


KILLED_WHILE_SAVING = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from moe.schema import BatchTensorProto, ExpertSchema
from moe.server.checkpoints import UNFINISHED_PREFIX, CheckpointSaver, load_experts, store_experts

class Counter:
    name, schema, count = "expert.0", ExpertSchema((BatchTensorProto(1),)), 0
    def state_dict(self):
        return {"module": torch.full((200_000,), self.count), "count": self.count}
    def load_state_dict(self, state):
        assert bool((state["module"] == state["count"]).all()), "torn"
        self.count = state["count"]

torch.set_num_threads(1)
directory, kills = Path(sys.argv[1]), int(sys.argv[2])
rng, acknowledged = random.Random(0), 0
for kill in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        expert = Counter()
        if kill:
            assert load_experts({"expert.0": expert}, directory) == ["expert.0"]
        while True:
            expert.count += 1
            store_experts({"expert.0": expert}, directory, keep_last=2)
            os.write(writer, b"s")
    os.close(writer)
    for _ in range(rng.randint(2, 6)):
        assert os.read(reader, 1) == b"s", "the child could not resume"
        acknowledged += 1
    time.sleep(rng.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while os.read(reader, 1):
        acknowledged += 1
    os.close(reader)
    expert = Counter()
    assert load_experts({"expert.0": expert}, directory) == ["expert.0"]
    assert expert.count >= acknowledged, f"{expert.count} restored, {acknowledged} saved"
    acknowledged = expert.count
    files = list((directory / "expert.0").glob("checkpoint_*"))
    assert len(files) <= 4  # two, one not pruned yet, last
    for file in files:
        torch.load(file, weights_only=True)  # none of them is half written: loading never had to fall back
saver = CheckpointSaver({"expert.0": expert}, directory, keep_last=2)
saver.start()
saver.stop()
assert sorted(path.name.startswith("checkpoint_") for path in (directory / "expert.0").iterdir()) == [True] * 3
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), "8"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=5 * GENEROUS_S, check=False)
    assert ran.returncode == 0, ran.stderr


# --- loading damaged, foreign and hostile files -----------------------------------------------------------------------


@pytest.fixture
def three_saved(tmp_path: Path) -> list[Path]:
    """Three checkpoints of ffn.0, oldest first, after 1, 2 and 3 updates."""
    backend = Backend()
    for i in range(3):
        store_experts({"ffn.0": backend.train(1)}, tmp_path, now=NOON + i)
    return dated(tmp_path / "ffn.0")


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "garbage": b"garbage"}[how])


@pytest.mark.parametrize("how", ["empty", "truncated", "garbage"])
def test_damaged_newest_gives_way(
    tmp_path: Path, three_saved: list[Path], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(three_saved[-1], how)  # and with it checkpoint_last.pt
    backend = Backend()
    with caplog.at_level(logging.WARNING):
        assert load_experts({"ffn.0": backend}, tmp_path) == ["ffn.0"]
    assert backend.updates == 2
    assert len(caplog.records) == 1, "each damaged file is tried once"
    assert str(tmp_path / "ffn.0" / "checkpoint_last.pt") in caplog.text
    store_experts({"ffn.0": backend.train(2)}, tmp_path)
    load_experts({"ffn.0": backend}, tmp_path)
    assert backend.updates == 4


def test_missing_last_and_restored_last(tmp_path: Path, three_saved: list[Path]) -> None:
    last, backend = tmp_path / "ffn.0" / "checkpoint_last.pt", Backend()
    last.unlink()
    assert find_checkpointed_uids(tmp_path) == ["ffn.0"]
    load_experts({"ffn.0": backend}, tmp_path)
    assert backend.updates == 3
    last.symlink_to(three_saved[0].name)  # a user goes back in time
    load_experts({"ffn.0": backend}, tmp_path)
    assert backend.updates == 1


def test_nothing_loadable(tmp_path: Path, three_saved: list[Path]) -> None:
    for path in three_saved:
        damage(path, "truncated")
    before = (backend := Backend()).state_dict()
    with pytest.raises(LifecycleError) as caught:
        load_experts({"ffn.0": backend}, tmp_path)
    assert all(str(path) in str(caught.value) for path in three_saved[:-1])
    assert "checkpoint_last.pt" in str(caught.value) and "ffn.0" in str(caught.value)
    assert same(backend.state_dict(), before)


def test_no_checkpoint_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store_experts({"ffn.1": Backend("ffn.1").train(1)}, tmp_path)
    backends = {"ffn.0": Backend("ffn.0"), "ffn.1": Backend("ffn.1")}
    assert load_experts(backends, tmp_path) == ["ffn.1"]
    assert "Failed to load checkpoint for expert ffn.0" in caplog.text
    assert backends["ffn.0"].updates == 0 and backends["ffn.1"].updates == 1


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, three_saved: list[Path], zipped: bool) -> None:
    marker, last = tmp_path / "executed", tmp_path / "ffn.0" / "checkpoint_last.pt"
    last.unlink()
    torch.save({"module": Malicious(marker)}, last, _use_new_zipfile_serialization=zipped)
    torch.load(last, weights_only=False)
    assert marker.exists(), "the bait works"
    marker.unlink()
    backend = Backend()
    load_experts({"ffn.0": backend}, tmp_path)
    assert backend.updates == 3
    for path in three_saved:
        path.unlink()
    with pytest.raises(LifecycleError):
        load_experts({"ffn.0": backend}, tmp_path)
    assert not marker.exists()


def test_state_of_another_expert(tmp_path: Path, three_saved: list[Path]) -> None:
    three_saved[0].parent.rename(tmp_path / "ffn.9")
    with pytest.raises(ConfigError, match=r"checkpoint_last\.pt is of expert ffn\.0, not of ffn\.9"):
        load_experts({"ffn.9": Backend("ffn.9")}, tmp_path)


def test_state_of_another_schema(tmp_path: Path, three_saved: list[Path]) -> None:
    wider = Backend(hidden_dim=16)
    with pytest.raises(ConfigError, match=r"another schema.*float32\(batch, 8\).*float32\(batch, 16\)"):
        load_experts({"ffn.0": wider}, tmp_path)
    with pytest.raises(ConfigError, match="another schema"):
        load_experts({"ffn.0": Backend(outputs=BatchTensorProto(9))}, tmp_path)
    compressed = Backend(compression=Compression.FLOAT16)
    assert load_experts({"ffn.0": compressed}, tmp_path) == ["ffn.0"], "codecs may change"


@pytest.mark.parametrize("description", [{}, [], 3, {"uid": "ffn.0", "schema": {"args": 3}}, {"uid": "ffn.0"}])
def test_state_with_a_malformed_description(tmp_path: Path, description: Any) -> None:
    (tmp_path / "ffn.0").mkdir()
    path = tmp_path / "ffn.0" / "checkpoint_last.pt"
    torch.save({**Backend().state_dict(), "moe": description}, path)
    with pytest.raises(ConfigError, match=r"checkpoint_last\.pt does not say properly whose"):
        load_experts({"ffn.0": Backend()}, tmp_path)


def test_state_of_another_module(tmp_path: Path) -> None:
    stock.store_experts({"ffn.0": make_stock_backend()}, tmp_path)  # has no description
    with pytest.raises(ConfigError, match=r"checkpoint_last\.pt does not fit expert ffn\.0: RuntimeError"):
        load_experts({"ffn.0": Backend(hidden_dim=16)}, tmp_path)


def test_a_file_that_is_no_state_gives_way(tmp_path: Path, three_saved: list[Path]) -> None:
    last = tmp_path / "ffn.0" / "checkpoint_last.pt"
    last.unlink()
    backend = Backend()
    for foreign in ({"weights": torch.zeros(1)}, torch.zeros(1)):
        torch.save(foreign, last)
        load_experts({"ffn.0": backend}, tmp_path)
        assert backend.updates == 3


# --- hivemind ---------------------------------------------------------------------------------------------------------


def test_stock_hivemind_loads_ours(tmp_path: Path) -> None:
    ours = Backend().train(5)
    store_experts({"ffn.0": ours}, tmp_path)
    theirs = make_stock_backend()
    stock.load_experts({"ffn.0": theirs}, tmp_path)
    state = ours.state_dict()
    assert same(weights(theirs), weights(ours))
    assert same(theirs.optimizer.state_dict(), state["optimizer"])
    assert same(theirs.scheduler.state_dict(), state["scheduler"])


def test_we_load_stock_hiveminds(tmp_path: Path) -> None:
    theirs = make_stock_backend(seed=7)
    for _ in range(3):
        theirs.backward(torch.randn(2, 8), torch.randn(2, 8))
    stock.store_experts({"ffn.0": theirs}, tmp_path)
    assert find_checkpointed_uids(tmp_path) == ["ffn.0"]
    ours = Backend()
    assert load_experts({"ffn.0": ours}, tmp_path) == ["ffn.0"]
    assert same(weights(ours), weights(theirs))
    assert same(ours.optimizer.state_dict(), theirs.optimizer.state_dict())
    assert same(ours.scheduler.state_dict(), theirs.scheduler.state_dict())


def test_taking_turns_with_stock_hivemind(tmp_path: Path) -> None:
    ours, theirs, fresh = Backend(), make_stock_backend(), Backend()
    for turn in range(3):
        theirs.backward(torch.randn(2, 8), torch.randn(2, 8))
        stock.store_experts({"ffn.0": theirs}, tmp_path)
        load_experts({"ffn.0": fresh}, tmp_path)
        assert same(weights(fresh), weights(theirs))
        store_experts({"ffn.0": ours.train(1)}, tmp_path, keep_last=2)
        load_experts({"ffn.0": fresh}, tmp_path)
        assert same(weights(fresh), weights(ours)) and fresh.updates == turn + 1
        stock.load_experts({"ffn.0": theirs}, tmp_path)
        assert same(weights(theirs), weights(ours))
    assert len(dated(tmp_path / "ffn.0")) == 2


# --- the saver --------------------------------------------------------------------------------------------------------


def updates_saved(directory: Path, uid: str = "ffn.0") -> int:
    return int(torch.load(directory / uid / "checkpoint_last.pt")["moe"]["updates"])


def test_saver_saves_new_experts_at_once_and_all_at_the_end(tmp_path: Path) -> None:
    experts = {"ffn.0": Backend("ffn.0").train(1), "ffn.1": Backend("ffn.1").train(1)}
    store_experts({"ffn.0": experts["ffn.0"]}, tmp_path)
    (tmp_path / "ffn.0" / f"{checkpoints.UNFINISHED_PREFIX}of_a_killed_save").touch()
    saver = CheckpointSaver(experts, tmp_path, period_s=3600)
    saver.start()
    wait_until(lambda: saver.statistics().saves == 1)
    assert find_checkpointed_uids(tmp_path) == ["ffn.0", "ffn.1"]
    assert len(names(tmp_path / "ffn.0")) == len(names(tmp_path / "ffn.1")) == 2, (
        "leftover removed, nothing saved twice"
    )
    for expert in experts.values():
        expert.train(1)
    saver.stop(GENEROUS_S)
    assert [updates_saved(tmp_path, uid) for uid in experts] == [2, 2]
    statistics = saver.statistics()
    assert statistics.saves == 2 and statistics.failures == 0 and saver.last_error is None
    assert statistics.last_saved_at is not None and abs(statistics.last_saved_at - time.time()) < 3600
    assert statistics.last_duration_s is not None and "stopped" in repr(saver)


def test_saver_saves_periodically(tmp_path: Path) -> None:
    saver = CheckpointSaver({"ffn.0": Backend()}, tmp_path, period_s=0.01, keep_last=2)
    saver.start()
    wait_until(lambda: saver.statistics().saves >= 4)
    saver.stop(GENEROUS_S, save=False)
    assert len(dated(tmp_path / "ffn.0")) == 2


def test_saver_survives_failed_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = CheckpointSaver({"ffn.0": Backend()}, tmp_path, period_s=0.01)
    with monkeypatch.context() as patch:

        def disk_full(*args: object) -> None:
            raise OSError(errno.ENOSPC, "no space left on device")

        patch.setattr(os, "fsync", disk_full)
        saver.start()
        wait_until(lambda: saver.statistics().failures >= 2)
        assert isinstance(saver.last_error, MoEError) and "no space left" in str(saver.last_error)
        assert saver.statistics().saves == 0
    wait_until(lambda: saver.statistics().saves >= 1)
    saver.stop(GENEROUS_S)
    assert saver.last_error is None and find_checkpointed_uids(tmp_path) == ["ffn.0"]


def test_stop_without_saving(tmp_path: Path) -> None:
    backend = Backend()
    saver = CheckpointSaver({"ffn.0": backend}, tmp_path, period_s=3600)
    saver.start()
    wait_until(lambda: saver.statistics().saves == 1)
    backend.train(1)
    saver.stop(GENEROUS_S, save=False)
    saver.stop(GENEROUS_S, save=False)
    assert updates_saved(tmp_path) == 0


def test_stop_does_not_wait_for_a_save_in_progress_to_go_through_all_experts(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Backend):
        def state_dict(self) -> dict[str, Any]:
            begun.set()
            assert go_on.wait(GENEROUS_S)
            return super().state_dict()

    experts = {"ffn.0": Slow("ffn.0"), "ffn.1": Backend("ffn.1")}
    saver = CheckpointSaver(experts, tmp_path, period_s=3600)
    saver.start()
    assert begun.wait(GENEROUS_S)
    with pytest.raises(LifecycleError, match=r"saving.*did not stop within 0\.01 s"):
        saver.stop(0.01, save=False)
    go_on.set()
    saver.stop(GENEROUS_S, save=False)
    assert find_checkpointed_uids(tmp_path) == ["ffn.0"] and saver.statistics().saves == 0


def test_saver_lifecycle(tmp_path: Path) -> None:
    before = threading.active_count()
    saver = CheckpointSaver({"ffn.0": Backend()}, tmp_path)
    saver.stop()
    assert names(tmp_path) == []
    with pytest.raises(LifecycleError, match="only once"):
        saver.start()
    saver = CheckpointSaver({"ffn.0": Backend()}, tmp_path)
    assert "new" in repr(saver)
    saver.start()
    with pytest.raises(LifecycleError, match="only once"):
        saver.start()
    saver.stop(GENEROUS_S)
    assert threading.active_count() == before
    for numbers in ({"period_s": 0}, {"period_s": -1.0}, {"keep_last": 0}):
        with pytest.raises(ConfigError, match=next(iter(numbers))):
            CheckpointSaver({}, tmp_path, **numbers)


def test_saver_finds_out_at_start_that_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "ffn.0").touch()  # in the way; permissions would not stop root
    saver = CheckpointSaver({"ffn.0": Backend()}, tmp_path)
    with pytest.raises(ConfigError, match=r"cannot write in .*ffn\.0"):
        saver.start()


# --- what is not finite -----------------------------------------------------------------------------------------------


def poison_parameter(backend: Backend) -> None:
    next(backend.module.parameters()).data.view(-1)[3] = float("nan")


def poison_with_infinity(backend: Backend) -> None:
    next(backend.module.parameters()).data.view(-1)[0] = -float("inf")


def poison_optimizer(backend: Backend) -> None:
    next(iter(backend.optimizer.state.values()))["exp_avg_sq"].view(-1)[-1] = float("inf")


poisons = pytest.mark.parametrize("poison", [poison_parameter, poison_with_infinity, poison_optimizer])


def finite(path: Path) -> bool:
    state = torch.load(path)
    return bool(state["moe"]["finite"]) and checkpoints._non_finite_tensor(state, Backend()) is None


@poisons
def test_the_last_finite_checkpoint_is_kept_and_loaded(
    tmp_path: Path, poison: Callable[[Backend], None], caplog: pytest.LogCaptureFixture
) -> None:
    backend, folder = Backend().train(1), tmp_path / "ffn.0"
    for i in range(4):
        store_experts({"ffn.0": backend.train(1)}, tmp_path, keep_last=2, now=NOON + i)
    poison(backend)
    for i in range(4, 9):
        backend.updates += 1
        store_experts({"ffn.0": backend}, tmp_path, keep_last=2, now=NOON + i)
        assert [finite(path) for path in dated(folder)] == [True, *[False] * min(i - 3, 2)]
        assert updates_saved(tmp_path) == 5
    assert "is not finite any more" in caplog.text
    fresh, theirs = Backend(), make_stock_backend()
    assert load_experts({"ffn.0": fresh}, tmp_path) == ["ffn.0"] and fresh.updates == 5
    stock.load_experts({"ffn.0": theirs}, tmp_path)  # hivemind loads the last one, which is finite
    assert all(tensor.isfinite().all() for tensor in weights(theirs))
    store_experts({"ffn.0": fresh.train(1)}, tmp_path, keep_last=2, now=NOON + 20)
    assert updates_saved(tmp_path) == 6 and len(dated(folder)) == 2


@poisons
def test_a_restart_passes_over_what_is_not_finite(tmp_path: Path, poison: Callable[[Backend], None]) -> None:
    """Also if somebody else has called it the last one, or there is none that is called so."""
    backend, last = Backend(), tmp_path / "ffn.0" / "checkpoint_last.pt"
    store_experts({"ffn.0": backend.train(2)}, tmp_path, now=NOON)
    poison(backend.train(1))
    store_experts({"ffn.0": backend}, tmp_path, now=NOON + 1)
    for prepare in (last.unlink, lambda: os.link(dated(last.parent)[-1], last)):
        prepare()
        assert load_experts({"ffn.0": (fresh := Backend())}, tmp_path) == ["ffn.0"]
        assert fresh.updates == 2


def test_if_none_is_finite_the_last_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = Backend()
    poison_parameter(backend)
    for i in range(4):
        backend.updates = i
        store_experts({"ffn.0": backend}, tmp_path, keep_last=2, now=NOON + i)
    assert len(dated(tmp_path / "ffn.0")) == 2 and updates_saved(tmp_path) == 3
    load_experts({"ffn.0": (fresh := Backend())}, tmp_path)
    assert fresh.updates == 3 and "none of its checkpoints is finite" in caplog.text


def test_checkpoints_of_hivemind_count_as_what_they_are(tmp_path: Path) -> None:
    """They do not say whether they are finite."""
    theirs, ours = make_stock_backend(), Backend()
    stock.store_experts({"ffn.0": theirs}, tmp_path)
    poison_parameter(ours)
    for i in range(3):
        store_experts({"ffn.0": ours}, tmp_path, keep_last=1, now=NOON + 1e9 + i)
    assert len(dated(tmp_path / "ffn.0")) == 2
    load_experts({"ffn.0": (fresh := Backend())}, tmp_path)
    assert same(weights(fresh), weights(theirs))


class Masked(torch.nn.Module):
    """With an infinity that is meant to be there."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2, dtype=dtype)
        self.register_buffer("mask", torch.full((2, 2), float("-inf"), dtype=dtype).triu(1))
        self.register_buffer("running", torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_infinities_of_buffers_do_not_count_but_what_is_no_number_does(dtype: torch.dtype) -> None:
    expert: Any = type("Expert", (), {"module": Masked(dtype)})()

    def problem() -> str | None:
        extras = {"optimizer": {"state": {0: {"step": torch.tensor(3), "empty": torch.empty(0, dtype=dtype)}}}}
        return checkpoints._non_finite_tensor({"module": expert.module.state_dict(), **extras, "moe": {}}, expert)

    assert problem() is None
    expert.module.running[1] = float("nan")
    assert problem() == "module.running"
    expert.module.running[1] = 0.0
    expert.module.linear.bias.data[0] = float("inf")
    assert problem() == "module.linear.bias"


# --- the last save ----------------------------------------------------------------------------------------------------


class Recorded(Backend):
    """Says when it is saved; may take its time."""

    saved: list[str]
    go_on: threading.Event | None = None

    def state_dict(self) -> dict[str, Any]:
        self.saved.append(self.name)
        if self.go_on is not None:
            assert self.go_on.wait(GENEROUS_S)
        return super().state_dict()


def recorded(*uids: str) -> tuple[dict[str, Recorded], list[str]]:
    experts, saved = {uid: Recorded(uid) for uid in uids}, list[str]()
    for expert in experts.values():
        expert.saved = saved
    return experts, saved


def test_those_that_would_lose_most_are_saved_first_and_one_that_is_busy_last(tmp_path: Path) -> None:
    experts, saved = recorded("ffn.0", "ffn.1", "ffn.2", "ffn.3")
    saver = CheckpointSaver(experts, tmp_path, period_s=3600)
    saver.start()
    wait_until(lambda: saver.statistics().saves == 1)
    saved.clear()
    experts["ffn.1"].train(1)
    experts["ffn.2"].train(3)
    experts["ffn.3"].train(5)
    lock = experts["ffn.3"].step_lock = threading.RLock()  # type: ignore[attr-defined]
    with lock:  # a batch runs
        saver.begin_stop()
        wait_until(lambda: len(saved) == 4)
    saver.stop(GENEROUS_S)
    assert saved == ["ffn.2", "ffn.1", "ffn.0", "ffn.3"]
    assert saver.lost == {}


def test_those_that_would_lose_all_are_saved_before_those_that_would_lose_much(tmp_path: Path) -> None:
    experts, saved = recorded("ffn.0", "ffn.1", "ffn.2")
    store_experts({"ffn.0": experts["ffn.0"]}, tmp_path)
    saver = CheckpointSaver(experts, tmp_path, period_s=3600)
    experts["ffn.0"].train(5)
    experts["ffn.1"].train(2)
    saved.clear()
    saver._store(experts)  # as at the end, before the first save of those without a checkpoint was done
    assert saved == ["ffn.1", "ffn.0", "ffn.2"]  # ffn.2 has learned nothing


def test_when_the_time_is_over_it_is_said_what_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    experts, _ = recorded("ffn.0", "ffn.1", "ffn.2")
    saver = CheckpointSaver(experts, tmp_path, period_s=3600)
    saver.start()
    wait_until(lambda: saver.statistics().saves == 1)
    experts["ffn.0"].train(2)
    experts["ffn.1"].train(1)
    experts["ffn.1"].go_on = threading.Event()
    saver.begin_stop()
    wait_until(lambda: updates_saved(tmp_path, "ffn.0") == 2)
    with pytest.raises(LifecycleError, match=r"did not stop within 0\.01 s"):
        saver.stop(0.01)
    assert saver.lost == {"ffn.1": 1}  # ffn.2 has learned nothing
    assert "ffn.1 (1 updates)" in caplog.text and saver.is_alive
    experts["ffn.1"].go_on.set()
    saver.stop(GENEROUS_S)
    assert saver.lost == {} and updates_saved(tmp_path, "ffn.1") == 1 and not saver.is_alive


def test_what_cannot_be_written_at_the_end_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    experts = {"ffn.0": Backend("ffn.0"), "ffn.1": Backend("ffn.1")}
    saver = CheckpointSaver(experts, tmp_path, period_s=3600)
    saver.start()
    wait_until(lambda: saver.statistics().saves == 1)
    for expert in experts.values():
        expert.train(4)
    shutil.rmtree(tmp_path / "ffn.1")
    (tmp_path / "ffn.1").touch()
    saver.stop(GENEROUS_S)
    assert saver.lost == {"ffn.1": 4} and updates_saved(tmp_path, "ffn.0") == 4
    assert "ffn.1 (4 updates)" in caplog.text
    saver = CheckpointSaver({"ffn.0": experts["ffn.0"]}, tmp_path, period_s=3600)
    saver.start()
    experts["ffn.0"].train(1)
    shutil.rmtree(tmp_path)
    saver.stop(GENEROUS_S)
    assert saver.lost == {"ffn.0": 1}


def test_experts_that_are_left_out_are_saved_until_nothing_of_them_can_be_lost(tmp_path: Path) -> None:
    experts = {"ffn.0": Backend("ffn.0"), "ffn.1": Backend("ffn.1"), "ffn.2": Backend("ffn.2")}
    saver = CheckpointSaver(experts, tmp_path, period_s=3600)
    saver.start()
    wait_until(lambda: saver.statistics().saves == 1)
    experts["ffn.1"].train(2)
    experts["ffn.2"].train(3)
    saver.experts = {"ffn.0": experts["ffn.0"]}
    (tmp_path / "ffn.1" / "checkpoint_last.pt").unlink()
    saver.save_leaving({"ffn.1": experts["ffn.1"]})
    assert updates_saved(tmp_path, "ffn.1") == 2 and updates_saved(tmp_path, "ffn.2") == 0
    saver.stop(GENEROUS_S)
    assert updates_saved(tmp_path, "ffn.2") == 3
    assert not saver._leaving and list(saver._saved) == ["ffn.0"]
