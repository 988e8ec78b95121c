"""Experts on disk. Owns: where checkpoints lie, how they are written so that a kill at any moment loses nothing that was
saved before, how many are kept, and which one is loaded. Must not know: what is in a state, or when a batch runs.

A directory per expert uid, in it ``checkpoint_<time of the save>.pt`` and ``checkpoint_last.pt``, a link to the newest
that is finite: hivemind's layout, so that either package finds and loads what the other one saved. A file appears under its
name only when it is complete, on disk, and known to load with ``weights_only``.

A state with a nan or an infinity in its parameters is of no use to anybody. It is saved all the same, but never in place of
the last finite one: that is neither deleted nor passed over by a restart.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import torch

from moe.config import check_positive
from moe.errors import ConfigError, LifecycleError, MoEError, ProtocolError
from moe.expert_uid import UID_DELIMITER, ExpertUID, is_valid_uid
from moe.schema import Compression, ExpertSchema

logger = logging.getLogger(__name__)

PREFIX, SUFFIX = "checkpoint_", ".pt"
LAST = f"{PREFIX}last{SUFFIX}"
UNFINISHED_PREFIX = ".unfinished_"
TIME_FORMAT = "%Y-%m-%d_%H-%M-%S.%f"  # local time, as hivemind's, but without the colons that some file systems refuse


class Checkpointable(Protocol):
    """What checkpoints need of an ExpertBackend.

    A state may hold, under the key ``moe``, the ``uid`` and the plain ``schema`` of the expert it was taken from; they
    are compared when it is loaded; and ``updates``, how often it was trained. hivemind's states have no such key.
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
    stored: Callable[[ExpertUID, int], None] = lambda uid, updates: None,
) -> None:
    """Save every expert, and delete all but its newest checkpoints (hivemind's included) and its last finite one.

    If one expert cannot be saved, the others still are.

    :param experts: uid -> backend
    :param checkpoint_dir: an existing directory
    :param keep_last: how many checkpoints of each expert to keep
    :param now: time to name the checkpoints by, in seconds since the epoch; the clock's unless told
    :param interrupted: asked before each expert; True leaves out the rest
    :param stored: told of each expert that is on disk, with the number of its updates
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
            stored(uid, _store(experts[uid], folder, keep_last, saved_at))
        except Exception as e:  # whatever one expert's code or its directory does, the others are saved
            logger.debug("could not save %s", uid, exc_info=True)
            failures[uid] = e
    if failures:
        reasons = "; ".join(f"{uid}: {type(e).__name__}: {e}" for uid, e in failures.items())
        raise LifecycleError(f"could not save {reasons}") from next(iter(failures.values()))


def _store(expert: Checkpointable, folder: Path, keep_last: int, saved_at: datetime) -> int:
    """Save one expert.

    :returns: the updates that are in what was saved
    """
    updates = _updates_of(expert)
    state = expert.state_dict()
    non_finite = _non_finite_tensor(state, expert)
    if "moe" in state:
        updates = state["moe"].get("updates", updates)
        state = {**state, "moe": {**state["moe"], "finite": non_finite is None}}
    if not folder.is_dir():
        folder.mkdir()
        _sync_directory(folder.parent)
    earlier = _saved(folder)
    if earlier:  # a clock that was set back must not make the newest checkpoint look old
        saved_at = max(saved_at, earlier[0][0] + timedelta(microseconds=1))
    path = folder / f"{PREFIX}{saved_at.strftime(TIME_FORMAT)}{SUFFIX}"
    with _appears_complete(path) as file:
        torch.save(state, file)
    last_finite = (
        path if non_finite is None else _newest_finite([*(old for _, old in earlier), path.with_name(LAST)], expert)
    )
    if non_finite is not None:
        logger.error(
            "expert %s is not finite any more (%s); %s",
            *(folder.name, non_finite),
            f"kept, and loaded by a restart: {last_finite}" if last_finite else "no checkpoint of it is",
        )
    _point_last_to(last_finite or path)
    _sync_directory(folder)
    for _, old in _saved(folder)[keep_last:]:
        if old != last_finite:
            old.unlink(missing_ok=True)
    return int(updates)


def _updates_of(expert: Checkpointable) -> int:
    """How often it was trained, as far as it knows."""
    updates = getattr(expert, "updates", 0)
    return updates if isinstance(updates, int) else 0


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
    with contextlib.suppress(OSError):
        if os.path.samefile(path, last):
            return
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


# --- what is finite -------------------------------------------------------------------------------------------------


def _non_finite_tensor(state: Mapping[str, Any], expert: Checkpointable) -> str | None:
    """Name of a tensor of a state that holds a nan, or an infinity; None: there is none.

    Infinities of buffers do not count: masks are made of them.
    """
    named_parameters = getattr(getattr(expert, "module", None), "named_parameters", None)
    parameters = None if named_parameters is None else {f"module.{name}" for name, _ in named_parameters()}
    for key, part in state.items():
        for name, tensor in _tensors(key, part):
            is_buffer = key == "module" and parameters is not None and name not in parameters
            if _is_non_finite(tensor, ignore_infinities=is_buffer):
                return name
    return None


def _tensors(name: str, part: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(part, torch.Tensor):
        yield name, part
    elif isinstance(part, (Mapping, list, tuple)):
        for key, inner in part.items() if isinstance(part, Mapping) else enumerate(part):
            yield from _tensors(f"{name}.{key}", inner)


def _is_non_finite(tensor: torch.Tensor, *, ignore_infinities: bool) -> bool:
    """One pass over the tensor that takes no memory: a fraction of what writing it takes."""
    if tensor.layout is not torch.strided:
        return tensor.layout is torch.sparse_coo and _is_non_finite(
            tensor.coalesce().values(), ignore_infinities=ignore_infinities
        )
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    ends = torch.stack(
        torch.aminmax(tensor.detach() if tensor.itemsize > 1 else tensor.detach().float())
    )  # nan spreads
    return bool((ends.isnan() if ignore_infinities else ~ends.isfinite()).any())


def _newest_finite(paths: Iterable[Path], expert: Checkpointable) -> Path | None:
    """The first of these checkpoints that can be loaded and is finite."""
    for path in paths:
        with contextlib.suppress(Exception):  # a damaged file makes torch raise nearly anything
            state = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
            finite = state["moe"].get("finite") if "moe" in state else None  # older files, and hivemind's, do not say
            if finite is True or (finite is None and _non_finite_tensor(state, expert) is None):
                return path
    return None


# --- loading --------------------------------------------------------------------------------------------------------


def load_experts(experts: Experts, checkpoint_dir: str | os.PathLike[str]) -> list[ExpertUID]:
    """Load the newest checkpoint of every expert, ours or hivemind's; one that is damaged or not finite gives way to the one
    before it, unless none is finite.

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
        path, state = _read_first(uid, experts[uid], paths)
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
    found = []
    for folder in _existing_directory(checkpoint_dir).iterdir():
        if is_valid_uid(folder.name):
            found += [folder.name] if _candidates(folder) else []
        elif UID_DELIMITER in folder.name and _candidates(folder):  # a name that was one in an earlier version, perhaps
            logger.warning("%s has checkpoints, but is not named by a uid: they are not loaded", folder)
    return sorted(found)


