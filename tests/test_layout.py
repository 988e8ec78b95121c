"""What the whole package promises and import-linter cannot express: no pickle, no hivemind.moe, hivemind's names."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hivemind.moe
import hivemind.moe.client
import hivemind.moe.server
import pytest

import moe

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "moe").rglob("*.py"))
MAY_IMPORT_HIVEMIND = ("moe.dht", "moe.testing", "moe.transport", "moe.wire.hivemind_dialect", "moe.wire.tensors")
SERIALIZERS_THAT_RUN_CODE = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
LIGHT_MODULES = ("moe", "moe.cli.parsing", "moe.cli.run_server", "moe.cli.status", "moe.cli.stopping", "moe.config")

# hivemind's name -> where hivemind's users import it from besides hivemind.moe
KNOWN_PATHS = {
    "moe.client.beam_search": ["MoEBeamSearcher"],
    "moe.client.expert": ["RemoteExpert"],
    "moe.client.moe": ["RemoteMixtureOfExperts"],
    "moe.client.switch_moe": ["RemoteSwitchMixtureOfExperts"],
    "moe.expert_uid": ["ExpertInfo", "ExpertUID", "is_valid_prefix", "is_valid_uid", "split_uid", "UID_DELIMITER"],
    "moe.server.checkpoints": ["CheckpointSaver", "load_experts", "store_experts"],
    "moe.server.connection_handler": ["ConnectionHandler"],
    "moe.server.layers": ["name_to_block", "name_to_input", "register_expert_class", "schedule_name_to_scheduler"],
    "moe.server.task_pool": ["TaskPool"],
}


# hivemind's parameter -> ours, which has its position; hivemind's name is taken as a keyword
RENAMED_PARAMETERS = {"module_backends": "expert_backends"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; this package imports by full names"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))


def test_nothing_can_unpickle() -> None:
    found = [
        f"{path}:{line}: {name}"
        for path in SOURCES
        for line, name in imports(path)
        if name.split(".")[0] in SERIALIZERS_THAT_RUN_CODE
    ]
    assert found == []


def test_torch_load_reads_weights_only() -> None:
    found = []
    for path in SOURCES:
        for call in calls(path):
            if ast.unparse(call.func) in ("torch.load", "torch.serialization.load"):
                safe = [keyword.value for keyword in call.keywords if keyword.arg == "weights_only"]
                if not (safe and isinstance(safe[0], ast.Constant) and safe[0].value is True):
                    found.append(f"{path}:{call.lineno}")
        found += [f"{path}:{line}" for line, name in imports(path) if name == "torch.load"]
    assert found == []


def test_nothing_imports_hivemind_moe() -> None:
    found = [
        f"{path}:{line}: {name}"
        for path in SOURCES
        for line, name in imports(path)
        if name == "hivemind.moe" or name.startswith("hivemind.moe.")
    ]
    for path in SOURCES:  # hivemind's __init__ offers these without naming hivemind.moe
        found += [
            f"{path}:{line}: {name}"
            for line, name in imports(path)
            if name.startswith("hivemind.")
            and name.count(".") == 1
            and name.split(".")[1] in public_names(hivemind.moe)
        ]
    assert found == []


def test_only_the_edges_import_hivemind() -> None:
    found = [
        f"{path}:{line}: {name}"
        for path in SOURCES
        for line, name in imports(path)
        if name.split(".")[0] == "hivemind" and not module_name(path).startswith(MAY_IMPORT_HIVEMIND)
    ]
    assert found == []


@pytest.mark.parametrize("name", LIGHT_MODULES)
def test_light_modules_import_nothing_heavy(name: str) -> None:
    code = f"import sys, {name}; print([m for m in ('hivemind', 'numpy', 'rich', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [module.name for module in pkgutil.walk_packages(moe.__path__, "moe.")])
def test_every_module_can_be_imported_and_says_what_it_is_for(name: str) -> None:
    assert (importlib.import_module(name).__doc__ or "").strip()


# --- the names --------------------------------------------------------------------------------------------------------


def public_names(module: ModuleType) -> list[str]:
    return sorted(
        name for name, value in vars(module).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    )


def test_public_names_can_be_imported() -> None:
    assert len(set(moe.__all__)) == len(moe.__all__)
    assert [name for name in moe.__all__ if not hasattr(moe, name)] == []
    assert set(moe.__all__) <= set(dir(moe))
    with pytest.raises(AttributeError):
        _ = moe.no_such_name


@pytest.mark.parametrize("path", KNOWN_PATHS)
def test_import_paths_of_hivemind_users(path: str) -> None:
    module = importlib.import_module(path)
    assert [name for name in KNOWN_PATHS[path] if not hasattr(module, name)] == []


STOCK_NAMES = sorted(
    {name for module in (hivemind.moe, hivemind.moe.client, hivemind.moe.server) for name in public_names(module)}
)


@pytest.mark.parametrize("name", STOCK_NAMES)
def test_names_of_hivemind_moe_with_the_same_parameters(name: str) -> None:
    stock, ours = getattr(hivemind.moe, name), getattr(moe, name)
    assert name in moe.__all__
    assert missing_parameters(stock, ours) == []
    if inspect.isclass(stock):
        for method, stock_method in own_methods(stock):
            assert hasattr(ours, method), f"{name}.{method}"
            assert missing_parameters(stock_method, getattr(ours, method)) == [], f"{name}.{method}"


def own_methods(kind: type) -> list[tuple[str, Any]]:
    """Public methods a class defines itself; those of its bases (Thread, Module) are not its interface."""
    return [
        (name, getattr(kind, name)) for name in vars(kind) if not name.startswith("_") and callable(getattr(kind, name))
    ]


def missing_parameters(stock: Any, ours: Any) -> list[str]:
    """Parameters of ``stock`` that a caller cannot pass to ``ours`` in the same way, and new required ones."""
    expected, actual = inspect.signature(stock).parameters, inspect.signature(ours).parameters
    problems = []
    for position, (name, parameter) in enumerate(expected.items()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        found = actual.get(name)
        if found is None:
            problems.append(f"{name} is missing")
            continue
        if parameter.kind is not parameter.KEYWORD_ONLY:
            placed = actual.get(RENAMED_PARAMETERS.get(name, name), found)
            if placed.kind is parameter.KEYWORD_ONLY or list(actual).index(placed.name) != position:
                problems.append(f"{name} is at another position")
        if parameter.default is not parameter.empty and found.default is parameter.empty:
            problems.append(f"{name} is required")
    for name, parameter in actual.items():
        optional = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or (
            parameter.default is not parameter.empty
        )
        if name not in expected and not optional:
            problems.append(f"{name} is new and required")
    return problems


def test_missing_parameters_sees_the_difference() -> None:
    def stock(a: int, b: int = 1, *, c: int = 2) -> None: ...
    def same(a: int, b: int = 3, *, c: int = 4, d: int = 5) -> None: ...
    def other(b: int, a: int, d: int) -> None: ...

    assert missing_parameters(stock, same) == []
    assert missing_parameters(stock, other) == [
        "a is at another position",
        "b is at another position",
        "b is required",
        "c is missing",
        "d is new and required",
    ]
