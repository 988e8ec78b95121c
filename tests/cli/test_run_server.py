"""``hivemind-server``: its flags, what it refuses and how fast, how it starts, stops, fails. The server is a fake."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import inspect
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from moe.cli import run_server
from moe.cli.parsing import build_server_parser, parse_server_options
from moe.cli.stopping import StopSignals
from moe.config import BUILTIN_EXPERTS
from moe.errors import ConfigError, LifecycleError
from moe.schema import Compression
from moe.server.stats import ExpertStatistics, ServerStatistics

ROOT = Path(__file__).resolve().parents[2]
PEER_ID = "12D3KooWFDB41gDnfxFZdSbL8T3oxh8Z2AkbWpaBqGWrEaFoVEJo"
PEER = f"/ip4/203.0.113.5/tcp/31330/p2p/{PEER_ID}"
LINE = f"--initial_peers {PEER}"


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in a directory without a config.yml."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(*argv: str) -> argparse.Namespace:
    return parse_server_options(list(argv))


# --- flags ------------------------------------------------------------------------------------------------------------


def stock_flags() -> dict[str, ast.Call]:
    """The flags of the installed hivemind-server, each with the call that adds it."""
    spec = importlib.util.find_spec("hivemind")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).with_name("hivemind_cli") / "run_server.py"
    flags = {}
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("parser.add", "parser.add_argument"):
            flags[ast.literal_eval(node.args[-1])] = node
    return flags


def test_has_every_flag_of_hivemind_with_its_default() -> None:
    stock, ours = stock_flags(), build_server_parser()
    known = {option: action for action in ours._actions for option in action.option_strings}
    assert len(stock) == 28
    assert set(stock) <= set(known)
    for flag, call in stock.items():
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if "default" in given and flag != "--max_batch_size":  # hivemind: 16384 here, 4096 in its API
            assert known[flag].default == ast.literal_eval(given["default"]), flag
        if "dest" in given:
            assert known[flag].dest == ast.literal_eval(given["dest"]), flag
        assert known[flag].required is False, flag


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--num_experts", "16"], "num_experts", 16),
        (["--num_experts", "3", "--expert_pattern", "ffn.[0:4].[0:256]"], "expert_pattern", "ffn.[0:4].[0:256]"),
        (["--expert_uids", "ffn.0.1", "ffn.3.7"], "expert_uids", ["ffn.0.1", "ffn.3.7"]),
        (["--expert_cls", "transformer"], "expert_cls", "transformer"),
        (["--hidden_dim", "64"], "hidden_dim", 64),
        (["--host_maddrs", "/ip4/127.0.0.1/tcp/31330"], "host_maddrs", ["/ip4/127.0.0.1/tcp/31330"]),
        (["--host_maddrs", "/ip4/0.0.0.0/tcp/0", "/ip6/::/udp/0/quic-v1"], "host_maddrs",
         ["/ip4/0.0.0.0/tcp/0", "/ip6/::/udp/0/quic-v1"]),
        (["--announce_maddrs", "/dns4/example.org/tcp/80"], "announce_maddrs", ["/dns4/example.org/tcp/80"]),
        (["--no_relay"], "use_relay", False),
        ([], "use_relay", True),
        (["--use_auto_relay"], "use_auto_relay", True),
        (["--num_handlers", "4"], "num_handlers", 4),
        (["--min_batch_size", "2"], "min_batch_size", 2),
        (["--max_batch_size", "16384"], "max_batch_size", 16384),
        ([], "max_batch_size", 4096),
        (["--device", "cuda:1"], "device", "cuda:1"),
        (["--optimizer", "sgd"], "optimizer", "sgd"),
        (["--lr", "1e-4"], "lr", 1e-4),
        (["--scheduler", "linear", "--num_training_steps", "100"], "scheduler", "linear"),
        (["--scheduler", "constant", "--num_warmup_steps", "10"], "num_warmup_steps", 10),
        (["--update_period", "5"], "update_period", 5.0),
        (["--expiration", "61.5"], "expiration", 61.5),
        (["--clip_grad_norm", "1"], "clip_grad_norm", 1.0),
        (["--initial_peers", PEER, PEER], "initial_peers", [PEER, PEER]),
        (["--initial_peers"], "initial_peers", []),
        (["--increase_file_limit"], "increase_file_limit", True),
        (["--compression", "float16"], "compression", "FLOAT16"),
        (["--checkpoint_dir", "checkpoints"], "checkpoint_dir", Path("checkpoints")),
        (["--checkpoint_dir", ".", "--checkpoint_period", "5"], "checkpoint_period", 5.0),
        (["--checkpoint_dir", ".", "--keep_checkpoints", "2"], "keep_checkpoints", 2),
        (["--checkpoint_dir", ".", "--stop_timeout", "900"], "stop_timeout", 900.0),
        (["--stats_report_interval", "10"], "stats_report_interval", 10.0),
        (["--identity_path", "new.id"], "identity_path", "new.id"),
        (["--detect_anomalies"], "detect_anomalies", True),
        (["--train_on_non_finite"], "train_on_non_finite", True),
        ([], "train_on_non_finite", False),
        (["--request_timeout", "9"], "request_timeout", 9.0),
        (["--held_bytes", "0"], "held_bytes", 0),
        (["--no_direct"], "direct", False),
        (["--direct_port", "31337"], "direct_port", 31337),
        (["--direct_hosts", "a.example", "10.0.0.1"], "direct_hosts", ["a.example", "10.0.0.1"]),
        (["--peers_file", "peers.txt"], "peers_file", Path("peers.txt")),
        (["--torch_threads", "2"], "torch_threads", 2),
        (["--block_indices", "2:5"], "block_indices", "2:5"),
        (["--block_indices", "0:3", "--total_blocks", "12"], "total_blocks", 12),
        (["--block_indices", "0:3", "--block_prefix", "bert."], "block_prefix", "bert."),
        ([], "block_prefix", "block."),
        (["--num_blocks", "4", "--total_blocks", "12"], "num_blocks", 4),
        (["--num_blocks", "4", "--total_blocks", "12"], "optimizer", "none"),
        (["--num_blocks", "4", "--total_blocks", "12", "--optimizer", "sgd", "--balance_quality", "0"], "optimizer", "sgd"),
        (["--num_blocks", "4", "--total_blocks", "12", "--balance_quality", "1.5"], "balance_quality", 1.5),
        (["--num_blocks", "4", "--total_blocks", "12", "--balance_period", "5"], "balance_period", 5.0),
        ([], "balance_quality", 0.75),
        ([], "throughput", "auto"),
        (["--throughput", "eval"], "throughput", "eval"),
        (["--throughput", "dry_run"], "throughput", "dry_run"),
        (["--throughput", "1e3"], "throughput", 1000.0),
    ],
)  # fmt: skip
def test_flags(argv: list[str], name: str, value: object) -> None:
    assert getattr(parse(*argv), name) == value


def test_custom_module_allows_any_expert_cls(tmp_path: Path) -> None:
    module = tmp_path / "mine.py"
    module.touch()
    options = parse("--expert_cls", "mine", "--custom_module_path", str(module))
    assert (options.expert_cls, options.custom_module_path) == ("mine", str(module))


def test_config_file(tmp_path: Path) -> None:
    config = tmp_path / "server.yml"
    config.write_text(
        textwrap.dedent(f"""
            # a comment
            expert_cls: nop
            hidden_dim: 16
            expert_uids: [nop.0, nop.1]
            initial_peers: [{PEER}]
            no_relay: true
            increase_file_limit: True
        """)
    )
    options = parse("-c", str(config), "--hidden_dim", "32")
    assert (options.expert_cls, options.hidden_dim) == ("nop", 32)
    assert options.expert_uids == ["nop.0", "nop.1"]
    assert options.initial_peers == [PEER]
    assert options.use_relay is False
    assert options.increase_file_limit is True
    assert not hasattr(options, "config")


def test_config_yml_is_read_if_present(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text("hidden_dim: 16\n")
    assert parse().hidden_dim == 16


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--num_experts", "0"], "argument --num_experts: expected a positive whole number, got '0'"),
        (["--hidden_dim", "1.5"], "argument --hidden_dim: expected a positive whole number, got '1.5'"),
        (["--num_warmup_steps", "-1"], "argument --num_warmup_steps: expected a whole number >= 0, got '-1'"),
        (["--update_period", "inf"], "argument --update_period: expected a positive number, got 'inf'"),
        (["--lr", "nan"], "argument --lr: expected a positive number, got 'nan'"),
        (["--expert_uids", "ffn.0", "--num_experts", "1"], "either expert_uids *or* num_experts"),
        (["--expert_uids", "ffn.0", "--expert_pattern", "ffn.[0:4]"], "either expert_uids *or* num_experts"),
        (["--expert_uids"], "expected at least one uid"),
        (["--expert_uids", "ffn.0", "ffn.01"], "'ffn.01' is not a uid"),
        (["--expert_uids", "ffn.0", "ffn.0"], "ffn.0 is given more than once"),
        (["--expert_pattern", "ffn.[0:x]"], "Expert pattern ffn.[0:x] has invalid block [0:x]"),
        (["--expert_pattern", "ffn.[0:4]", "--num_experts", "5"], "has 4 uids, fewer than num_experts (5)"),
        (["--num_blocks", "4"], "num_blocks: give total_blocks, too"),
        (["--num_blocks", "4", "--total_blocks", "3"], "num_blocks (4) is more than total_blocks (3)"),
        (["--num_blocks", "4", "--total_blocks", "9", "--block_indices", "0:4"], "cannot be combined with block_indices"),
        (["--num_blocks", "4", "--total_blocks", "9", "--num_experts", "4"], "num_blocks says which experts to serve"),
        (["--num_blocks", "4", "--total_blocks", "9", "--optimizer", "sgd"], "blocks that are trained cannot move"),
        (["--balance_quality", "-1"], "argument --balance_quality: expected a number >= 0, got '-1'"),
        (["--balance_period", "0"], "argument --balance_period: expected a positive number, got '0'"),
        (["--throughput", "fast"], "expected auto, eval, dry_run or rows per second, got 'fast'"),
        (["--throughput", "inf"], "expected auto, eval, dry_run or rows per second, got 'inf'"),
        (["--block_indices", "3"], "expected FIRST:END, such as 0:3 for blocks 0, 1 and 2, got '3'"),
        (["--block_indices", "3:3"], "expected FIRST:END"),
        (["--block_indices", "0:3", "--num_experts", "3"], "block_indices says which experts to serve"),
        (["--block_indices", "0:3", "--expert_uids", "a.0"], "it cannot be combined with expert_uids"),
        (["--block_indices", "0:3", "--total_blocks", "2"], "0:3 ends beyond the 2 blocks of the model"),
        (["--block_indices", "0:9999"], "ends beyond the 4096 blocks"),
        (["--block_indices", "0:3", "--block_prefix", "block"], "expected a name and a dot, such as 'block.', got 'block'"),
        (["--total_blocks", "5000"], "total_blocks: expected 4096 at most, got 5000"),
        (["--model_path", "gone"], "model_path: there is no model in gone: it has no config.json"),
        (["--model_path", ".", "--num_experts", "3"], "model_path says which experts to serve"),
        (["--model_path", ".", "--total_blocks", "3"], "it cannot be combined with total_blocks"),
        (["--expert_cls", "fnn"], f"'fnn' is not one of the built-in experts {', '.join(BUILTIN_EXPERTS)}"),
        (["--custom_module_path", "gone.py"], "custom_module_path: there is no file gone.py"),
        (["--custom_module_path", "."], "custom_module_path: there is no file ."),
        (["--optimizer", "rmsprop"], "argument --optimizer: invalid choice: 'rmsprop'"),
        (["--scheduler", "step"], "argument --scheduler: invalid choice: 'step'"),
        (["--scheduler", "linear"], "scheduler 'linear' needs num_training_steps"),
        (["--scheduler", "cosine", "--num_warmup_steps", "5"], "scheduler 'cosine' needs num_training_steps"),
        (["--scheduler", "linear", "--num_warmup_steps", "9", "--num_training_steps", "8"],
         "num_warmup_steps (9) is larger than num_training_steps (8)"),
        (["--optimizer", "none", "--scheduler", "constant"], "scheduler needs an optimizer"),
        (["--optimizer", "none", "--clip_grad_norm", "1"], "clip_grad_norm needs an optimizer"),
        (["--optimizer", "none", "--lr", "1"], "lr needs an optimizer"),
        (["--min_batch_size", "9", "--max_batch_size", "8"], "min_batch_size (9) is larger than max_batch_size (8)"),
        (["--device", "gpu"], "expected a torch device such as 'cpu', 'cuda' or 'cuda:1', got 'gpu'"),
        (["--compression", "zip"], "argument --compression: invalid choice: 'ZIP'"),
        (["--no_relay", "--use_auto_relay"], "use_auto_relay contradicts no_relay"),
        (["--expiration", "2", "--update_period", "1"], "the DHT needs 3 s or more"),
        (["--expiration", "30"], "expiration (30 s) has to be longer than update_period (30 s)"),
        (["--checkpoint_dir", "gone/checkpoints"], "checkpoint_dir: there is no directory"),
        (["--checkpoint_dir", "a_file"], "checkpoint_dir: there is no directory a_file"),
        (["--identity_path", "gone/new.id"], "identity_path: there is no directory"),
        (["--identity_path", "."], "identity_path: . is a directory, expected a file"),
        (["--peers_file", "gone/peers"], "peers_file: there is no directory"),
        (["-c", "gone.yml"], "Unable to open config file: gone.yml"),
        (["--no_direct_flag_of_this_name"], "unrecognized arguments: --no_direct_flag_of_this_name"),
        (["stray"], "unrecognized arguments: stray"),
        (["--initial_peers", "203.0.113.5:31330"], "'203.0.113.5:31330' is not a multiaddr: it starts with '/'"),
        (["--initial_peers", PEER, "/ip4/203.0.113.5/tcp/31330"],
         "'/ip4/203.0.113.5/tcp/31330' does not end with '/p2p/' and the id of the peer"),
        (["--initial_peers", f"{PEER},{PEER}"], "is not a peer id such as 12D3KooW... (after 'p2p')"),
        (["--initial_peers", PEER[:-20]], f"'{PEER_ID[:-20]}' is not a peer id"),
        (["--host_maddrs", "/"], "'/' is not a multiaddr: it names no protocol"),
        (["--host_maddrs", "/ip4/127.0.0.1/tpc/0"], "'tpc' is not a protocol"),
        (["--host_maddrs", "/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/tcp/65536"],
         "'65536' is not a port between 0 and 65535 (after 'tcp')"),
        (["--host_maddrs", "/ip4/127.0.0.256/tcp/0"], "'127.0.0.256' is not an IPv4 address"),
        (["--host_maddrs", "/ip6/127.0.0.1/tcp/0"], "'127.0.0.1' is not an IPv6 address"),
        (["--host_maddrs", "/ip4/127.0.0.1/tcp"], "'tcp' has to be followed by a value"),
        (["--announce_maddrs", "/ip4/203.0.113.5/tcp/0"], "port 0 cannot be dialed"),
    ],
)  # fmt: skip
def test_refusals(argv: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a_file").touch()
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv)
    output = capsys.readouterr()
    assert exit_info.value.code == 2
    assert complaint in output.err
    assert len(output.err.splitlines()) <= 3
    assert output.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_file"]  # nothing was created


@pytest.mark.parametrize("config", ["nonsense: 1\n", "optimizer: rmsprop\n", "num_experts: 1\nexpert_uids: [ffn.0]\n"])
def test_bad_config_files_are_refused(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yml").write_text(config)
    with pytest.raises(SystemExit) as exit_info:
        parse()
    assert exit_info.value.code == 2
    assert config.split(":")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "warning"),
    [
        (["--num_training_steps", "5"], "num_training_steps has no effect without a scheduler"),
        (["--scheduler", "constant", "--num_training_steps", "5"], "no effect with scheduler 'constant'"),
        (["--total_blocks", "5"], "total_blocks has no effect without block_indices"),
        (["--balance_quality", "0.5"], "balance_quality has no effect without num_blocks"),
        (["--balance_period", "5"], "balance_period has no effect without num_blocks"),
        (["--keep_checkpoints", "5"], "keep_checkpoints has no effect without checkpoint_dir"),
        (["--stop_timeout", "5"], "stop_timeout has no effect without checkpoint_dir"),
    ],
)
def test_warns_of_what_has_no_effect(argv: list[str], warning: str, caplog: pytest.LogCaptureFixture) -> None:
    parse(*argv)
    assert warning in caplog.text


def test_a_bad_command_line_fails_fast_and_imports_nothing_heavy() -> None:
    code = textwrap.dedent("""
        import sys
        from moe.cli.run_server import main
        try:
            main(["--expert_cls", "fnn"])
        except SystemExit as e:
            print(e.code, [name for name in ("torch", "hivemind", "numpy", "rich") if name in sys.modules])
    """)
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "2 []"
    assert "'fnn' is not one of the built-in experts" in result.stderr
    assert time.monotonic() - started < 10  # a fraction of a second; importing torch takes several on a busy machine


def test_module_can_be_run() -> None:
    command = [sys.executable, "-m", "moe.cli.run_server", "--optimizer", "rmsprop"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert "invalid choice: 'rmsprop'" in result.stderr


# --- what the server is created with ----------------------------------------------------------------------------------


def test_arguments_are_those_of_server_create() -> None:
    from hivemind.moe import Server as StockServer

    stock = inspect.signature(StockServer.create).parameters
    dht = {"host_maddrs", "announce_maddrs", "use_relay", "use_auto_relay", "identity_path"}
    ours = {"checkpoint_period_s", "keep_checkpoints", "detect_anomalies", "request_timeout_s", "held_max_bytes"}
    ours |= {"direct", "direct_port", "direct_hosts", "stop_timeout_s", "train_on_non_finite"}
    ours |= {"block_indices", "block_prefix", "model_path", "total_blocks"}
    ours |= {"num_blocks", "balance_quality", "balance_period_s", "throughput"}
    not_from_here = {"start", "kwargs", "stats_report_interval"}  # reports are made by the command line itself
    arguments = run_server.create_arguments(parse())
    assert set(arguments) == (set(stock) - not_from_here) | dht | ours
    for name in set(stock) & set(arguments) - {"num_experts", "initial_peers"}:
        assert arguments[name] == stock[name].default, name


@pytest.mark.parametrize(
    ("argv", "kind", "lr"),
    [
        ([], torch.optim.Adam, 1e-3),
        (["--lr", "0.5"], torch.optim.Adam, 0.5),
        (["--optimizer", "sgd"], torch.optim.SGD, 0.01),
        (["--optimizer", "sgd", "--lr", "0.5"], torch.optim.SGD, 0.5),
    ],
)
def test_optimizers(argv: list[str], kind: type[torch.optim.Optimizer], lr: float) -> None:
    optimizer = run_server.create_arguments(parse(*argv))["optim_cls"]([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == lr


def test_pretrained_blocks_are_trained_only_if_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    model = ["--model_path", str(tmp_path)]
    arguments = run_server.create_arguments(parse(*model, "--block_indices", "0:3"))
    assert (arguments["model_path"], arguments["optim_cls"], arguments["num_experts"]) == (tmp_path, None, None)
    assert run_server.create_arguments(parse(*model))["num_experts"] is None
    assert run_server.create_arguments(parse(*model, "--optimizer", "adam"))["optim_cls"] is torch.optim.Adam
    (tmp_path / "own.yml").write_text("optimizer: sgd")
    assert parse(*model, "-c", str(tmp_path / "own.yml")).optimizer == "sgd"
    with pytest.raises(SystemExit):
        parse(*model, "--lr", "0.1")


def test_pretrained_blocks_need_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parse("--model_path", str(tmp_path))
    assert 'model_path needs transformers: pip install "transformers>=5,<6"' in capsys.readouterr().err


def test_no_optimizer_and_compression() -> None:
    arguments = run_server.create_arguments(parse("--optimizer", "none", "--compression", "blockwise_8bit"))
    assert arguments["optim_cls"] is None
    assert arguments["compression"] is Compression.BLOCKWISE_8BIT


def test_number_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ["ffn.0", "ffn.1", "ffn.2"]
    monkeypatch.setattr("moe.server.checkpoints.find_checkpointed_uids", lambda path: found)
    in_directory = ["--checkpoint_dir", str(tmp_path)]
    assert run_server.create_arguments(parse())["num_experts"] == 1
    assert run_server.create_arguments(parse(*in_directory))["num_experts"] == 3
    assert run_server.create_arguments(parse(*in_directory, "--num_experts", "7"))["num_experts"] == 7
    assert run_server.create_arguments(parse(*in_directory, "--expert_uids", "ffn.9"))["num_experts"] is None
    assert run_server.create_arguments(parse(*in_directory, "--block_indices", "0:9"))["num_experts"] is None
    found.clear()
    assert run_server.create_arguments(parse(*in_directory))["num_experts"] == 1


def test_file_limit_is_raised_as_far_as_allowed() -> None:
    code = textwrap.dedent("""
        import resource
        from moe.cli.run_server import increase_file_limit
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512))
        increase_file_limit()
        print(resource.getrlimit(resource.RLIMIT_NOFILE))
        increase_file_limit()
        print(resource.getrlimit(resource.RLIMIT_NOFILE))
    """)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["(512, 512)"] * 2


# --- from start to end ------------------------------------------------------------------------------------------------


class FakeServer:
    """Serves nothing until it is stopped, or fails."""

    dht = "its DHT"

    def __init__(self, failure: BaseException | None = None, shutdown_error: Exception | None = None):
        self.failure = failure
        self.shutdown_error = shutdown_error
        self.shutdowns = 0
        self.is_saving = False
        self.lost: dict[str, int] = {}
        self.ended = threading.Event()
        if failure is not None:
            self.ended.set()

    def wait(self, timeout: float) -> bool:
        return self.ended.wait(timeout)

    def statistics(self) -> ServerStatistics:
        return ServerStatistics(experts={"ffn.0": ExpertStatistics(forward_rows=3, forward_batches=1)})

    def shutdown(self) -> None:
        self.shutdowns += 1
        self.ended.set()
        if self.shutdown_error is not None:
            raise self.shutdown_error

    def join(self, timeout: float | None = None) -> None:
        assert self.shutdowns


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with StopSignals(stop_within_s=60.0) as installed:
        yield installed
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def run(options: argparse.Namespace, signals: StopSignals, server: Any) -> int:
    return run_server.run(options, signals, start=lambda options: server, peers_line=lambda dht: LINE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serves_until_told_to_stop(
    number: int, signals: StopSignals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = FakeServer()
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), number))
    timer.start()
    assert run(parse("--peers_file", "peers.txt"), signals, server) == 0
    timer.join()
    assert server.shutdowns == 1
    assert capsys.readouterr().out == LINE + "\n"
    assert (tmp_path / "peers.txt").read_text() == LINE + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["peers.txt"]


def test_told_to_stop_while_starting(signals: StopSignals, capsys: pytest.CaptureFixture[str]) -> None:
    def start(options: argparse.Namespace) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    assert run_server.run(parse(), signals, start=start, peers_line=lambda dht: LINE) == 0
    assert capsys.readouterr().out == ""


def test_a_failed_server_ends_the_process(signals: StopSignals, caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer(failure=LifecycleError("the Runtime has died"))
    assert run(parse(), signals, server) == 1
    assert server.shutdowns == 1
    assert "the server failed: the Runtime has died" in caplog.text


def test_one_that_fails_as_all_its_processes_are_told_to_stop_was_told_to_stop(signals: StopSignals) -> None:
    class Failing(FakeServer):
        def shutdown(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            super().shutdown()

    server = Failing(failure=LifecycleError("the libp2p daemon has died"))
    assert run(parse(), signals, server) == 0
    server.lost = {"ffn.0": 1}
    assert run(parse(), signals, server) == 1


def test_a_server_that_stops_by_itself(signals: StopSignals) -> None:
    server = FakeServer()
    server.ended.set()
    assert run(parse(), signals, server) == 0


@pytest.mark.parametrize(
    "error", [ConfigError("no such place"), OSError("no such place"), RuntimeError("no such place")]
)
def test_a_server_that_cannot_start(
    error: Exception,
    signals: StopSignals,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start(options: argparse.Namespace) -> Any:
        raise error

    assert run_server.run(parse(), signals, start=start, peers_line=lambda dht: LINE) == 1
    assert "could not start" in caplog.text
    assert "no such place" in caplog.text
    assert ("Traceback" in caplog.text) == isinstance(error, RuntimeError)  # of what nobody expected
    assert capsys.readouterr().out == ""


def test_a_shutdown_that_fails(signals: StopSignals, caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer(shutdown_error=LifecycleError("stuck"))
    server.ended.set()
    assert run(parse(), signals, server) == 1
    assert "stuck" in caplog.text


def test_a_server_nobody_can_be_told_of_is_stopped(signals: StopSignals, caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer()

    def peers_line(dht: Any) -> str:
        raise LifecycleError("the DHT is gone")

    assert run_server.run(parse(), signals, start=lambda options: server, peers_line=peers_line) == 1
    assert server.shutdowns == 1
    assert "could not go on: the DHT is gone" in caplog.text


def test_reports_what_it_serves(signals: StopSignals, caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer()
    caplog.set_level("INFO")
    timer = threading.Timer(0.5, server.ended.set)
    timer.start()
    assert run(parse("--stats_report_interval", "0.1"), signals, server) == 0
    timer.join()
    reports = [record.getMessage() for record in caplog.records if record.name == "moe.cli.report"]
    assert len(reports) >= 2
    assert "since start 3 + 0 rows" in reports[0]
    assert "ffn.0 0.0 rows/s" in reports[-1]  # idle: zeros, not gaps


# --- with real processes ----------------------------------------------------------------------------------------------

PROGRAM = """
import multiprocessing, os, signal, sys, time
from moe.cli.parsing import parse_server_options
from moe.cli.run_server import run
from moe.cli.stopping import StopSignals, leave

