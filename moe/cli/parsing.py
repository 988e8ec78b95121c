"""Reading a command line. Owns: the flags of ``hivemind-server``, what a flag may be, which ones contradict each other.

Everything that can be wrong is found here, before torch or hivemind are imported: a typo costs a fraction of a second
and exit code 2. Must not know: servers, sockets, signals. Creates nothing on disk.

Flags, their meaning and the config file are those of hivemind 1.1.12 (hivemind/hivemind_cli/run_server.py); more are
added.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import configargparse

from moe.config import (
    BUILTIN_EXPERTS,
    COMPRESSIONS,
    DHT_MIN_EXPIRATION_S,
    MAX_BLOCKS,
    OPTIMIZERS,
    SCHEDULERS,
    HandlerConfig,
    PoolConfig,
    ServerConfig,
)
from moe.errors import ConfigError
from moe.expert_uid import UidPattern, block_range, is_valid_prefix, is_valid_uid

logger = logging.getLogger(__name__)

USAGE_ERROR = 2  # exit code, as argparse has it
THROUGHPUT_MODES = ("auto", "eval", "dry_run")
DECAYING_SCHEDULERS = ("cosine", "linear")  # those that have to know when to reach zero
DEVICE_PATTERN = re.compile(r"(cpu|cuda|hpu|mps|mtia|npu|xla|xpu)(:\d+)?")
PEER_ID_PATTERN = re.compile(r"[1-9A-HJ-NP-Za-km-z]{46,60}|b[a-z2-7]{50,80}")  # base58, or a CID in base32


class Parser(configargparse.ArgParser):  # type: ignore[misc]
    """configargparse whose complaints are two lines, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Write ``message`` to stderr and exit with code 2."""
        print(f"{self.prog}: error: {message}\nTry '{self.prog} --help'.", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


# --- what a value may be ----------------------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    return int(_number(text, int, "a positive whole number", lambda value: value >= 1))


def whole_number(text: str) -> int:
    """Argument type: a whole number of at least 0."""
    return int(_number(text, int, "a whole number >= 0", lambda value: value >= 0))


def positive_float(text: str) -> float:
    """Argument type: a finite number above 0."""
    return _number(text, float, "a positive number", lambda value: 0 < value < float("inf"))


def fraction(text: str) -> float:
    """Argument type: a finite number of at least 0."""
    return _number(text, float, "a number >= 0", lambda value: 0 <= value < float("inf"))


def throughput(text: str) -> float | str:
    """Argument type: how to know a server's throughput, or rows per second."""
    if text in THROUGHPUT_MODES:
        return text
    return _number(text, float, f"{', '.join(THROUGHPUT_MODES)} or rows per second", lambda value: 0 < value < 1e18)