def _read_first(uid: ExpertUID, expert: Checkpointable, paths: list[Path]) -> tuple[Path, dict[str, Any]]:
    """The first checkpoint that can be read and is finite; if none is finite, the first that can be read."""
    readable = []
    for path in paths:
        try:
            state = _read(path)
        except Exception as e:  # a damaged file makes torch raise nearly anything
            reason = str(e).partition("\n")[0]
            logger.warning("expert %s: cannot load checkpoint %s: %s: %s", uid, path, type(e).__name__, reason)
            logger.debug("could not load %s", path, exc_info=True)
            continue
        non_finite = _non_finite_tensor(state, expert)
        if non_finite is None:
            return path, state
        logger.warning("expert %s: checkpoint %s is not finite (%s)", uid, path, non_finite)
        readable.append(path)
    if readable:
        logger.warning("expert %s: none of its checkpoints is finite; loading %s", uid, readable[0])
        return readable[0], _read(readable[0])
    raise LifecycleError(f"none of these checkpoints can be loaded: {', '.join(map(str, paths))}", uid=uid)


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint.

    :raises Exception: if it cannot be read
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "module" not in state:
        raise ValueError("it does not hold the state of an expert")
    return state


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
    """Saves experts periodically, in a thread of its own, and once more when stopped. Always those first that would lose most.

    A save that fails is logged and tried again after the next period; it never ends the thread.

    :param experts: uid -> backend; assign another mapping to ``experts`` when some come or go
    :param checkpoint_dir: an existing directory
    :param period_s: from the end of one save to the beginning of the next
    :param keep_last: how many checkpoints of each expert to keep
    :ivar last_error: why the last save failed; None if it did not
    :ivar lost: after ``stop``: uids of the experts that could not be saved at the end, and how many updates each has lost
    :raises ConfigError: no such directory, or a number that makes no sense
    """

    def __init__(
        self, experts: Experts, checkpoint_dir: str | os.PathLike[str], period_s: float = 60.0, keep_last: int = 3
    ):
        self.checkpoint_dir = _existing_directory(checkpoint_dir)
        self.period_s, self.keep_last = period_s, keep_last
        check_positive(self, "period_s", "keep_last", allow_none=False)
        self.last_error: Exception | None = None
        self.lost: dict[ExpertUID, int] = {}
        self._statistics = CheckpointStatistics()
        self._lock = threading.Lock()
        self._saved: dict[ExpertUID, _Saved] = {}
        self._experts: Experts = {}
        self._leaving: dict[ExpertUID, Checkpointable] = {}  # left out of these, and not saved yet
        self._stopping, self._save_at_stop = threading.Event(), False
        self._thread: threading.Thread | None = None
        self.experts = experts

    def __repr__(self) -> str:
        state = "new" if self._thread is None else "saving" if self._thread.is_alive() else "stopped"
        return (
            f"CheckpointSaver({len(self.experts)} experts, {str(self.checkpoint_dir)!r}, {state}, {self._statistics})"
        )

    @property
    def experts(self) -> Experts:
        """What is saved. An expert that is left out is saved once more, if it has learned something."""
        return self._experts

    @experts.setter
    def experts(self, experts: Experts) -> None:
        with self._lock:
            for uid, expert in self._experts.items():
                if uid not in experts and self._unsaved_updates(uid, expert):
                    self._leaving[uid] = expert
            self._experts = experts
            for uid, expert in experts.items():
                self._leaving.pop(uid, None)
                self._know(uid, expert)
            self._forget_others()

    @property
    def is_alive(self) -> bool:
        """True from start until everything is saved after ``begin_stop``."""
        return self._thread is not None and self._thread.is_alive()

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

    def begin_stop(self, save: bool = True) -> None:
        """Save every expert once more, in the background, and end. May be called more than once; the first time counts.

        :param save: False: only end
        """
        with self._lock:
            if not self._stopping.is_set():
                self._save_at_stop = save
                self._stopping.set()

    def stop(self, timeout_s: float | None = None, save: bool = True) -> None:
        """``begin_stop``, and wait for the end. May be called again, and before start.

        What could not be saved is logged, and in ``lost``.

        :param timeout_s: longest wait; None: as long as it takes
        :param save: save every expert once more
        :raises LifecycleError: if it is still saving after timeout_s
        """
        self.begin_stop(save)
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            with self._lock:
                left = {uid: self._unsaved_updates(uid, expert) for uid, expert in self._all().items()}
            self._give_up({uid: updates for uid, updates in left.items() if updates}, "the time to save them is over")
            raise LifecycleError(f"{self!r} did not stop within {timeout_s:.3g} s")

    def save_leaving(self, experts: Experts) -> None:
        """Save experts that were left out of ``experts``, in the calling thread. If that fails, or the saver is stopped before
        it is done, those that have something to lose are saved with the others.

        :raises MoEError: as store_experts
        """
        with self._lock:
            for uid, expert in experts.items():
                self._know(uid, expert)
        self._store(experts)

    def _run(self) -> None:
        new = {uid: expert for uid, expert in self.experts.items() if not _candidates(self.checkpoint_dir / uid)}
        if new:
            self._save(new, self._stopping.is_set)
        while not self._stopping.wait(self.period_s):
            self._save(self._all(), self._stopping.is_set)
        if self._save_at_stop:
            owed = self._all()
            logger.info("saving %d experts", len(owed))
            failed = self._save(owed)
            self._give_up({uid: self._unsaved_updates(uid, owed[uid]) for uid in failed}, str(self.last_error))

    def _all(self) -> dict[ExpertUID, Checkpointable]:
        return {**self._leaving, **self._experts}

    def _know(self, uid: ExpertUID, expert: Checkpointable) -> None:
        """Begin to count the updates of an expert that is as it was loaded, or made."""
        self._saved.setdefault(uid, _Saved(_updates_of(expert), -math.inf))

    def _forget_others(self) -> None:
        """Of experts that have left, remember only those that are not saved yet."""
        self._leaving = {uid: one for uid, one in self._leaving.items() if self._unsaved_updates(uid, one)}
        for uid in self._saved.keys() - self._all().keys():
            del self._saved[uid]

    def _unsaved_updates(self, uid: ExpertUID, expert: Checkpointable) -> int:
        saved = self._saved.get(uid)
        return 0 if saved is None else abs(_updates_of(expert) - saved.updates)  # also of one that was set back

    def _give_up(self, lost: dict[ExpertUID, int], reason: str) -> None:
        self.lost = lost
        if lost:
            named = ", ".join(f"{uid} ({updates} updates)" for uid, updates in lost.items())
            logger.error(
                "%d experts are not saved, and what they have learned is lost: %s: %s", len(lost), named, reason
            )

    def _save(self, experts: Experts, interrupted: Callable[[], bool] = lambda: False) -> Collection[ExpertUID]:
        """Save experts.

        :returns: those that could not be saved, or were left out
        """
        started_at = time.monotonic()
        was = self._statistics
        left = set(experts)
        try:
            self._store(experts, interrupted, left.discard)
        except Exception as e:  # a full disk now is no reason not to try again later
            logger.error("saving experts failed: %s", e, exc_info=e.__cause__ or e)
            self.last_error, self._statistics = e, replace(was, failures=was.failures + 1)
            return left
        self.last_error = None
        if not interrupted():
            duration_s = time.monotonic() - started_at
            self._statistics = CheckpointStatistics(was.saves + 1, was.failures, time.time(), duration_s)
        return left

    def _store(
        self,
        experts: Experts,
        interrupted: Callable[[], bool] = lambda: False,
        stored: Callable[[ExpertUID], None] = lambda uid: None,
    ) -> None:
        """Save experts, those first that would lose most: all that they have learned, then the most updates, then those that
        were not saved for longest; last one that is training now."""

        def urgency(uid: ExpertUID) -> tuple[bool, bool, int, float]:
            unsaved, at = self._unsaved_updates(uid, experts[uid]), self._saved[uid].at
            has_a_checkpoint = at > -math.inf or not unsaved or bool(_candidates(self.checkpoint_dir / uid))
            return _is_busy(experts[uid]), has_a_checkpoint, -unsaved, at

        def note(uid: ExpertUID, updates: int) -> None:
            with self._lock:
                if uid in self._saved:
                    self._saved[uid] = _Saved(updates, time.monotonic())
            stored(uid)

        with self._lock:
            known = (uid for uid in experts if uid in self._saved)  # others have left, and are saved
            ordered = {uid: experts[uid] for uid in sorted(known, key=urgency)}
        try:
            store_experts(ordered, self.checkpoint_dir, self.keep_last, interrupted=interrupted, stored=note)
        finally:
            with self._lock:
                self._forget_others()


class _Saved(NamedTuple):
    """What is on disk of an expert: after how many updates it was saved, and when (monotonic; -inf: not by us)."""

    updates: int
    at: float


def _is_busy(expert: Checkpointable) -> bool:
    """True if its state cannot be had at once: a batch runs."""
    lock = getattr(expert, "step_lock", None)
    if lock is None:
        return False
    if free := lock.acquire(blocking=False):
        lock.release()
    return not free
