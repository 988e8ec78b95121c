"""What a user of hivemind may have written: hosts experts, finds them, calls them, trains through them, and says what it saw.

As it stands it runs on stock hivemind. Tests also run it with ``hivemind.moe`` replaced by ``moe``, and nothing else changed.
"""

# ruff: noqa: T201

import tempfile
import time

import torch
from hivemind import DHT
from hivemind.moe import (
    ModuleBackend,
    RemoteExpert,
    RemoteMixtureOfExperts,
    RemoteSwitchMixtureOfExperts,
    Server,
    background_server,
    declare_experts,
    get_experts,
    register_expert_class,
)
from hivemind.moe.client.beam_search import MoEBeamSearcher
from hivemind.moe.expert_uid import UID_DELIMITER, is_valid_uid, split_uid
from hivemind.moe.server.layers import name_to_block, schedule_name_to_scheduler
from hivemind.utils import get_dht_time
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from torch import nn

tempfile.gettempdir()  # else a stock server may fork while another of its threads looks this up, under a lock, and hang
HIDDEN = 16
LOCAL = ["/ip4/127.0.0.1/tcp/0"]


@register_expert_class("perceptron", lambda batch_size, hid_dim: torch.empty((batch_size, hid_dim)))
class Perceptron(nn.Module):
    def __init__(self, hid_dim):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hid_dim, 2 * hid_dim), nn.Tanh(), nn.Linear(2 * hid_dim, hid_dim))

    def forward(self, x):
        return self.layers(x)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x, scale):
        return self.linear(x) * scale


def make_backends():
    torch.manual_seed(0)
    backends = {}
    for i in range(4):
        module = name_to_block["perceptron"](HIDDEN)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        scheduler = schedule_name_to_scheduler["linear"](optimizer, num_warmup_steps=1, num_training_steps=1000)
        uid = UID_DELIMITER.join(["perceptron", str(i // 2), str(i % 2)])
        assert is_valid_uid(uid) and split_uid(uid) == (f"perceptron.{i // 2}.", i % 2)
        backends[uid] = ModuleBackend(
            name=uid,
            module=module,
            optimizer=optimizer,
            scheduler=scheduler,
            args_schema=(BatchTensorDescriptor(HIDDEN),),
            outputs_schema=BatchTensorDescriptor(HIDDEN),
            max_batch_size=64,
        )
    module = Scaled()
    backends["scaled.0"] = ModuleBackend(
        name="scaled.0",
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.0),
        args_schema=(BatchTensorDescriptor(HIDDEN),),
        kwargs_schema={"scale": BatchTensorDescriptor(HIDDEN, dtype=torch.float32)},
        outputs_schema=BatchTensorDescriptor(HIDDEN),
        max_batch_size=64,
        min_batch_size=1,
    )
    return backends


def await_experts(dht, uids):
    experts = get_experts(dht, uids)
    while None in experts:
        time.sleep(0.1)
        experts = get_experts(dht, uids)
    return experts


def say(what, tensor):
    print(what, [round(value, 3) for value in tensor.detach().flatten()[:4].tolist()], flush=True)


def main():
    with background_server(
        expert_uids=["behind.0", "behind.1"],
        expert_cls="perceptron",
        hidden_dim=HIDDEN,
        num_handlers=1,
        optim_cls=None,
        device="cpu",
        host_maddrs=LOCAL,
    ) as peer_info:
        run(peer_info)
    print("done")


def run(peer_info):
    dht = DHT(initial_peers=peer_info.addrs, start=True, host_maddrs=LOCAL)
    server_dht = DHT(initial_peers=peer_info.addrs, start=True, host_maddrs=LOCAL)
    backends = make_backends()
    server = Server(server_dht, backends, num_connection_handlers=1)
    server.start()
    assert server.ready.wait(timeout=60)
    *experts, behind = await_experts(dht, [*sorted(backends), "behind.1"])
    print([expert.uid for expert in experts], flush=True)

    # one expert
    scaled = experts[-1]
    assert isinstance(scaled, RemoteExpert) and scaled.peer_id == server_dht.peer_id
    print(scaled.info["keyword_names"])
    x = torch.linspace(-1, 1, 3 * HIDDEN).view(3, HIDDEN).requires_grad_()
    scale = torch.ones(3, HIDDEN, requires_grad=True)
    output = scaled(x, scale=scale)
    output.sum().backward()
    say("output", output)
    say("gradient", x.grad)
    say("gradient", scale.grad)
    local = backends["scaled.0"].module
    assert torch.allclose(output, local(x, scale), atol=1e-5)

    # a mixture of them
    searcher = MoEBeamSearcher(dht, "perceptron.", (2, 2))
    print([expert.uid for expert in searcher.find_best_experts([(0.0, 1.0), (0.2, 0.1)], beam_size=3)])
    torch.manual_seed(1)
    mixture = RemoteMixtureOfExperts(
        in_features=HIDDEN, grid_size=(2, 2), dht=dht, uid_prefix="perceptron.", k_best=3, k_min=1, forward_timeout=30
    )
    say("mixture", mixture(x))
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.01)
    inputs, targets = torch.randn(8, HIDDEN), torch.randn(8, HIDDEN)
    losses = []
    for _ in range(10):
        loss = nn.functional.mse_loss(mixture(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print("it learns:", losses[-1] < losses[0])
    switch = RemoteSwitchMixtureOfExperts(in_features=HIDDEN, grid_size=(2, 2), dht=dht, uid_prefix="perceptron.")
    output, balancing_loss = switch(inputs)
    print("switch", tuple(output.shape), balancing_loss.isfinite().item())

    # an expert in another process, and one in the DHT only
    print(tuple(behind(x).shape), behind.peer_id == peer_info.peer_id)
    print(sorted(map(str, declare_experts(dht, ["told.0.1"], expiration_time=get_dht_time() + 30).values())))
    found = get_experts(dht, ["told.0.1", "untold.0.1"])
    print(found[0].uid, found[1])

    server.shutdown()
    dht.shutdown()


if __name__ == "__main__":
    main()
