"""Adapters of peft, here and there: the same outputs, the same gradients, also after saving and loading in both directions."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import nn
from torch.testing import assert_close
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.pytorch_utils import Conv1D

from moe import ConfigError, DistributedModel, SoftPrompt, combine, load_peft, save_peft
from moe.architectures import LORA, Architecture, kwarg_of, linear_of
from moe.client.adapters import from_peft, to_peft
from moe.client.adapters.peft_settings import Settings
from moe.errors import RemoteSchemaError
from moe.server.expert_backend import ExpertBackend
from moe.server.pretrained import PretrainedBlock, PretrainedModel
from moe.testing import MemorySwarm, memory_swarm
from tests.client.sequence_swarm import QUICK, FixedRouter
from tests.hosted import hosted as any_hosted
from tests.pretrained import ALL_MODELS, LAYERS, save_model, token_ids

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of much

TOLERANCE: dict[str, Any] = dict(rtol=1e-4, atol=2e-5)
ATTENTION = ["q_proj", "v_proj"]
SEQ_CLS: Any = transformers.AutoModelForSequenceClassification


class Hosted(NamedTuple):
    """A model on disk whose blocks are hosted."""

    folder: Path
    swarm: MemorySwarm
    router: FixedRouter

    def here(self, model_class: Any = None, **options: Any) -> DistributedModel:
        """The model over the swarm."""
        return DistributedModel.from_pretrained(
            self.folder,
            self.swarm.transport,  # type: ignore[arg-type]
            config=QUICK,
            manager=self.router,  # type: ignore[arg-type]
            model_class=model_class,
            **options,
        ).requires_grad_(False)

    def whole(self, model_class: Any = None, **options: Any) -> Any:
        """The model for peft."""
        return (model_class or CLASSES[self.folder.name]).from_pretrained(self.folder, **options)


CLASSES: dict[str, Any] = {
    "bert": transformers.BertModel,
    "llama": transformers.LlamaForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
}


@contextlib.contextmanager
def hosted(kind: str, folder: Path, **options: Any) -> Iterator[Hosted]:
    save_model(kind, folder, **options)
    model = PretrainedModel(folder)
    blocks = [model.load_block(index) for index in range(LAYERS)]
    backends = {f"block.{i}": ExpertBackend(f"block.{i}", b, **b.backend_options()) for i, b in enumerate(blocks)}
    router = FixedRouter(list(backends), {"server0": set(backends)})
    with memory_swarm(backends) as swarm:
        yield Hosted(folder, swarm, router)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Hosted]]:
    """Models by their kind."""
    folder = tmp_path_factory.mktemp("models")
    with contextlib.ExitStack() as stack:
        yield {kind: stack.enter_context(hosted(kind, folder / kind)) for kind in CLASSES}.__getitem__


def trained(whole: Any, config: peft.PeftConfig, seed: int = 0) -> Any:
    """An adapter that does something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(whole, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) / 5)
    return model.eval()


def output_of(model: Any, **kwargs: Any) -> torch.Tensor:
    returned = model(token_ids(2, 6), **kwargs)
    for name in ("logits", "end_logits", "last_hidden_state"):
        if name in returned:
            return returned[name]  # type: ignore[no-any-return]
    raise AssertionError(returned.keys())


def assert_same_outputs(here: DistributedModel, adapter: Any, there: Any) -> None:
    with torch.no_grad():
        got, expected = output_of(here, adapters=adapter), output_of(there)
        assert_close(got, expected, **TOLERANCE)
        assert not torch.allclose(got, output_of(here), atol=1e-2)


