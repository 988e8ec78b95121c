"""Server: starts the parts in order, watches them, stops them in reverse. Nothing else.

Parts: DHT node -> checkpoints -> network thread with the ConnectionHandler behind libp2p and the direct link -> Runtime ->
announcements -> rebalancing. In reverse that means: nobody new comes, the batch at hand is finished and all who wait are
answered, the answers are sent, what was learned is saved. Must not know: what any of them does inside. How settings become
parts is ``moe.server.assembly``'s.
"""

from __future__ import annotations

import atexit
import gc
import inspect
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from moe.config import HandlerConfig, ServerConfig, note_unused, replace_known
from moe.dht import DHT, Announcer, ServerInfo, check_uids, resolve_p2p, stop_dht, visible_addresses
from moe.errors import ConfigError, LifecycleError, MoEError, Unavailable
from moe.lazy import lazy_names
from moe.server.assembly import ServerParts, assemble
from moe.server.authorization import Authorizer
from moe.server.blocks import BlockSource
from moe.server.checkpoints import CheckpointSaver
from moe.server.connection_handler import ConnectionHandler
from moe.server.expert_backend import ExpertBackend
from moe.server.heap import HeapTrimmer
from moe.server.hosting import Hosting
from moe.server.idle import LEFT_AT_THE_END, find_busy
from moe.server.rebalancing import DHTSwarm, Rebalancer, blocks_of
from moe.server.runtime import BatchHook, Runtime
from moe.server.stats import ExpertStatistics, ServerStatistics, served_rates
from moe.server.throughput import Throughput
from moe.transport.direct import DirectServer
from moe.transport.event_loop import EventLoopThread
from moe.transport.libp2p import LibP2PServer
from moe.version import __version__

if TYPE_CHECKING:
    from moe.server.background import background_server as background_server

# It needs this module, and hivemind's users know it from here.
__getattr__, __dir__, _ = lazy_names(__name__, {"moe.server.background": ("background_server",)})

logger = logging.getLogger(__name__)

_Create = TypeVar("_Create", bound=Callable[..., Any])

RELAYED = "p2p-circuit"  # in the address of a peer that is reached through another one
_FAMILIES = {
    **dict.fromkeys(("ip4", "dns4"), socket.AF_INET),
    **dict.fromkeys(("ip6", "dns6"), socket.AF_INET6),
    **dict.fromkeys(("dns", "dnsaddr"), socket.AF_UNSPEC),
}
_DEFAULT_HOST_MADDRS = ("/ip4/127.0.0.1/tcp/0",)  # hivemind's
_SETTLED_WITHIN_S = 0.5  # for what is ending when all parts were stopped
_WATCH_PERIOD_S = 0.25  # how often a running server looks after its parts


