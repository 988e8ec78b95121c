"""Experts on disk. Owns: where checkpoints lie, how they are written so that a kill at any moment loses nothing that was
saved before, how many are kept, and which one is loaded. Must not know: what is in a state, or when a batch runs.

A directory per expert uid, in it ``checkpoint_<time of the save>.pt`` and ``checkpoint_last.pt``, a link to the newest:
hivemind's layout, so that either package finds and loads what the other one saved. A file appears under its name only when
it is complete, on disk, and known to load with ``weights_only``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from moe.config import check_positive
from moe.errors import ConfigError, LifecycleError, MoEError, ProtocolError
from moe.expert_uid import ExpertUID, is_valid_uid
from moe.schema import Compression, ExpertSchema

logger = logging.getLogger(__name__)

PREFIX, SUFFIX = "checkpoint_", ".pt"
LAST = f"{PREFIX}last{SUFFIX}"
UNFINISHED_PREFIX = ".unfinished_"
TIME_FORMAT = "%Y-%m-%d_%H-%M-%S.%f"  # local time, as hivemind's, but without the colons that some file systems refuse


class Checkpointable(Protocol):
    """What checkpoints need of an ExpertBackend.

    A state may hold, under the key ``moe``, the ``uid`` and the plain ``schema`` of the expert it was taken from; they
    are compared when it is loaded. hivemind's states have no such key.
    """

    @property
    def name(self) -> str:
        """The uid."""

    @property
    def schema(self) -> ExpertSchema:
        """What the expert takes and returns."""

    def state_dict(self) -> dict[str, Any]:
        """A snapshot that nobody changes afterwards."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Go back to a snapshot."""


Experts = Mapping[ExpertUID, Checkpointable]


# --- saving ---------------------------------------------------------------------------------------------------------


def store_experts(
    experts: Experts,
    checkpoint_dir: str | os.PathLike[str],
    keep_last: int = 3,
    now: float | None = None,
    *,
    interrupted: Callable[[], bool] = lambda: False,
) -> None:
    """Save every expert, and delete all but its newest checkpoints (hivemind's included).

    If one expert cannot be saved, the others still are.

    :param experts: uid -> backend
    :param checkpoint_dir: an existing directory
    :param keep_last: how many checkpoints of each expert to keep
    :param now: time to name the checkpoints by, in seconds since the epoch; the clock's unless told
    :param interrupted: asked before each expert; True leaves out the rest
    :raises ConfigError: no such directory, a uid that cannot name a directory, or nothing to keep
    :raises LifecycleError: if some experts could not be saved, naming them
    """
    if keep_last < 1:
        raise ConfigError(f"keep_last: expected at least 1, got {keep_last}")
    folders = _folders(experts, checkpoint_dir)
    saved_at = datetime.fromtimestamp(time.time() if now is None else now)
    failures: dict[ExpertUID, Exception] = {}
    for uid, folder in folders.items():
        if interrupted():
            break
        try:
            _store(experts[uid].state_dict(), folder, keep_last, saved_at)
        except Exception as e:  # whatever one expert's code or its directory does, the others are saved
            logger.debug("could not save %s", uid, exc_info=True)
            failures[uid] = e
    if failures:
        reasons = "; ".join(f"{uid}: {type(e).__name__}: {e}" for uid, e in failures.items())
        raise LifecycleError(f"could not save {reasons}") from next(iter(failures.values()))


def _store(state: dict[str, Any], folder: Path, keep_last: int, saved_at: datetime) -> None:
    if not folder.is_dir():
        folder.mkdir()
        _sync_directory(folder.parent)
    earlier = _saved(folder)
    if earlier:  # a clock that was set back must not make the newest checkpoint look old
        saved_at = max(saved_at, earlier[0][0] + timedelta(microseconds=1))
    path = folder / f"{PREFIX}{saved_at.strftime(TIME_FORMAT)}{SUFFIX}"
    with _appears_complete(path) as file:
        torch.save(state, file)
    _point_last_to(path)
    _sync_directory(folder)
    for _, old in _saved(folder)[keep_last:]:
        old.unlink(missing_ok=True)