def assert_same_gradients(here: DistributedModel, adapter: Any, there: Any, *, others: bool = False) -> None:
    """
    :param others: peft trains more than is in blocks
    """
    for model, kwargs in ((here, dict(adapters=adapter)), (there, {})):
        model.zero_grad()
        output = output_of(model, **kwargs)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        (output * weights).sum().backward()
    of_peft = {name: p.grad for name, p in there.named_parameters() if p.grad is not None}
    expected = get_peft_model_state_dict(there, state_dict=of_peft, save_embedding_layers=False)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.data, parameter.grad = parameter.grad, None
    _, grads = to_peft(adapter, here)
    assert grads.keys() <= expected.keys() if others else grads.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in grads.items():
        assert name.endswith(".bias") or expected[name].abs().max() > 1e-6, name  # biases of keys do not matter
        atol = max(1e-4 * expected[name].abs().max().item(), 1e-5 * largest)
        assert_close(grad, expected[name], rtol=1e-3, atol=atol)


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "init_lora_weights": False, **options}
    )


def ia3(targets: Any, feedforward: Any) -> peft.IA3Config:
    return peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)


KINDS: dict[str, tuple[str, peft.PeftConfig]] = {
    "lora": ("llama", lora()),
    "lora of bert": ("bert", lora(target_modules=["query", "attention.output.dense"])),
    "rslora": ("llama", lora(use_rslora=True)),
    "ranks and alphas": (
        "llama",
        lora(
            target_modules=[*ATTENTION, "down_proj"],
            rank_pattern={r"layers\.1\.self_attn.q_proj": 2, "v_proj": 3},
            alpha_pattern={r"^model.layers.[02].*v_proj": 20, "down_proj": 1},
        ),
    ),
    "a pattern": ("llama", lora(target_modules=r".*\.[02]\.(self_attn|mlp)\.(k|up|down)_proj")),
    "all linear layers": ("llama", lora(target_modules="all-linear")),
    "some layers": ("llama", lora(layers_to_transform=[0, 2], layers_pattern="layers")),
    "excluded ones": ("llama", lora(target_modules=[*ATTENTION, "up_proj"], exclude_modules=r".*\.1\..*")),
    "dropout, in eval mode": ("llama", lora(lora_dropout=0.3)),
    "fan_in_fan_out": ("llama", lora(fan_in_fan_out=True)),
    "gaussian": ("llama", lora(init_lora_weights="gaussian")),
    "eva": ("llama", lora(init_lora_weights="eva", eva_config=peft.EvaConfig())),
    "orthogonal": ("llama", lora(init_lora_weights="orthogonal")),
    "dora": ("qwen2", lora(use_dora=True, target_modules=[*ATTENTION, "o_proj"])),
    "dora, rslora, patterns": (
        "bert", lora(use_dora=True, use_rslora=True, target_modules=["query"], alpha_pattern={"query": 3}),
    ),
    "biases of lora": ("qwen2", lora(bias="lora_only")),
    "all biases": ("qwen2", lora(bias="all", target_modules=["q_proj"])),
    "dora with biases": ("qwen2", lora(bias="lora_only", use_dora=True)),
    "ia3": ("llama", ia3(["k_proj", "v_proj", "down_proj"], ["down_proj"])),
    "ia3 of bert": ("bert", ia3(["key", "intermediate.dense"], ["intermediate.dense"])),
    "ia3 by patterns": ("llama", ia3(r".*\.[02]\..*_proj", r".*(o|up)_proj")),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_here_and_back(kind: str, models: Callable[[str], Hosted], tmp_path: Path) -> None:
    name, config = KINDS[kind]
    made = models(name)
    there, here = trained(made.whole(), config), made.here()
    there.save_pretrained(tmp_path / "peft")
    adapter = load_peft(tmp_path / "peft", here)
    assert_same_outputs(here, adapter, there)
    by_number = load_peft(tmp_path / "peft", num_blocks=LAYERS)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), by_number.parameters(), strict=True))
    save_peft(adapter, tmp_path / "ours", here)
    again = peft.PeftModel.from_pretrained(made.whole(), tmp_path / "ours", is_trainable=True).eval()
    assert_same_outputs(here, adapter, again)
    learned = sum(p.numel() for p in again.parameters() if p.requires_grad)
    assert learned == sum(p.numel() for p in there.parameters() if p.requires_grad)
    assert_same_gradients(here, load_peft(tmp_path / "ours", here), again)
    assert_same_gradients(here, adapter, there)


