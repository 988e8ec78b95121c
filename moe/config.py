"""Settings as frozen dataclasses with units in their names. Owns: defaults and what makes a setting invalid.

Imports nothing heavy, so that the command line can refuse bad settings before torch is loaded. Where a number is ours and
not measured, its comment says so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from moe.errors import ConfigError

logger = logging.getLogger(__name__)

BUILTIN_EXPERTS = ("adapted_ffn", "det_dropout", "ffn", "nop", "nop_delay", "transformer")  # moe/server/layers
OPTIMIZERS = ("adam", "sgd", "none")  # hivemind-server --optimizer
SCHEDULERS = ("constant", "cosine", "linear", "none")  # moe/server/layers/lr_schedule.py
COMPRESSIONS = ("NONE", "MEANSTD_16BIT", "FLOAT16", "QUANTILE_8BIT", "UNIFORM_8BIT", "BLOCKWISE_8BIT")

TRANSPORTS = ("auto", "unix", "tls", "libp2p")
ROUTINGS = ("max_throughput", "min_latency")  # moe/client/routing.py
MAX_BLOCKS = 4096  # of one model; ours
DHT_MIN_EXPIRATION_S = 3.0  # hivemind's MAX_DHT_TIME_DISCREPANCY_SECONDS


def check_positive(owner: object, *names: str, allow_none: bool = True, allow_zero: bool = False) -> None:
    """Raise ConfigError unless each named attribute is a positive number (or None, or zero, where allowed)."""
    for name in names:
        value = getattr(owner, name)
        if value is None and allow_none:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
        if not number or value < 0 or (value == 0 and not allow_zero):
            kind = "a number >= 0" if allow_zero else "a positive number"
            raise ConfigError(f"{name}: expected {kind}{' or None' if allow_none else ''}, got {value!r}")


def _peer_names(setting: str, peers: Any) -> tuple[str, ...] | None:
    """Peer ids as base58, given as that or as PeerID objects."""
    if peers is None:
        return None
    if isinstance(peers, (str, bytes)) or not isinstance(peers, Iterable):
        raise ConfigError(f"{setting}: expected a list of peer ids or None, got {peers!r}")
    names = [peer.to_base58() if hasattr(peer, "to_base58") else peer for peer in peers]
    wrong = [name for name in names if not isinstance(name, str) or not name]
    if wrong:
        raise ConfigError(f"{setting}: expected peer ids (base58 strings or PeerID), got {wrong[0]!r}")
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """How patient a client is. ``None`` means "no limit" and has to be asked for.

    :param connect_timeout_s: to reach a peer and learn what its expert takes
    :param request_timeout_s: for one request to one server, from sending to the full reply
    :param total_timeout_s: for everything one forward or one backward does: search, info, requests, retries
    :param max_retries: further attempts after a transient failure (another server of the same expert first)
    :param min_backoff_s: wait before the second attempt; doubles after each
    :param max_backoff_s: longest wait between attempts
    :param max_tokens_per_request: RemoteSequential splits larger batches (rows x length of the first sequence axis)
    :param detect_anomalies: refuse non-finite inputs, outputs and gradients on the client
    :param hold_tensors: let servers hold tensors, so that they need not be sent again: global ones, and inputs for backward
    :param transport: how tensors travel: "auto" (direct link where it can be had, else libp2p), "libp2p" (never a direct
        link), "unix" or "tls" (nothing but a direct link of this kind)
    :param routing: how RemoteSequential chooses servers: "max_throughput" (at random, more often those that are fast and
        host many of the next blocks) or "min_latency" (the fastest way through all blocks)
    :param update_period_s: how often RemoteSequential looks for servers anew, in the background
    :param ban_timeout_s: how long a server that failed is avoided; doubles with each failure in a row; 0: never
    :param allowed_servers: peer ids, base58, of the only servers RemoteSequential may use; None: all
    :param blocked_servers: peer ids, base58, of servers it must not use
    :param show_route: log each route that RemoteSequential takes
    :param request_metadata: called with (peer id, "forward" or "backward", uids of the request) for each request; the server
        gives what it returns (names and plain values, 4 KiB at most) to its ``authorize``. Stock servers get nothing
    """

    connect_timeout_s: float | None = 5.0
    request_timeout_s: float | None = 180.0
    total_timeout_s: float | None = 300.0
    max_retries: int = 3
    min_backoff_s: float = 0.2
    max_backoff_s: float = 10.0
    max_tokens_per_request: int = 1024
    detect_anomalies: bool = False
    hold_tensors: bool = True
    transport: str = "auto"
    routing: str = "max_throughput"
    update_period_s: float = 60.0  # these two: as Petals
    ban_timeout_s: float = 15.0
    allowed_servers: tuple[str, ...] | None = None
    blocked_servers: tuple[str, ...] | None = None
    show_route: bool = False
    request_metadata: Callable[[str, str, tuple[str, ...]], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"transport: expected one of {', '.join(TRANSPORTS)}, got {self.transport!r}")
        if self.routing not in ROUTINGS:
            raise ConfigError(f"routing: expected one of {', '.join(ROUTINGS)}, got {self.routing!r}")
        check_positive(self, "update_period_s", allow_none=False)
        check_positive(self, "ban_timeout_s", allow_none=False, allow_zero=True)
        for name in ("allowed_servers", "blocked_servers"):
            object.__setattr__(self, name, _peer_names(name, getattr(self, name)))
        check_positive(self, "connect_timeout_s", "request_timeout_s", "total_timeout_s")
        check_positive(self, "min_backoff_s", "max_backoff_s", "max_retries", allow_none=False, allow_zero=True)
        check_positive(self, "max_tokens_per_request", allow_none=False)


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """How one TaskPool batches and bounds its work.

    :param min_batch_size: rows to wait for before a batch is formed, for at most ``max_wait_s``
    :param max_batch_size: rows in one batch; a single request with more is refused (clients split them)
    :param max_wait_s: longest a task waits for ``min_batch_size`` to be reached
    :param max_pending_tasks: waiting tasks before one is refused as Overloaded: the newest of the peer that has most
    :param max_pending_per_peer: the same for one peer, so that one flood cannot lock everybody out
    """

    min_batch_size: int = 1
    max_batch_size: int = 4096
    max_wait_s: float = 0.05
    max_pending_tasks: int = 4096
    max_pending_per_peer: int = 1024

    def __post_init__(self) -> None:
        check_positive(self, "min_batch_size", "max_batch_size", "max_pending_tasks", allow_none=False)
        check_positive(self, "max_pending_per_peer", allow_none=False)
        check_positive(self, "max_wait_s", allow_none=False, allow_zero=True)
        if self.min_batch_size > self.max_batch_size:
            raise ConfigError(
                f"min_batch_size ({self.min_batch_size}) is larger than max_batch_size ({self.max_batch_size})"
            )


@dataclass(frozen=True, kw_only=True)
class HandlerConfig:
    """What a server accepts from the network.

    :param max_request_bytes: of all tensors of one request together; wildcard sizes are bounded by this alone
    :param max_inflight_bytes: of all requests being received, waiting, computed or answered at one time
    :param max_inflight_bytes_per_peer: of those of one peer; a single request may be larger
    :param request_timeout_s: longest a request may take when its caller sets no shorter time
    :param read_timeout_s: longest silence while a request is being received (against slow senders)
    :param once_max_replies: finished backward replies kept to answer repeats; the peer that has most loses its oldest
    :param once_max_bytes: of those replies together, 2 KiB for each besides its values
    :param once_window_s: how long a repeated backward is recognized
    :param held_max_bytes: tensors held for their senders, who then need not send them again; of global tensors, and as much
        again of inputs of forwards, for the backwards that follow, and of the activations of these; 0: none
    :param held_max_bytes_per_peer: of tensors of one peer, of each kind; of activations half of all may be one peer's
    :param held_window_s: how long one is held that nobody uses
    """

    max_request_bytes: int = 2**30
    max_inflight_bytes: int = 2**32
    max_inflight_bytes_per_peer: int = 2**31
    request_timeout_s: float = 300.0
    read_timeout_s: float = 30.0
    once_max_replies: int = 4096
    once_max_bytes: int = 2**28
    once_window_s: float = 600.0
    held_max_bytes: int = 2**28
    held_max_bytes_per_peer: int = 2**26
    held_window_s: float = 300.0

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self) if field.name != "held_max_bytes"]
        check_positive(self, *names, allow_none=False)
        check_positive(self, "held_max_bytes", allow_none=False, allow_zero=True)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a Server announces, reports, saves and stops.

    :param update_period_s: how often experts are announced to the DHT
    :param expiration_s: how long an announcement lives; default twice the period, at least 3 s
    :param start_timeout_s: for all parts to start
    :param shutdown_timeout_s: for a graceful stop before the hard way, apart from saving
    :param stop_timeout_s: from the order to stop until experts must be saved, if there is a checkpoint directory
    :param checkpoint_period_s: how often experts are saved, if there is a checkpoint directory
    :param keep_checkpoints: newest checkpoints kept per expert
    :param stats_report_interval_s: how often served rows are reported; None: never
    :param direct: offer the direct link (Unix socket, TLS) next to libp2p
    :param direct_port: TCP port of the direct link; 0: any free one
    :param direct_hosts: names or addresses at which other hosts reach the direct link; none: those libp2p announces
    :param stuck_after_s: while a batch runs longer, the server is unhealthy: its experts are hidden and all who call are told
        to go elsewhere; None: never
    :param give_up_after_s: a batch that runs longer ends the server, for a supervisor to start it again; None: never
    :param drain_quiet_s: an expert that leaves is served on until nobody has called it for this long
    :param drain_timeout_s: but no longer than this
    :param balance_quality: a server of blocks that may move does so if the slowest block is served slower than this part of
        what it could be. 0: never; above 1: whenever there is a better place
    :param balance_period_s: mean time between two looks for a better place
    """

    update_period_s: float = 30.0
    expiration_s: float | None = None
    start_timeout_s: float = 60.0
    shutdown_timeout_s: float = 5.0
    stop_timeout_s: float = 300.0
    checkpoint_period_s: float = 60.0
    keep_checkpoints: int = 3
    stats_report_interval_s: float | None = None
    stuck_after_s: float | None = 600.0
    give_up_after_s: float | None = None
    direct: bool = True
    direct_port: int = 0
    direct_hosts: tuple[str, ...] = ()
    drain_quiet_s: float = 5.0
    drain_timeout_s: float = 60.0
    balance_quality: float = 0.75  # as Petals
    balance_period_s: float = 120.0

    def __post_init__(self) -> None:
        check_positive(self, "update_period_s", "start_timeout_s", "shutdown_timeout_s", allow_none=False)
        check_positive(self, "stop_timeout_s", allow_none=False)
        check_positive(self, "checkpoint_period_s", "keep_checkpoints", allow_none=False)
        if not 0 <= self.direct_port <= 65535:
            raise ConfigError(f"direct_port: expected a port from 0 to 65535, got {self.direct_port!r}")
        check_positive(self, "drain_quiet_s", "drain_timeout_s", "balance_quality", allow_none=False, allow_zero=True)
        check_positive(self, "balance_period_s", allow_none=False)
        check_positive(self, "expiration_s", "stats_report_interval_s", "stuck_after_s", "give_up_after_s")

    @property
    def announce_expiration_s(self) -> float:
        """How long an announcement lives."""
        if self.expiration_s is not None:
            return self.expiration_s
        return max(2 * self.update_period_s, DHT_MIN_EXPIRATION_S)


def replace_known(config: Any, **changes: Any) -> Any:
    """A copy of a config dataclass with the changes that are not None.

    :raises ConfigError: for a name the config does not have
    """
    known = {field.name: getattr(config, field.name) for field in fields(config)}
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise ConfigError(f"{type(config).__name__} has no setting {unknown}; it has {sorted(known)}")
    return type(config)(**{**known, **{name: value for name, value in changes.items() if value is not None}})


_noted: set[tuple[str, str]] = set()


def note_unused(owner: str, **given: bool) -> None:
    """Log once for each setting that hivemind's programs give and that has no effect here.

    :param owner: what takes it
    :param given: for each setting, whether it was given
    """
    for name in (name for name, was_given in given.items() if was_given and (owner, name) not in _noted):
        _noted.add((owner, name))
        logger.info("%s: %s has no effect here; it is accepted because hivemind's takes it", owner, name)
