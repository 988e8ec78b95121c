"""Keeping a server's experts visible. Owns: the thread that declares them again and again, and when it does."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hivemind.dht import DHT
from hivemind.utils import get_dht_time

from moe.dht.experts import DEFAULT_EXPIRATION_S, check_uids, declare_experts, find_experts, retract_experts
from moe.dht.records import ServerInfo
from moe.errors import LifecycleError
from moe.expert_uid import ExpertUID

logger = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.5
_LEAVE_ALONE_S = 0.2  # an announcement that takes longer when the announcer stops is ended by the retraction


@dataclass(frozen=True, kw_only=True)
class AnnouncerStatistics:
    """How announcing goes.

    :ivar successes: announcements that went through
    :ivar failures: announcements that did not
    :ivar failures_in_a_row: since the last success
    :ivar last_success_age_s: None before the first
    :ivar last_error: None after a success
    """

    successes: int
    failures: int
    failures_in_a_row: int
    last_success_age_s: float | None
    last_error: str | None


def next_announcement(last_attempt: float, failures_in_a_row: int, update_period_s: float) -> float:
    """When to announce next: a period after a success; sooner after a failure, at first soon and then ever later."""
    if failures_in_a_row == 0:
        return last_attempt + update_period_s
    return last_attempt + min(update_period_s, _FIRST_RETRY_S * 2.0 ** min(failures_in_a_row - 1, 32))


class Announcer:
    """Announces experts now and every period, through any failure, and retracts them in the end. Without any it is silent.

    :param dht: a running DHT
    :param uids: experts to announce
    :param get_info: what to tell about the server; called before each announcement, in the announcer's thread
    :param update_period_s: between announcements
    :param expiration_s: how long each one lives
    :param timeout_s: for one announcement; default: as declare_experts has it

    >>> announcer = Announcer(dht, ["ffn.0.0"], lambda: ServerInfo(device="cpu"), 30.0, 60.0)
    >>> announcer.start()
    >>> announcer.stop()
    """

    def __init__(
        self,
        dht: DHT,
        uids: Sequence[ExpertUID],
        get_info: Callable[[], ServerInfo],
        update_period_s: float = DEFAULT_EXPIRATION_S / 2,
        expiration_s: float = DEFAULT_EXPIRATION_S,
        *,
        timeout_s: float | None = None,
    ):
        self.dht, self.uids, self.get_info = dht, tuple(check_uids(uids)), get_info
        self.update_period_s, self.expiration_s, self.timeout_s = update_period_s, expiration_s, timeout_s
        self._lock = threading.Lock()
        self._announcing = threading.RLock()  # so that none that is under way undoes what another one does
        self._hidden = False
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._successes = self._failures = self._failures_in_a_row = 0
        self._last_attempt = self._last_success = -math.inf
        self._last_error: str | None = None

    def __repr__(self) -> str:
        return f"Announcer({len(self.uids)} experts, {self.statistics()})"

    def start(self) -> None:
        """Announce once, then go on in the background.

        :raises LifecycleError: if it has been started before
        :raises MoEError: if the first announcement fails; nothing is running then
        """
        if self._thread is not None or self._stopping.is_set():
            raise LifecycleError("an Announcer starts once")
        self._announce()
        self._thread = threading.Thread(target=self._run, name="moe.dht.announcer", daemon=True)
        self._thread.start()

    def announce_now(self) -> None:
        """Make the next announcement now, in the background: what there is to tell has changed."""
        self._wake.set()

    def hide(self, hidden: bool = True) -> None:
        """Make the experts invisible, or visible again, in the background; it is tried until it succeeds."""
        self._hidden = hidden
        self._wake.set()

    def announce(self) -> None:
        """Make an announcement now, and return when it is done: what there is to tell has changed.

        :raises LifecycleError: if announcing has ended
        :raises MoEError: if it fails; the background will try again
        """
        with self._announcing:
            self._check_running()
            self._announce()

    def add(self, uids: Iterable[ExpertUID]) -> None:
        """Announce more experts, now and from now on. Returns when that is done.

        :raises ConfigError: wrong uids, or too many
        :raises LifecycleError: if announcing has ended
        :raises MoEError: if it fails; then they are not announced further
        """
        with self._announcing:
            self._check_running()
            before = self.uids
            self.uids = tuple(check_uids([*before, *uids]))
            try:
                self._announce()
            except BaseException:
                self.uids = before
                raise

    def remove(self, uids: Iterable[ExpertUID], timeout_s: float | None = None) -> None:
        """Announce these experts no longer, and make them invisible. Returns when that is done.

        :raises MoEError: if making them invisible fails; they stay visible until they expire
        """
        leaving = tuple(uids)
        with self._announcing:
            self.uids = tuple(uid for uid in self.uids if uid not in leaving)
            retract_experts(self.dht, leaving, timeout_s)

    def are_visible(self, uids: Iterable[ExpertUID]) -> bool:
        """True if all these experts can be found here.

        :raises MoEError: if the DHT does not answer
        """
        me = self.dht.peer_id
        return all(found is not None and me in found.peer_ids for found in find_experts(self.dht, list(uids)))

    def stop(self, retract: bool = True, timeout_s: float = 5.0) -> None:
        """Stop announcing. May be called twice.

        :param retract: make the experts invisible; if that fails, a warning is logged, and they stay until they expire
        :param timeout_s: for all of this
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            stopped_before = self._stopping.is_set()
            self._stopping.set()
        self._wake.set()
        if self._last_attempt == -math.inf:
            return
        if self._announcing.acquire(
            timeout=min(_LEAVE_ALONE_S, timeout_s)
        ):  # whoever has seen that it goes on, has sent
            self._announcing.release()
        if retract and not stopped_before:
            try:
                retract_experts(self.dht, self.uids, timeout_s=max(0.1, deadline - time.monotonic()))
            except Exception as e:  # whatever was read there, the server goes on stopping
                logger.warning("could not retract %d experts, they stay until they expire: %s", len(self.uids), e)
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def statistics(self) -> AnnouncerStatistics:
        """How announcing goes."""
        with self._lock:
            return AnnouncerStatistics(
                successes=self._successes,
                failures=self._failures,
                failures_in_a_row=self._failures_in_a_row,
                last_success_age_s=time.monotonic() - self._last_success if self._successes else None,
                last_error=self._last_error,
            )

    def _check_running(self) -> None:
        if self._stopping.is_set():
            raise LifecycleError("what is announced now would stay, since nobody would take it back: the server stops")

    def _run(self) -> None:
        while True:
            due = next_announcement(self._last_attempt, self._failures_in_a_row, self.update_period_s)
            self._wake.wait(max(0.0, due - time.monotonic()))
            self._wake.clear()
            if self._stopping.is_set():
                return
            try:
                self._announce()
            except Exception as e:
                if self._stopping.is_set():  # the retraction has ended it
                    return
                failures = self.statistics().failures_in_a_row
                logger.warning("could not announce %d experts, %d in a row: %s", len(self.uids), failures, e)

    def _announce(self) -> None:
        with self._announcing:
            self._announce_next()

    def _announce_next(self) -> None:
        self._last_attempt = time.monotonic()
        if not self.uids:
            return
        try:
            if self._hidden:
                retract_experts(self.dht, self.uids, self.timeout_s)
            else:
                info = self.get_info()
                self._check_running()  # it asks the DHT, too, which takes time
                until = get_dht_time() + self.expiration_s
                declare_experts(self.dht, self.uids, until, info=info, timeout_s=self.timeout_s)
        except Exception as e:
            with self._lock:
                self._failures += 1
                self._failures_in_a_row += 1
                self._last_error = f"{type(e).__name__}: {e}"
            raise
        with self._lock:
            self._successes += 1
            self._failures_in_a_row = 0
            self._last_success = time.monotonic()
            self._last_error = None