def test_training_goes_on_as_there(models: Callable[[str], Hosted], tmp_path: Path) -> None:
    made = models("qwen2")
    there, here = trained(made.whole(), lora(use_dora=True, bias="lora_only")), made.here()
    there.save_pretrained(tmp_path)
    adapter = load_peft(tmp_path, here)
    ids = token_ids(2, 6)
    for model, parameters, kwargs in (
        (here, list(adapter.parameters()), dict(adapters=adapter)),
        (there, [p for p in there.parameters() if p.requires_grad], {}),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids, labels=ids, **kwargs).loss.backward()
            optimizer.step()
    assert_same_outputs(here, adapter, there)


def test_biases_of_everything(tmp_path: Path) -> None:
    """Norms in blocks, too; what is outside of them goes into the local part."""
    with hosted("bert", tmp_path / "bert") as made:
        config = lora(bias="all", target_modules=["query"], task_type="SEQ_CLS")
        here = made.here(SEQ_CLS, num_labels=3)
        there = trained(made.whole(SEQ_CLS, num_labels=3), config)
        there.save_pretrained(tmp_path / "peft")
        adapter = load_peft(tmp_path / "peft", here)
        assert "bias_attention__output__LayerNorm" in adapter()[0]
        assert_same_outputs(here, adapter, there)
        with pytest.raises(ConfigError, match=r"(embeddings|pooler|classifier)\..*pass the DistributedModel"):
            load_peft(tmp_path / "peft", LAYERS)


PATHS = [
    f"{parent}.{index}.{linear}"
    for parent, linears in (
        ("bert.encoder.layer", ("attention.self.query", "attention.output.dense", "output.dense")),
        ("model.layers", ("self_attn.q_proj", "mlp.down_proj")),
    )
    for index in (0, 1, 10)
    for linear in linears
]
NAMES = st.sampled_from(
    [
        "query",
        "dense",
        "output.dense",
        "q_proj",
        "proj",
        "self",
        "layer.1.output.dense",
        *PATHS[::3],
        "classifier",
        "0",
        "e",
        "",
    ]
)
PATTERNS = st.sampled_from(
    [
        ".*query", ".*dense", r".*\.1\..*", "query|q_proj", "(query|dense)", r"layers\.1", "layer.1.output.dense", ".*", "",
        "attention", r"^bert.*", r"^model\..*proj$", r"(?!bert).*", *PATHS[::4],
    ]
)  # fmt: skip
LISTS = st.lists(NAMES, max_size=3)


@given(
    targets=LISTS | PATTERNS,
    excluded=st.none() | LISTS | PATTERNS,
    indices=st.none() | st.integers(0, 11) | st.lists(st.integers(0, 11), max_size=3),
    layers=st.none()
    | st.sampled_from(["layer", "layers", "encoder.layer"])
    | st.lists(st.sampled_from(["layer", "layers"])),
    ranks=st.dictionaries(PATTERNS, st.integers(1, 64), max_size=3),
    alphas=st.dictionaries(PATTERNS, st.integers(1, 64), max_size=3),
    whole=st.none() | st.lists(st.sampled_from(["classifier", "output", "query", "encoder"]), max_size=2),
)
def test_the_same_layers_ranks_and_alphas(
    targets: Any, excluded: Any, indices: Any, layers: Any, ranks: dict[str, int], alphas: dict[str, int], whole: Any
) -> None:
    options = dict(target_modules=targets, exclude_modules=excluded, layers_to_transform=indices, layers_pattern=layers)
    options |= dict(rank_pattern=ranks, alpha_pattern=alphas, modules_to_save=whole)
    try:
        config: Any = peft.LoraConfig(**options)
    except ValueError:
        with pytest.raises(ConfigError):
            Settings({"peft_type": "LORA", **options}, "file")
        return
    settings = Settings({"peft_type": "LORA", **options}, "file")
    for path in PATHS:
        assert settings.is_targeted(path) == bool(check_target_module_exists(config, path)), path
        assert settings.rank_of(path) == ranks.get(get_pattern_key(ranks.keys(), path), config.r)
        assert settings.alpha_of(path) == alphas.get(get_pattern_key(alphas.keys(), path), config.lora_alpha)


