"""Arguments of calls as people write them: what comes out is what the whole model gives, or they are refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.testing import assert_close

from moe import PrefixAdapter, SchemaError, load_peft
from moe.errors import ConfigError
from tests.hosted import Hosted, hosted
from tests.pretrained import padding_mask, token_ids

TOLERANCE = dict(rtol=1e-4, atol=1e-4)


def test_packed_rows_with_and_without_a_cache(llama: Hosted) -> None:
    """Without a cache transformers tells sequences in one row apart, with one it does not; nobody is left to guess."""
    model, ids, packed = llama.distributed(), token_ids(1, 7), torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with torch.no_grad():
        got = model(ids, position_ids=packed, use_cache=False).logits
        assert_close(got, llama.local(ids, position_ids=packed, use_cache=False).logits, **TOLERANCE)
        assert_close(got[:, 4:], llama.local(ids[:, 4:]).logits, **TOLERANCE)
        mask = torch.ones(1, 7)
        together = model(ids, position_ids=packed, attention_mask=mask).logits
        assert_close(together, llama.local(ids, position_ids=packed, attention_mask=mask).logits, **TOLERANCE)
        assert not torch.allclose(got, together, atol=1e-2)
        with pytest.raises(SchemaError, match=r"position_ids: expected steps of one.*use_cache=False"):
            model(ids, position_ids=packed)
        model.config.use_cache = False
        assert_close(model(ids, position_ids=packed).logits, got)


def test_a_head_that_flattens_its_inputs(bert: Hosted) -> None:
    """BertForMultipleChoice: masks (rows, choices, length)."""
    classes = transformers.BertForMultipleChoice
    model = bert.distributed(model_class=classes)
    local = classes.from_pretrained(bert.folder)
    local.classifier.load_state_dict(model.local.classifier.state_dict())
    ids, mask = token_ids(4, 7).view(2, 2, 7), padding_mask([7, 5, 3, 6]).view(2, 2, 7)
    with torch.no_grad():
        assert_close(model(ids, attention_mask=mask).logits, local(ids, attention_mask=mask).logits, **TOLERANCE)


@pytest.mark.parametrize("how", ["to", "torch_dtype", "dtype", "a string"])
def test_a_client_of_another_dtype(how: str, llama: Hosted) -> None:
    forms: dict[str, dict[str, Any]] = {
        "torch_dtype": dict(torch_dtype=torch.bfloat16),
        "dtype": dict(dtype=torch.bfloat16),
        "a string": dict(dtype="bfloat16"),
    }
    model = llama.distributed(**forms.get(how, {}))
    if how == "to":
        model = model.to(torch.bfloat16)
    logits = model(token_ids(2, 5), attention_mask=padding_mask([5, 3])).logits
    assert logits.dtype == torch.bfloat16
    expected = llama.local(token_ids(2, 5), attention_mask=padding_mask([5, 3])).logits
    mask = padding_mask([5, 3]).bool()
    assert (logits.float() - expected)[mask].abs().max() < 0.05 * expected[mask].abs().max()
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.local.parameters())


@pytest.mark.parametrize("settings", [dict(output_hidden_states=True), dict(output_attentions=True)], ids=str)
def test_what_stays_on_the_servers_is_refused_when_a_model_is_loaded(settings: dict[str, Any], llama: Hosted) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}: not available"):
        llama.distributed(**settings)


@pytest.mark.parametrize(
    "wanted", ["LlamaForCausalLM", transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM]
)
def test_the_class_of_a_model_in_any_form(wanted: Any, llama: Hosted) -> None:
    assert type(llama.distributed(model_class=wanted).local) is transformers.LlamaForCausalLM


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        ("LlamaForNothing", "transformers has no class 'LlamaForNothing'"),
        ("AutoTokenizer", "expected a model class"),
        (torch.nn.Linear, "expected a model class"),
        (transformers.AutoModelForSpeechSeq2Seq, "there is no AutoModelForSpeechSeq2Seq for a model of type 'llama'"),
    ],
)
def test_classes_that_are_none(wanted: Any, complaint: str, llama: Hosted) -> None:
    with pytest.raises(ConfigError, match=complaint):
        llama.distributed(model_class=wanted)


def test_the_local_model_and_the_wrapper_are_one(llama: Hosted) -> None:
    model = llama.distributed()
    assert model.get_input_embeddings() is model.local.get_input_embeddings()
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"
    assert type(model).__name__ == "DistributedLlamaForCausalLM"
    model.gradient_checkpointing_enable()
    model.train()
    loss = model(token_ids(2, 5), labels=token_ids(2, 5)).loss
    loss.backward()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        model.nonsense  # noqa: B018
    copied = copy.deepcopy(model)
    assert copied.local is not model.local
    assert copied.blocks(torch.zeros(1, 2, 32)).shape == (1, 2, 32)


def test_generate_without_a_cache(llama: Hosted) -> None:
    model, ids = llama.distributed(), token_ids(2, 4)
    how = dict(max_new_tokens=4, do_sample=False, use_cache=False, attention_mask=torch.ones_like(ids))
    assert torch.equal(model.generate(ids, **how), llama.local.generate(ids, **how))


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "opt", "electra", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("masked", [False, True])
def test_positions_after_a_prefix_are_those_of_transformers(kind: str, masked: bool, tmp_path: Path) -> None:
    with hosted(kind, tmp_path) as made:
        model, ids, length = made.distributed(), token_ids(2, 6), 3
        prefix = PrefixAdapter.for_blocks(made.backends, length=length, std=1.0)
        cache, heads = transformers.DynamicCache(), made.local.config.num_attention_heads
        size = made.backends[0].module.key_size  # type: ignore[union-attr]
        heads = getattr(made.local.config, "num_key_value_heads", None) or heads
        for index, kwargs in enumerate(prefix()):
            pair: Any = kwargs["prefix"]
            halves = (pair[half].reshape(1, length, heads, size // heads) for half in ("key", "value"))  # type: ignore[operator]
            cache.update(*(half.transpose(1, 2).expand(2, -1, -1, -1) for half in halves), index)
        mask = padding_mask([6, 4]) if masked else torch.ones(2, 6, dtype=torch.long)
        longer = torch.nn.functional.pad(mask, (length, 0), value=1)
        with torch.no_grad():
            got = model(ids, attention_mask=mask if masked else None, adapters=prefix)
            expected = made.local(ids, attention_mask=longer, past_key_values=cache)
        assert_close(got[0][mask.bool()], expected[0][mask.bool()], **TOLERANCE)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "opt"])
@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("masked", [False, True])
def test_prompts_of_peft(kind: str, peft_type: str, masked: bool, tmp_path: Path) -> None:
    """Outputs, losses and gradients are those of peft around the whole model."""
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    settings: dict[str, Any] = dict(task_type=task, num_virtual_tokens=3)
    kinds: dict[str, Any] = {
        "PROMPT_TUNING": peft.PromptTuningConfig,
        "P_TUNING": peft.PromptEncoderConfig,
        "PREFIX_TUNING": peft.PrefixTuningConfig,
    }
    sizes = dict(word_embed_proj_dim=32) if kind == "opt" else {}  # peft's prompts are as wide as hidden states
    with hosted(kind, tmp_path / "model", **sizes) as made:
        auto = (
            transformers.AutoModelForSequenceClassification if task == "SEQ_CLS" else transformers.AutoModelForCausalLM
        )
        tuned = peft.get_peft_model(auto.from_pretrained(made.folder), kinds[peft_type](**settings)).eval()
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "prompt_encoder" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        tuned.save_pretrained(tmp_path / "adapter")
        model = made.distributed(model_class=auto)
        adapter = load_peft(tmp_path / "adapter", model)
        ids, mask = token_ids(2, 6), padding_mask([6, 4])
        given = dict(labels=torch.tensor([0, 1]) if task == "SEQ_CLS" else ids)
        given |= dict(attention_mask=mask) if masked else {}
        got, expected = model(ids, adapters=adapter, **given), tuned(input_ids=ids, **given)
        assert_close(got.loss, expected.loss, **TOLERANCE)
        for of_row, theirs, length in zip(got.logits, expected.logits, mask.sum(1)):
            kept = len(of_row) - (6 - int(length)) if masked and task == "CAUSAL_LM" else None  # the rest is padding
            assert_close(of_row[:kept], theirs[:kept], **TOLERANCE)
        got.loss.backward()
        expected.loss.backward()
        if peft_type == "PROMPT_TUNING":
            (learned,) = tuned.prompt_encoder.parameters()
            assert_close(adapter.embeddings.grad, learned.grad, **TOLERANCE)
        assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())
