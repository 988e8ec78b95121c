"""What ``adapter_config.json`` of peft says. Owns: the fields that are known here, and which layers they mean.

**Allow-lists**: a field is one that is known here and has a value that is understood, or it says nothing (null, false, empty),
or it is refused by name, before anything is computed. So what a later version of peft adds is never ignored. Must not know:
tensors. Fields, defaults and the rules for names are those of peft 0.21.2 (https://github.com/huggingface/peft).
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moe.errors import ConfigError

LORA_KIND, IA3_KIND, PREFIX_KIND, PROMPT_KIND, P_TUNING_KIND = (
    "LORA",
    "IA3",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
)
SOFT_KINDS = (PROMPT_KIND, P_TUNING_KIND)
HEADS = {  # by task: modules that peft trains and saves besides
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "CAUSAL_LM": (),
    "FEATURE_EXTRACTION": (),
}
MAX_REPEATS, OPTIONAL = 4, 0.25  # in a pattern of names, and what "?" counts as; ours: more can take years to say no
MATCHING_S = 1.0  # of the processor, for all names and patterns; ours
MAX_NAME = 200  # characters of the name of a layer; ours, same reason
MAX_COUNT, MAX_NUMBER = 2**31, 1e30

_CONVERT = (
    "it changes the weights of the model itself: save the adapter with path_initial_model_for_weight_conversion=, "
    "which makes an ordinary LoRA of it"
)


class Rule(NamedTuple):
    """Values of a field that are understood."""

    fits: Callable[[Any], bool]
    expected: str


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < MAX_COUNT


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < MAX_NUMBER


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value)


def _by_pattern(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(isinstance(n, str) and fits(v) for n, v in value.items())


def _or_null(fits: Callable[[Any], bool], expected: str) -> Rule:
    return Rule(lambda value: value is None or fits(value), f"{expected} or null")


def _one_of(*values: Any) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value in values, f"one of {', '.join(values)}")


def _fits_init(value: Any) -> bool:
    known = ("gaussian", "eva", "orthogonal", "mica")  # none of them changes the weights of the model
    return value is None or isinstance(value, bool) or (isinstance(value, str) and value in known)


_TEXT = _or_null(lambda value: isinstance(value, str), "text")
_FLAG = _or_null(lambda value: isinstance(value, bool), "true, false")
_DICT = _or_null(lambda value: isinstance(value, Mapping), "an object")
_COUNT = Rule(_is_count, "a whole number above 0")
_NUMBER = Rule(_is_number, "a number")
_FRACTION = Rule(lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
_COUNT_OR_NULL = _or_null(_is_count, "a whole number above 0")
_NAMES = _or_null(lambda value: isinstance(value, str) or _is_names(value), "a list of names, a pattern")
_NAME_LIST = _or_null(_is_names, "a list of names")
_LAYERS = _or_null(
    lambda value: all(type(i) is int for i in (value if isinstance(value, (list, tuple)) else [value])),
    "indices of layers",
)
_ONE = _or_null(lambda value: type(value) is int and value == 1, "1")
_TASK = Rule(
    lambda value: value is None or (isinstance(value, str) and value in HEADS),
    f"null or one of {', '.join(HEADS)}, as models with an encoder and a decoder are not hosted",
)

_COMMON = {
    "peft_type": Rule(lambda value: isinstance(value, str), "text"),
    "task_type": _TASK,
    "auto_mapping": _DICT,  # for AutoPeftModel
    "peft_version": _TEXT,
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "inference_mode": _FLAG,
    "modules_to_save": _NAME_LIST,
}
_TARGETS = {
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "fan_in_fan_out": _FLAG,
}  # the layer itself tells the last
_PROMPTS = {
    "num_virtual_tokens": _COUNT_OR_NULL,
    "token_dim": _COUNT_OR_NULL,
    "num_transformer_submodules": _ONE,
    "num_attention_heads": _COUNT_OR_NULL,
    "num_layers": _COUNT_OR_NULL,
}
RULES: dict[str, dict[str, Rule]] = {
    LORA_KIND: {
        **_COMMON,
        **_TARGETS,
        "r": _COUNT,
        "lora_alpha": _NUMBER,
        "lora_dropout": _FRACTION,
        "bias": _one_of("none", "all", "lora_only"),
        "use_rslora": _FLAG,
        "use_dora": _FLAG,
        "rank_pattern": _or_null(_by_pattern(_is_count), "an object of whole numbers above 0"),
        "alpha_pattern": _or_null(_by_pattern(_is_number), "an object of numbers"),
        "layers_to_transform": _LAYERS,
        "layers_pattern": _NAMES,
        "init_lora_weights": Rule(
            _fits_init, f"true, false, gaussian, eva, orthogonal or mica; of any other: {_CONVERT}"
        ),
        # of an init only
        **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), _DICT),
        # of what is refused unless it is off
        "megatron_core": _TEXT,
        "qalora_group_size": _COUNT_OR_NULL,
        # not read by peft from files
        "runtime_config": _DICT,
        "merge_weights": _FLAG,
    },
    IA3_KIND: {**_COMMON, **_TARGETS, "feedforward_modules": _NAMES, "init_ia3_weights": _FLAG},
    PREFIX_KIND: {
        **_COMMON,
        **_PROMPTS,
        "prefix_projection": _FLAG,  # saved is what it gives
        "encoder_hidden_size": _COUNT_OR_NULL,
        "init_weights": _or_null(lambda value: value == "zero", "zero"),
    },
    PROMPT_KIND: {
        **_COMMON,
        **_PROMPTS,
        "prompt_tuning_init": _one_of("TEXT", "SAMPLE_VOCAB", "RANDOM"),
        "prompt_tuning_init_text": _TEXT,
        "tokenizer_name_or_path": _TEXT,
        "tokenizer_kwargs": _DICT,
    },
    P_TUNING_KIND: {  # saved is what the encoder gives
        **_COMMON,
        **_PROMPTS,
        "encoder_reparameterization_type": _one_of("MLP", "LSTM"),
        "encoder_hidden_size": _COUNT_OR_NULL,
        "encoder_num_layers": _COUNT_OR_NULL,
        "encoder_dropout": _FRACTION,
    },
}


class Settings:
    """The fields of one adapter, all of them understood.

    :param values: of the file
    :param file: its name, for errors
    :raises ConfigError: names the file and the field
    """

    def __init__(self, values: Any, file: str):
        self.file = file
        if not isinstance(values, Mapping):
            raise ConfigError(f"{file}: expected an object with the fields of an adapter, got {_short(values)}")
        self._values: dict[str, Any] = {str(name): value for name, value in values.items()}
        kind = self._values.get("peft_type")
        if not isinstance(kind, str) or kind not in RULES:
            raise self.error(
                "peft_type", f"expected one of {', '.join(RULES)}, got {_short(kind)}: use it with peft itself"
            )
        self.kind: str = str(getattr(kind, "value", kind))
        for name, value in self._values.items():
            self._check(name, value)
        self._check_together()
        self._spent_s = 0.0
        self._targets = self._matcher("target_modules")
        self._excluded = self._matcher("exclude_modules")
        self._feedforward = self._matcher("feedforward_modules")
        self._ranks, self._alphas = self._patterns("rank_pattern"), self._patterns("alpha_pattern")
        self._layers = self._patterns("layers_pattern", r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")

    def error(self, field: str, problem: str) -> ConfigError:
        """An error that says where it is."""
        return ConfigError(f"{self.file}: {_short(field, quoted=False)}: {problem}")

    def get(self, field: str, default: Any = None) -> Any:
        """The value of a field.

        :param default: if it is null or missing
        """
        value = self._values.get(field)
        return default if value is None else value

    def saved_modules(self) -> list[str]:
        """Names of modules that are trained and saved whole: those that are told, and heads for the task, as peft adds them."""
        return list(dict.fromkeys([*self.get("modules_to_save", ()), *HEADS[self.get("task_type", "CAUSAL_LM")]]))

    # --- which layers ---------------------------------------------------------------------------------------------------

    def is_targeted(self, path: str) -> bool:
        """Would peft adapt the linear layer of this name? True if the file does not say: peft has defaults for models."""
        with self._timed("target_modules, exclude_modules, modules_to_save"):
            if self._excluded is not None and self._excluded(path):
                return False
            if any(f".{name}." in f".{path}." for name in self.get("modules_to_save", ())):
                return False
            targets = self.get("target_modules")
            if self._targets is None or (not isinstance(targets, str) and path in targets):
                return True  # peft: whole names are taken whatever layers_to_transform says
            return self._targets(path) and self._is_in_layers(path)

    def begins_at_random(self) -> bool:
        """Does an adapter that is not trained yet change something?"""
        field = "init_lora_weights" if self.kind == LORA_KIND else "init_ia3_weights"
        return self._targets is not None and self._values.get(field, True) in (None, False)

    def is_feedforward(self, path: str) -> bool | None:
        """Does IA3 scale what this layer takes? None: the file does not say."""
        with self._timed("feedforward_modules"):
            return None if self._feedforward is None else self._feedforward(path)

    def rank_of(self, path: str) -> int:
        """Of the LoRA of a layer."""
        with self._timed("rank_pattern"):
            return int(next((v for pattern, v in self._ranks if pattern.match(path)), self.get("r", 8)))

    def alpha_of(self, path: str) -> float:
        """Of the LoRA of a layer."""
        with self._timed("alpha_pattern"):
            return float(next((v for pattern, v in self._alphas if pattern.match(path)), self.get("lora_alpha", 8)))

    # --- inside ---------------------------------------------------------------------------------------------------------

    def _check(self, name: str, value: Any) -> None:
        rule = RULES[self.kind].get(name)
        if rule is None and not is_neutral(value):
            raise self.error(
                name,
                f"{_short(value)} is not supported for adapters of type {self.kind}, and may change what they do: "
                "train it without, or use it with peft itself",
            )
        if rule is not None and not rule.fits(value):
            raise self.error(name, f"expected {rule.expected}, got {_short(value)}")

    def _check_together(self) -> None:
        """As peft does."""
        by_pattern, indices = isinstance(self.get("target_modules"), str), self.get("layers_to_transform")
        if by_pattern and (indices is not None or self.get("layers_pattern") is not None):
            raise self.error(
                "target_modules", "a pattern cannot go with layers_to_transform or layers_pattern: list the names"
            )
        if self.get("layers_pattern") and indices is None:
            raise self.error("layers_pattern", "needs layers_to_transform")
        inputs, targets = self.get("feedforward_modules"), self.get("target_modules")
        if inputs and targets is not None and not isinstance(inputs, str) and not isinstance(targets, str):
            others = set(inputs) - set(targets)
            if others:
                raise self.error(
                    "feedforward_modules", f"expected names that are in target_modules, got {_short(sorted(others))}"
                )

    def _matcher(self, field: str) -> Callable[[str], bool] | None:
        """Does a name belong to a list of last parts of names, or match a pattern? None: nothing is said."""
        value = self.get(field)
        if value is None:
            return None
        if isinstance(value, str):
            if field == "target_modules" and value.lower() == "all-linear":
                return lambda path: True
            pattern = self._compile(field, value, "{}")
            return lambda path: pattern.fullmatch(path) is not None
        if field == "feedforward_modules":  # peft: also in the middle of a part
            return lambda path: path.endswith(tuple(value))
        names = set(value)
        return lambda path: any(path[match.start() :].lstrip(".") in names for match in re.finditer(r"^|\.", path))

    def _patterns(self, field: str, around: str = r"(.*\.)?({})$") -> list[tuple[re.Pattern[str], Any]]:
        given = self.get(field, {})
        given = (
            {given: None} if isinstance(given, str) else given if isinstance(given, Mapping) else dict.fromkeys(given)
        )
        return [(self._compile(field, pattern, around), value) for pattern, value in given.items()]

    def _is_in_layers(self, path: str) -> bool:
        indices = self.get("layers_to_transform", ())
        if not isinstance(indices, int) and not indices:
            return True
        patterns = [pattern for pattern, _ in self._layers] or [re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")]
        matched = next((m for pattern in patterns if (m := pattern.match(path))), None)
        return matched is not None and int(matched["idx"]) in ([indices] if isinstance(indices, int) else indices)

    def _compile(self, field: str, pattern: str, around: str) -> re.Pattern[str]:
        try:
            with self._timed(field):
                compiled = re.compile(around.replace("{}", pattern))
                repeats = _repeats(_parser().parse(pattern))
        except (re.error, OverflowError, RecursionError) as e:
            raise self.error(field, f"{_short(pattern)} is not a pattern of names: {e}") from None
        if repeats > MAX_REPEATS:
            raise self.error(
                field,
                f"{_short(pattern)} can take forever: expected {MAX_REPEATS} repeats in a row at most, not nested",
            )
        return compiled

    @contextlib.contextmanager
    def _timed(self, field: str) -> Iterator[None]:
        """Names and patterns of a file may be any, and many."""
        began = time.thread_time()
        yield
        self._spent_s += time.thread_time() - began
        if self._spent_s > MATCHING_S:
            raise self.error(field, "matching its names takes too long: list fewer")


def is_neutral(value: Any) -> bool:
    """Does the value of a field say nothing?"""
    return value is None or value is False or (isinstance(value, (str, Collection)) and not value)


def _short(value: Any, *, quoted: bool = True) -> str:
    text = repr(value) if quoted else value if value.isprintable() else ascii(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _parser() -> Any:
    return importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


def _repeats(pattern: Sequence[Any]) -> float:
    """The most repeats that follow each other in a match of a parsed pattern; a repeated choice counts as too many."""
    found = 0.0
    for operation, argument in pattern:
        name = str(operation)
        if "REPEAT" in name:
            _, most, repeated = argument
            inner = _repeats(repeated)
            found += inner + OPTIONAL if most <= 1 else MAX_REPEATS + 1 if _has_choice(repeated) else 1
        elif name == "BRANCH":
            found += max(map(_repeats, argument[1]))
        else:
            found += sum(map(_repeats, _inner(argument)))
    return found


def _has_choice(pattern: Sequence[Any]) -> bool:
    names = [str(operation) for operation, _ in pattern]
    if any("REPEAT" in name or name == "BRANCH" for name in names):
        return True
    return any(_has_choice(inner) for _, argument in pattern for inner in _inner(argument))


def _inner(argument: Any) -> list[Any]:
    """The parsed patterns in a group."""
    return [part for part in (argument if isinstance(argument, tuple) else [argument]) if hasattr(part, "getwidth")]