def test_adapters_of_another_model(models: Callable[[str], Hosted], tmp_path: Path) -> None:
    llama, bert = models("llama"), models("bert")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=4, num_hidden_layers=LAYERS
    )
    other = transformers.LlamaForCausalLM(config)
    trained(other, lora(target_modules=["up_proj"])).save_pretrained(tmp_path / "narrow")
    complaint = (
        r"lora_mlp__up_proj\['a'\] of block 0: expected \(32, None\), .* got \(16, 4\): the adapter is of another model"
    )
    with pytest.raises(ConfigError, match=complaint):
        load_peft(tmp_path / "narrow", llama.here())
    trained(llama.whole(), lora()).save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match="outside of its blocks, which are at encoder.layer"):
        load_peft(tmp_path / "llama", bert.here())
    state = {f"base_model.model.model.layers.0.mlp.x.lora_{half}.weight": torch.ones(8, 8) for half in "AB"}
    with pytest.raises(ConfigError, match=r"'mlp.x' of block 0: the blocks of this model have none"):
        from_peft({"peft_type": "LORA"}, state, llama.here())
    trained(bert.whole(SEQ_CLS), lora(target_modules=["query"])).save_pretrained(tmp_path / "head")
    with pytest.raises(
        ConfigError, match="outside of its blocks, which are at encoder.layer"
    ):  # peft would ignore all of it
        load_peft(tmp_path / "head", bert.here())
    assert load_peft(tmp_path / "head", LAYERS)()[0]
    deep = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**llama.whole().config.to_dict(), "num_hidden_layers": 4})
    )
    trained(deep, lora()).save_pretrained(tmp_path / "deep")
    with pytest.raises(ConfigError, match="any of the 3 blocks"):
        load_peft(tmp_path / "deep", llama.here())


def test_layers_that_begin_at_random_and_are_not_in_the_file(models: Callable[[str], Hosted], tmp_path: Path) -> None:
    made = models("llama")
    there = trained(made.whole(), lora())
    state = get_peft_model_state_dict(there)
    partly = {key: tensor for key, tensor in state.items() if ".layers.1." not in key}
    settings = {"peft_type": "LORA", "r": 4, "target_modules": ATTENTION}
    assert from_peft({**settings, "init_lora_weights": True}, partly, made.here())
    with pytest.raises(
        ConfigError, match=r"'model.layers.1.self_attn.q_proj': it has no tensors, and would begin at random"
    ):
        from_peft({**settings, "init_lora_weights": False}, partly, made.here())


# --- families -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ALL_MODELS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """A model over the swarm, and a function that makes a whole one."""
    with any_hosted(request.param, tmp_path_factory.mktemp("family")) as made:
        model_class: Any = ALL_MODELS[request.param][1]
        yield made.distributed().requires_grad_(False), partial(model_class.from_pretrained, made.folder)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_all_linear_layers_and_biases_of_each_family(use_dora: bool, family: tuple[Any, Any], tmp_path: Path) -> None:
    here, make = family
    whole = make()
    targets = [
        name
        for name, module in whole.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(f"{here.block_path}.")
    ]
    assert {linear_of(kwarg_of(LORA, name)) for name in targets} == {(LORA, name) for name in targets}
    there = trained(whole, lora(target_modules=targets, bias="all", use_dora=use_dora))
    there.save_pretrained(tmp_path / "peft")
    before = copy.deepcopy(here.local.state_dict())
    adapter = load_peft(tmp_path / "peft", here)
    assert_same_outputs(here, adapter, there)
    save_peft(adapter, tmp_path / "ours", here)
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours", is_trainable=True).eval()
    changed = [name for name, tensor in here.local.state_dict().items() if not torch.equal(tensor, before[name])]
    if not changed:
        assert_same_outputs(here, adapter, again)
    assert_same_gradients(here, adapter, there, others=bool(changed))
    here.local.load_state_dict(before)


