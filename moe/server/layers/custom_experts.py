"""The registry of expert classes. Owns: what can be hosted by name, its schema, and loading users' files.

A class is registered in one of two forms: hivemind's, with a function that makes sample inputs, or with a function that
gives its schema, which can also describe global and optional kwargs. Classes that a program has registered with hivemind's own
function of the same name are taken over.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from moe.errors import ConfigError, MoEError
from moe.schema import DUMMY_BATCH_SIZE, BatchTensorProto, ExpertSchema

SampleInput = Callable[[int, int], "torch.Tensor | tuple[torch.Tensor, ...]"]  # (batch_size, hidden_dim) -> inputs
SchemaFunction = Callable[[int], Mapping[str, Any]]  # hidden_dim -> dict(args=, kwargs=, optional=, outputs=)
ExpertClass = TypeVar("ExpertClass", bound=Callable[..., nn.Module])

name_to_block: dict[str, Callable[..., nn.Module]] = {}
name_to_input: dict[str, SampleInput] = {}
name_to_schema: dict[str, SchemaFunction] = {}

_HIVEMINDS = "hivemind.moe.server.layers"  # has a registry of its own; never imported here


def register_expert_class(
    name: str, sample_input: SampleInput | None = None, *, schema: SchemaFunction | None = None
) -> Callable[[ExpertClass], ExpertClass]:
    """Class decorator: let servers host the class under a name. Give either ``sample_input`` or ``schema``.

    :param name: what ``expert_cls`` calls it
    :param sample_input: hivemind's form: ``(batch_size, hidden_dim)`` -> a tensor or a tuple of tensors, all batched
    :param schema: ``hidden_dim`` -> a dict with any of ``args``, ``kwargs``, ``optional`` and ``outputs``, as ExpertSchema
        takes them
    :returns: a decorator that returns the class unchanged; its constructor takes ``hidden_dim``
    :raises ConfigError: if both forms are given, or none
    :raises RuntimeError: if the name is taken
    """
    if (sample_input is None) == (schema is None):
        raise ConfigError(f"expert class {name!r}: give either sample_input or schema")

    def register(expert_class: ExpertClass) -> ExpertClass:
        if name in name_to_block:
            raise RuntimeError("The class might already exist or be added twice")
        name_to_block[name] = expert_class
        if sample_input is not None:
            name_to_input[name] = sample_input
        if schema is not None:
            name_to_schema[name] = schema
        return expert_class

    return register


def expert_schema(expert_cls: str, hidden_dim: int, compression: int = 0) -> dict[str, Any]:
    """What ExpertBackend needs to know about a registered class, as its keyword arguments.

    :param expert_cls: name of a registered class
    :param hidden_dim: what the class is built with
    :param compression: if not NONE, the codec of all floating-point tensors, whatever the class says
    :returns: args_schema, kwargs_schema, optional_kwargs, outputs_schema (None: to be found by a dry run)
    :raises ConfigError: unknown class, or its schema function does not give a schema
    :raises SchemaError: what it gives cannot be sent to experts
    """
    _check_known(expert_cls)
    try:
        if expert_cls in name_to_schema:
            schema = ExpertSchema(**name_to_schema[expert_cls](hidden_dim))
        else:
            sample = name_to_input[expert_cls](DUMMY_BATCH_SIZE, hidden_dim)
            samples = sample if isinstance(sample, tuple) else (sample,)
            schema = ExpertSchema(tuple(BatchTensorProto.from_tensor(tensor) for tensor in samples))
    except MoEError:
        raise
    except Exception as e:  # any code of the user's
        reason = f"{type(e).__name__}: {e}"
        raise ConfigError(f"expert class {expert_cls!r} does not describe its inputs as it should: {reason}") from e
    if compression:
        schema = schema.with_compression(compression)
    return {
        "args_schema": schema.args,
        "kwargs_schema": schema.kwargs,
        "optional_kwargs": schema.optional,
        "outputs_schema": schema.outputs,
    }


def build_expert(expert_cls: str, hidden_dim: int) -> nn.Module:
    """A new module of a registered class.

    :raises ConfigError: unknown class, or it cannot be built with this hidden_dim
    """
    _check_known(expert_cls)
    try:
        return name_to_block[expert_cls](hidden_dim)
    except Exception as e:  # any code of the user's
        raise ConfigError(f"cannot build expert class {expert_cls!r} with hidden_dim={hidden_dim}: {e!r}") from e


def add_custom_models_from_file(path: str | Path) -> ModuleType:
    """Execute a Python file that registers expert classes; a second time it is not executed again.

    It may as well use hivemind's ``register_expert_class``.

    :returns: the module, which is also in ``sys.modules``
    :raises ConfigError: if the file is missing, its code fails, or it gives a class a name that is taken; then none of its
        classes stay registered
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise ConfigError(f"there is no file {str(path)!r} with custom experts")
    name = f"moe_custom_{hashlib.sha256(bytes(file)).hexdigest()[:16]}"  # two files of one name are two modules
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"custom experts are a Python file, got {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    registries: tuple[dict[str, Any], ...] = (name_to_block, name_to_input, name_to_schema, *_hiveminds_registries())
    registered_before = [dict(registry) for registry in registries]
    known_to_hivemind = set(_hiveminds_registries()[0])
    sys.modules[name] = module  # before execution: dataclasses and pickle look their module up here
    try:
        spec.loader.exec_module(module)
        take_over_hiveminds()
        for expert_cls in _hiveminds_registries()[0].keys() - known_to_hivemind:
            _check_one_class(expert_cls)
    except Exception as e:
        del sys.modules[name]
        for registry, before in zip(registries, registered_before):
            registry.clear()
            registry.update(before)
        raise ConfigError(f"the code of custom experts in {str(path)!r} failed: {type(e).__name__}: {e}") from e
    return module


def take_over_hiveminds() -> None:
    """Register what this process has registered with hivemind's ``register_expert_class``, under names that are free."""
    blocks, inputs = _hiveminds_registries()
    for name in blocks.keys() & inputs.keys() - name_to_block.keys():
        name_to_block[name], name_to_input[name] = blocks[name], inputs[name]


def _check_one_class(name: str) -> None:
    """Refuse a name under which a program has registered one class with hivemind, while it is another one here."""
    stock, ours = _hiveminds_registries()[0].get(name), name_to_block.get(name)
    built_in = getattr(stock, "__module__", "").startswith("hivemind.")
    if stock is not None and stock is not ours and not built_in:
        raise ConfigError(
            f"expert class {name!r} is {stock!r} in hivemind.moe, where it was registered, but {ours!r} here; choose another "
            f"name, or import register_expert_class from moe"
        )


def _hiveminds_registries() -> tuple[dict[str, Any], dict[str, Any]]:
    """Its ``name_to_block`` and ``name_to_input``; empty ones if nobody has imported it."""
    layers = sys.modules.get(_HIVEMINDS)
    return ({}, {}) if layers is None else (layers.name_to_block, layers.name_to_input)


def _check_known(expert_cls: str) -> None:
    take_over_hiveminds()
    _check_one_class(expert_cls)
    if expert_cls not in name_to_block:
        raise ConfigError(f"unknown expert class {expert_cls!r}; registered are {', '.join(sorted(name_to_block))}")
