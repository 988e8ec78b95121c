"""The documentation's tables agree with the code."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import hivemind.hivemind_cli.run_server as stock_command
import msgspec
import pytest

from moe import config, errors
from moe.architectures import ARCHITECTURES
from moe.cli.parsing import build_server_parser
from moe.dht.records import DIRECTORY_KEY, hosted_key, part_key
from moe.transport.tickets import Ticket
from moe.wire import frames, hivemind_dialect
from moe.wire.messages import FEATURES, BlockInputs, ExpertDescription, ReplyHeader, RequestHeader
from tests.docs.markdown import ROOT, code, table_of

PROTOCOL, OPERATIONS = ROOT / "docs" / "protocol.md", ROOT / "docs" / "operations.md"
CONFIGS = (config.ClientConfig, config.ServerConfig, config.PoolConfig, config.HandlerConfig)


def error_classes(cls: type[errors.MoEError] = errors.MoEError) -> list[type[errors.MoEError]]:
    """The tree, depth first, in the order in which it is written."""
    children = [c for c in vars(errors).values() if isinstance(c, type) and cls in c.__bases__]
    return [cls, *(found for child in children for found in error_classes(child))]


def first_sentence(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def test_errors() -> None:
    expected = [
        [f"`{cls.__name__}`", f"`{cls.code}`", "yes" if cls.retryable else "no", first_sentence(cls.__doc__)]
        for cls in error_classes()
    ]
    assert table_of(PROTOCOL, "errors") == expected


def test_errors_have_the_bases_that_the_text_says() -> None:
    text = PROTOCOL.read_text(encoding="utf-8")
    for base in (ValueError, TimeoutError, LookupError):
        named = [cls.__name__ for cls in error_classes() if issubclass(cls, base)]
        sentence = next(part for part in re.split(r"[.;]\s", text) if part.endswith(f"also `{base.__name__}`"))
        assert [name for name in re.findall(r"`(\w+)`", sentence) if name != base.__name__] == named


@pytest.mark.parametrize("struct", [RequestHeader, BlockInputs, ReplyHeader, ExpertDescription, Ticket])
def test_structs(struct: type[msgspec.Struct]) -> None:
    fields = msgspec.structs.fields(struct)
    rows = table_of(PROTOCOL, struct.__name__)
    assert [code(row[0]) for row in rows] == [field.encode_name for field in fields]
    for field, (_, _, default, _) in zip(fields, rows):
        assert (default == "required") == field.required, field.name
        if isinstance(field.default, (int, float)):
            assert code(default) == str(field.default), field.name


def test_features_frames_handles_and_keys() -> None:
    text = PROTOCOL.read_text(encoding="utf-8")
    rows = table_of(PROTOCOL, "frames")
    names = ("HELLO", "WELCOME", "OPEN", "DATA", "CANCEL")
    assert [(int(row[0]), row[1]) for row in rows] == [(getattr(frames, name), name) for name in names]
    units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20}
    limits = [int(number) * units[unit] for number, unit in (row[2].split() for row in rows)]
    assert limits == [frames._MAX_PAYLOAD[int(row[0])] for row in rows]
    assert [feature for feature in FEATURES if f"| `{feature}` |" not in text] == []
    handles = {value for name, value in vars(hivemind_dialect).items() if name.startswith("RPC_")}
    assert [handle for handle in handles if f"| `{handle}` |" not in text] == []
    keys = [code(row[0]) for row in table_of(PROTOCOL, "DHT keys")]
    assert keys == [hosted_key("ffn.3."), DIRECTORY_KEY, part_key("<peer id>", "<part>")]  # type: ignore[arg-type]


def test_flags() -> None:
    actions = {
        action.option_strings[0] if action.dest != "config" else "--config": action
        for action in build_server_parser()._actions
        if not isinstance(action, argparse._HelpAction)
    }
    rows = {code(row[0]): row for row in table_of(OPERATIONS, "flags")}
    assert sorted(rows) == sorted(actions)
    for flag, action in actions.items():
        default = action.default[0] if isinstance(action.default, list) and action.default else action.default
        if default not in (None, [], True, False):
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            assert code(rows[flag][1]) == shown, flag


def test_flags_of_our_own_are_marked() -> None:
    source = Path(stock_command.__file__).read_text(encoding="utf-8")
    stock = set(re.findall(r"'(--\w+)'|\"(--\w+)\"", source))
    known = {quoted for pair in stock for quoted in pair if quoted}
    for cells in table_of(OPERATIONS, "flags"):
        assert cells[0].endswith("+") == (code(cells[0]) not in known), cells[0]


def test_settings() -> None:
    def show(value: Any) -> str:
        return value if isinstance(value, str) else str(value)

    expected = [(field.name, show(field.default)) for cls in CONFIGS for field in dataclasses.fields(cls)]
    assert sorted((code(row[0]), code(row[1])) for row in table_of(OPERATIONS, "settings")) == sorted(expected)


def test_import_paths_of_both_packages() -> None:
    paths = {}
    for stock, ours, hands_on in table_of(ROOT / "docs" / "moving-from-hivemind.md", "imports"):
        names = re.findall(r"`(\w+)`", hands_on)
        for path in (code(stock), code(ours)):
            module = importlib.import_module(path)
            assert [name for name in names if not hasattr(module, name)] == [], path
        paths[code(stock)] = code(ours)
    assert all(ours == stock.replace("hivemind.moe", "moe") for stock, ours in paths.items() if stock != "hivemind")


def test_packages_exist_and_are_all_named() -> None:
    named = [code(row[0]) for row in table_of(ROOT / "docs" / "architecture.md", "packages")]
    assert [path for path in named if not (ROOT / path).exists()] == []
    parts = {path for path in (ROOT / "moe").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    missing = [path.name for path in parts if not any(entry.rstrip("/") == f"moe/{path.name}" for entry in named)]
    assert sorted(missing) == ["__init__.py", "version.py"]


def test_families_of_pretrained_models() -> None:
    named = [re.findall(r"`([\w-]+)`", row[0]) for row in table_of(ROOT / "docs" / "finetune.md", "families")]
    assert sorted(kind for kinds in named for kind in kinds) == sorted(ARCHITECTURES)