def test_a_prefix_for_each_family(family: tuple[Any, Any], tmp_path: Path) -> None:
    here, make = family
    task = "CAUSAL_LM" if here.get_output_embeddings() is not None else "FEATURE_EXTRACTION"
    try:
        there = trained(make(), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type=task))
        there.save_pretrained(tmp_path)
        with torch.no_grad():
            output_of(there)
    except (RuntimeError, ValueError):  # peft cannot
        assert here.config.model_type in ("distilbert", "falcon")
        return
    try:
        assert_same_outputs(here, load_peft(tmp_path, here), there)
    except (ConfigError, RemoteSchemaError) as e:  # refused by name
        assert any(why in e.message for why in ("none that takes prefix", "longer than the window"))


# --- heads ----------------------------------------------------------------------------------------------------------------


HEADS: dict[str, tuple[str, Any, str]] = {
    "SEQ_CLS": ("bert", SEQ_CLS, "classifier"),
    "SEQ_CLS of a decoder": ("llama", SEQ_CLS, "score"),
    "TOKEN_CLS": ("bert", transformers.AutoModelForTokenClassification, "classifier"),
    "QUESTION_ANS": ("bert", transformers.AutoModelForQuestionAnswering, "qa_outputs"),
    "CAUSAL_LM": ("llama", None, ""),
    "FEATURE_EXTRACTION": ("bert", None, ""),
}


@pytest.mark.parametrize("task", HEADS)
def test_heads_go_along(task: str, models: Callable[[str], Hosted], tmp_path: Path) -> None:
    kind, model_class, head = HEADS[task]
    made, task = models(kind), task.split()[0]
    options: dict[str, Any] = dict(num_labels=2, pad_token_id=0) if model_class else {}
    targets = ["query"] if kind == "bert" else ATTENTION
    there = trained(made.whole(model_class, **options), lora(task_type=task, target_modules=targets))
    there.save_pretrained(tmp_path / "peft")
    here = made.here(model_class, **options)
    if head:
        with pytest.raises(ConfigError, match=rf"{head}\..*pass the DistributedModel: load_peft\(folder, model\)"):
            load_peft(tmp_path / "peft", LAYERS)
    adapter = load_peft(tmp_path / "peft", here)
    assert_same_outputs(here, adapter, there)
    for where in (here, here.block_path):
        save_peft(adapter, tmp_path / "ours", where, task_type=task)
        again = peft.PeftModel.from_pretrained(made.whole(model_class, **options), tmp_path / "ours")
        assert type(again) is type(there)
        assert_same_outputs(here, adapter, again)
    if head:
        with pytest.raises(ConfigError, match=r"task_type: .*pass the DistributedModel"):
            save_peft(adapter, tmp_path / "none", str(here.block_path), task_type=task)
        assert not (tmp_path / "none").exists()


def test_other_modules_that_are_trained_whole(tmp_path: Path) -> None:
    """Tied ones are untied, as in peft."""
    with hosted("llama", tmp_path / "llama", tie_word_embeddings=True) as made:
        there = trained(made.whole(), lora(modules_to_save=["lm_head", "model.norm"]))
        there.save_pretrained(tmp_path / "peft")
        here = made.here()
        before = here.local.model.embed_tokens.weight.clone()
        adapter = load_peft(tmp_path / "peft", here)
        assert torch.equal(here.local.model.embed_tokens.weight, before)
        assert_same_outputs(here, adapter, there)
        save_peft(adapter, tmp_path / "ours", here, modules_to_save=["lm_head", "model.norm"])
        assert_same_outputs(here, adapter, peft.PeftModel.from_pretrained(made.whole(), tmp_path / "ours"))
        with pytest.raises(ConfigError, match="modules_to_save: the local part of the model has no lm_haed"):
            save_peft(adapter, tmp_path / "none", here, modules_to_save=["lm_haed"])
        with pytest.raises(ConfigError, match="modules_to_save: model has blocks in it"):
            save_peft(adapter, tmp_path / "none", here, modules_to_save=["model"])
        trained(made.whole(), lora(modules_to_save=["input_layernorm"])).save_pretrained(tmp_path / "inside")
        with pytest.raises(ConfigError, match=r"input_layernorm.weight': .*modules_to_save"):
            load_peft(tmp_path / "inside", here)


