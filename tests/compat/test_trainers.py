"""Trainers, as their users call them, with a DistributedModel: the same losses and weights as with the whole model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForQuestionAnswering, Trainer, TrainingArguments

from tests.hosted import Hosted, hosted
from tests.pretrained import token_ids

ROWS, LENGTH, EPOCHS = 16, 7, 1


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Token ids that are their own labels."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = token_ids(ROWS, LENGTH)[index]
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


@pytest.fixture(scope="module", params=[False, True], ids=["", "tied"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    """A decoder, with a head of its own or that of its embeddings."""
    with hosted("llama", tmp_path_factory.mktemp("llama"), tie_word_embeddings=request.param) as made:
        yield made


def whole(made: Hosted) -> Any:
    """The whole model, of which what is in blocks is not trained."""
    model = copy.deepcopy(made.local)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers." not in name)
    return model


def trainer(model: Any, folder: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        dataloader_pin_memory=False,
        **settings,
    )
    return Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())


@pytest.mark.parametrize(
    "settings", [{}, dict(gradient_checkpointing=True), dict(bf16=True), dict(gradient_accumulation_steps=2)], ids=str
)
def test_trainer(settings: dict[str, Any], llama: Hosted, tmp_path: Path) -> None:
    results = []
    for index, model in enumerate((llama.distributed(), whole(llama))):
        own = trainer(model, tmp_path / str(index), **settings)
        loss = own.train().training_loss
        results.append((loss, own.evaluate()["eval_loss"], model.state_dict()))
    (loss, evaluated, state), (expected_loss, expected_evaluated, expected) = results
    tolerance = 2e-2 if "bf16" in settings else 1e-4  # blocks do not compute in the trainer's autocast
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert evaluated == pytest.approx(expected_evaluated, rel=tolerance)
    for name, tensor in state.items():
        assert_close(tensor, expected[name.removeprefix("local.")], rtol=tolerance, atol=10 * tolerance)


def test_trainer_goes_on_from_its_checkpoint(llama: Hosted, tmp_path: Path) -> None:
    uninterrupted = trainer(llama.distributed(), tmp_path / "whole", save_strategy="steps", save_steps=2)
    uninterrupted.train()
    expected: Any = uninterrupted.model
    model = llama.distributed()
    resumed = trainer(model, tmp_path / "whole", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, tensor in expected.state_dict().items():
        assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert_close(model(token_ids(2, 5)).logits, expected(token_ids(2, 5)).logits)


def test_trainer_knows_the_labels_of_other_heads(tmp_path: Path) -> None:
    with hosted("bert", tmp_path / "bert") as made:
        model = made.distributed(model_class=AutoModelForQuestionAnswering)
        assert trainer(model, tmp_path / "out").label_names == ["start_positions", "end_positions"]


def test_accelerate(llama: Hosted) -> None:
    losses = []
    for model in (llama.distributed(), whole(llama)):
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        data = torch.utils.data.DataLoader(Rows(), batch_size=4)
        prepared, optimizer, data = accelerator.prepare(model, optimizer, data)
        own = []
        for batch in data:
            with accelerator.accumulate(prepared):
                loss = prepared(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            own.append(loss.item())
        losses.append(own)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
