"""RemoteSwitchMixtureOfExperts: routing, the balancing loss, and the bugs of hivemind's version."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe.client.switch_moe import RemoteSwitchMixtureOfExperts, load_balancing_loss
from moe.config import ClientConfig
from moe.errors import ConfigError
from moe.expert_uid import ExpertInfo, coordinates
from moe.schema import BatchTensorProto
from moe.transport.memory import MemoryPeer
from tests.client.memory_swarm import DIM, RANK, Swarm, adapted_schema, grad_of

PEER = MemoryPeer("peer")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def swarm():
    with Swarm() as swarm:
        yield swarm


def switch(swarm, **options):
    options.setdefault("config", ClientConfig(max_retries=0))
    return swarm.mixture(RemoteSwitchMixtureOfExperts, **options)


def dense(swarm, moe, x, *, silent=(), **kwargs):
    """The same in eval mode, locally. Returns outputs, loss, and the uid that each row goes to."""
    uids = swarm.search.uids
    where = torch.tensor([coordinates(uid) for uid in uids])
    x_gate = x if x.ndim == 2 else x.mean(dim=tuple(range(1, x.ndim - 1)))
    logits = moe.proj(x_gate).split(list(swarm.search.grid_size), dim=-1)
    scores = sum(dim[:, where[:, i]] for i, dim in enumerate(logits))
    probs = [dim.softmax(-1) for dim in logits]
    joint = torch.stack([dim[:, where[:, i]] for i, dim in enumerate(probs)]).prod(0)
    best = scores.topk(moe.k_best, dim=1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
    chosen &= torch.tensor([uid not in silent for uid in uids])
    outputs = torch.stack([swarm.originals[uid](x, **kwargs) for uid in uids], dim=1)
    y = torch.einsum("be,be...->b...", joint * chosen, outputs) + x
    utilization = moe.grid_utilization.split(list(swarm.search.grid_size))
    loss = sum((p.mean(0) * u).mean() * len(u) ** 2 for p, u in zip(probs, utilization))
    return y, loss, [uids[i] for i in best[:, 0]]


@pytest.mark.parametrize("grid_size", [(6,), (2, 4), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("k_best", [1, 3])
def test_equals_dense_computation_in_eval(grid_size, k_best):
    with Swarm(grid_size, **adapted_schema(None)) as swarm:
        moe = switch(swarm, k_best=k_best).eval()
        a, b = torch.randn(DIM, RANK, requires_grad=True), torch.randn(RANK, DIM, requires_grad=True)
        x, mask = torch.randn(16, 3, DIM, requires_grad=True), torch.rand(16, 3) > 0.3
        tensors = [x, a, b, *moe.parameters()]
        results = []
        for y, loss, *_ in (moe(x, mask=mask, lora_a=a, lora_b=b), dense(swarm, moe, x, mask=mask, lora_a=a, lora_b=b)):
            weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
            results.append([y, loss, *torch.autograd.grad((y * weights).sum() + 3 * loss, tensors)])
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_one_request_per_expert_and_pass():
    with Swarm(lr=0.0) as swarm:
        moe = switch(swarm)
        for _ in range(2):
            swarm.transport.calls.clear()
            y, loss = moe(torch.randn(64, DIM))
            (y.sum() + loss).backward()
            assert len(moe.statistics().rows_per_expert) == swarm.transport.count("forward") <= 8
            assert swarm.transport.count("backward") == swarm.transport.count("forward")


# --- regressions ---------------------------------------------------------------------------------------------------


def test_pitfall_14_balancing_loss_is_per_dimension():
    probs = [torch.rand(5, 3).softmax(-1).requires_grad_(), torch.rand(5, 4).softmax(-1).requires_grad_()]
    utilization = [torch.tensor([0.0, 0.9, 0.1]), torch.tensor([0.25, 0.25, 0.5, 0.0])]
    loss = load_balancing_loss(probs, utilization)
    expected = sum(
        sum(float(p[:, i].detach().mean() * u[i]) for i in range(len(u))) / len(u) * len(u) ** 2
        for p, u in zip(probs, utilization)
    )
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert all(grad_of(p).isfinite().all() for p in probs), "also for coordinates that nobody used"
    even = [torch.full((5, size), 1 / size) for size in (3, 4)]
    assert load_balancing_loss(even, [e[0] for e in even]).item() == pytest.approx(2.0)


def test_pitfall_14_utilization_follows_where_rows_went(swarm):
    moe, x = switch(swarm, jitter_eps=0.0, utilization_alpha=0.75), torch.randn(32, DIM)
    uids = dense(swarm, moe, x)[2]
    counts = [torch.zeros(2), torch.zeros(4)]
    for uid in uids:
        for dim, index in zip(counts, coordinates(uid)):
            dim[index] += 1 / 32
    before = moe.grid_utilization.clone()
    torch.testing.assert_close(before, torch.tensor([1 / 2] * 2 + [1 / 4] * 4))
    _, loss = moe(x)
    torch.testing.assert_close(moe.grid_utilization, 0.75 * before + 0.25 * torch.cat(counts))
    torch.testing.assert_close(loss, dense(swarm, moe, x)[1])


def test_failed_experts_do_not_count_as_used(swarm):
    moe, x = switch(swarm, jitter_eps=0.0, utilization_alpha=0.0), torch.randn(32, DIM)
    dead = dense(swarm, moe, x)[2][0]
    swarm.kill(dead)
    moe(x)
    survivors = [coordinates(uid)[1] for uid in dense(swarm, moe, x)[2] if uid != dead]
    expected = torch.bincount(torch.tensor(survivors), minlength=4) / len(survivors)
    torch.testing.assert_close(moe.grid_utilization[2:], expected)


def test_pitfall_15_the_callers_input_is_left_alone_and_may_be_a_leaf(swarm):
    moe = switch(swarm, jitter_eps=0.5)
    x = torch.randn(8, DIM, requires_grad=True)
    before = x.detach().clone()
    y, loss = moe(x)
    (y.sum() + loss).backward()
    assert torch.equal(x.detach(), before) and x.grad is not None
    plain = torch.randn(8, DIM)
    before = plain.clone()
    moe(plain)
    assert torch.equal(plain, before)


def test_pitfall_15_no_randomness_and_no_moving_average_in_eval(swarm):
    moe, x = switch(swarm, jitter_eps=0.9, grid_dropout=0.3).eval(), torch.randn(16, DIM)
    first, first_loss = moe(x)
    second, second_loss = moe(x)
    assert torch.equal(first, second) and torch.equal(first_loss, second_loss)
    torch.testing.assert_close(moe.grid_utilization, torch.tensor([1 / 2] * 2 + [1 / 4] * 4))
    moe.train()
    assert not torch.equal(moe(x)[1], moe(x)[1])


class TwoOutputs(nn.Module):
    def forward(self, x):
        return 2 * x, x.sum(-1)


def test_pitfall_16_tuple_outputs():
    with Swarm(make=TwoOutputs, args_schema=(BatchTensorProto(DIM),)) as swarm:
        moe, x = switch(swarm).eval(), torch.randn(5, DIM)
        (first, second), loss = moe(x)
        probs = [dim.softmax(-1).max(1).values for dim in moe._grid_scores(x)]
        weight = probs[0] * probs[1]
        torch.testing.assert_close(first, 2 * x * weight[:, None] + x)
        torch.testing.assert_close(second, x.sum(-1) * weight)
        assert loss.ndim == 0


def test_pitfall_16_grid_dropout_never_drops_a_whole_dimension(swarm):
    moe, x = switch(swarm, grid_dropout=0.0), torch.randn(16, DIM, requires_grad=True)
    for _ in range(5):
        y, loss = moe(x)
        (y.sum() + loss).backward()
        assert len(moe.statistics().rows_per_expert) == 1, "one coordinate per dimension is kept"
        assert all(t.isfinite().all() for t in (y, loss, grad_of(x), grad_of(moe.proj.weight)))


def test_grid_dropout_routes_around_dropped_coordinates(swarm):
    moe, x = switch(swarm, grid_dropout=0.5), torch.randn(64, DIM)
    routes = set()
    for _ in range(10):
        moe(x)
        routes.add(tuple(sorted(moe.statistics().rows_per_expert)))
    assert len(routes) > 1 and all(moe.grid_utilization > 0)


def test_dropout_may_leave_no_live_expert(swarm):
    swarm.search.uids[:] = ["ffn.1.3"]
    moe, x = switch(swarm, grid_dropout=0.0), torch.randn(4, DIM)
    seen = {moe(x)[0].sub(x).abs().sum().item() == 0 for _ in range(30)}
    assert seen == {True, False}, "sometimes just the input, sometimes the one expert"


# --- failing experts -----------------------------------------------------------------------------------------------


def test_rows_of_dead_experts_keep_their_input(swarm):
    moe, x = switch(swarm).eval(), torch.randn(32, DIM, requires_grad=True)
    uids = dense(swarm, moe, x)[2]
    dead = uids[0]
    swarm.kill(dead)
    y, _ = moe(x)
    torch.testing.assert_close(y, dense(swarm, moe, x, silent=[dead])[0], atol=1e-5, rtol=1e-5)
    kept = [uid == dead for uid in uids]
    assert torch.equal(y[kept], x[kept]) and not torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(grad_of(x)[kept], torch.ones_like(x)[kept])


def test_all_dead(swarm):
    moe, x = switch(swarm), torch.randn(4, DIM)
    moe(x)
    utilization = moe.grid_utilization
    for uid in swarm.search.uids:
        swarm.kill(uid)
    y, loss = moe(x)
    assert torch.equal(y, x) and loss.isfinite()
    assert torch.equal(moe.grid_utilization, utilization)


def test_backward_failures_are_constants(swarm):
    moe, x = switch(swarm).eval(), torch.randn(32, DIM, requires_grad=True)
    for uid in swarm.search.uids:
        swarm.transport.stalled.add(("backward", uid))
    moe.backward_timeout = 0.2
    y, _ = moe(x)
    y.sum().backward()
    assert grad_of(x).isfinite().all() and grad_of(moe.proj.weight).abs().sum() > 0
    assert moe.statistics().total_backward_failures == len(moe.statistics().rows_per_expert)


# --- the module ----------------------------------------------------------------------------------------------------


def test_two_forwards_before_one_backward(swarm):
    moe = switch(swarm)
    losses = [moe(torch.randn(4, DIM)) for _ in range(2)]
    sum(y.sum() + loss for y, loss in losses).backward()
    assert grad_of(moe.proj.weight).isfinite().all()


def test_bfloat16(swarm):
    y, loss = switch(swarm)(torch.randn(4, DIM).bfloat16())
    assert y.dtype == torch.bfloat16 and loss.dtype == torch.float32
    y, loss = switch(swarm).bfloat16()(torch.randn(4, DIM).bfloat16())
    assert y.dtype == torch.bfloat16 and loss.isfinite()


def test_state_dict_has_hiveminds_names(swarm):
    moe = switch(swarm)
    moe(torch.randn(4, DIM))
    assert set(moe.state_dict()) == {"proj.weight", "proj.bias", "grid_utilization"}
    other = switch(swarm)
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other.grid_utilization, moe.grid_utilization)


def test_defaults_and_unknown_settings(swarm):
    moe = switch(swarm)
    assert (moe.k_best, moe.k_min, moe.backward_k_min, moe.allow_zero_outputs) == (1, 0, 0, True)
    with pytest.raises(TypeError, match="grid_droput"):
        switch(swarm, grid_droput=0.1)
    for wrong in (dict(grid_dropout=1.5), dict(utilization_alpha=-0.1), dict(jitter_eps=-1)):
        with pytest.raises(ConfigError):
            switch(swarm, **wrong)


def test_compute_expert_scores_multiplies_probabilities(swarm):
    moe = switch(swarm)
    px, py = torch.rand(2, 2).softmax(-1), torch.rand(2, 4).softmax(-1)
    batch = [[ExpertInfo("ffn.1.3", PEER), ExpertInfo("ffn.0.0", PEER)], [ExpertInfo("ffn.0.2", PEER)]]
    scores = moe.compute_expert_scores([px, py], batch)
    expected = torch.stack(
        [
            torch.stack([px[0, 1] * py[0, 3], px[0, 0] * py[0, 0]]),
            torch.stack([px[1, 0] * py[1, 2], -torch.tensor(torch.inf)]),
        ]
    )
    torch.testing.assert_close(scores, expected)


def test_training_balances_and_learns():
    """A toy task: the loss falls, with everything random that training has."""
    with Swarm((4,), lr=0.05) as swarm:
        moe = switch(swarm, jitter_eps=0.1, grid_dropout=0.9)
        head = nn.Linear(DIM, 2)
        optimizer = torch.optim.Adam([*moe.parameters(), *head.parameters()], lr=0.02)
        x = torch.randn(64, DIM)
        labels = (x[:, 0] * x[:, 1] > 0).long()
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            y, balancing = moe(x)
            loss = nn.functional.cross_entropy(head(y), labels)
            (loss + 0.01 * balancing).backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-5:]) / 5 < 0.8 * losses[0]