def test_embeddings_and_local_layers_are_refused(models: Callable[[str], Hosted], tmp_path: Path) -> None:
    made = models("llama")
    for targets, key in ((["embed_tokens"], "embed_tokens."), (["lm_head"], "lm_head.")):
        trained(made.whole(), lora(target_modules=targets)).save_pretrained(tmp_path)
        for model in (made.here(), LAYERS):
            with pytest.raises(ConfigError, match=rf"adapter_model.safetensors: '.*{key}"):
                load_peft(tmp_path, model)


# --- prefixes and prompts -------------------------------------------------------------------------------------------------


PREFIXES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama": ("llama", None, dict(task_type="CAUSAL_LM")),
    "projected": ("llama", None, dict(task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=7)),
    "qwen2": ("qwen2", None, dict(task_type="CAUSAL_LM")),
    "with a head": ("llama", SEQ_CLS, dict(task_type="SEQ_CLS")),
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_prefixes(kind: str, models: Callable[[str], Hosted], tmp_path: Path) -> None:
    name, model_class, options = PREFIXES[kind]
    made, settings = models(name), dict(num_labels=2, pad_token_id=0) if model_class else {}
    there = trained(made.whole(model_class, **settings), peft.PrefixTuningConfig(num_virtual_tokens=3, **options))
    there.save_pretrained(tmp_path / "peft")
    here = made.here(model_class, **settings)
    adapter = load_peft(tmp_path / "peft", here)
    assert_same_outputs(here, adapter, there)
    save_peft(adapter, tmp_path / "ours", here, task_type=options["task_type"])
    again = peft.PeftModel.from_pretrained(made.whole(model_class, **settings), tmp_path / "ours")
    assert_same_outputs(here, adapter, again)
    if kind != "projected":
        assert_same_gradients_of_prefix(here, adapter, there)


def assert_same_gradients_of_prefix(here: DistributedModel, adapter: Any, there: Any) -> None:
    for model, kwargs in ((here, dict(adapters=adapter)), (there, {})):
        output_of(model, **kwargs).square().sum().backward()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.data = parameter.grad
    expected = there.prompt_encoder["default"].embedding.weight.grad
    assert_close(to_peft(adapter, here)[1]["prompt_embeddings"], expected, rtol=1e-3, atol=1e-4)


def test_a_prefix_whose_head_the_settings_do_not_mention(models: Callable[[str], Hosted], tmp_path: Path) -> None:
    """As peft wrote them before prompt learning had modules_to_save."""
    made, settings = models("llama"), dict(num_labels=2, pad_token_id=0)
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    there = trained(made.whole(SEQ_CLS, **settings), config)
    there.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    del values["modules_to_save"]
    file.write_text(json.dumps(values))
    here = made.here(SEQ_CLS, **settings)
    assert_same_outputs(here, load_peft(tmp_path, here), there)
    with pytest.raises(ConfigError, match=r"base_model.score.weight.*pass the DistributedModel"):
        load_peft(tmp_path, LAYERS)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.PromptEncoderConfig(
            num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=7, encoder_dropout=0.1
        ),
        peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_reparameterization_type="LSTM"),
    ],
    ids=["prompt tuning", "P-tuning", "P-tuning, LSTM"],
)
def test_soft_prompts(config: peft.PeftConfig, models: Callable[[str], Hosted], tmp_path: Path) -> None:
    made = models("llama")
    there, here = trained(made.whole(), config), made.here()
    there.save_pretrained(tmp_path / "peft")
    prompt = load_peft(tmp_path / "peft", here)
    assert isinstance(prompt, SoftPrompt)
    assert_close(prompt(), there.get_prompt(1)[0])
    save_peft(prompt, tmp_path / "ours", here, task_type="CAUSAL_LM")
    again = peft.PeftModel.from_pretrained(made.whole(), tmp_path / "ours")
    with torch.no_grad():
        assert_close(output_of(again), output_of(there))


