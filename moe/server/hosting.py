"""Experts that come and go while a server runs. Owns: in which order the parts of a server learn of it, so that nobody is hurt.

An expert is announced once it can be called; one that leaves is first made invisible, then served until nobody calls it any
more, then refused, and only then dropped. Must not know: why experts come or go, or what the parts do with them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

from moe.config import ServerConfig
from moe.dht import check_uids
from moe.errors import CallTimeout, ConfigError, LifecycleError, MoEError
from moe.expert_uid import ExpertUID
from moe.server.checkpoints import CheckpointSaver
from moe.server.connection_handler import ConnectionHandler, Traffic
from moe.server.expert_backend import ExpertBackend
from moe.server.runtime import Runtime
from moe.transport.event_loop import EventLoopThread

logger = logging.getLogger(__name__)

_LOOP_TIMEOUT_S = 30.0  # for the event loop to do next to nothing
_POLL_S = 0.05  # how often a leaving expert's requests are counted
_LOOK_S = 0.2  # how often the DHT is asked whether it shows what was announced


class Announcing(Protocol):
    """What this file needs of an Announcer."""

    def add(self, uids: Iterable[ExpertUID]) -> None:
        """Announce more experts."""
        ...

    def remove(self, uids: Iterable[ExpertUID]) -> None:
        """Make experts invisible."""
        ...

    def are_visible(self, uids: Iterable[ExpertUID]) -> bool:
        """True if others can find them here."""
        ...


class QuietWatch:
    """Tells when nobody has called for a while.

    :param quiet_s: how long
    :param traffic: at the beginning
    :param now: monotonic seconds
    """

    def __init__(self, quiet_s: float, traffic: Traffic, now: float):
        self._quiet_s, self._opened, self._since = quiet_s, traffic.opened, now

    def is_quiet(self, traffic: Traffic, now: float) -> bool:
        """Take note of what is known now. True if no request is open and none has come for ``quiet_s``."""
        if traffic.open or traffic.opened != self._opened:
            self._opened, self._since = traffic.opened, now
        return not traffic.open and now - self._since >= self._quiet_s


class Hosting:
    """The experts of one server in all its parts.

    :param backends: experts at the start; the parts have them already
    :param saver: None: nothing is saved
    :param config: how long leaving experts are served on
    :param stopping: set when the server stops; then nothing is waited for any more
    :ivar backends: experts by uid; replaced, never changed, so that readers need no lock
    :ivar loop: where the handler runs; set by the server when it has started that
    :ivar announcer: likewise; None: nothing is announced
    """

    def __init__(
        self,
        backends: Mapping[ExpertUID, ExpertBackend],
        runtime: Runtime,
        handler: ConnectionHandler,
        saver: CheckpointSaver | None = None,
        *,
        config: ServerConfig | None = None,
        stopping: threading.Event | None = None,
    ):
        self.backends: dict[ExpertUID, ExpertBackend] = dict(backends)
        self.runtime, self.handler, self.saver = runtime, handler, saver
        self.config, self.stopping = config or ServerConfig(), stopping or threading.Event()
        self.loop: EventLoopThread | None = None
        self.announcer: Announcing | None = None
        self._changing = threading.Lock()
        self._leaving: set[ExpertUID] = set()

    def __repr__(self) -> str:
        return f"Hosting({len(self.backends)} experts, {len(self._leaving)} of them leaving)"

    def add(self, backends: Mapping[ExpertUID, ExpertBackend], timeout_s: float | None = None) -> None:
        """See Server.add_backends."""
        new = dict(backends)
        check_uids(new)
        for uid, backend in new.items():
            if uid != backend.name:
                raise ConfigError(f"the backend given as {uid!r} is named {backend.name!r}")
        deadline = time.monotonic() + (self.config.start_timeout_s if timeout_s is None else timeout_s)
        with self._changing:
            known = sorted(new.keys() & self.backends.keys())
            if known:
                raise ConfigError(f"this server hosts {', '.join(known)} already")
            self._check_serving()
            self.runtime.add(new)
            self.backends = {**self.backends, **new}
            self._in_loop(lambda: self.handler.host(new))
            self._save_from_now_on()
        try:
            if self.announcer is not None:
                self.announcer.add(new)
                self._await_visible(self.announcer, new, deadline)
        except BaseException:
            with contextlib.suppress(MoEError):  # the server is stopping
                self.remove(new, quiet_s=0.0)
            raise

    def remove(
        self, uids: Collection[ExpertUID], *, quiet_s: float | None = None, timeout_s: float | None = None
    ) -> None:
        """See Server.remove_backends."""
        leaving = list(dict.fromkeys(uids))
        quiet_s = self.config.drain_quiet_s if quiet_s is None else quiet_s
        timeout_s = self.config.drain_timeout_s if timeout_s is None else timeout_s
        with self._changing:
            unknown = [uid for uid in leaving if uid not in self.backends or uid in self._leaving]
            if unknown:
                raise ConfigError(f"this server does not host {', '.join(unknown)}, or not for long any more")
            self._check_serving()
            self._leaving.update(leaving)
        try:
            if self.announcer is not None:
                try:
                    self.announcer.remove(leaving)
                except MoEError as e:
                    logger.warning(
                        "could not retract %d experts, they stay visible until they expire: %s", len(leaving), e
                    )
            self._await_quiet(leaving, quiet_s, time.monotonic() + timeout_s)
            self._in_loop(lambda: self.handler.drop(leaving))
            # by then the last request has had its answer, or is told to go elsewhere
            limit_s = min(self.handler.config.request_timeout_s + 1.0, self.config.drain_timeout_s)
            self._await_quiet(leaving, 0.0, time.monotonic() + limit_s)
        finally:
            self._drop(leaving)

    def _drop(self, uids: list[ExpertUID]) -> None:
        with self._changing:
            dropped = {uid: self.backends[uid] for uid in uids}
            self.backends = {uid: backend for uid, backend in self.backends.items() if uid not in dropped}
            self._leaving.difference_update(uids)
            self._save_from_now_on()
            if not self.stopping.is_set():  # else the Runtime has closed their pools, or is about to
                self.runtime.remove(uids)
        if self.saver is not None:
            try:
                self.saver.save_leaving(dropped)
            except MoEError as e:
                logger.error("experts that leave are not saved yet: %s", e)

    def _await_visible(self, announcer: Announcing, uids: Collection[ExpertUID], deadline: float) -> None:
        while not announcer.are_visible(uids):
            if time.monotonic() > deadline:
                raise CallTimeout(f"{len(uids)} experts were announced, but could not be found in time")
            if self.stopping.wait(_LOOK_S):
                raise LifecycleError("the server is stopping")

    def _await_quiet(self, uids: Collection[ExpertUID], quiet_s: float, deadline: float) -> None:
        """Wait until nobody calls these experts any more, until the deadline, or until the server stops."""
        watch = QuietWatch(quiet_s, self._traffic(uids), time.monotonic())
        while not watch.is_quiet(self._traffic(uids), now := time.monotonic()) and now < deadline:
            if self.stopping.wait(_POLL_S):
                return

    def _traffic(self, uids: Collection[ExpertUID]) -> Traffic:
        counted: list[Traffic] = []
        self._in_loop(lambda: counted.append(self.handler.traffic(uids)))
        return counted[0] if counted else Traffic(0, 0)

    def _save_from_now_on(self) -> None:
        if self.saver is not None:
            self.saver.experts = self.backends

    def _in_loop(self, function: Callable[[], None]) -> None:
        """Run something where the handler runs, so that no request is between being looked up and being counted."""

        async def call() -> None:
            function()

        try:
            if self.loop is not None and self.loop.is_alive():
                self.loop.run(call(), _LOOP_TIMEOUT_S)
        except LifecycleError:
            if not self.stopping.is_set():
                raise

    def _check_serving(self) -> None:
        if self.loop is None or not self.loop.is_alive() or self.stopping.is_set():
            raise LifecycleError("experts come and go only while the server runs")