@contextlib.contextmanager
def _appears_complete(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name, in place of any other, only once it is on disk and can be loaded."""
    unfinished = path.with_name(f"{UNFINISHED_PREFIX}{uuid.uuid4().hex}")
    try:
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mmap: looks at the structure without reading the tensors; refuses objects that we would refuse to load
        torch.load(str(unfinished), map_location="cpu", weights_only=True, mmap=True)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _point_last_to(path: Path) -> None:
    last, link = path.with_name(LAST), path.with_name(f"{UNFINISHED_PREFIX}{uuid.uuid4().hex}")
    try:
        os.link(path, link)
        os.replace(link, last)
    except OSError:  # a file system without hard links
        link.unlink(missing_ok=True)
        with open(path, "rb") as source, _appears_complete(last) as file:
            shutil.copyfileobj(source, file)


def _sync_directory(directory: Path) -> None:
    """Make new names in a directory survive a power cut."""
    with contextlib.suppress(OSError):  # some network file systems refuse; the files themselves are on disk
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- loading --------------------------------------------------------------------------------------------------------


def load_experts(experts: Experts, checkpoint_dir: str | os.PathLike[str]) -> list[ExpertUID]:
    """Load the newest checkpoint of every expert, ours or hivemind's; a damaged one gives way to the one before it.

    Nothing in a checkpoint is executed. An expert without checkpoints stays as it is, with a warning.

    :param experts: uid -> backend
    :param checkpoint_dir: an existing directory
    :returns: uids of the experts that were loaded
    :raises ConfigError: no such directory, or a checkpoint of another expert, of another schema, or of another module
    :raises LifecycleError: an expert has checkpoints and none of them can be read
    """
    loaded = []
    for uid, folder in _folders(experts, checkpoint_dir).items():
        paths = _candidates(folder)
        if not paths:
            logger.warning("Failed to load checkpoint for expert %s: there is none in %s", uid, folder)
            continue
        path, state = _read_first(uid, paths)
        _check_identity(state.get("moe"), experts[uid], path)
        try:
            experts[uid].load_state_dict(state)
        except MoEError:
            raise
        except Exception as e:  # torch reports a wrong state in many ways
            raise ConfigError(f"{path} does not fit expert {uid}: {type(e).__name__}: {e}") from e
        loaded.append(uid)
    return loaded


def find_checkpointed_uids(checkpoint_dir: str | os.PathLike[str]) -> list[ExpertUID]:
    """Uids of the experts that have a checkpoint there, sorted.

    :raises ConfigError: no such directory
    """
    folders = (child for child in _existing_directory(checkpoint_dir).iterdir() if is_valid_uid(child.name))
    return sorted(folder.name for folder in folders if _candidates(folder))


def _read_first(uid: ExpertUID, paths: list[Path]) -> tuple[Path, dict[str, Any]]:
    """The first checkpoint that can be read."""
    for path in paths:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or "module" not in state:
                raise ValueError("it does not hold the state of an expert")
            return path, state
        except Exception as e:  # a damaged file makes torch raise nearly anything
            reason = str(e).partition("\n")[0]
            logger.warning("expert %s: cannot load checkpoint %s: %s: %s", uid, path, type(e).__name__, reason)
            logger.debug("could not load %s", path, exc_info=True)
    raise LifecycleError(f"none of these checkpoints can be loaded: {', '.join(map(str, paths))}", uid=uid)


def _check_identity(description: Any, expert: Checkpointable, path: Path) -> None:
    if description is None:  # hivemind's
        return
    try:
        uid, schema = description["uid"], ExpertSchema.from_plain(description["schema"])
    except (KeyError, TypeError, ProtocolError) as e:
        raise ConfigError(f"{path} does not say properly whose state it is: {type(e).__name__}: {e}") from e
    if uid != expert.name:
        raise ConfigError(f"{path} is of expert {uid}, not of {expert.name}")
    # how tensors are compressed on their way is no part of what was learned: a server may change it
    if schema.with_compression(Compression.NONE) != expert.schema.with_compression(Compression.NONE):
        raise ConfigError(f"{path} is of an expert with another schema: {schema}, while {uid} has {expert.schema}")


# --- the files of one expert ----------------------------------------------------------------------------------------


def _existing_directory(checkpoint_dir: str | os.PathLike[str]) -> Path:
    directory = Path(checkpoint_dir)
    if not directory.is_dir():
        raise ConfigError(f"checkpoint_dir: {directory} is not an existing directory")
    return directory


def _folders(experts: Experts, checkpoint_dir: str | os.PathLike[str]) -> dict[ExpertUID, Path]:
    directory = _existing_directory(checkpoint_dir)
    for uid in experts:
        if uid in ("", "..") or Path(uid).name != uid:  # would lead out of the checkpoint directory
            raise ConfigError(f"expert {uid!r} cannot be saved: its uid cannot be the name of a directory")
    return {uid: directory / uid for uid in experts}


def _saved(folder: Path) -> list[tuple[datetime, Path]]:
    """Checkpoints by the time in their names, newest first. Other files are the user's."""
    dated = [(_time_in(path), path) for path in folder.glob(f"{PREFIX}*{SUFFIX}")]
    return sorted(((when, path) for when, path in dated if when is not None), reverse=True)


def _time_in(path: Path) -> datetime | None:
    text = path.stem[len(PREFIX) :].replace(":", "-")  # hivemind's have colons, and no fraction if it is zero
    for time_format in (TIME_FORMAT, TIME_FORMAT.removesuffix(".%f")):
        with contextlib.suppress(ValueError):
            return datetime.strptime(text, time_format)
    return None


def _candidates(folder: Path) -> list[Path]:
    """What to try loading, in order: the one called last, then from new to old, each file once."""
    by_file: dict[tuple[int, int], Path] = {}
    for path in (folder / LAST, *(path for _, path in _saved(folder))):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = path.stat()
            by_file.setdefault((found.st_dev, found.st_ino), path)
    return list(by_file.values())


# --- saving now and then ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointStatistics:
    """What a CheckpointSaver did so far.

    :ivar saves: rounds in which every expert that was due was saved
    :ivar failures: rounds in which some expert could not be saved
    :ivar last_saved_at: end of the last good round, in seconds since the epoch; None: there was none
    :ivar last_duration_s: how long that round took
    """

    saves: int = 0
    failures: int = 0
    last_saved_at: float | None = None
    last_duration_s: float | None = None


class CheckpointSaver:
    """Saves experts periodically, in a thread of its own, and once more when stopped.

    A save that fails is logged and tried again after the next period; it never ends the thread.

    :param experts: uid -> backend; assign another mapping to ``experts`` when some come or go
    :param checkpoint_dir: an existing directory
    :param period_s: from the end of one save to the beginning of the next
    :param keep_last: how many checkpoints of each expert to keep
    :ivar last_error: why the last save failed; None if it did not
    :raises ConfigError: no such directory, or a number that makes no sense
    """

    def __init__(
        self, experts: Experts, checkpoint_dir: str | os.PathLike[str], period_s: float = 60.0, keep_last: int = 3
    ):
        self.experts, self.checkpoint_dir = experts, _existing_directory(checkpoint_dir)
        self.period_s, self.keep_last = period_s, keep_last
        check_positive(self, "period_s", "keep_last", allow_none=False)
        self.last_error: Exception | None = None
        self._statistics = CheckpointStatistics()
        self._stopping, self._save_at_stop = threading.Event(), False
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        state = "new" if self._thread is None else "saving" if self._thread.is_alive() else "stopped"
        return (
            f"CheckpointSaver({len(self.experts)} experts, {str(self.checkpoint_dir)!r}, {state}, {self._statistics})"
        )

    def statistics(self) -> CheckpointStatistics:
        """What was done so far."""
        return self._statistics

    def start(self) -> None:
        """Make sure that the directory can be written, remove what killed saves left behind, and begin.

        Experts without any checkpoint are saved right away, so that a restart finds their uids.

        :raises LifecycleError: if it was started or stopped before
        :raises ConfigError: if the directory cannot be written
        """
        if self._thread is not None or self._stopping.is_set():
            raise LifecycleError(f"{self!r} can be started only once")
        try:
            for folder in _folders(self.experts, self.checkpoint_dir).values():
                folder.mkdir(exist_ok=True)
                for leftover in folder.glob(f"{UNFINISHED_PREFIX}*"):
                    leftover.unlink(missing_ok=True)
                probe = folder / f"{UNFINISHED_PREFIX}{uuid.uuid4().hex}"
                probe.touch(exist_ok=False)
                probe.unlink()
        except OSError as e:
            raise ConfigError(f"checkpoint_dir: cannot write in {self.checkpoint_dir}: {e}") from e
        # daemon: a save that hangs on a broken disk must not keep the process alive; a kill never harms what is saved
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float | None = None, save: bool = True) -> None:
        """End the thread. May be called again, and before start. A failure to save is logged, not raised.

        :param timeout_s: longest wait; None: as long as it takes
        :param save: save every expert once more
        :raises LifecycleError: if it is still saving after timeout_s
        """
        self._save_at_stop = save
        self._stopping.set()
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise LifecycleError(f"{self!r} did not stop within {timeout_s} s")

    def _run(self) -> None:
        new = {uid: expert for uid, expert in self.experts.items() if not _candidates(self.checkpoint_dir / uid)}
        if new:
            self._save(new, interrupted=self._stopping.is_set)
        while not self._stopping.wait(self.period_s):
            self._save(self.experts, interrupted=self._stopping.is_set)
        if self._save_at_stop:
            self._save(self.experts)

    def _save(self, experts: Experts, interrupted: Callable[[], bool] = lambda: False) -> None:
        started_at = time.monotonic()
        was = self._statistics
        try:
            store_experts(experts, self.checkpoint_dir, self.keep_last, interrupted=interrupted)
        except Exception as e:  # a full disk now is no reason not to try again later
            logger.error("saving experts failed: %s", e, exc_info=e.__cause__ or e)
            self.last_error, self._statistics = e, replace(was, failures=was.failures + 1)
            return
        self.last_error = None
        if not interrupted():
            duration_s = time.monotonic() - started_at
            self._statistics = CheckpointStatistics(was.saves + 1, was.failures, time.time(), duration_s)