def test_a_soft_prompt_with_a_head(models: Callable[[str], Hosted], tmp_path: Path) -> None:
    made, options = models("llama"), dict(num_labels=2, pad_token_id=0)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    there, here = trained(made.whole(SEQ_CLS, **options), config), made.here(SEQ_CLS, **options)
    there.save_pretrained(tmp_path / "peft")
    prompt = load_peft(tmp_path / "peft", here)
    save_peft(prompt, tmp_path / "ours", here, task_type="SEQ_CLS")
    again = peft.PeftModel.from_pretrained(made.whole(SEQ_CLS, **options), tmp_path / "ours")
    with torch.no_grad():
        assert_close(output_of(again), output_of(there))
    with pytest.raises(ConfigError, match="token_dim: expected 32, the hidden size of the model, got 16"):
        settings = {"peft_type": "PROMPT_TUNING", "token_dim": 16, "num_virtual_tokens": 2}
        from_peft(settings, {"prompt_embeddings": torch.ones(2, 16)}, here)


# --- several, and other files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cat", "linear"])
def test_several_loras_with_weights(how: str, models: Callable[[str], Hosted], tmp_path: Path) -> None:
    made = models("llama")
    here, there = made.here(), trained(made.whole(), lora())
    there.add_adapter("other", lora(target_modules=["v_proj", "up_proj"], lora_alpha=3))
    there.add_weighted_adapter(["default", "other"], [0.7, -1.3], "both", combination_type=how)
    there.save_pretrained(tmp_path)
    adapters = [load_peft(folder, here) for folder in (tmp_path, tmp_path / "other")]
    combined = combine(adapters, [0.7, -1.3], how)
    there.set_adapter("both")
    assert_same_outputs(here, combined, there)
    assert_same_outputs(here, load_peft(tmp_path / "both", here), there)
    save_peft(combined, tmp_path / "ours", here)
    assert_same_outputs(here, combined, peft.PeftModel.from_pretrained(made.whole(), tmp_path / "ours"))
    if how == "cat":
        there.base_model.set_adapter(["default", "other"])
        assert_same_outputs(here, combine(adapters, [1, 1]), there)


def test_several_ia3_with_weights(models: Callable[[str], Hosted], tmp_path: Path) -> None:
    made = models("llama")
    config = KINDS["ia3"][1]
    here, there = made.here(), trained(made.whole(), config)
    there.add_adapter("other", peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    for layer in there.modules():
        if hasattr(layer, "ia3_l") and "other" in layer.ia3_l:
            nn.init.normal_(layer.ia3_l["other"], 1)
    there.add_weighted_adapter(["default", "other"], [0.7, 0.4], "both")
    there.save_pretrained(tmp_path)
    there.set_adapter("both")
    combined = combine([load_peft(folder, here) for folder in (tmp_path, tmp_path / "other")], [0.7, 0.4])
    assert_same_outputs(here, combined, there)


def test_pickled_files(models: Callable[[str], Hosted], tmp_path: Path) -> None:
    made = models("llama")
    there, here = trained(made.whole(), lora()), made.here()
    there.save_pretrained(tmp_path, safe_serialization=False)
    assert_same_outputs(here, load_peft(tmp_path, here), there)
    state = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
    torch.save(state, tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=False)
    assert_same_outputs(here, load_peft(tmp_path, here), there)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "Pissa"])
def test_inits_that_change_the_model(init: str) -> None:
    settings = {"peft_type": "LORA", "init_lora_weights": init}
    with pytest.raises(
        ConfigError, match=r"adapter_config.json: init_lora_weights: .*path_initial_model_for_weight_conversion"
    ):
        from_peft(settings, {}, LAYERS)


def test_one_half_is_not_trained_with_mica(models: Callable[[str], Hosted], tmp_path: Path) -> None:
    made = models("llama")
    there, here = trained(made.whole(), lora(init_lora_weights="mica")), made.here()
    there.save_pretrained(tmp_path)
    adapter = load_peft(tmp_path, here)
    assert_same_outputs(here, adapter, there)
    trainable = {name.split("lora_")[1][0]: p.requires_grad for name, p in there.named_parameters() if "lora_" in name}
    assert trainable == {"A": True, "B": False}
    assert [p.requires_grad for p in adapter.blocks()[0]["lora_self_attn__q_proj"].values()] == [True, False]


