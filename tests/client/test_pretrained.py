"""DistributedModel over servers in this process: called as transformers' own model, and returns the same."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

from moe import DeepPrompts, DistributedModel, LoraAdapter, PrefixAdapter, SchemaError
from moe.client.pretrained import block_kwargs_of
from moe.errors import ConfigError, MissingBlocks, Unsupported
from tests.client.sequence_swarm import QUICK, FixedRouter
from tests.hosted import TOLERANCE, Hosted, assert_same_outputs, hosted
from tests.pretrained import LAYERS, MODELS, padding_mask, token_ids

HIDDEN = 32


@pytest.fixture(scope="module", params=MODELS)
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    """Each kind of model."""
    with hosted(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    """An encoder."""
    with hosted("bert", tmp_path_factory.mktemp("bert")) as made:
        yield made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    """A decoder."""
    with hosted("llama", tmp_path_factory.mktemp("llama")) as made:
        yield made


# --- as the model of transformers ---------------------------------------------------------------------------------------


def test_the_same_outputs(any_model: Hosted) -> None:
    model = any_model.distributed()
    ids, mask = token_ids(3, 9), padding_mask([9, 4, 7])
    positions = torch.arange(9) + torch.tensor([[1], [0], [4]])
    with torch.no_grad():
        assert_same_outputs(model(ids), any_model.local(ids))
        assert_same_outputs(model(ids, mask), any_model.local(ids, mask))  # by position, as one may in transformers
        for given in (
            dict(attention_mask=mask),
            dict(attention_mask=padding_mask([9, 4, 7], left=True)),
            dict(attention_mask=mask.bool()),
            dict(attention_mask=mask, position_ids=positions),
            dict(position_ids=positions[1:2]),
        ):
            assert_same_outputs(model(ids, **given), any_model.local(ids, **given))
        embedded = any_model.local.get_input_embeddings()(ids)
        assert_same_outputs(model(inputs_embeds=embedded), any_model.local(inputs_embeds=embedded))
        assert isinstance(model(ids, return_dict=False), tuple)


def test_only_embeddings_and_head_are_here(any_model: Hosted) -> None:
    model = any_model.distributed()
    names = {name.removeprefix("local.") for name, _ in model.named_parameters()}
    assert names == {name for name, _ in any_model.local.named_parameters() if f"{model.block_path}." not in name}
    assert model.config.num_hidden_layers == LAYERS
    assert not model.training


def test_the_same_loss_and_gradients(llama: Hosted) -> None:
    model, local = llama.distributed(), llama.local
    ids, mask = token_ids(3, 8), padding_mask([8, 5, 8])
    labels = ids.masked_fill(mask == 0, -100)
    got = model(ids, attention_mask=mask, labels=labels).loss
    expected = local(ids, attention_mask=mask, labels=labels).loss
    assert_close(got, expected, **TOLERANCE)
    got.backward()
    expected.backward()
    of_local = dict(local.named_parameters())
    for name, parameter in model.local.named_parameters():
        assert_close(parameter.grad, of_local[name].grad, **TOLERANCE)
    local.zero_grad()


def test_blocks_run_in_spans_and_the_mask_goes_along(bert: Hosted) -> None:
    model, before = bert.distributed(), len(bert.swarm.calls)
    with torch.no_grad():
        model(token_ids(2, 5), attention_mask=padding_mask([5, 2]))
    calls = [call for call in bert.swarm.calls[before:] if call[1] != "info"]
    assert calls == [("server0", "forward", "block.0 block.1"), ("server1", "forward", "block.2")]


def test_another_head(bert: Hosted) -> None:
    classes = transformers.AutoModelForSequenceClassification
    model = bert.distributed(model_class=classes, num_labels=3)
    assert type(model.local) is transformers.BertForSequenceClassification
    assert model.block_path == "bert.encoder.layer"
    local = classes.from_pretrained(bert.folder, num_labels=3)
    local.classifier.load_state_dict(model.local.classifier.state_dict())
    ids, mask = token_ids(3, 6), padding_mask([6, 6, 2])
    got, expected = (m(ids, attention_mask=mask, labels=torch.tensor([0, 2, 1])) for m in (model, local))
    assert got.logits.shape == (3, 3)
    assert_same_outputs(got, expected)


def test_tied_and_untied_heads(tmp_path: Path) -> None:
    with hosted("llama", tmp_path, tie_word_embeddings=True) as tied:
        model, ids = tied.distributed(), token_ids(2, 4)
        assert model.local.lm_head.weight is model.local.model.embed_tokens.weight
        assert_same_outputs(model(ids), tied.local(ids))


def test_bfloat16(tmp_path: Path) -> None:
    with hosted("llama", tmp_path, dtype=torch.bfloat16) as small:
        model, ids = small.distributed(), token_ids(2, 6)
        assert model.local.dtype == torch.bfloat16
        with torch.no_grad():
            assert_close(model(ids).logits, small.local(ids).logits, rtol=0.02, atol=0.02)


def test_a_folder_without_the_blocks_is_enough(tmp_path: Path, bert: Hosted) -> None:
    whole = bert.local.state_dict()
    (tmp_path / "config.json").write_text((bert.folder / "config.json").read_text())
    torch.save({k: v for k, v in whole.items() if "encoder.layer." not in k}, tmp_path / "pytorch_model.bin")
    model = DistributedModel.from_pretrained(tmp_path, bert.swarm.transport, config=QUICK, manager=bert.router)  # type: ignore[arg-type]
    assert_same_outputs(model(token_ids(2, 5)), bert.local(token_ids(2, 5)))


def test_copies_share_the_servers_and_have_a_head_of_their_own(bert: Hosted) -> None:
    model, ids = bert.distributed(), token_ids(2, 5)
    copied = copy.deepcopy(model)
    assert_same_outputs(copied(ids), bert.local(ids))
    with torch.no_grad():
        copied.local.embeddings.word_embeddings.weight.zero_()
    assert_same_outputs(model(ids), bert.local(ids))
    for save in (pickle.dumps, lambda whole: torch.save(whole, io.BytesIO())):
        with pytest.raises(Unsupported, match=r"RemoteSequential cannot be pickled.*state_dict"):
            save(model)
    model.load_state_dict(model.state_dict())


# --- adapters -------------------------------------------------------------------------------------------------------------


def lora_for(made: Hosted, seed: int, **options: Any) -> LoraAdapter:
    """An adapter that changes something."""
    adapter = LoraAdapter.for_blocks(made.backends, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return adapter


def run_locally(made: Hosted, hidden: torch.Tensor, per_block: Sequence[Any], **kwargs: torch.Tensor) -> torch.Tensor:
    for backend, own in zip(made.backends, per_block):
        hidden = backend.module(hidden, **kwargs, **own)
    return hidden


def test_adapters_of_a_call_in_all_forms(bert: Hosted) -> None:
    model, ids, mask = bert.distributed(), token_ids(2, 6), padding_mask([6, 3])
    lora, prefix = lora_for(bert, 0), PrefixAdapter.for_blocks(bert.backends, length=2, std=1.0)
    prompts = DeepPrompts(LAYERS, 2, HIDDEN, std=1.0)

    def check(adapters: Any, per_block: Sequence[Any]) -> torch.Tensor:
        positions = torch.arange(6)[None] + (2 if "prefix" in per_block[0] else 0)  # as in peft, after the prefix
        embedded = bert.local.embeddings(ids, position_ids=positions)
        own = [
            {name: v.expand(2, -1, -1) if name == "prompt" else v for name, v in kwargs.items()} for kwargs in per_block
        ]
        got = model(ids, attention_mask=mask, adapters=adapters).last_hidden_state
        assert_close(got, run_locally(bert, embedded, own, attention_mask=mask), **TOLERANCE)
        return got.detach()  # type: ignore[no-any-return]

    plain = model(ids, attention_mask=mask).last_hidden_state
    results = [
        check(lora, lora()),
        check([lora, prompts], [{**a, **b} for a, b in zip(lora(), prompts())]),
        check([prefix], prefix()),
        check(lora(), lora()),
        check(lora()[0], [lora()[0]] * LAYERS),
    ]
    assert all(not torch.allclose(plain, result, atol=1e-2) for result in results)
    assert torch.equal(model(ids, attention_mask=mask, adapters=None).last_hidden_state, plain)


def test_positions_after_a_prefix(llama: Hosted) -> None:
    """As in transformers and peft, what a prefix precedes is at the positions after it."""
    model, ids = llama.distributed(), token_ids(2, 6)
    prefix = PrefixAdapter.for_blocks(llama.backends, length=3, std=1.0)
    cache = transformers.DynamicCache()
    for index, kwargs in enumerate(prefix()):
        pair = (
            kwargs["prefix"][half].reshape(1, 3, 2, 8).transpose(1, 2).expand(2, -1, -1, -1)
            for half in ("key", "value")
        )
        cache.update(*pair, index)
    expected = llama.local(ids, attention_mask=torch.ones(2, 9, dtype=torch.long), past_key_values=cache).logits
    assert_close(model(ids, adapters=prefix).logits, expected, **TOLERANCE)


def test_users_with_different_adapters_at_once(bert: Hosted) -> None:
    model, ids = bert.distributed(), token_ids(2, 6)
    adapters = [lora_for(bert, seed) for seed in range(4)]

    def gradients(adapter: LoraAdapter) -> list[torch.Tensor]:
        loss = model(ids, adapters=adapter).last_hidden_state.square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, list(adapter.parameters()))]

    alone = [gradients(adapter) for adapter in adapters]
    with ThreadPoolExecutor(4) as threads:
        for got, expected in zip(threads.map(gradients, adapters * 3), alone * 3):
            for mine, reference in zip(got, expected):
                assert_close(mine, reference, rtol=1e-4, atol=1e-4)


def test_g1_whatever_a_block_takes_is_passed_and_learned(llama: Hosted) -> None:
    """Petals' pull request #467: ``model.forward(h, attention_mask=, layer_past=learned, position_ids=, **any)``."""
    blocks = llama.distributed().blocks
    hidden, mask = torch.randn(2, 6, HIDDEN), padding_mask([6, 3])
    positions = torch.arange(6).repeat(2, 1) + 5

    def learned() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        sizes = ((3, 16), (3, 16), (32, 2), (2, 32), (16,))
        return [torch.randn(*size, generator=generator).requires_grad_() for size in sizes]

    def kwargs(key: Any, value: Any, a: Any, b: Any, scale: Any) -> dict[str, Any]:
        lora, past = {"a": a, "b": b}, {"key": key, "value": value}
        given = dict(attention_mask=mask, position_ids=positions, prefix=past)
        return {**given, "lora_self_attn__q_proj": lora, "ia3_self_attn__v_proj": scale}

    ours, theirs = learned(), learned()
    got = blocks(hidden, **kwargs(*theirs))
    expected = run_locally(llama, hidden, [kwargs(*ours)] * LAYERS)
    assert_close(got, expected, **TOLERANCE)
    got.square().mean().backward()
    for tensor, grad in zip(theirs, torch.autograd.grad(expected.square().mean(), ours)):
        assert grad.abs().max() > 1e-3
        assert_close(tensor.grad, grad, **TOLERANCE)


