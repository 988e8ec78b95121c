"""Files of peft that are not what they should be: one ConfigError that names file and field, soon, and nothing is executed."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe.client.adapters import from_peft, load_peft
from moe.client.adapters.peft_settings import RULES, Settings, is_neutral
from moe.errors import ConfigError

BLOCKS = 3
KEY = "base_model.model.encoder.layer.1.attention.self.query"
PAIR = {f"{KEY}.lora_A.weight": torch.ones(8, 4), f"{KEY}.lora_B.weight": torch.ones(4, 8)}
SETTINGS: dict[str, dict[str, Any]] = {
    "LORA": {"peft_type": "LORA", "target_modules": ["query"], "use_dora": False, "eva_config": None},
    "IA3": {"peft_type": "IA3", "target_modules": ["query"], "feedforward_modules": []},
    "PREFIX_TUNING": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "token_dim": 4, "num_layers": BLOCKS},
    "PROMPT_TUNING": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "token_dim": 4},
    "P_TUNING": {"peft_type": "P_TUNING", "num_virtual_tokens": 2, "token_dim": 4},
}
STATES = {
    "LORA": PAIR,
    "IA3": {f"{KEY}.ia3_l": torch.ones(4, 1)},
    "PREFIX_TUNING": {"prompt_embeddings": torch.ones(2, 2 * 4 * BLOCKS)},
    "PROMPT_TUNING": {"prompt_embeddings": torch.ones(2, 4)},
    "P_TUNING": {"prompt_embeddings": torch.ones(2, 4)},
}


def write(folder: Path, settings: Any = None, state: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS["LORA"] if settings is None else settings))
    save_file(
        {k: v.contiguous() for k, v in (PAIR if state is None else state).items()}, folder / "adapter_model.safetensors"
    )
    return folder


def refused(folder: Path, complaint: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=complaint):
        load_peft(folder, BLOCKS)
    assert time.perf_counter() - began < 2


# --- fields -------------------------------------------------------------------------------------------------------------------

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(list(SETTINGS)), st.text(), anything)
@example("LORA", "target_parameters", ["x"])
@example("LORA", "trainable_token_indices", [1])
@example("LORA", "layer_replication", [[0, 2]])
@example("LORA", "monteclora_config", {"num_samples": 8})
@example("LORA", "alora_invocation_tokens", [1])
@example("LORA", "use_qalora", True)
@example("LORA", "ensure_weight_tying", True)
@example("IA3", "layers_to_transform", 0)
@example("P_TUNING", "prefix_projection", True)
def test_an_unknown_field_is_refused_unless_it_says_nothing(kind: str, field: str, value: Any) -> None:
    """Whatever a later peft adds."""
    if field in RULES[kind]:
        return
    settings = {**SETTINGS[kind], field: value}
    if is_neutral(value):
        assert from_peft(settings, STATES[kind], BLOCKS) is not None
        return
    with pytest.raises(ConfigError) as caught:
        from_peft(settings, STATES[kind], BLOCKS)
    shown = field if field.isprintable() else ascii(field)
    assert caught.value.message.startswith(f"adapter_config.json: {shown[:97]}")


@given(st.sampled_from([(kind, field) for kind in RULES for field in RULES[kind]]), anything)
@example(("LORA", "r"), -1)
@example(("LORA", "r"), True)
@example(("LORA", "r"), 2**70)
@example(("LORA", "lora_alpha"), float("nan"))
@example(("LORA", "lora_alpha"), 10**400)
@example(("LORA", "target_modules"), "(")
@example(("LORA", "rank_pattern"), {"(": 3})
@example(("LORA", "layers_to_transform"), [[1]])
def test_any_value_of_a_field_is_understood_or_refused(field: tuple[str, str], value: Any) -> None:
    kind, name = field
    try:
        Settings({**SETTINGS[kind], name: value}, "file")
    except ConfigError as e:
        assert e.message.startswith("file: ")
        assert name in e.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", -4), ("r", 0), ("r", "8"), ("r", None), ("r", 2.0), ("lora_alpha", "x"), ("lora_alpha", None), ("bias", "some"),
        ("bias", None), ("use_dora", "yes"), ("use_rslora", 1), ("target_modules", 3), ("target_modules", [1]),
        ("rank_pattern", {"x": -1}), ("rank_pattern", [1]), ("alpha_pattern", {"x": "1"}), ("lora_dropout", 2),
        ("modules_to_save", "classifier"), ("task_type", "SEQ_2_SEQ_LM"), ("task_type", 3), ("init_lora_weights", 1),
        ("layers_to_transform", "1"), ("layers_pattern", ["layer"]), ("peft_type", ["LORA"]), ("fan_in_fan_out", "no"),
    ],
)  # fmt: skip
def test_wrong_values(field: str, value: Any, tmp_path: Path) -> None:
    refused(write(tmp_path, {**SETTINGS["LORA"], field: value}), rf"adapter_config.json: {field}: ")


def test_a_pattern_cannot_go_with_layers(tmp_path: Path) -> None:
    settings = {**SETTINGS["LORA"], "target_modules": ".*query", "layers_to_transform": [1]}
    refused(write(tmp_path, settings), "target_modules: a pattern cannot go with layers_to_transform")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*$",
        "(?:a?){60}b",
        ".*.*.*.*.*.*.*.*x",
        "(a*)*b",
        "a?" * 30 + "a" * 30,
        "(" * 5000,
        "(?=(a+)+$).*",
    ],
)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_patterns_that_take_forever(field: str, pattern: str, tmp_path: Path) -> None:
    value = {pattern: 3} if field.endswith("_pattern") else pattern
    refused(write(tmp_path, {**SETTINGS["LORA"], field: value}), rf"adapter_config.json: {field}: ")


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"]
)
def test_any_number_of_names(field: str, tmp_path: Path) -> None:
    """Understood or refused, but soon."""
    keys = [f"base_model.model.layer.{i % 3}.query{i}.lora_{half}.weight" for i in range(300) for half in "AB"]
    names = {f"{index:x}query": 8 for index in range(200_000)}
    value = names if field.endswith("_pattern") else list(names)
    settings = {"peft_type": "LORA", field: value}
    folder = write(tmp_path, settings, {key: torch.ones(8, 8) for key in keys})
    began = time.thread_time()
    with contextlib.suppress(ConfigError):
        load_peft(folder, BLOCKS)
    assert time.thread_time() - began < 2


@pytest.mark.parametrize(
    "pattern",
    [
        ".*query", r"^(?!.*vision).*(?:query|value).*", r".*\.[01]\.attention\.(self|other)\.query", ".*er.*(query|value)$",
        r"(?:.*?(?:encoder|text).*?(?:self|attn).*?(?:query|key).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self)\.(?:q))",
    ],
)  # fmt: skip
def test_patterns_as_people_write_them(pattern: str, tmp_path: Path) -> None:
    assert load_peft(write(tmp_path, {**SETTINGS["LORA"], "target_modules": pattern}), BLOCKS)()[1]


# --- tensors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "settings", "complaint"),
    [
        ({**PAIR, f"{KEY}.lora_A.weight": torch.full((8, 4), torch.nan)}, {}, r"lora_A.weight': expected finite numbers"),
        ({**PAIR, f"{KEY}.lora_A.weight": torch.ones(8, 4).long()}, {}, r"lora_A.weight': expected floating-point numbers"),
        (PAIR, {"r": 4}, r"lora_A.weight': expected \(4, inputs\), as r and rank_pattern say, got \(8, 4\)"),
        (PAIR, {"rank_pattern": {"query": 2}}, r"lora_A.weight': expected \(2, inputs\)"),
        ({**PAIR, f"{KEY}.lora_B.weight": torch.ones(8)}, {}, r"lora_B.weight': expected \(outputs, 8\)"),
        (PAIR, {"target_modules": ["value"]}, "peft would ignore it"),
        (PAIR, {"exclude_modules": ["query"]}, "peft would ignore it"),
        (PAIR, {"layers_to_transform": [0, 2]}, "peft would ignore it"),
        (PAIR, {"use_dora": True}, r"lora_magnitude_vector': it is missing, and use_dora is true"),
        ({**PAIR, f"{KEY}.lora_magnitude_vector": torch.ones(4)}, {}, "expected with use_dora"),
        ({**PAIR, f"{KEY}.lora_magnitude_vector": torch.ones(3)}, {"use_dora": True}, r"expected \(4\), got \(3,\)"),
        ({**PAIR, f"{KEY}.base_layer.bias": torch.ones(4)}, {}, "bias is none"),
        ({**PAIR, f"{KEY}.bias": torch.ones(4)}, {"bias": "all"}, "it looks for base_layer.bias"),
        ({**PAIR, f"{KEY}.base_layer.bias": torch.ones(4, 1)}, {"bias": "all"}, r"expected \(outputs\), got \(4, 1\)"),
        ({**PAIR, f"{KEY}.lora_B.bias": torch.ones(4)}, {"bias": "all"}, "expected lora_A.weight, lora_B.weight"),
        ({**PAIR, KEY.replace(".1.", ".9.") + ".lora_A.weight": torch.ones(8, 4)}, {}, "any of the 3 blocks"),
        ({**PAIR, KEY.replace(".1.", f".{'9' * 50}.") + ".lora_A.weight": torch.ones(8, 4)}, {}, "belongs to none"),
        ({**PAIR, KEY.replace("encoder", "decoder") + ".lora_A.weight": torch.ones(8, 4)}, {}, "several lists of blocks"),
        ({**PAIR, KEY + ".lora_A.default.weight": torch.ones(8, 4)}, {}, "expected lora_A.weight"),
        ({**PAIR, "base_model.model.lm_head.lora_A.weight": torch.ones(8, 4)}, {}, "pass the DistributedModel"),
        ({**PAIR, "x" * 5000: torch.ones(1)}, {}, "does not begin with base_model.model."),
        ({**PAIR, KEY + ".x" * 500 + ".lora_A.weight": torch.ones(8, 4)}, {}, "expected a name of 200 characters at most"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(state: Any, settings: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    folder = write(tmp_path, {**SETTINGS["LORA"], **settings}, state)
    refused(folder, f"^{re.escape(str(folder))}/adapter_model.safetensors: .*(?:{complaint})")


@pytest.mark.parametrize(
    ("kind", "settings", "state", "complaint"),
    [
        ("IA3", {"feedforward_modules": ["query"]}, None, r"expected \(1, inputs\), as feedforward_modules says, got \(4, 1\)"),
        ("IA3", {"feedforward_modules": ["x"]}, None, r"feedforward_modules: expected names .* target_modules, got \['x'\]"),
        ("IA3", {}, {f"{KEY}.ia3_l": torch.ones(4)}, r"expected \(outputs, 1\)"),
        ("PREFIX_TUNING", {"num_virtual_tokens": 3}, None, r"expected \(3, 24\)"),
        ("PREFIX_TUNING", {"token_dim": 8}, None, r"expected \(2, 48\)"),
        ("PREFIX_TUNING", {"num_layers": 4}, None, "num_layers: expected 3, as the model has blocks, got 4"),
        ("PREFIX_TUNING", {"num_transformer_submodules": 2}, None, "num_transformer_submodules: expected 1 or null"),
        ("PREFIX_TUNING", {}, {"prompt_embeddings": torch.ones(2, 0)}, r"expected \(2, 24\)"),
        ("PROMPT_TUNING", {"token_dim": 5}, None, r"expected \(2, 5\)"),
        ("PROMPT_TUNING", {}, {"prompt_embeddings": torch.ones(())}, r"expected \(2, 4\)"),
        ("P_TUNING", {"encoder_reparameterization_type": "GRU"}, None, "encoder_reparameterization_type: expected one of MLP"),
    ],
)  # fmt: skip
def test_other_kinds_that_do_not_fit(kind: str, settings: Any, state: Any, complaint: str, tmp_path: Path) -> None:
    refused(write(tmp_path, {**SETTINGS[kind], **settings}, STATES[kind] if state is None else state), complaint)


# --- files --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        "3",
        "null",
        '"text"',
        "[" * 100_000,
        '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}",
        "\x00",
    ],
)
def test_settings_that_are_no_object(text: str, tmp_path: Path) -> None:
    (write(tmp_path) / "adapter_config.json").write_text(text)
    refused(tmp_path, "adapter_config.json")


def test_settings_of_any_size(tmp_path: Path) -> None:
    os.truncate(write(tmp_path) / "adapter_config.json", 2**30)
    refused(tmp_path, "adapter_config.json: expected 4194304 bytes at most")


def test_folders_without_an_adapter(tmp_path: Path) -> None:
    refused(tmp_path / "none", "adapter_config.json")
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS["LORA"]))
    refused(tmp_path, "adapter_model.safetensors")
    for target in (0, -1, "3", None, 2.0, True):
        with pytest.raises(ConfigError, match="expected a DistributedModel, or the number of its blocks"):
            load_peft(write(tmp_path), target)


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "nonsense": lambda whole: b"nonsense",
    "nothing": lambda whole: b"",
    "truncated": lambda whole: whole[:-10],
    "truncated header": lambda whole: whole[:40],
    "a header of 1 GB": lambda whole: struct.pack("<Q", 2**30) + whole[8:],
    "a header of 2**63 bytes": lambda whole: struct.pack("<Q", 2**63) + whole[8:],
    "a tensor of 1 TB": lambda whole: whole.replace(b"[8,4]", b"[8,4000000000]"),
    "another dtype": lambda whole: whole.replace(b'"F32"', b'"F99"'),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_safetensors(how: str, tmp_path: Path) -> None:
    file = write(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(BROKEN[how](file.read_bytes()))
    refused(tmp_path, "cannot read an adapter from .*adapter_model.safetensors")


class Executed:
    """What a pickle can do."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def pickled(folder: Path, value: Any, **options: Any) -> Path:
    (write(folder) / "adapter_model.safetensors").unlink()
    torch.save(value, folder / "adapter_model.bin", **options)
    return folder


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({**PAIR, "x": Executed()}, "holds other than tensors, which is not executed"),
        ([1], "expected tensors by name, got list"),
        ({3: torch.ones(2)}, "'3': expected names that are text"),
        ({"x": 3}, "'x': expected a tensor, got int"),
        ({"x": torch.ones(1).expand(10**6, 10**6)}, r"'x': expected no more than is in the file, got \(1000000, 1000000\)"),
        ({"x": torch.ones(2, device="meta")}, "'x': expected floating-point numbers, got .* on meta"),
        ({"x": torch.ones(2, 2).to_sparse()}, "'x': expected floating-point numbers, got .*sparse"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_zip", [True, False])
def test_pickles_are_not_executed(
    is_zip: bool, value: Any, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = pickled(tmp_path / "adapter", value, _use_new_zipfile_serialization=is_zip)
    refused(folder, f"adapter_model.bin.*{complaint}")
    assert not (tmp_path / "executed").exists()


def test_other_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = pickled(tmp_path / "adapter", PAIR) / "adapter_model.bin"
    assert load_peft(tmp_path / "adapter", BLOCKS)()[1]
    whole = file.read_bytes()
    for broken in (pickle.dumps(Executed()), b"", b"nonsense", whole[:-30], whole[:100]):
        file.write_bytes(broken)
        refused(tmp_path / "adapter", "cannot read an adapter from .*adapter_model.bin")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(10**6))
    refused(tmp_path / "adapter", "it is compressed")
    assert not (tmp_path / "executed").exists()
