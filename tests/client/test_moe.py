"""RemoteMixtureOfExperts against real servers in this process: exactness, failures, and the bugs of hivemind's version."""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from moe.client.moe import RemoteMixtureOfExperts
from moe.config import ClientConfig
from moe.errors import CallTimeout, ConfigError, ConnectError, NoExpertsFound, SchemaError, TooFewExperts
from moe.expert_uid import ExpertInfo, coordinates
from moe.schema import BatchTensorProto, TensorProto
from moe.transport.memory import MemoryPeer
from tests.client.memory_swarm import DIM, RANK, FullSearch, Swarm, adapted_schema, grad_of

ONE_TRY = ClientConfig(max_retries=0)
PEER = MemoryPeer("peer")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def swarm():
    with Swarm() as swarm:
        yield swarm


def mixture(swarm, **options):
    options.setdefault("k_best", 4)
    options.setdefault("config", ONE_TRY)
    return swarm.mixture(RemoteMixtureOfExperts, **options)


def dense(swarm, moe, x, *, silent=(), constant=(), **kwargs):
    """The same mixture computed locally: every expert on every row, all but the best masked out.

    :param silent: experts that do not answer
    :param constant: experts through which no gradient flows
    """
    uids = swarm.search.uids
    x_gate = x if x.ndim == 2 else x.mean(dim=tuple(range(1, x.ndim - 1)))
    by_dim = moe.proj(x_gate).split(list(swarm.search.grid_size), dim=-1)
    scores = sum(dim[:, [coordinates(uid)[i] for uid in uids]] for i, dim in enumerate(by_dim))
    best = scores.topk(min(moe.k_best, len(uids)), dim=1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
    chosen &= torch.tensor([uid not in silent for uid in uids])
    weights = scores.masked_fill(~chosen, -torch.inf).softmax(dim=1)
    outputs = []
    for uid in uids:
        y = swarm.originals[uid](x, **kwargs)
        outputs.append(y.detach() if uid in constant else y)
    return torch.einsum("be,be...->b...", weights, torch.stack(outputs, dim=1))


def gradients(y, tensors):
    """Of a loss in which every output element has its own weight."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad((y * weights).sum(), tensors, allow_unused=True, retain_graph=True)


def assert_same(swarm, moe, x, *, silent=(), constant=(), **kwargs):
    """Outputs and all gradients: of the input, the gate, and every kwarg that has one."""
    tensors = [x, moe.proj.weight, moe.proj.bias, *(t for t in kwargs.values() if t.requires_grad)]
    ours = moe(x, **kwargs)
    theirs = dense(swarm, moe, x, silent=silent, constant=constant, **kwargs)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for ours_grad, theirs_grad in zip(gradients(ours, tensors), gradients(theirs, tensors)):
        torch.testing.assert_close(ours_grad, theirs_grad, atol=1e-5, rtol=1e-5)


def used(moe, x):
    """Experts that rows of x go to, and for each of them its rows."""
    with torch.no_grad():
        scores = moe._grid_scores(moe._gating_input(x))
        chosen = moe.beam_search.search([s.numpy() for s in scores], moe.k_best, timeout_s=None)
    rows: dict[str, list[int]] = {}
    for row, infos in enumerate(chosen):
        for info in infos:
            rows.setdefault(info.uid, []).append(row)
    return rows


# --- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid_size", [(8,), (2, 4), (2, 2, 2)], ids=str)
def test_equals_dense_computation(grid_size):
    with Swarm(grid_size) as swarm:
        assert_same(swarm, mixture(swarm), torch.randn(64, DIM, requires_grad=True))


def test_sequences_masks_and_adapters_equal_dense_computation():
    with Swarm(**adapted_schema(None)) as swarm:
        moe = mixture(swarm)
        for length in (5, 8):
            a, b = torch.randn(DIM, RANK, requires_grad=True), torch.randn(RANK, DIM, requires_grad=True)
            x, mask = torch.randn(12, length, DIM, requires_grad=True), torch.rand(12, length) > 0.3
            assert_same(swarm, moe, x, mask=mask, lora_a=a, lora_b=b)
            assert_same(swarm, moe, x, mask=mask)


def test_batch_size_equal_to_rank_and_dim_is_no_confusion(swarm):
    a, b = torch.randn(DIM, RANK, requires_grad=True), torch.randn(RANK, DIM, requires_grad=True)
    for rows in (DIM, RANK, 1):
        assert_same(swarm, mixture(swarm), torch.randn(rows, DIM, requires_grad=True), lora_a=a, lora_b=b)


def test_explicit_kinds_of_kwargs(swarm):
    moe, x = mixture(swarm), torch.randn(5, DIM)
    a, b = torch.randn(DIM, RANK), torch.randn(RANK, DIM)
    mask = torch.ones(5, dtype=torch.bool)
    y = moe(x, batch_kwargs={"mask": mask}, global_kwargs={"lora_a": a, "lora_b": b})
    torch.testing.assert_close(y, moe(x, mask=mask, lora_a=a, lora_b=b))
    with pytest.raises(SchemaError, match="given as batched, but the expert's schema says global"):
        moe(x, batch_kwargs={"lora_a": a}, lora_b=b)


def test_experts_train_as_they_would_locally():
    with Swarm(lr=0.1) as swarm:
        moe, x = mixture(swarm), torch.randn(16, DIM)
        local = [p for uid in swarm.search.uids for p in swarm.originals[uid].parameters()]
        y = dense(swarm, moe, x)
        expected = [p if g is None else p - 0.1 * g for p, g in zip(local, gradients(y, local))]
        (moe(x) * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        remote = [p for uid in swarm.search.uids for p in swarm.modules[uid].parameters()]
        for ours, theirs in zip(remote, expected):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_bfloat16_inputs(swarm):
    moe = mixture(swarm)
    x = torch.randn(9, DIM).bfloat16().requires_grad_()
    a, b = (torch.randn(*size).bfloat16().requires_grad_() for size in ((DIM, RANK), (RANK, DIM)))
    y = moe(x, lora_a=a, lora_b=b)
    y.float().sum().backward()
    assert y.dtype == grad_of(x).dtype == grad_of(a).dtype == torch.bfloat16
    exact = [t.detach().float().requires_grad_() for t in (x, a, b)]
    expected = dense(swarm, moe, exact[0], lora_a=exact[1], lora_b=exact[2])
    torch.testing.assert_close(y.float(), expected, atol=0.02, rtol=0.02)
    for ours, theirs in zip((x, a, b), torch.autograd.grad(expected.sum(), exact)):
        torch.testing.assert_close(grad_of(ours).float(), theirs, atol=0.05, rtol=0.05)
    moe.bfloat16()
    assert moe(x).dtype == torch.bfloat16


def test_float64_inputs(swarm):
    x = torch.randn(9, DIM, dtype=torch.float64, requires_grad=True)
    y = mixture(swarm)(x)
    y.sum().backward()
    assert y.dtype == grad_of(x).dtype == torch.float64


class ManyOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, 2)

    def forward(self, x):
        y = self.linear(x)
        return {"y": y, "more": (x.unsqueeze(1) * y.unsqueeze(2), (y > 0).long())}


def test_nested_and_integer_outputs():
    with Swarm(make=ManyOutputs, args_schema=(BatchTensorProto(DIM),)) as swarm:
        moe, x = mixture(swarm, k_best=8), torch.randn(7, DIM, requires_grad=True)
        y = moe(x)
        assert y["y"].shape == (7, 2) and y["more"][0].shape == (7, 2, DIM)
        assert (y["more"][1] >= 0).all() and (y["more"][1] <= 1).all() and y["more"][1].is_floating_point()
        scores = moe.compute_expert_scores(moe._grid_scores(x), [[ExpertInfo(u, PEER) for u in swarm.search.uids]] * 7)
        local = [swarm.originals[uid](x) for uid in swarm.search.uids]
        for ours, pick in ((y["y"], lambda o: o["y"]), (y["more"][0], lambda o: o["more"][0])):
            expected = torch.einsum("be,be...->b...", scores.softmax(1), torch.stack([pick(o) for o in local], 1))
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
            for a, b in zip(gradients(ours, [x, moe.proj.weight]), gradients(expected, [x, moe.proj.weight])):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_second_backward_gives_the_same_gradients_and_trains_again():
    with Swarm(lr=0.0) as swarm:
        moe, x = mixture(swarm), torch.randn(8, DIM, requires_grad=True)
        y = moe(x).sum()
        first = torch.autograd.grad(y, [x, *moe.parameters()], retain_graph=True)
        second = torch.autograd.grad(y, [x, *moe.parameters()])
        for a, b in zip(first, second):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert {b.updates for b in swarm.backends.values()} <= {0, 2}


def test_requests_that_are_too_large_are_split():
    with Swarm((2,), max_batch_size=5, **adapted_schema()) as swarm:
        a, b = torch.randn(DIM, RANK, requires_grad=True), torch.randn(RANK, DIM, requires_grad=True)
        assert_same(swarm, mixture(swarm, k_best=2), torch.randn(13, DIM, requires_grad=True), lora_a=a, lora_b=b)


def test_empty_batch(swarm):
    moe = mixture(swarm)
    y = moe(torch.randn(0, DIM, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, DIM) and grad_of(moe.proj.weight).abs().sum() == 0


# --- requests ------------------------------------------------------------------------------------------------------


def test_pitfall_18_one_search_per_batch_and_one_request_per_expert_and_pass():
    with Swarm(lr=0.0) as swarm:
        moe = mixture(swarm)
        for step in range(3):
            swarm.transport.calls.clear()
            swarm.search.searches.clear()
            moe(torch.randn(64, DIM)).sum().backward()
            assert swarm.transport.count("forward") == swarm.transport.count("backward") == 8
            assert swarm.transport.count("info") == 0 or step == 0, "known experts are not asked again"
            assert len(swarm.search.searches) == 1
        assert sum(moe.statistics().rows_per_expert.values()) == 64 * 4


def test_pitfall_19_global_kwargs_are_sent_whole_and_their_gradients_summed(swarm):
    moe, x = mixture(swarm), torch.randn(64, DIM)
    a, b = torch.randn(DIM, RANK, requires_grad=True), torch.randn(RANK, DIM, requires_grad=True)
    moe(x, lora_a=a, lora_b=b).sum().backward()
    expected = torch.autograd.grad(dense(swarm, moe, x, lora_a=a, lora_b=b).sum(), [a, b])
    torch.testing.assert_close([grad_of(a), grad_of(b)], list(expected), atol=1e-4, rtol=1e-5)
    assert swarm.transport.count("backward") == 8


def test_descriptions_are_fetched_at_once_and_a_hanging_one_holds_nobody_up(swarm):
    for uid in swarm.search.uids[1:]:
        swarm.transport.stalled.add(("info", uid))
    moe, x = mixture(swarm, k_best=8, timeout_after_k_min=0.2), torch.randn(4, DIM)
    began = time.monotonic()
    y = moe(x)
    assert time.monotonic() - began < 4
    torch.testing.assert_close(y, swarm.originals[swarm.search.uids[0]](x), atol=1e-5, rtol=1e-5)


def test_no_backward_requests_when_nobody_wants_gradients(swarm):
    moe = mixture(swarm)
    moe(torch.randn(4, DIM)).sum().backward()  # no optimizer, and x wants none
    assert swarm.transport.count("backward") == 0 and grad_of(moe.proj.weight).abs().sum() > 0


def test_wrong_inputs_are_refused_before_anything_is_sent(swarm):
    moe = mixture(swarm)
    moe(torch.randn(3, DIM))
    swarm.transport.calls.clear()
    x, a = torch.randn(3, DIM), torch.randn(DIM, RANK)
    for call, message in (
        (lambda: moe(torch.randn(3, DIM + 1)), "input: expected a tensor"),
        (lambda: moe(torch.randn(DIM)), "input: expected a tensor"),
        (lambda: moe(torch.randn(3, 2, DIM)), r"args\[0\]: expected float32\(batch, 6\)"),
        (lambda: moe(x, torch.randn(3, DIM)), "args: expected 1 positional"),
        (lambda: moe(x, maks=x), "unknown"),
        (lambda: moe(x, mask=torch.ones(4, dtype=torch.bool)), "expected 3 rows"),
        (lambda: moe(x, lora_a=a.T, lora_b=a), "lora_a"),
    ):
        with pytest.raises(SchemaError, match=message):
            call()
    assert {method for _, method, _ in swarm.transport.calls} <= {"info"}  # other experts may take something else


class GlobalOutput(nn.Module):
    def forward(self, x):
        return x, torch.zeros(3)


def test_experts_with_a_global_output_cannot_be_mixed():
    outputs = (BatchTensorProto(DIM), TensorProto(3))
    with (
        Swarm((2,), GlobalOutput, args_schema=(BatchTensorProto(DIM),), outputs_schema=outputs) as swarm,
        pytest.raises(SchemaError, match=r"outputs\[1\] is global .* cannot be mixed"),
    ):
        mixture(swarm, k_best=1)(torch.randn(3, DIM))


# --- failing experts -----------------------------------------------------------------------------------------------


def test_f10_k_min_is_per_row_with_one_dead_expert(swarm, caplog):
    moe, x = mixture(swarm, k_min=3), torch.randn(64, DIM, requires_grad=True)
    dead = swarm.search.uids[3]
    swarm.kill(dead)
    with caplog.at_level(logging.WARNING, "moe"):
        assert_same(swarm, moe, x, silent=[dead])
    assert f"forward: 1 of 8 experts failed: {dead}: ConnectError" in caplog.text
    assert swarm.search.forgotten == [dead]
    assert list(moe.statistics().forward_failures) == [dead] and moe.statistics().total_forward_failures == 1
    moe.k_min = 4
    rows = used(moe, x)[dead]
    with pytest.raises(TooFewExperts, match="fewer than 4 experts answered for rows") as e:
        moe(x)
    assert isinstance(e.value, TimeoutError) and str(rows[:20])[:-1] in str(e.value)
    assert isinstance(e.value.__cause__, ConnectError)


def test_dead_in_backward_only_is_a_constant(swarm, caplog):
    moe, x = mixture(swarm), torch.randn(64, DIM, requires_grad=True)
    a, b = torch.randn(DIM, RANK, requires_grad=True), torch.randn(RANK, DIM, requires_grad=True)
    dead = swarm.search.uids[5]
    swarm.transport.broken["backward", dead] = ConnectError("gone")
    with caplog.at_level(logging.WARNING, "moe"):
        assert_same(swarm, moe, x, constant=[dead], lora_a=a, lora_b=b)
    assert "backward: 1 of 8 experts failed" in caplog.text
    statistics = moe.statistics()
    assert list(statistics.backward_failures) == [dead] and statistics.total_backward_failures == 1
    assert statistics.forward_failures == {} and statistics.backward_s > 0


def test_backward_k_min(swarm):
    moe, x = mixture(swarm, k_best=1), torch.randn(32, DIM, requires_grad=True)
    dead, rows = max(used(moe, x).items(), key=lambda item: len(item[1]))
    swarm.transport.broken["backward", dead] = ConnectError("gone")
    with pytest.raises(TooFewExperts, match="backward: fewer than 1 experts answered for rows") as e:
        moe(x).sum().backward()
    assert str(rows[:20])[:-1] in str(e.value)
    moe.backward_k_min = 0
    x.grad = None
    moe(x).sum().backward()
    expected = dense(swarm, moe, x, constant=[dead])
    torch.testing.assert_close(grad_of(x), torch.autograd.grad(expected.sum(), x)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k_min", [0, 1])
def test_pitfall_17_rows_without_survivors_are_zeros_if_allowed_and_never_nan(swarm, k_min):
    moe = mixture(swarm, k_best=1, k_min=k_min, allow_zero_outputs=True)
    x = torch.randn(32, DIM, requires_grad=True)
    dead, rows = max(used(moe, x).items(), key=lambda item: len(item[1]))
    swarm.kill(dead)
    y = moe(x)
    assert (y[rows] == 0).all() and not y.isnan().any()
    others = [row for row in range(32) if row not in rows]
    torch.testing.assert_close(y[others], dense(swarm, moe, x)[others], atol=1e-5, rtol=1e-5)
    y.sum().backward()
    assert all(grad_of(t).isfinite().all() for t in (x, moe.proj.weight, moe.proj.bias))
    assert (grad_of(x)[rows] == 0).all()

    moe.allow_zero_outputs = False
    with pytest.raises(TooFewExperts, match="fewer than 1 experts answered for rows"):
        moe(x)


def test_pitfall_17_all_experts_dead(swarm):
    moe = mixture(swarm, allow_zero_outputs=True)
    x = torch.randn(5, DIM, requires_grad=True)
    moe(x)
    for uid in swarm.search.uids:
        swarm.kill(uid)
    y = moe(x)
    assert y.shape == (5, DIM) and (y == 0).all()
    y.sum().backward()
    assert (grad_of(x) == 0).all() and (grad_of(moe.proj.weight) == 0).all()
    swarm.search.uids.clear()
    assert (moe(x) == 0).all()
    with pytest.raises(TooFewExperts, match="none of 4 experts that were found"):
        mixture(swarm_of_ghosts(), allow_zero_outputs=True)(x)


def swarm_of_ghosts() -> Swarm:
    """Experts that are announced, but gone."""
    swarm = Swarm((4,))
    for uid in swarm.search.uids:
        swarm.kill(uid)
    return swarm


def test_zeros_do_not_excuse_rows_with_some_but_too_few_answers(swarm):
    moe = mixture(swarm, k_best=2, k_min=2, allow_zero_outputs=True)
    swarm.kill(swarm.search.uids[0])
    with pytest.raises(TooFewExperts, match="fewer than 2"):
        moe(torch.randn(64, DIM))


@pytest.mark.parametrize("allow_zero_outputs", [False, True])
def test_pitfall_21_nothing_alive(swarm, allow_zero_outputs):
    swarm.search.uids.clear()
    moe = mixture(swarm, allow_zero_outputs=allow_zero_outputs)
    with pytest.raises(NoExpertsFound, match=r"no live experts under ffn\."):
        moe(torch.randn(3, DIM))
    with pytest.raises(NoExpertsFound):
        _ = moe.info


def test_info(swarm):
    info = mixture(swarm).info
    assert info["keyword_names"] == ("lora_a", "lora_b", "mask") and info["forward_schema"][0][0].size == (None, DIM)
    assert swarm.transport.count("info") == 1


def test_restarted_expert_with_another_schema_is_asked_again(swarm):
    moe, x = mixture(swarm, k_best=8), torch.randn(3, DIM)
    moe(x)
    with Swarm(**adapted_schema(None)) as successor:
        swarm.transport.services = dict(successor.handlers)
        with pytest.raises(TooFewExperts, match="expected float32"):
            moe(x)
        assert moe(torch.randn(3, 5, DIM)).shape == (3, 5, DIM)
    moe.refresh_info()
    assert moe._typical is None


# --- time ----------------------------------------------------------------------------------------------------------


def test_t1_one_budget_covers_search_info_and_requests(swarm):
    moe, x = mixture(swarm, k_best=8, forward_timeout=2), torch.randn(4, DIM)
    swarm.transport.stalled.add(("forward", swarm.search.uids[0]))
    began = time.monotonic()
    assert_close_to_silent(swarm, moe, x, [swarm.search.uids[0]])
    assert 1.5 < time.monotonic() - began < 20
    assert 0 < swarm.search.searches[0] <= 2

    def slow_search(batch_scores, beam_size, *, timeout_s):
        time.sleep(timeout_s + 0.01)
        return [[] for _ in batch_scores[0]]

    swarm.search.search, moe.forward_timeout = slow_search, 0.1
    with pytest.raises(NoExpertsFound):
        moe(x)
    moe.allow_zero_outputs = True
    with pytest.raises(CallTimeout, match="time budget"):
        moe(x)


def assert_close_to_silent(swarm, moe, x, silent):
    torch.testing.assert_close(moe(x), dense(swarm, moe, x, silent=silent), atol=1e-5, rtol=1e-5)


def test_without_forward_timeout_the_config_limits_a_pass(swarm):
    moe = mixture(swarm, config=ClientConfig(max_retries=0, total_timeout_s=0.3))
    swarm.transport.stalled |= {(method, uid) for method in ("forward", "info") for uid in swarm.search.uids}
    with pytest.raises(TooFewExperts):
        moe(torch.randn(3, DIM))


def test_pitfall_22_stragglers_are_cut_off_after_k_min_and_cancelled(swarm):
    slow = swarm.search.uids[2]
    moe = mixture(swarm, k_best=8, k_min=7, backward_k_min=6, timeout_after_k_min=0.1)
    x = torch.randn(4, DIM, requires_grad=True)
    moe(x)
    swarm.transport.stalled |= {("forward", slow), ("backward", swarm.search.uids[6])}
    began = time.monotonic()
    assert_same(swarm, moe, x, silent=[slow], constant=[swarm.search.uids[6]])
    assert time.monotonic() - began < 5
    assert set(swarm.transport.cancelled) == {("forward", slow), ("backward", swarm.search.uids[6])}
    assert swarm.search.forgotten == [], "being slow is no reason to be forgotten"
    assert "after every row had its k_min" in moe.statistics().forward_failures[slow]


def test_timeout_after_k_min_starts_when_every_row_has_its_k_min(swarm):
    moe, x = mixture(swarm, k_best=1, timeout_after_k_min=0.01, forward_timeout=2), torch.randn(32, DIM)
    moe(x)
    stalled, _ = max(used(moe, x).items(), key=lambda item: len(item[1]))
    swarm.transport.stalled.add(("forward", stalled))
    with pytest.raises(TooFewExperts, match=r"no answer within|time budget"):
        moe(x)
    assert list(moe.statistics().forward_failures) == [stalled]


class Stuck(nn.Module):
    """Inputs that are all ones take until it is released."""

    released = threading.Event()

    def forward(self, x):
        if (x == 1).all():
            self.released.wait(30)
        return x


def test_cancelling_a_straggler_withdraws_its_task_from_the_server():
    with Swarm((2,), Stuck, isolated=True, args_schema=(BatchTensorProto(DIM),)) as swarm:
        busy = swarm.search.uids[0]
        blocking = swarm.backends[busy].submit_forward(torch.ones(1, DIM))
        moe, x = mixture(swarm, k_best=2, timeout_after_k_min=0.05), torch.randn(4, DIM)
        torch.testing.assert_close(moe(x), x)
        assert moe.statistics().forward_failures.keys() == {busy}
        Stuck.released.set()
        blocking.result(10)
        moe.timeout_after_k_min = None
        moe(x)
        assert moe.statistics().forward_failures == {}
        assert swarm.handlers[busy].inflight.bytes == 0
        assert swarm.backends[busy].forward_pool.statistics().batches == 2, "the withdrawn task was not computed"


def test_backward_timeout(swarm):
    moe, x = mixture(swarm, k_best=8, backward_timeout=0.3), torch.randn(4, DIM, requires_grad=True)
    y = moe(x).sum()
    swarm.transport.stalled |= {("backward", uid) for uid in swarm.search.uids}
    began = time.monotonic()
    with pytest.raises(TooFewExperts, match="backward"):
        y.backward()
    assert time.monotonic() - began < 5


def test_hopeless_calls_end_at_once(swarm):
    moe, x = mixture(swarm, k_best=8, k_min=8), torch.randn(4, DIM)
    moe(x)
    swarm.kill(swarm.search.uids[0])
    swarm.transport.stalled.add(("forward", swarm.search.uids[1]))
    began = time.monotonic()
    with pytest.raises(TooFewExperts):
        moe(x)
    assert time.monotonic() - began < 5


def test_one_more_try_by_default(swarm):
    moe = mixture(swarm, config=None, k_best=8)
    assert moe.config.max_retries == 1


# --- anomalies -----------------------------------------------------------------------------------------------------


def test_anomalies_in_inputs_and_gradients_are_errors(swarm):
    moe, x = mixture(swarm, detect_anomalies=True), torch.randn(4, DIM, requires_grad=True)
    y = moe(x)
    swarm.transport.calls.clear()
    with pytest.raises(ValueError, match="One of inputs has nan/inf values"):
        moe(torch.full((4, DIM), torch.nan))
    with pytest.raises(ValueError, match=r"One of inputs has nan/inf values: kwargs\['lora_a'\]"):
        moe(x, lora_a=torch.full((DIM, RANK), torch.inf), lora_b=torch.zeros(RANK, DIM))
    with pytest.raises(ValueError, match="One of gradients has nan/inf values"):
        (y * torch.nan).sum().backward()
    assert swarm.transport.calls == []


def test_expert_with_anomalous_outputs_counts_as_failed(swarm):
    broken = swarm.search.uids[4]
    with torch.no_grad():
        swarm.modules[broken].second.weight.fill_(torch.nan)
    moe, x = mixture(swarm, detect_anomalies=True, config=None), torch.randn(64, DIM, requires_grad=True)
    assert_same(swarm, moe, x, silent=[broken])
    assert "nan/inf" in moe.statistics().forward_failures[broken]


# --- the module ----------------------------------------------------------------------------------------------------


def test_pitfall_20_unknown_settings_are_refused(swarm):
    with pytest.raises(TypeError, match="forward_timout"):
        mixture(swarm, forward_timout=1)
    for wrong in (
        dict(k_best=0),
        dict(k_min=5),
        dict(k_min=-1),
        dict(backward_k_min=5),
        dict(forward_timeout=0),
        dict(timeout_after_k_min=-1),
    ):
        with pytest.raises(ConfigError):
            mixture(swarm, **wrong)


def test_state_dict_and_repr(swarm):
    moe = mixture(swarm)
    moe(torch.randn(3, DIM))
    assert set(moe.state_dict()) == {"proj.weight", "proj.bias"} and moe.proj.weight.shape == (2 + 4, DIM)
    assert "grid_size=(2, 4), k_best=4" in repr(moe) and list(moe.children()) == [moe.proj]


def test_inputs_are_left_alone(swarm):
    moe, x = mixture(swarm), torch.randn(4, DIM)
    before = x.clone()
    moe(x).sum().backward()
    assert torch.equal(x, before)


def test_compute_expert_scores():
    """As hivemind's test of that name."""
    moe = RemoteMixtureOfExperts(
        dht=None, in_features=16, grid_size=(40,), k_best=4, uid_prefix="expert.", beam_search=FullSearch((40,), [])
    )
    moe.beam_search.uid_prefix = "expert."  # type: ignore[misc]
    gx, gy = torch.randn(4, 5, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    ii, jj = [[4, 0, 2], [3, 1, 1, 1, 3], [0], [3, 2]], [[2, 2, 1], [0, 1, 2, 0, 1], [0], [1, 2]]
    batch = [[ExpertInfo(f"expert.{i}.{j}", PEER) for i, j in zip(*row)] for row in zip(ii, jj)]
    moe.beam_search.grid_size = (5, 3)  # type: ignore[misc]
    logits = moe.compute_expert_scores([gx, gy], batch)
    torch.softmax(logits, dim=-1).norm(dim=-1).mean().backward()
    assert grad_of(gx).norm().item() > 0 and grad_of(gy).norm().item() > 0
    assert logits.shape == (4, 5)
    for b in range(4):
        for k in range(5):
            expected = gx[b, ii[b][k]] + gy[b, jj[b][k]] if k < len(ii[b]) else torch.tensor(-torch.inf)
            assert torch.allclose(logits[b, k], expected)


def test_scores_given_to_the_search_are_those_of_all_rows(swarm):
    moe, x, seen = mixture(swarm), torch.randn(5, 3, DIM), []
    search = swarm.search.search

    def seeing_search(batch_scores, beam_size, *, timeout_s):
        seen.append(batch_scores)
        return search(batch_scores, beam_size, timeout_s=timeout_s)

    swarm.search.search = seeing_search
    with pytest.raises(SchemaError):
        moe(x)  # these experts take no sequences, but the search comes first
    (scores,) = seen
    assert [s.shape for s in scores] == [(5, 2), (5, 4)] and all(isinstance(s, np.ndarray) for s in scores)
    expected = moe.proj(x.mean(1)).detach().numpy()
    np.testing.assert_allclose(np.concatenate(scores, axis=1), expected, rtol=1e-6)