def test_f28_p_tuning_at_the_input_and_in_each_block(bert: Hosted) -> None:
    """The loss falls, and nothing but the prompts changes."""
    torch.manual_seed(0)
    model, ids, mask = bert.distributed().requires_grad_(False), token_ids(4, 6), padding_mask([6, 3, 5, 6])
    words, seen = model.local.get_input_embeddings()(ids), torch.nn.functional.pad(mask, (2, 0), value=1)

    def run(soft: torch.Tensor, deep: DeepPrompts) -> torch.Tensor:
        longer = torch.cat([soft.expand(len(ids), -1, -1), words], dim=1)
        hidden: torch.Tensor = model(inputs_embeds=longer, attention_mask=seen, adapters=deep).last_hidden_state
        return hidden[seen.bool()]

    target = run(torch.randn(2, HIDDEN), DeepPrompts(LAYERS, 2, HIDDEN, std=1.0)).detach()
    soft, deep = torch.nn.Parameter(torch.randn(2, HIDDEN) / 50), DeepPrompts(LAYERS, 2, HIDDEN)
    states = [m.state_dict() for m in (model.local, *(backend.module for backend in bert.backends))]
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    optimizer = torch.optim.Adam([soft, *deep.parameters()], lr=0.1)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.mse_loss(run(soft, deep), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.7
    assert all(torch.equal(state[name], old[name]) for state, old in zip(states, before) for name in old)


def test_adapters_for_another_number_of_blocks() -> None:
    with pytest.raises(SchemaError, match="expected kwargs for 3 blocks, got 2"):
        block_kwargs_of([{}, {}], 3)
    prompts = DeepPrompts(3, 2, HIDDEN)
    with pytest.raises(SchemaError, match=r"kwargs \['prompt'\] are given by two of them"):
        block_kwargs_of([prompts, prompts], 3)


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        (dict(use_cache=True), "use_cache: not available"),
        (dict(past_key_values=transformers.DynamicCache()), "past_key_values: not available"),
        (dict(output_hidden_states=True, output_attentions=True), "output_hidden_states, output_attentions"),
        (dict(attention_mask=torch.ones(2, 1, 5, 5, dtype=torch.long)), r"attention_mask: expected .*got torch.int64"),
        (dict(attention_mask=torch.ones(2, 4)), r"attention_mask: expected \(rows, 5\), as the inputs, got \(2, 4\)"),
        (dict(is_causal=False), "is_causal: expected one of"),
        (dict(something_new=torch.ones(2)), "something_new: expected one of"),
        (dict(attention_mask=torch.ones(3, 5)), "expected 2 rows"),
        (dict(adapters={"lora": torch.ones(3)}), "unknown"),
    ],
)
def test_inputs_that_are_refused(kwargs: Any, complaint: str, llama: Hosted) -> None:
    with pytest.raises(SchemaError, match=complaint):
        llama.distributed()(inputs_embeds=torch.randn(2, 5, HIDDEN), **kwargs)