def _number(text: str, kind: Callable[[str], float], expected: str, is_good: Callable[[float], bool]) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = float("nan")
    if not is_good(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def device_name(text: str) -> str:
    """Argument type: a torch device, such as ``cpu`` or ``cuda:1``. Whether this machine has it is found out later."""
    if not DEVICE_PATTERN.fullmatch(text):
        raise argparse.ArgumentTypeError(f"expected a torch device such as 'cpu', 'cuda' or 'cuda:1', got {text!r}")
    return text


def multiaddr(text: str) -> str:
    """Argument type: an address in multiaddr notation, such as ``/ip4/203.0.113.5/tcp/31330``.

    Knows the protocols that hivemind 1.1.12 knows (hivemind/utils/multiaddr/protocols.py) and looks nothing up.
    """
    if not text.startswith("/"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a multiaddr: it starts with '/', for example /ip4/203.0.113.5/tcp/31330"
        )
    parts = text.rstrip("/").split("/")[1:]
    if not parts:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiaddr: it names no protocol")
    rest = iter(parts)
    for protocol in rest:
        if protocol not in _PROTOCOLS:
            raise argparse.ArgumentTypeError(
                f"{text!r}: {protocol!r} is not a protocol; known are {', '.join(sorted(_PROTOCOLS))}"
            )
        if protocol == "unix":  # the rest is a path
            if not any(rest):
                raise argparse.ArgumentTypeError(f"{text!r}: 'unix' has to be followed by a path")
            break
        check = _PROTOCOLS[protocol]
        if check is None:
            continue
        value = next(rest, None)
        if value is None:
            raise argparse.ArgumentTypeError(f"{text!r}: {protocol!r} has to be followed by a value")
        problem = check(value)
        if problem is not None:
            raise argparse.ArgumentTypeError(f"{text!r}: {value!r} is not {problem} (after {protocol!r})")
    return text


def peer_multiaddr(text: str) -> str:
    """Argument type: a multiaddr that ends with the id of the peer, such as ``.../tcp/31330/p2p/12D3Koo...``."""
    if not re.search(r"/p2p/[^/]+/?$", multiaddr(text)):
        raise argparse.ArgumentTypeError(f"{text!r} does not end with '/p2p/' and the id of the peer")
    return text


def announced_multiaddr(text: str) -> str:
    """Argument type: a multiaddr others can dial, so its port is not 0."""
    if re.search(r"/(tcp|udp)/0+(/|$)", multiaddr(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: port 0 cannot be dialed; announce the port others reach")
    return text


def _expects_ip(kind: Callable[[str], object], name: str) -> Callable[[str], str | None]:
    def check(value: str) -> str | None:
        try:
            kind(value)
        except ValueError:
            return f"an {name} address"
        return None

    return check


def _expects_port(value: str) -> str | None:
    good = value.isascii() and value.isdigit() and int(value) <= 65535
    return None if good else "a port between 0 and 65535"


def _expects_peer_id(value: str) -> str | None:
    return None if PEER_ID_PATTERN.fullmatch(value) else "a peer id such as 12D3KooW..."


def _expects_host(value: str) -> str | None:
    return None if re.fullmatch(r"[^\s:/]+", value) else "a host name"


_PROTOCOLS: dict[str, Callable[[str], str | None] | None] = {
    "ip4": _expects_ip(ipaddress.IPv4Address, "IPv4"),
    "ip6": _expects_ip(ipaddress.IPv6Address, "IPv6"),
    "p2p": _expects_peer_id,
    **dict.fromkeys(("tcp", "udp", "dccp", "sctp"), _expects_port),
    **dict.fromkeys(("dns", "dns4", "dns6", "dnsaddr"), _expects_host),
    **dict.fromkeys(("ip6zone", "onion", "onion3", "unix"), lambda value: None),
    **dict.fromkeys(("udt", "utp", "quic", "quic-v1", "http", "https", "tls", "ws", "wss", "p2p-circuit")),
    **dict.fromkeys(("p2p-websocket-star", "p2p-webrtc-star", "p2p-webrtc-direct")),
}


# --- hivemind-server --------------------------------------------------------------------------------------------------


def port(text: str) -> int:
    """A TCP port; 0: any free one."""
    number = whole_number(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return number


def build_server_parser() -> Parser:
    """The parser of ``hivemind-server``: every flag of hivemind 1.1.12, and ours."""
    parser = Parser(
        description="Serve experts to a swarm. Without --initial_peers this server is the first of a new swarm.",
        default_config_files=["config.yml"],
    )
    add = parser.add_argument
    add(
        "-c",
        "--config",
        is_config_file=True,
        help="file with 'flag: value' lines (default: config.yml, if there is one)",
    )

    group = parser.add_argument_group("experts")
    add = group.add_argument
    add("--num_experts", type=positive_int, help="how many experts to serve (default: those in checkpoint_dir, or 1)")
    add(
        "--expert_pattern",
        help='pattern of the uids, e.g. "ffn.[0:4].[0:256]" for free uids between ffn.0.0 and ffn.3.255, chosen at '
        "random. Use either num_experts and this, or expert_uids",
    )
    add("--expert_uids", nargs="*", help="the exact uids to serve, instead of num_experts and expert_pattern")
    add(
        "--model_path",
        type=Path,
        help="folder with a pretrained Hugging Face model: serve its blocks (all, or those of block_indices), instead of "
        "experts of expert_cls; they are not trained, unless optimizer is given",
    )
    add(
        "--block_indices",
        help='serve these blocks of a model, e.g. "0:3" for blocks 0, 1 and 2, instead of the three above',
    )
    add(
        "--num_blocks",
        type=positive_int,
        help="serve this many consecutive blocks, those that the swarm needs most, and move when that changes; instead of "
        "block_indices",
    )
    add("--block_prefix", default="block.", help='what the uids of blocks begin with (default: "block.")')
    add("--total_blocks", type=positive_int, help="blocks of the model (default: up to the end of block_indices)")
    add("--expert_cls", default="ffn", help=f"kind of expert: {', '.join(BUILTIN_EXPERTS)}, or your own (default: ffn)")
    add("--hidden_dim", type=positive_int, default=1024, help="main size of an expert (default: 1024)")
    add("--custom_module_path", help="python file that registers your own experts with register_expert_class")
    add("--checkpoint_dir", type=Path, help="directory to load experts from and to save them to; created if missing")
    add(
        "--checkpoint_period",
        type=positive_float,
        help=f"seconds between checkpoints (default: {ServerConfig.checkpoint_period_s:g})",
    )
    add(
        "--keep_checkpoints",
        type=positive_int,
        help=f"how many of its newest checkpoints every expert keeps (default: {ServerConfig.keep_checkpoints})",
    )

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="'none': experts never change (default: adam)")
    add("--lr", type=positive_float, help="learning rate (default: adam 0.001, sgd 0.01)")
    add("--scheduler", choices=SCHEDULERS, default="none", help="schedule of the learning rate (default: none)")
    add("--num_warmup_steps", type=whole_number, help="steps in which a schedule reaches the full learning rate")
    add("--num_training_steps", type=positive_int, help="steps after which a linear or cosine schedule ends")
    add("--clip_grad_norm", type=positive_float, help="clip the gradients of an expert to this norm")
    add("--detect_anomalies", action="store_true", help="refuse inputs and gradients that are not finite")
    add(
        "--train_on_non_finite",
        action="store_true",
        help="train with parameter gradients that are not finite, too; by default a call that has such trains nothing",
    )

    group = parser.add_argument_group("batching and device")
    add = group.add_argument
    add("--min_batch_size", type=positive_int, default=PoolConfig.min_batch_size, help="rows to wait for, shortly")
    add(
        "--max_batch_size",
        type=positive_int,
        default=PoolConfig.max_batch_size,
        help=f"most rows in one batch (default: {PoolConfig.max_batch_size})",
    )
    add("--device", type=device_name, help="in torch notation (default: cuda if there is one, else cpu)")
    add("--torch_threads", type=positive_int, help="threads torch may compute with (default: torch's own choice)")
    add("--num_handlers", type=positive_int, help="accepted for hivemind's sake: one network thread takes all requests")
    add(
        "--request_timeout",
        type=positive_float,
        default=HandlerConfig.request_timeout_s,
        help=f"most seconds a request may take (default: {HandlerConfig.request_timeout_s:g})",
    )
    add(
        "--held_bytes",
        type=whole_number,
        default=HandlerConfig.held_max_bytes,
        help="bytes of callers' tensors to hold, so that they need not be sent again: of global tensors, as much again of "
        "inputs for backwards, and of activations; a caller gets a fourth at most, half of the latter (default: "
        f"{HandlerConfig.held_max_bytes})",
    )
    add(
        "--compression",
        type=str.upper,
        choices=COMPRESSIONS,
        default="NONE",
        help="codec for all floating-point tensors these experts take and return (default: NONE)",
    )

    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--initial_peers", type=peer_multiaddr, nargs="*", default=[], help="addresses of peers of the swarm to join")
    add("--peers_file", type=Path, help="also write the line with this server's --initial_peers to this file")
    add(
        "--host_maddrs",
        type=multiaddr,
        nargs="+",
        default=["/ip4/0.0.0.0/tcp/0"],
        help="addresses to listen on (default: /ip4/0.0.0.0/tcp/0, a free port on all IPv4 interfaces)",
    )
    add(
        "--announce_maddrs", type=announced_multiaddr, nargs="+", help="addresses others shall use to reach this server"
    )
    add("--no_relay", action="store_false", dest="use_relay", help="do not use relays to reach peers")
    add(
        "--use_auto_relay",
        action="store_true",
        help="look for relays to be reached through, if behind NAT or a firewall",
    )
    add("--no_direct", action="store_false", dest="direct", help="carry tensors over libp2p only, without direct links")
    add("--direct_port", type=port, default=0, help="TCP port for direct links of other hosts (default: any free one)")
    add("--direct_hosts", nargs="+", default=[], help="names or addresses for direct links (default: as announced)")
    add("--identity_path", help="file with this peer's private key, so that its id stays; written if missing")
    add(
        "--update_period",
        type=positive_float,
        default=ServerConfig.update_period_s,
        help=f"seconds between announcements of the experts (default: {ServerConfig.update_period_s:g})",
    )
    add("--expiration", type=positive_float, help="seconds an announcement lives (default: two periods)")

    add(
        "--throughput",
        type=throughput,
        default="auto",
        help="rows per second to announce; 'auto': measured, once for each kind of expert on this machine; 'eval': measured "
        "now; 'dry_run': measure, print and exit (default: auto)",
    )
    add(
        "--balance_quality",
        type=fraction,
        default=ServerConfig.balance_quality,
        help="with num_blocks: move if the slowest block is served slower than this part of what it could be; 0: never, above "
        f"1: whenever there is a better place (default: {ServerConfig.balance_quality:g})",
    )
    add(
        "--balance_period",
        type=positive_float,
        default=ServerConfig.balance_period_s,
        help=f"mean seconds between two looks for a better place (default: {ServerConfig.balance_period_s:g})",
    )

    group = parser.add_argument_group("process")
    add = group.add_argument
    add("--stats_report_interval", type=positive_float, help="seconds between reports of served rows (default: none)")
    add(
        "--stop_timeout",
        type=positive_float,
        help="with checkpoint_dir: most seconds to save the experts in when told to stop (default: "
        f"{ServerConfig.stop_timeout_s:g})",
    )
    add("--increase_file_limit", action="store_true", help="raise the limit of open files as far as the system lets us")
    return parser


def parse_server_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check a command line of ``hivemind-server`` (default: that of this process).

    Warns of flags that have no effect.

    :raises SystemExit: with code 2, after a message on stderr; with code 0 after ``--help``
    """
    parser = build_server_parser()
    options = argparse.Namespace()
    parser.parse_args(argv, namespace=options)
    del options.config
    of_model = options.model_path is not None or options.num_blocks is not None
    if of_model and "--optimizer" in parser.get_source_to_settings_dict().get("defaults", ()):
        options.optimizer = "none"  # nobody asked for another one
    try:
        _check_experts(options)
        _check_blocks(options)
        _check_training(options)
        _check_network(options)
        _check_paths(options)
        PoolConfig(min_batch_size=options.min_batch_size, max_batch_size=options.max_batch_size)
    except ConfigError as e:
        parser.error(e.message)
    for warning in _settings_without_effect(options):
        logger.warning(warning)
    return options


def _check_blocks(options: argparse.Namespace) -> None:
    if not is_valid_prefix(options.block_prefix):
        raise ConfigError(f"block_prefix: expected a name and a dot, such as 'block.', got {options.block_prefix!r}")
    if options.total_blocks is not None and options.total_blocks > MAX_BLOCKS:
        raise ConfigError(f"total_blocks: expected {MAX_BLOCKS} at most, got {options.total_blocks}")
    choosing = ("block_indices", "model_path", "num_blocks")
    chosen_by = next((name for name in choosing if getattr(options, name) is not None), None)
    for name in ("num_experts", "expert_uids", "expert_pattern"):
        if chosen_by is not None and getattr(options, name) is not None:
            raise ConfigError(f"{chosen_by} says which experts to serve; it cannot be combined with {name}")
    if options.model_path is not None:
        for name in ("custom_module_path", "total_blocks"):
            if getattr(options, name) is not None:
                raise ConfigError(f"model_path says what the blocks are; it cannot be combined with {name}")
        if not (options.model_path / "config.json").is_file():
            raise ConfigError(f"model_path: there is no model in {options.model_path}: it has no config.json")
        if importlib.util.find_spec("transformers") is None:
            raise ConfigError('model_path needs transformers: pip install "transformers>=5,<6"')
    if options.num_blocks is not None:
        _check_num_blocks(options)
    if options.block_indices is None:
        return
    indices, total = block_range(options.block_indices), options.total_blocks
    if indices.stop > (MAX_BLOCKS if total is None else total):
        raise ConfigError(
            f"block_indices: {options.block_indices} ends beyond the {total or MAX_BLOCKS} blocks of the model"
        )


def _check_num_blocks(options: argparse.Namespace) -> None:
    if options.block_indices is not None:
        raise ConfigError("num_blocks chooses which blocks to serve; it cannot be combined with block_indices")
    if options.model_path is None and options.total_blocks is None:
        raise ConfigError("num_blocks: give total_blocks, too; without it, nobody knows where the model ends")
    if options.total_blocks is not None and options.num_blocks > options.total_blocks:
        raise ConfigError(f"num_blocks ({options.num_blocks}) is more than total_blocks ({options.total_blocks})")
    if options.optimizer != "none" and options.balance_quality > 0:
        raise ConfigError(
            "num_blocks: blocks that are trained cannot move, where they go to, others have other copies; leave out optimizer, "
            "or give balance_quality 0"
        )


def _check_experts(options: argparse.Namespace) -> None:
    if options.expert_uids is not None:
        if options.num_experts is not None or options.expert_pattern is not None:
            raise ConfigError(
                "Please provide either expert_uids *or* num_experts (possibly with expert_pattern), but not both"
            )
        if not options.expert_uids:
            raise ConfigError("expert_uids: expected at least one uid")
        for uid in options.expert_uids:
            if not is_valid_uid(uid):
                raise ConfigError(f"expert_uids: {uid!r} is not a uid; expected a name and coordinates, as in ffn.3.7")
        repeated = sorted({uid for uid in options.expert_uids if options.expert_uids.count(uid) > 1})
        if repeated:
            raise ConfigError(f"expert_uids: {', '.join(repeated)} is given more than once")
    if options.expert_pattern is not None:
        wanted: int = options.num_experts or 1
        available = len(UidPattern(options.expert_pattern))
        if available < wanted:
            raise ConfigError(
                f"expert_pattern {options.expert_pattern} has {available} uids, fewer than num_experts ({wanted})"
            )
    if options.custom_module_path is None and options.expert_cls not in BUILTIN_EXPERTS:
        raise ConfigError(
            f"expert_cls: {options.expert_cls!r} is not one of the built-in experts {', '.join(BUILTIN_EXPERTS)}; "
            f"to serve your own, give its file with --custom_module_path"
        )


def _check_training(options: argparse.Namespace) -> None:
    if options.optimizer == "none":
        for name, unset in (("scheduler", "none"), ("clip_grad_norm", None), ("lr", None)):
            if getattr(options, name) != unset:
                raise ConfigError(f"{name} needs an optimizer, but optimizer is 'none'")
    warmup: int = options.num_warmup_steps or 0
    total: int | None = options.num_training_steps
    if options.scheduler in DECAYING_SCHEDULERS:
        if total is None:
            raise ConfigError(f"scheduler '{options.scheduler}' needs num_training_steps")
        if warmup > total:
            raise ConfigError(f"num_warmup_steps ({warmup}) is larger than num_training_steps ({total})")


def _check_network(options: argparse.Namespace) -> None:
    if options.use_auto_relay and not options.use_relay:
        raise ConfigError("use_auto_relay contradicts no_relay")
    if options.expiration is not None:
        if options.expiration < DHT_MIN_EXPIRATION_S:
            raise ConfigError(
                f"expiration ({options.expiration:g} s): the DHT needs {DHT_MIN_EXPIRATION_S:g} s or more"
            )
        if options.expiration <= options.update_period:
            raise ConfigError(
                f"expiration ({options.expiration:g} s) has to be longer than update_period "
                f"({options.update_period:g} s), or the experts vanish between two announcements"
            )


def _check_paths(options: argparse.Namespace) -> None:
    if options.custom_module_path is not None and not Path(options.custom_module_path).is_file():
        raise ConfigError(f"custom_module_path: there is no file {options.custom_module_path}")
    if options.identity_path is not None:
        _check_file_to_write("identity_path", Path(options.identity_path), to_replace=False)
    if options.peers_file is not None:
        _check_file_to_write("peers_file", options.peers_file, to_replace=True)
    if options.checkpoint_dir is not None:
        directory = options.checkpoint_dir
        if not directory.exists():
            directory = directory.absolute().parent  # will be made in there
        if not directory.is_dir():
            raise ConfigError(f"checkpoint_dir: there is no directory {directory}")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ConfigError(f"checkpoint_dir: no permission to write to {directory}")


def _check_file_to_write(name: str, path: Path, *, to_replace: bool) -> None:
    if path.is_dir():
        raise ConfigError(f"{name}: {path} is a directory, expected a file")
    if path.exists() and not to_replace:
        if not os.access(path, os.R_OK):
            raise ConfigError(f"{name}: no permission to read {path}")
        return
    directory = path.absolute().parent
    if not directory.is_dir():
        raise ConfigError(f"{name}: there is no directory {directory}")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"{name}: no permission to write to {directory}")


def _settings_without_effect(options: argparse.Namespace) -> Iterable[str]:
    """Settings that are harmless but ignored: an old command line may have them, so they are no error."""
    if options.total_blocks is not None and options.block_indices is None and options.num_blocks is None:
        yield "total_blocks has no effect without block_indices or num_blocks"
    if options.num_blocks is None:
        for name, default in (
            ("balance_quality", ServerConfig.balance_quality),
            ("balance_period", ServerConfig.balance_period_s),
        ):
            if getattr(options, name) != default:
                yield f"{name} has no effect without num_blocks"
    if options.scheduler == "none":
        for name in ("num_warmup_steps", "num_training_steps"):
            if getattr(options, name) is not None:
                yield f"{name} has no effect without a scheduler"
    elif options.scheduler not in DECAYING_SCHEDULERS and options.num_training_steps is not None:
        yield f"num_training_steps has no effect with scheduler '{options.scheduler}'"
    if options.checkpoint_dir is None:
        for name in ("checkpoint_period", "keep_checkpoints", "stop_timeout"):
            if getattr(options, name) is not None:
                yield f"{name} has no effect without checkpoint_dir"
