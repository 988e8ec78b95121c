"""``hivemind-server`` (also ``moe-server``): serve experts until told to stop.

Owns: the order of things in a server process (check, start, say where it is, watch, stop) and its exit codes. Must not
know: how a server works. torch and hivemind are imported only once the command line is known to be good.

Exit codes: 0 stopped by SIGINT, SIGTERM or SIGHUP, or only measured; 1 could not start, failed later, or could not save all
that was learned; 2 bad usage. The only thing on stdout is one line: ``--initial_peers ...`` for others to join with, or what
was measured; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moe.cli.display import PlainFormatter
from moe.cli.parsing import parse_server_options
from moe.cli.stopping import StopRequested, StopSignals, end_children, leave
from moe.config import ServerConfig
from moe.errors import MoEError

if TYPE_CHECKING:
    from moe.server.stats import ServerStatistics

logger = logging.getLogger("moe.cli.run_server")  # not __name__, which is __main__ with python -m

OPEN_FILES = 2**15  # what --increase_file_limit asks for, as hivemind does
SGD_LR = 0.01  # hivemind's; adam gets torch's own default
TORCH_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "THP_MEM_ALLOC_ENABLE": "1"}  # see set_torch_environment
CHECK_PERIOD_S = 1.0  # how often to look at the server when nothing is to be reported; ours

# What Server.create takes under the name of the flag. The rest is translated in create_arguments.
CREATE_ARGUMENTS = (
    "announce_maddrs", "balance_quality", "block_indices", "block_prefix", "checkpoint_dir", "clip_grad_norm",
    "custom_module_path", "detect_anomalies", "device", "expert_cls", "expert_pattern", "expert_uids", "expiration",
    "hidden_dim", "host_maddrs", "identity_path", "initial_peers", "max_batch_size", "min_batch_size", "model_path",
    "num_blocks", "num_experts", "num_handlers", "num_training_steps", "num_warmup_steps", "scheduler", "throughput",
    "total_blocks", "train_on_non_finite", "update_period", "use_auto_relay", "use_relay",
)  # fmt: skip


# Of a server that nobody is to find.
ALONE = {"initial_peers": (), "host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "announce_maddrs": None, "identity_path": None}


class RunningServer(Protocol):
    """What this file needs of a Server."""

    @property
    def dht(self) -> Any: ...

    @property
    def failure(self) -> BaseException | None: ...

    @property
    def is_saving(self) -> bool: ...

    @property
    def lost(self) -> Mapping[str, int]: ...

    def wait(self, timeout: float) -> bool:
        """True once the server has stopped or failed."""
        ...

    def statistics(self) -> ServerStatistics: ...

    def shutdown(self) -> None: ...

    def join(self, timeout: float | None = None) -> None: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console scripts. Ends the process itself once a server has run.

    :param argv: arguments without the program's name; default: those of this process
    :returns: exit code, if it was told to stop before there was a server
    :raises SystemExit: with code 2, if the arguments are bad
    """
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(asctime)s.%(msecs)03d [%(levelname)s] %(message)s", "%b %d %H:%M:%S"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("moe").setLevel(logging.INFO)
    signals = StopSignals()
    signals.install()  # for good: the process ends with this function
    try:
        leave(run(parse_server_options(argv), signals))
    except StopRequested:  # while the command line was read
        return 0


def run(
    options: argparse.Namespace,
    signals: StopSignals,
    start: Callable[[argparse.Namespace], RunningServer] | None = None,
    peers_line: Callable[[Any], str] | None = None,
) -> int:
    """Run one server from start to end.

    :param options: as parse_server_options gives them
    :param signals: installed already
    :param start: starts the server and returns it when it can be called; default: start_server
    :param peers_line: how others reach a DHT; default: moe.dht.peers_line
    :returns: exit code
    """
    server, code, why = None, 0, ""
    try:
        if options.throughput == "dry_run":
            print(measure_only(options), flush=True)
            return 0
        server = (start or start_server)(options)
        if not signals.requested:  # code that swallows every exception may have swallowed the request
            announce(server, options.peers_file, peers_line)
            watch(server, options.stats_report_interval, lambda: signals.requested)
        if server.failure is not None:
            logger.error("the server failed: %s", _describe(server.failure))
    except StopRequested as request:
        why = str(request)
    except Exception as e:
        if not signals.requested:  # an import that is interrupted fails in any way it likes
            expected = isinstance(e, (MoEError, OSError))
            what = "go on" if server else "start"
            logger.error("the server could not %s: %s", what, _describe(e), exc_info=not expected)
            code = 1
    finally:
        signals.begin_stop(
            lambda: server is not None and server.is_saving
        )  # before anything that can get stuck, as logging
        if why:
            logger.info("%s, stopping", why)
        if not stop(server):
            code = 1
    if server is None:
        return code
    # whoever tells all processes of a server to stop may tell others first, which is a failure to the server
    failed = server.failure is not None and not signals.requested
    return 1 if failed or server.lost else code


def start_server(options: argparse.Namespace) -> RunningServer:
    """Import what is heavy, create the server and wait until it serves.

    :raises Exception: whatever keeps it from starting
    """
    if options.increase_file_limit:
        increase_file_limit()
    if options.checkpoint_dir is not None:
        options.checkpoint_dir.mkdir(exist_ok=True)

    set_torch_environment()  # before the import
    import torch

    from moe.server.server import Server

    if options.torch_threads is not None:
        torch.set_num_threads(options.torch_threads)
    server: RunningServer = Server.create(**create_arguments(options), start=True)
    return server