class Server:
    dht = failure = None
    is_saving, lost = False, {lost}
    def wait(self, timeout):
        time.sleep(timeout)
        return False
    def shutdown(self):
        print("child alive", child.is_alive(), flush=True)
        {shutdown}
        self.is_saving = False
    def join(self, timeout=None):
        pass

def start(options):
    global child
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
    child.start()
    return Server()

signals = StopSignals(stop_within_s={within})
signals.install()
leave(run(parse_server_options([]), signals, start, lambda dht: str(child.pid)))
"""


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Any]:
    """Start PROGRAM as the leader of a process group, as a terminal does; gives the process and its child's pid."""
    started: list[subprocess.Popen[str]] = []
    children: list[psutil.Process] = []

    def launch(shutdown: str = "pass", within: float = 60.0, lost: object = ()) -> tuple[subprocess.Popen[str], int]:
        code = PROGRAM.format(shutdown=shutdown, within=within, lost=lost)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        child = int(process.stdout.readline())
        children.append(psutil.Process(child))
        while os.getpgid(child) != child:  # it has come as far as leaving our group
            time.sleep(0.01)
        return process, child

    yield launch
    for process in started:
        process.kill()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    for process in started:
        process.communicate()


def ends(pid: int, patience_s: float = 10.0) -> bool:
    """True once a process is gone, or a zombie whose parent is gone too."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def test_ctrl_c_reaches_only_the_server_itself(launch: Any) -> None:
    process, child = launch()
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert output == "child alive True\n"  # so it can still tell the swarm that it leaves
    assert ends(child)
    assert "Traceback" not in errors


def test_the_same_signal_again_ends_at_once(launch: Any) -> None:
    process, child = launch(shutdown="time.sleep(600)")
    process.terminate()
    assert process.stdout.readline() == "child alive True\n"
    process.send_signal(signal.SIGINT)  # another one may come from whoever ends a whole session, and changes nothing
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "leaving at once" in errors
    assert ends(child)


def test_a_shutdown_that_hangs_is_ended(launch: Any) -> None:
    process, child = launch(shutdown="time.sleep(600)", within=0.5)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "still not stopped after 0.5 s" in errors
    assert ends(child)


@pytest.mark.parametrize("again", [False, True])
def test_logs_that_nobody_reads_keep_no_server_alive(launch: Any, again: bool) -> None:
    """A pipe that is full: who writes to it waits."""
    stuck = "sys.stderr.write('x' * 1_000_000)"
    process, child = launch(shutdown=f"print('stopping', flush=True); {stuck}", within=600 if again else 0.5)
    process.terminate()
    assert process.stdout.readline() == "child alive True\n"
    assert process.stdout.readline() == "stopping\n"
    if again:
        time.sleep(0.5)
        process.terminate()
    assert process.wait(timeout=30) == (128 + signal.SIGTERM if again else 1)
    assert ends(child)


def test_the_clock_stands_still_while_something_is_saved(launch: Any) -> None:
    process, _ = launch(shutdown="self.is_saving = True; time.sleep(2)", within=0.5)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors


def test_after_saving_the_clock_goes_on(launch: Any) -> None:
    saving = "self.is_saving = True; time.sleep(1); self.is_saving = False; time.sleep(600)"
    process, child = launch(shutdown=saving, within=0.5)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "still not stopped after 0.5 s" in errors
    assert ends(child)


def test_what_is_lost_is_in_the_exit_code(launch: Any) -> None:
    process, _ = launch(lost={"ffn.0": 3})
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 1


def test_copies_of_a_signal_are_one_order(launch: Any) -> None:
    """As ``timeout`` sends them: to the process, and to its group."""
    process, _ = launch(shutdown="time.sleep(0.3)")
    for _ in range(20):
        process.terminate()
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors


def test_children_can_be_terminated(launch: Any) -> None:
    process, child = launch()
    os.kill(child, signal.SIGTERM)  # they do not inherit our handlers
    assert ends(child)
    process.terminate()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert output == "child alive False\n"


@pytest.mark.parametrize(("name", "ours"), [("OMP_WAIT_POLICY", "passive"), ("THP_MEM_ALLOC_ENABLE", "1")])
def test_torch_gets_what_suits_a_server_unless_the_environment_says_otherwise(
    name: str, ours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.setenv(variable, "")  # so that it is put back as it was
    monkeypatch.delenv(name)
    run_server.set_torch_environment()
    assert os.environ[name] == ours
    monkeypatch.setenv(name, "theirs")
    run_server.set_torch_environment()
    assert os.environ[name] == "theirs"