def test_nothing_of_a_call_is_left_after_an_error(bert: Hosted) -> None:
    model = bert.distributed()
    with pytest.raises(SchemaError):
        model(token_ids(1, 3), adapters={"lora": torch.ones(3)})
    assert_same_outputs(model.local(token_ids(1, 3)), bert.local(token_ids(1, 3)))


def test_models_that_cannot_be_loaded(tmp_path: Path, bert: Hosted) -> None:
    with pytest.raises(ConfigError, match="there is no model in"):
        DistributedModel.from_pretrained(tmp_path, bert.swarm.transport)
    (tmp_path / "config.json").write_text((bert.folder / "config.json").read_text())
    with pytest.raises(ConfigError, match="no weights in"):
        DistributedModel.from_pretrained(tmp_path, bert.swarm.transport)


def test_the_class_in_the_configuration_has_to_be_a_model(bert: Hosted, tmp_path: Path) -> None:
    config = (bert.folder / "config.json").read_text()
    for file in bert.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(config.replace('"BertModel"', '"pipeline"'))
    model = DistributedModel.from_pretrained(tmp_path, bert.swarm.transport, manager=bert.router)  # type: ignore[arg-type]
    assert type(model.local) is transformers.BertModel


def test_blocks_that_nobody_hosts(bert: Hosted) -> None:
    router = FixedRouter(bert.router.uids, {})
    model = DistributedModel.from_pretrained(bert.folder, bert.swarm.transport, config=QUICK, manager=router)  # type: ignore[arg-type]
    with pytest.raises(MissingBlocks, match="no live server for 3 of 3 blocks"):
        model(token_ids(1, 3))