def set_torch_environment() -> None:
    """What suits a server, unless the environment says otherwise. Read once, so torch must not be imported before.

    Compute threads sleep while there is nothing to compute. By default OpenMP lets them spin for some milliseconds after
    each parallel region. In a server that is time the network and the callers on the same cores do not get: a nop call of
    8 MiB took the server 14 ms of CPU, asleep 3 ms (docs/performance.md).

    Large tensors are made of huge pages. Gradients and activations are new memory for each batch, which the kernel maps
    page by page: that was a third of the CPU time of training an ffn of hidden size 1024 with 32 rows.
    """
    for name, value in TORCH_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def create_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of Server.create for a parsed command line. Imports torch."""
    import torch

    from moe.schema import Compression
    from moe.server.checkpoints import find_checkpointed_uids

    arguments = {name: getattr(options, name) for name in CREATE_ARGUMENTS}
    chosen = ("num_experts", "expert_uids", "block_indices", "num_blocks", "model_path")
    if all(getattr(options, name) is None for name in chosen):
        found = find_checkpointed_uids(options.checkpoint_dir) if options.checkpoint_dir is not None else []
        arguments["num_experts"] = max(1, len(found))
    if options.optimizer == "none":
        optim_cls: Any = None
    elif options.optimizer == "sgd":
        optim_cls = functools.partial(torch.optim.SGD, lr=options.lr or SGD_LR)
    else:
        optim_cls = functools.partial(torch.optim.Adam, lr=options.lr) if options.lr else torch.optim.Adam
    return {
        **arguments,
        "optim_cls": optim_cls,
        "compression": Compression[options.compression],
        "checkpoint_period_s": options.checkpoint_period or ServerConfig.checkpoint_period_s,
        "keep_checkpoints": options.keep_checkpoints or ServerConfig.keep_checkpoints,
        "stop_timeout_s": options.stop_timeout or ServerConfig.stop_timeout_s,
        "request_timeout_s": options.request_timeout,
        "held_max_bytes": options.held_bytes,
        "balance_period_s": options.balance_period,
        "direct": options.direct,
        "direct_port": options.direct_port,
        "direct_hosts": tuple(options.direct_hosts),
    }


def measure_only(options: argparse.Namespace) -> str:
    """Make experts as a server would, in a swarm of its own, and say what one was measured at. Nothing is remembered.

    :raises Exception: whatever keeps it from being made or measured
    """
    set_torch_environment()  # before the import
    import torch

    from moe.dht import stop_dht
    from moe.server.assembly import assemble
    from moe.server.throughput import measure

    if options.torch_threads is not None:
        torch.set_num_threads(options.torch_threads)
    if options.checkpoint_dir is not None and not options.checkpoint_dir.exists():
        options.checkpoint_dir = None
    arguments = create_arguments(options)
    parts = assemble(**{**arguments, **ALONE, "throughput": None})
    try:
        backend = next(iter(parts.backends.values()))
        backend.to(parts.server_options["device"])
        measured = measure(backend)
    finally:
        stop_dht(parts.dht)
    num_blocks = 1 if parts.server_options["blocks"] is None else len(parts.backends)
    served = f"{measured}; to be announced: {measured.served_rows_per_s(num_blocks):.1f} rows/s"
    if options.use_auto_relay:
        served += f", through a relay {measured.served_rows_per_s(num_blocks, relayed=True):.1f}"
    return served


def announce(server: RunningServer, peers_file: Path | None, peers_line: Callable[[Any], str] | None = None) -> None:
    """Say how to join this server's swarm: on stdout, and in a file that is never seen half-written."""
    if peers_line is None:
        from moe.dht import peers_line as peers_line_of_dht

        peers_line = peers_line_of_dht
    line = peers_line(server.dht)
    logger.info("serving; others join this swarm with the line below")
    print(line, flush=True)
    if peers_file is not None:
        unfinished = peers_file.with_name(f".{peers_file.name}.{os.getpid()}")
        unfinished.write_text(line + "\n", encoding="utf-8")
        unfinished.replace(peers_file)


def watch(
    server: RunningServer, stats_report_interval_s: float | None, told_to_stop: Callable[[], bool] = lambda: False
) -> None:
    """Wait until the server has stopped or failed or is to stop, and report what it serves meanwhile."""
    if stats_report_interval_s is None:
        while not told_to_stop() and not server.wait(CHECK_PERIOD_S):
            pass
        return

    from moe.cli.report import Reporter

    with Reporter() as reporter:
        while not told_to_stop() and not server.wait(stats_report_interval_s):
            reporter.report(server.statistics())


def stop(server: RunningServer | None) -> bool:
    """Stop the server, if it came into being, and end all child processes.

    :returns: False if the server's own shutdown raised; its children are ended all the same
    """
    try:
        if server is not None:
            server.shutdown()
            server.join()
            logger.info("stopped")
        return True
    except Exception:
        logger.exception("the server could not shut down")
        return False
    finally:
        end_children()


def increase_file_limit() -> None:
    """Allow this process as many open files as the system lets it, up to OPEN_FILES. Never lowers the limit."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        logger.info("limit of open files raised from %d to %d", soft, wanted)
    except (OSError, ValueError) as e:
        logger.warning("the limit of open files stays at %d: %s", soft, e)


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, MoEError) and str(error) else f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