def test_nothing_is_put_into_a_model_from_a_file_that_is_refused(
    models: Callable[[str], Hosted], tmp_path: Path
) -> None:
    made, options = models("llama"), dict(num_labels=2, pad_token_id=0)
    here, there = made.here(SEQ_CLS, **options), trained(made.whole(SEQ_CLS, **options), lora(task_type="SEQ_CLS"))
    state, settings = get_peft_model_state_dict(there), {"peft_type": "LORA", "r": 4, "task_type": "SEQ_CLS"}
    before = here.local.score.weight.clone()
    head = "base_model.model.score.weight"
    for wrong, complaint in (
        ({**state, "base_model.model.x": torch.ones(1)}, "'base_model.model.x': the model has nothing of this name"),
        ({**state, head: torch.ones(3, 32)}, rf"'{head}': expected \(2, 32\), as the model has, got \(3, 32\)"),
        ({**state, head: state[head] * torch.nan}, "expected finite numbers"),
        (
            {key: tensor for key, tensor in state.items() if key != head},
            rf"'{head}': it is missing, and peft trains score",
        ),
    ):
        with pytest.raises(ConfigError, match=complaint):
            from_peft(settings, wrong, here)
    assert torch.equal(here.local.score.weight, before)
    copied = copy.deepcopy(here)
    from_peft(settings, state, copied)
    assert torch.equal(copied.local.score.weight, state[head])
    assert torch.equal(here.local.score.weight, before)
    assert to_peft(from_peft(settings, state, copied), copied.block_path, task_type="SEQ_CLS")[1].keys() == state.keys()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_files(init: str, models: Callable[[str], Hosted], tmp_path: Path) -> None:
    made = models("llama")
    there: Any = peft.get_peft_model(made.whole(), lora(init_lora_weights=init))
    here = made.here()
    there.peft_config["default"].init_lora_weights = True
    there.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for layer in there.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_A["default"].weight.add_(torch.randn_like(layer.lora_A["default"].weight) / 5)
    there.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert_same_outputs(here, load_peft(tmp_path / "converted", here), there.eval())


def test_bfloat16(tmp_path: Path) -> None:
    with hosted("llama", tmp_path / "llama", dtype=torch.bfloat16) as made:
        there, here = trained(made.whole(), lora(use_dora=True)), made.here()
        there.save_pretrained(tmp_path / "peft")
        with torch.no_grad():
            got = output_of(here, adapters=load_peft(tmp_path / "peft", here))
            assert_close(got, output_of(there), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("use_dora", [False, True])
def test_layers_with_weights_the_other_way_round(use_dora: bool, tmp_path: Path) -> None:
    """GPT-2 has transformers' Conv1D."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=LAYERS, vocab_size=60, n_positions=64)
    whole = transformers.GPT2Model(config).eval()
    architecture = Architecture("gpt2", GPT2Block.__name__, "h", causal=True)
    blocks = [PretrainedBlock(config, architecture, index) for index in range(LAYERS)]
    for block, own in zip(blocks, whole.h):
        block.layer.load_state_dict({k: v.clone() for k, v in own.state_dict().items()}, assign=True)
    targets = ["c_attn", "mlp.c_proj"]
    there = trained(whole, lora(target_modules=targets, fan_in_fan_out=True, use_dora=use_dora, bias="lora_only"))
    there.save_pretrained(tmp_path)
    adapter = load_peft(tmp_path, LAYERS)
    with torch.no_grad():
        hidden = whole.wte(token_ids(2, 6)) + whole.wpe(torch.arange(6))
        for block, kwargs in zip(blocks, adapter()):
            schema = block.schema().kwargs
            assert schema["lora_attn__c_attn"]["a"].sizes == (32, None)
            assert schema["lora_attn__c_attn"]["b"].sizes == (None, 96)
            hidden = block(hidden, **kwargs)
        assert_close(whole.ln_f(hidden), output_of(there), **TOLERANCE)
