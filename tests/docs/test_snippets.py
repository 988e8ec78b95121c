"""The documentation's code runs: Python blocks as programs against a real swarm, commands through the real parsers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe.cli.parsing import parse_server_options
from moe.cli.status import parse_status_options
from moe.testing import LocalSwarm
from tests.docs.markdown import (
    DOCUMENTS,
    LANGUAGES,
    ROOT,
    anchors_of,
    blocks_of,
    commands_of,
    name_of,
    program_of,
)

ADDRESS = re.compile(r"/ip4/203\.0\.113\.5/tcp/31330/p2p/12D3KooW[\w.]*")  # stands for what a server printed
PARSERS = {
    "hivemind-server": parse_server_options,
    "moe-server": parse_server_options,
    "moe-status": parse_status_options,
}
NOISE = re.compile(r"Traceback|Error|Warning|WARNING|Task was destroyed|Exception ignored")

WITH_PYTHON = [document for document in DOCUMENTS if blocks_of(document, "python")]


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    """The servers that the README tells the reader to start."""
    commands = [shlex.split(command) for command in commands_of(ROOT / "README.md")]
    servers = [arguments for program, *arguments in commands if program == "hivemind-server"]
    assert servers
    with LocalSwarm(*servers) as swarm:
        yield swarm


@pytest.mark.parametrize("document", WITH_PYTHON, ids=name_of)
def test_s2_t8_python_blocks_of_the_documentation_run(document: Path, swarm: LocalSwarm, tmp_path: Path) -> None:
    program = tmp_path / document.with_suffix(".py").name
    program.write_text(ADDRESS.sub(swarm.initial_peers[0], program_of(document)), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, f"{name_of(document)}, line numbers are those of the document:\n{result.stderr}"
    assert not NOISE.search(result.stderr), result.stderr


def test_the_custom_expert_in_the_readme_is_short() -> None:
    block = next(block for block in blocks_of(ROOT / "README.md", "python") if "register_expert_class" in block.code)
    assert len(block.code.splitlines()) < 30
    quickstart = blocks_of(ROOT / "README.md", "python")[0]
    assert len([line for line in quickstart.code.splitlines() if line]) <= 15


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_exist_with_these_flags(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # a config.yml where the tests run would be read
    (tmp_path / "my_experts.py").touch()
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").touch()
    (tmp_path / "config.yml").write_text("\n".join(block.code for block in blocks_of(document, "yaml")))
    inline = re.findall(r"`((?:hivemind-server|moe-server|moe-status) -[^`]*)`", document.read_text(encoding="utf-8"))
    for command in [*commands_of(document), *inline]:
        program, *arguments = shlex.split(command)
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        elif program in PARSERS:
            try:
                PARSERS[program](arguments)
            except SystemExit:
                pytest.fail(f"{command}\n{capsys.readouterr().err}")
        else:
            assert program in ("pip", "python"), f"{command}: nobody checks this"


def test_config_file_in_operations_is_read(tmp_path: Path) -> None:
    (block,) = blocks_of(ROOT / "docs" / "operations.md", "yaml")
    (tmp_path / "config.yml").write_text(block.code + f"\ncheckpoint_dir: {tmp_path / 'experts'}\n")
    options = parse_server_options(["-c", str(tmp_path / "config.yml"), "--lr", "0.0003"])
    assert (options.num_experts, options.hidden_dim, options.lr) == (16, 512, 0.0003)
    assert options.host_maddrs == ["/ip4/0.0.0.0/tcp/31330"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere_and_blocks_say_what_they_are(document: Path) -> None:
    assert {block.language for block in blocks_of(document)} <= LANGUAGES
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors_of(target), link