def _takes_what(function: Callable[..., Any]) -> Callable[[_Create], _Create]:
    """Show the parameters of another function, and ``start``, as those of a classmethod that passes them on."""

    def show(create: _Create) -> _Create:
        first, *own = inspect.signature(create).parameters.values()
        passed = list(inspect.signature(function).parameters.values())
        named = [parameter for parameter in own if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
        create.__signature__ = inspect.Signature([first, *passed[:-1], *named, passed[-1]])  # type: ignore[attr-defined]
        return create

    return show


class Server:
    """Hosts experts for other peers.

    Has the methods of hivemind's Server (which was a thread): ``run``, ``run_in_background``, ``ready``, ``shutdown``,
    ``join``, ``is_alive``.

    :param dht: a DHT node; the server shuts it down with itself, as hivemind's does
    :param expert_backends: experts by uid
    :param num_connection_handlers: hivemind's; has no effect: one network thread serves all requests
    :param update_period: seconds between announcements
    :param expiration: seconds an announcement lives; default twice the period
    :param start: start now, and return when requests can be served
    :param checkpoint_dir: save experts there
    :param module_backends: hivemind's name of ``expert_backends``
    :param device: where experts compute; None: where they are
    :param prefetch_batches: see Runtime
    :param sender_threads: see Runtime
    :param stats_report_interval: seconds between log lines of served rows
    :param handler_config: what is accepted from the network
    :param config: periods and timeouts; single settings above win over it
    :param authorize: see ConnectionHandler
    :param on_batch: see Runtime; for fault injection
    :param throughput: what the server says it can serve: rows per second, or what was measured; None: nothing
    :param blocks: the experts are consecutive blocks of this model; unless ``config.balance_quality`` is 0, the server goes
        where the swarm needs it most
    :ivar failure: why the server has stopped by itself; None: it has not
    :ivar lost: after the stop: uids of experts that could not be saved, and how many updates each has lost
    :raises ConfigError: contradicting settings, or an expert whose uid is none
    """

    def __init__(
        self,
        dht: DHT,
        expert_backends: Mapping[str, ExpertBackend] | None = None,
        num_connection_handlers: int = 1,
        update_period: float | None = None,
        expiration: float | None = None,
        start: bool = False,
        checkpoint_dir: str | Path | None = None,
        *,
        module_backends: Mapping[str, ExpertBackend] | None = None,
        device: torch.device | str | None = None,
        prefetch_batches: int | None = None,
        sender_threads: int = 1,
        stats_report_interval: float | None = None,
        handler_config: HandlerConfig | None = None,
        config: ServerConfig | None = None,
        authorize: Authorizer | None = None,
        on_batch: BatchHook | None = None,
        throughput: float | Throughput | None = None,
        blocks: BlockSource | None = None,
    ):
        backends = expert_backends if expert_backends is not None else module_backends
        if backends is None or (expert_backends is not None and module_backends is not None):
            raise ConfigError("a Server takes the experts it hosts, once: expert_backends={uid: backend}")
        check_uids(backends)
        note_unused("Server", num_connection_handlers=num_connection_handlers != 1)
        self.config: ServerConfig = replace_known(
            config or ServerConfig(),
            update_period_s=update_period,
            expiration_s=expiration,
            stats_report_interval_s=stats_report_interval,
        )
        self.dht = dht
        self.runtime = Runtime(backends, prefetch_batches, sender_threads, device, on_batch=on_batch)
        self.handler = ConnectionHandler(backends, handler_config, authorize=authorize)
        self.checkpoint_saver = (
            None
            if checkpoint_dir is None
            else CheckpointSaver(
                dict(backends), checkpoint_dir, self.config.checkpoint_period_s, self.config.keep_checkpoints
            )
        )
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self._stop_requested = threading.Event()
        self._hosting = Hosting(
            backends,
            self.runtime,
            self.handler,
            self.checkpoint_saver,
            config=self.config,
            stopping=self._stop_requested,
        )
        self._stopped = threading.Event()
        self._lifecycle = threading.Lock()
        self._undo: list[tuple[str, Callable[[], object]]] = []  # how to stop what was started, in order of the start
        self._watcher: threading.Thread | None = None
        self.loop: EventLoopThread | None = None
        self.direct: DirectServer | None = None
        self.libp2p: LibP2PServer | None = None
        self._cut_off = False  # the DHT process or its libp2p daemon has died: nobody can be told anything any more
        self._started_at = 0.0
        self._pid = 0  # of the process that it was started in
        self.lost: dict[str, int] = {}
        self._save_until = math.inf  # monotonic; set when the server begins to stop
        self._throughput, self._num_blocks = throughput, len(backends) if blocks is not None else 1
        self._away = False  # callers are sent elsewhere, because a batch runs for too long
        self._moving = "", ""  # which blocks the server is about to leave, and to host
        self._announcer: Announcer | None = None
        self.rebalancer = None if blocks is None or not self.config.balance_quality else self._make_rebalancer(blocks)
        if start:
            self.run_in_background(await_ready=True)

    @classmethod
    @_takes_what(assemble)
    def create(cls, *args: Any, start: bool, **kwargs: Any) -> Server:
        """Make a server with several experts of one class, and a DHT node of its own.

        Takes the parameters of ``moe.server.assembly.assemble``, which are hivemind's and some more; see there.

        :param start: start now, and return when requests can be served
        """
        parts: ServerParts = assemble(*args, **kwargs)
        try:
            return cls(parts.dht, parts.backends, start=start, **parts.server_options)
        except BaseException:
            stop_dht(parts.dht)
            gc.unfreeze()  # see assembly
            raise

    @property
    def expert_backends(self) -> Mapping[str, ExpertBackend]:
        """The experts hosted now, by uid."""
        return self._hosting.backends

    @property
    def module_backends(self) -> Mapping[str, ExpertBackend]:
        """hivemind's name of ``expert_backends``."""
        return self.expert_backends

    def __repr__(self) -> str:
        state = "failed" if self.failure else "ready" if self.ready.is_set() else "not serving"
        return f"Server({len(self.expert_backends)} experts, {state})"

    # --- start -----------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Start in this thread and serve until shutdown is called from another."""
        self._start()
        self.join()

    def run_in_background(self, await_ready: bool = True, timeout: float | None = None) -> None:
        """Start, and go on serving in background threads.

        :param await_ready: return when requests can be served and the experts are announced
        :param timeout: seconds for that; default ``config.start_timeout_s``
        :raises LifecycleError: a part could not start; says which
        :raises TimeoutError: not ready in time
        """
        if await_ready and timeout is None:
            self._start()
            return
        thread = threading.Thread(target=self._start_logged, name="moe-server-start", daemon=True)
        thread.start()
        if await_ready:
            thread.join(timeout)
            if not self.ready.is_set():
                if self.failure is not None:
                    raise self.failure
                raise TimeoutError(f"Server didn't notify .ready in {timeout} seconds")

    start = run_in_background

    def _start_logged(self) -> None:
        try:
            self._start()
        except Exception as e:
            self.failure = self.failure or e
            logger.error("the server could not start: %s", e)

    def _start(self) -> None:
        with self._lifecycle:
            if self._undo or self._stopped.is_set():
                raise LifecycleError("a Server can be started once; make a new one")
            self._started_at = time.time()
            begin = time.monotonic()
            try:
                for stage, start_part in (
                    ("the DHT node", self._start_dht),
                    ("checkpoints", self._start_checkpoints),
                    ("the network", self._start_network),
                    ("the Runtime", self._start_runtime),
                    ("announcing the experts", self._start_announcing),
                    ("rebalancing", self._start_rebalancing),
                ):
                    start_part()
                    logger.debug("started %s after %.2f s", stage, time.monotonic() - begin)
            except BaseException as e:
                self._stop_parts()
                self._stopped.set()
                if isinstance(e, MoEError) or not isinstance(e, Exception):
                    raise
                raise LifecycleError(f"the server could not start {stage}: {e!r}") from e
            self._watcher = threading.Thread(target=self._watch, name="moe-server", daemon=True)
            self._watcher.start()
            self._pid = os.getpid()
            atexit.register(self._end_with_program)
            self.ready.set()

    def _start_dht(self) -> None:
        if not self.dht.is_alive():
            self.dht.run_in_background(await_ready=False)
            self.dht.wait_until_ready(self.config.start_timeout_s)
        self._undo.append(("garbage collections of everything", gc.unfreeze))  # see assembly
        self._undo.append(("the DHT node", lambda: stop_dht(self.dht, 0.5 if self._cut_off else 5.0)))

    def _start_checkpoints(self) -> None:
        if self.checkpoint_saver is not None:
            self._undo.append(("checkpoints", self._finish_saving))
            self.checkpoint_saver.start()

    def _finish_saving(self) -> None:
        assert self.checkpoint_saver is not None
        try:
            self.checkpoint_saver.stop(max(0.0, self._save_until - time.monotonic()))
        finally:
            self.lost = dict(self.checkpoint_saver.lost)

    def _start_network(self) -> None:
        daemon_maddr = resolve_p2p(self.dht, self.config.start_timeout_s)
        loop = EventLoopThread("moe-server-loop")
        self._undo.append(("the network thread", loop.stop))
        self.loop = self._hosting.loop = loop
        issue_ticket = None
        if self.config.direct:
            listening = listen_hosts(self.dht)
            hosts = (self.config.direct_hosts or _hosts_of(visible_addresses(self.dht))) if listening else ()
            self.direct = direct = DirectServer(self.handler, self.config.direct_port, hosts, listening)
            self._undo.append(("the direct link", lambda: loop.run(direct.stop(), self.config.shutdown_timeout_s)))
            loop.run(direct.start(), self.config.start_timeout_s)
            issue_ticket = direct.ticket
        self.libp2p = transport = LibP2PServer(str(daemon_maddr), self.handler, issue_ticket)
        self._undo.append(("the network", lambda: loop.run(transport.stop(), self.config.shutdown_timeout_s)))
        loop.run(transport.start(), self.config.start_timeout_s)

    def _start_runtime(self) -> None:
        if self.checkpoint_saver is not None:  # as soon as nothing is learned any more
            self._undo.append(("what was learned", self.checkpoint_saver.begin_stop))
        self._undo.append(("the Runtime", lambda: self.runtime.shutdown(self.config.shutdown_timeout_s / 2)))
        self.runtime.start(on_failure=lambda error: self._stop_requested.set())

    def _start_announcing(self) -> None:
        if self.rebalancer is not None:  # stopped after the announcements: they are what callers see
            self._undo.append(("rebalancing", self.rebalancer.stop))
        announcer = Announcer(
            self.dht,
            list(self.expert_backends),
            self._announcement,
            self.config.update_period_s,
            self.config.announce_expiration_s,
        )
        self._undo.append(
            ("announcements", lambda: announcer.stop(timeout_s=3.0))
        )  # also of a start that is interrupted
        announcer.start()
        self._hosting.announcer = self._announcer = announcer

    def _announcement(self) -> ServerInfo:
        modules = (backend.module for backend in self.expert_backends.values())
        parameter = next((parameter for module in modules for parameter in module.parameters()), None)
        return ServerInfo(
            version=__version__,
            dtype="" if parameter is None else str(parameter.dtype).removeprefix("torch."),
            device="cpu" if parameter is None else str(parameter.device),
            throughput_rows_per_s=self._rows_per_s(),
            pending_tasks=self.statistics().total.pending,
            started_at=self._started_at,
            moving_from=self._moving[0],
            moving_to=self._moving[1],
        )

    def _rows_per_s(self) -> float:
        """Rows that this server can serve; 0 if that is not known."""
        if not isinstance(self._throughput, Throughput):
            return self._throughput or 0.0
        addresses = visible_addresses(self.dht)
        relayed = bool(addresses) and all(RELAYED in address for address in addresses)
        return self._throughput.served_rows_per_s(self._num_blocks, relayed=relayed)

    def _make_rebalancer(self, blocks: BlockSource) -> Rebalancer:
        hosted = sorted(blocks_of(blocks, self.expert_backends))
        place = range(hosted[0], hosted[-1] + 1) if hosted else range(0)
        if len(place) != len(self.expert_backends) or not place:
            raise ConfigError(
                f"a server that moves hosts consecutive blocks of its model, got {list(self.expert_backends)}"
            )

        def say(moving_from: str, moving_to: str) -> None:
            self._moving = moving_from, moving_to
            if self._announcer is not None:
                self._announcer.announce()

        return Rebalancer(
            blocks,
            place,
            self,
            DHTSwarm(self.dht, blocks, say),
            rows_per_s=self._rows_per_s,
            balance_quality=self.config.balance_quality,
            period_s=self.config.balance_period_s,
            stopping=self._stop_requested,
        )

    def _start_rebalancing(self) -> None:
        if self.rebalancer is not None:
            self.rebalancer.start()

    # --- experts that come and go ------------------------------------------------------------------------------------------

    def add_backends(self, backends: Mapping[str, ExpertBackend], timeout_s: float | None = None) -> None:
        """Host more experts, while the server runs. Returns when others can find and call them.

        :param backends: experts by uid
        :param timeout_s: until they must be visible; default ``config.start_timeout_s``
        :raises ConfigError: an expert of this name is here already, or the name is not the backend's
        :raises LifecycleError: the server is not running
        :raises MoEError: they cannot be announced; they are not hosted then
        """
        self._hosting.add(backends, timeout_s)

    def remove_backends(
        self, uids: Collection[str], *, quiet_s: float | None = None, timeout_s: float | None = None
    ) -> None:
        """Host these experts no longer. No request is lost: they are made invisible, and served until nobody has called
        them for a while; then calls are refused as ExpertNotFound, which tells clients to look for another server; when
        the last answer is sent, their pools are dropped and, with checkpoints, they are saved. Returns when that is done.

        :param uids: experts hosted now
        :param quiet_s: how long nobody must have called them; default ``config.drain_quiet_s``
        :param timeout_s: how long to wait for that; default ``config.drain_timeout_s``
        :raises ConfigError: an expert that is not here, or about to leave already
        :raises LifecycleError: the server is not running
        """
        self._hosting.remove(uids, quiet_s=quiet_s, timeout_s=timeout_s)

    # --- while it runs -----------------------------------------------------------------------------------------------------

    def is_alive(self) -> bool:
        """True between start and the end of shutdown."""
        return self._watcher is not None and not self._stopped.is_set()

    def is_healthy(self) -> bool:
        """True if requests are being served: the Runtime lives, and no batch runs for longer than ``config.stuck_after_s``."""
        return self.ready.is_set() and not self._is_stuck() and self._problem() is None

    def statistics(self) -> ServerStatistics:
        """What was served so far, by expert."""
        experts = {}
        for uid, backend in self.expert_backends.items():
            forward, backward = backend.forward_pool.statistics(), backend.backward_pool.statistics()
            experts[uid] = ExpertStatistics(
                forward_rows=forward.rows,
                backward_rows=backward.rows,
                forward_batches=forward.batches,
                backward_batches=backward.batches,
                pending=forward.pending + backward.pending,
                failed=forward.failed + backward.failed,
                failed_steps=backend.failed_steps,
            )
        return ServerStatistics(experts=experts)

    def _problem(self) -> MoEError | None:
        if self.runtime.failure is not None:
            return LifecycleError(f"the Runtime has died: {self.runtime.failure!r}")
        if self._is_busy_for(self.config.give_up_after_s):
            return LifecycleError(f"a batch has been running for {self.runtime.busy_s():.0f} s: the server gives up")
        self._cut_off = not self.dht.is_alive() or (self.libp2p is not None and not self.libp2p.is_connected)
        if self._cut_off:
            return LifecycleError("the DHT process or its libp2p daemon has died")
        return None

    def _is_busy_for(self, limit_s: float | None) -> bool:
        return limit_s is not None and self.runtime.busy_s() > limit_s

    def _is_stuck(self) -> bool:
        return self._is_busy_for(self.config.stuck_after_s)

    def _send_elsewhere(self, away: bool) -> None:
        """While a batch runs that nobody can interrupt, callers are better served by other servers."""
        assert self._announcer is not None
        self._away = away
        self._announcer.hide(away)
        if away:
            busy_s = self.runtime.busy_s()
            logger.error("a batch has been running for %.0f s; until it ends, callers are sent elsewhere", busy_s)
            for pool in self.runtime.pools:
                pool.close(Unavailable(f"a batch has been running for {busy_s:.0f} s; try another server"))
        else:
            logger.warning("the batch has ended; serving again")
            for pool in self.runtime.pools:
                pool.reopen()

    def _watch(self) -> None:
        """Until asked to stop, or a part fails: then stop everything, so that nobody goes on calling a dead server."""
        before, measured_at = self.statistics(), time.monotonic()
        interval_s = self.config.stats_report_interval_s or math.inf
        heap = HeapTrimmer()
        while not self._stop_requested.wait(_WATCH_PERIOD_S):
            self.failure = self._problem()
            if self.failure is not None:
                break
            if self._is_stuck() != self._away:
                self._send_elsewhere(not self._away)
            handler = self.handler
            heap.look(handler.requests, handler.inflight.bytes > 0, time.monotonic(), handler.held_bytes)
            elapsed_s = time.monotonic() - measured_at
            if elapsed_s >= interval_s:
                now = self.statistics()
                served = served_rates(before, now, elapsed_s).total
                logger.info("served %.1f rows/s in batches of %.1f rows", served.rows_per_s, served.mean_batch_rows)
                before, measured_at = now, time.monotonic()
        self._begin_stop()
        self.failure = self.failure or self._problem()
        if self.failure is not None:
            logger.critical("the server stops: %s", self.failure)
            for pool in self.runtime.pools:
                pool.close(Unavailable(str(self.failure)))
        self.ready.clear()
        self._stop_parts()
        if not self.runtime.is_alive() and (left := find_busy(self, _SETTLED_WITHIN_S)):
            logger.error("%s%s", LEFT_AT_THE_END, "; ".join(left))
        atexit.unregister(self._end_with_program)
        self._stopped.set()

    # --- stop ----------------------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Stop serving: take back the announcements, finish the batch at hand, save, end all threads and processes.

        Returns when that is done; may be called more than once, and before or after a failure. Experts that could not be
        saved within ``config.stop_timeout_s`` are in ``lost``.
        """
        self.ready.clear()
        self._begin_stop()
        watcher = self._watcher
        if watcher is None:
            with self._lifecycle:
                self._stop_parts()
                self._stopped.set()
                if self.dht.is_alive():
                    stop_dht(self.dht)
                gc.unfreeze()
        elif watcher is not threading.current_thread():
            watcher.join(max(0.0, self._save_until - time.monotonic()) + self.config.shutdown_timeout_s + 5.0)

    def _end_with_program(self) -> None:
        """Nothing is lost of a server that runs when its program ends."""
        if os.getpid() == self._pid and not self._stopped.is_set():
            logger.warning("the program has ended, so its server stops; to serve on, let it call server.join()")
            self.shutdown()

    def _begin_stop(self) -> None:
        may_save_s = 0.0 if self.checkpoint_saver is None else self.config.stop_timeout_s
        self._save_until = min(self._save_until, time.monotonic() + may_save_s)
        self._stop_requested.set()  # nobody waits for anything any more

    @property
    def is_saving(self) -> bool:
        """True while a server that stops may have something to save, for ``config.stop_timeout_s`` at most."""
        saver = self.checkpoint_saver
        return saver is not None and saver.is_alive and time.monotonic() < self._save_until < math.inf

    def join(self, timeout: float | None = None) -> None:
        """Wait until the server has stopped."""
        self._stopped.wait(timeout)
        if self._watcher is not None and self._stopped.is_set():
            self._watcher.join(timeout)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the server has stopped or failed.

        :returns: False after ``timeout`` seconds without either
        """
        return self._stopped.wait(timeout)

    def _stop_parts(self) -> None:
        self._begin_stop()
        while self._undo:
            name, stop = self._undo.pop()
            try:
                stop()
            except Exception as e:  # one part that will not stop must not keep the others running
                logger.warning("could not stop %s cleanly: %r", name, e)


def listen_hosts(dht: DHT) -> tuple[str, ...]:
    """Addresses of this machine at which the libp2p daemon of a DHT listens, as numbers: the direct link listens there, too."""
    if dht.kwargs.get("no_listen") or dht.kwargs.get("client_mode"):
        return ()
    found: dict[str, None] = {}
    for maddr in map(str, dht.kwargs.get("host_maddrs") or _DEFAULT_HOST_MADDRS):
        _, protocol, host, *rest = *maddr.split("/"), "", "", ""
        if protocol == "ip6zone" and rest[0] == "ip6":
            protocol, host = "ip6", f"{rest[1]}%{host}"
        if protocol in _FAMILIES:
            found |= dict.fromkeys(_addresses_of(host, _FAMILIES[protocol]))
    for everywhere, part in (("0.0.0.0", "."), ("::", ":")):  # no other address of its family is free then
        if everywhere in found:
            found = {host: None for host in found if host == everywhere or part not in host}
    return tuple(found)


def _addresses_of(host: str, family: socket.AddressFamily) -> list[str]:
    """Where this machine can listen under a name or an address; like the daemon, we do without those where it cannot."""
    found = []
    try:
        for kind, _, _, _, address in socket.getaddrinfo(host, 0, family, socket.SOCK_STREAM):
            with socket.socket(kind, socket.SOCK_STREAM) as probe:
                probe.bind(address)
            found.append(host if "%" in host else str(address[0]))
    except OSError as e:
        logger.warning("no direct link at %s: %s", host, e)
    return found


def _hosts_of(multiaddrs: Sequence[str]) -> tuple[str, ...]:
    """Hosts in multiaddrs such as ``/ip4/10.0.0.1/tcp/31337/p2p/...``; relayed ones lead to somebody else."""
    parts = [address.split("/") for address in multiaddrs if RELAYED not in address]
    return tuple(dict.fromkeys(p[2] for p in parts if len(p) > 2 and p[1] in ("ip4", "ip6", "dns", "dns4", "dns6")))
