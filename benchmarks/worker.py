"""The program of a benchmark's processes: ``python -m benchmarks.worker ROLE SYSTEM DESCRIPTOR_OF_A_CONNECTION``.

Owns: the loops that are timed. They are the same for all systems. A process is told once with which options to start, then
runs methods of its role by name; messages are JSON. See ``benchmarks.peers`` for the other side. Times are those of
``time.monotonic``, which all processes of a machine share.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from benchmarks.systems import SYSTEMS, Address, System, await_experts

AT_ONCE = 8  # clients that start at the same time; each starts a libp2p daemon
TIME_TO_PREPARE_S = 0.1  # from the order to begin until clients begin, all at once
CLIENT_START_TIMEOUT_S = 60.0
JOIN_THROUGH = 3  # DHT nodes that a new one is told of


# --- what is called --------------------------------------------------------------------------------------------------


class Load(NamedTuple):
    """What one caller does, over and over.

    :ivar uids: experts to call, in turn, beginning with another one for each caller
    :ivar shape: of the input, rows first
    :ivar dtype: of the input
    :ivar backward: also call backward, on the sum of the output
    :ivar input_grad: and ask for the gradient of the input
    :ivar adapters: how many different LoRA adapters the callers have between them; 0: none
    :ivar rank: of the adapters
    :ivar lengths: if any, lengths of the input's second axis; the callers take them in turn
    :ivar changing: the adapter is another one after each call
    """

    uids: Sequence[str] = ()
    shape: Sequence[int] = (1, 1)
    dtype: str = "float32"
    backward: bool = False
    input_grad: bool = False
    adapters: int = 0
    rank: int = 8
    lengths: Sequence[int] = ()
    changing: bool = False

    def inputs(self, caller: int) -> tuple[Any, dict[str, Any]]:
        """Positional and keyword input of one caller, the same in every system."""
        import torch

        generator = torch.Generator().manual_seed(caller)
        shape = list(self.shape)
        if self.lengths:
            shape[1] = self.lengths[caller % len(self.lengths)]
        dtype = getattr(torch, self.dtype)
        x = torch.randn(shape, generator=generator).to(dtype).requires_grad_(self.input_grad)
        if not self.adapters:
            return x, {}
        generator.manual_seed(caller % self.adapters)
        width = shape[-1]
        lora_a = torch.randn(width, self.rank, generator=generator) / width
        lora_b = torch.randn(self.rank, 4 * width, generator=generator)
        return x, {
            "lora_a": lora_a.to(dtype).requires_grad_(self.backward),
            "lora_b": lora_b.to(dtype).requires_grad_(self.backward),
        }

    def step(self, expert: Callable[..., Any], x: Any, kwargs: dict[str, Any]) -> None:
        """What is timed."""
        output = expert(x, **kwargs)
        if self.backward:
            output.sum().backward()
            for tensor in (x, *kwargs.values()):
                tensor.grad = None
        if self.changing:
            for tensor in kwargs.values():
                tensor.detach().mul_(0.999)


class Limit(NamedTuple):
    """When a timed loop ends: after so many calls, or at the first end of a call after so many seconds."""

    calls: int | None = None
    seconds: float | None = None

    def reached(self, calls: int, elapsed_s: float) -> bool:
        """Is it time to end?"""
        return (self.calls is not None and calls >= self.calls) or (
            self.seconds is not None and elapsed_s >= self.seconds
        )


def timed_loop(step: Callable[[int], object], limit: Limit) -> dict[str, Any]:
    """Call ``step`` until the limit is reached.

    :returns: when it began and ended, and how long each call took
    """
    durations: list[float] = []
    start = end = time.monotonic()
    while not limit.reached(len(durations), end - start):
        begin = end
        step(len(durations))
        end = time.monotonic()
        durations.append(end - begin)
    return {"start": start, "end": end, "durations": durations}


# --- roles -----------------------------------------------------------------------------------------------------------


class Server:
    """A server; has nothing to be asked. Torch chooses the number of its threads, as in a user's server."""

    def __init__(self, system: System, **options: Any):
        self.started = system.serve(**options)


class TracedServer:
    """A server of this project that notes when requests pass the points of ``benchmarks.tracing``."""

    def __init__(self, system: System, **options: Any):
        from benchmarks import tracing

        self._stamps = tracing.install(tracing.SERVER_POINTS)
        self.started = system.serve(**options)

    def stamps(self) -> dict[str, list[float]]:
        """Those since it was asked last."""
        found = {name: list(times) for name, times in self._stamps.items()}
        for times in self._stamps.values():
            times.clear()
        return found


class Client:
    """Calls experts, in one or several threads.

    :param system: what is called
    :param index: of this client among all
    :param address: of the server
    :param transport: see ``moe.ClientConfig``
    :param uids: if any, join the DHT and wait until these experts are found there; needed for mixtures
    """

    def __init__(
        self, system: System, *, index: int, address: Address, transport: str = "auto", uids: Sequence[str] = ()
    ):
        self._system, self._index, self._transport = system, index, transport
        self._node: Any = None
        self._mixture: Any = None
        if uids:
            self._node = system.join(address["maddrs"])
            await_experts(system, self._node, uids)
        else:
            system.connect(address, transport)
        self.started = None

    def calls(
        self, begin_at: float, load: dict[str, Any], limit: dict[str, Any], threads: int = 1
    ) -> list[dict[str, Any]]:
        """Call experts without pause; one result of ``timed_loop`` per thread, with the number of vectors of a call."""
        what, until = Load(**load), Limit(**limit)
        results: list[dict[str, Any]] = []
        failures: list[BaseException] = []

        def work(caller: int) -> None:
            try:
                x, kwargs = what.inputs(caller)
                experts = [self._system.expert(uid) for uid in what.uids]
                for expert in experts:
                    _ = getattr(expert, "info", None)  # asked for once in the life of a client
                _sleep_until(begin_at)
                result = timed_loop(lambda i: what.step(experts[(caller + i) % len(experts)], x, kwargs), until)
                results.append({**result, "vectors": x.numel() // x.shape[-1]})
            except BaseException as e:
                failures.append(e)

        callers = range(self._index * threads, (self._index + 1) * threads)
        if threads == 1:
            work(callers[0])
        else:
            workers = [threading.Thread(target=work, args=(caller,)) for caller in callers]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        if failures:
            raise failures[0]
        return results

    def uploads(
        self, begin_at: float, load: dict[str, Any], limit: dict[str, Any], hold_tensors: bool
    ) -> dict[str, Any]:
        """Call an expert as a client that has just started; this project only.

        :returns: see ``timed_loop``, and the bytes of tensors that were sent
        """
        what = Load(**load)
        x, kwargs = what.inputs(self._index)
        expert, counter = self._system.counted_expert(what.uids[0], hold_tensors=hold_tensors)  # type: ignore[attr-defined]
        _ = expert.info
        _sleep_until(begin_at)
        result = timed_loop(lambda _: what.step(expert, x, kwargs), Limit(**limit))
        return {**result, "sent_bytes": counter.sent_bytes}

    def trace(self, begin_at: float, operation: str) -> None:
        """From now on, note when calls pass the points of ``benchmarks.tracing``; this project only.

        :param operation: "forward" or "backward"
        """
        from benchmarks import tracing

        self._stamps = tracing.install((*tracing.CLIENT_POINTS[operation], *tracing.CLIENT_POINTS["both"]))

    def traced(self, begin_at: float, load: dict[str, Any], limit: dict[str, Any]) -> dict[str, list[float]]:
        """Call an expert, ``Limit`` times.

        :returns: the times of these calls
        """
        what = Load(**load)
        x, kwargs = what.inputs(self._index)
        expert = self._system.expert(what.uids[0])
        _ = expert.info  # type: ignore[attr-defined]

        def step(_: int) -> None:
            what.step(expert, x, kwargs)

        for times in self._stamps.values():
            times.clear()
        _sleep_until(begin_at)
        timed_loop(step, Limit(**limit))
        return {name: list(times) for name, times in self._stamps.items()}

    def mixture_steps(
        self,
        begin_at: float,
        limit: dict[str, Any],
        rows: int,
        hot: bool,
        prefix: str,
        grid: Sequence[int],
        k: int,
        width: int,
    ) -> dict[str, Any]:
        """Forward and backward of a mixture, over and over, see ``timed_loop``.

        :param hot: one expert is among the best ones of all rows
        """
        import torch

        torch.manual_seed(0)
        if self._mixture is None:
            self._mixture = self._system.mixture(
                self._node, self._transport, prefix=prefix, grid=grid, k=k, width=width
            )
        mixture = self._mixture
        with torch.no_grad():
            mixture.proj.weight.normal_()
            mixture.proj.bias.zero_()
            mixture.proj.bias[0] = 1000.0 if hot else 0.0
        generator = torch.Generator().manual_seed(self._index)

        def step(_: int) -> None:
            x = torch.randn(rows, width, generator=generator).requires_grad_()
            mixture(x).sum().backward()
            if x.grad is None or not x.grad.isfinite().all():
                raise RuntimeError("the mixture gave no gradient")

        _sleep_until(begin_at)
        return timed_loop(step, Limit(**limit))


class Clients:
    """Clients, each in a forked process: what they import is imported once, as in hivemind's own benchmark.

    :param count: how many
    :param client: options of ``Client``
    """

    def __init__(self, system: System, *, count: int, client: dict[str, Any]):
        import torch

        torch.set_num_threads(1)
        context = multiprocessing.get_context("fork")
        self._pipes: list[Connection] = []
        for index in range(count):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(theirs, Client, system), name=f"client-{index}").start()
            theirs.close()
            self._pipes.append(ours)
        for first in range(0, count, AT_ONCE):
            indices = range(first, min(first + AT_ONCE, count))
            self._exchange(indices, lambda index: {**client, "index": index}, CLIENT_START_TIMEOUT_S)
        self.started = None

    def run(self, method: str, patience_s: float, workers: int | None, call: dict[str, Any]) -> list[Any]:
        """Let the clients, or the first ``workers`` of them, do the same at the same time; their results in order.

        :param call: arguments of the method
        """
        begin_at = time.monotonic() + TIME_TO_PREPARE_S
        message = {"command": method, "arguments": {**call, "begin_at": begin_at}}
        return self._exchange(range(workers or len(self._pipes)), lambda index: message, patience_s)

    def _exchange(
        self, indices: Sequence[int], message: Callable[[int], dict[str, Any]], timeout_s: float
    ) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        for index in indices:
            self._pipes[index].send_bytes(json.dumps(message(index)).encode())
        answers: dict[int, Any] = {}
        waiting = {self._pipes[index]: index for index in indices}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{len(waiting)} of {len(indices)} clients gave no answer within {timeout_s:.0f} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                answer = json.loads(pipe.recv_bytes())
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                answers[waiting.pop(pipe)] = answer["result"]
        return [answers[index] for index in indices]


class Bare:
    """The module itself, in one thread of a process that does nothing else. What an expert's server cannot exceed.

    :param expert_cls: a registered class of this project (the same modules as stock hivemind's)
    :param hidden_dim: of the expert
    :param optimizer: "adam" or "none"
    :param device: where it computes
    """

    def __init__(
        self,
        system: None,
        *,
        expert_cls: str,
        hidden_dim: int,
        optimizer: str = "none",
        device: str = "cpu",
    ):
        import torch

        import benchmarks.experts  # noqa: F401  registers them
        from benchmarks.systems import optimizer_class
        from moe.server.layers import build_expert

        self._device = torch.device(device)
        self._module = build_expert(expert_cls, hidden_dim).to(self._device)
        make = optimizer_class(optimizer)
        self._optimizer = None if make is None else make(self._module.parameters())
        self.started = None

    def calls(
        self, load: dict[str, Any], limit: dict[str, Any], callers: int = 1, from_host: bool = False
    ) -> list[dict[str, Any]]:
        """Compute the calls of ``callers``, one after another, over and over; see ``Client.calls``.

        :param from_host: inputs come from the host's memory and outputs go there, as a server's must
        """
        import torch

        what, until = Load(**load), Limit(**limit)
        inputs = [what.inputs(caller) for caller in range(callers)]
        if not from_host:
            inputs = [
                (x.detach().to(self._device).requires_grad_(x.requires_grad), self._moved(kwargs))
                for x, kwargs in inputs
            ]

        def compute(x: Any, **kwargs: Any) -> Any:
            if not from_host:
                return self._module(x, **kwargs)
            return self._module(x.to(self._device, non_blocking=True), **self._moved(kwargs)).cpu()

        def step(_: int) -> None:
            with torch.set_grad_enabled(what.backward):
                for x, kwargs in inputs:
                    what.step(compute, x, kwargs)
            if what.backward and self._optimizer is not None:
                self._optimizer.step()
                self._optimizer.zero_grad()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        step(0)
        result = timed_loop(step, until)
        return [{**result, "vectors": sum(x.numel() // x.shape[-1] for x, _ in inputs)}]

    def _moved(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.detach().to(self._device).requires_grad_(value.requires_grad) for name, value in kwargs.items()
        }


class Nodes:
    """DHT nodes, one of which declares experts and another one of which finds them.

    :param count: how many; at least 2
    """

    def __init__(self, system: System, *, count: int):
        self._system = system
        self._nodes = [system.join([])]
        while len(self._nodes) < count:
            known = [maddr for node in self._nodes[-JOIN_THROUGH:] for maddr in system.maddrs(node)]
            self._nodes.append(system.join(known))
        self.started = None

    def declare(self, uids: Sequence[str], expiration_s: float) -> float:
        """Seconds to declare experts."""
        begin = time.monotonic()
        if not self._system.declare(self._nodes[-2], uids, expiration_s):
            raise RuntimeError("some records were refused")
        return time.monotonic() - begin

    def find(self, uids: Sequence[str]) -> float:
        """Seconds to find them."""
        begin = time.monotonic()
        found = self._system.find(self._nodes[-1], uids)
        elapsed_s = time.monotonic() - begin
        if found < len(uids):
            raise RuntimeError(f"{found} of {len(uids)} experts were found")
        return elapsed_s

    def search(self, prefix: str, grid: Sequence[int], rows: int, beam_size: int, seed: int) -> tuple[float, float]:
        """Seconds of a first beam search over a grid that the node knows nothing of, and of a second one with other scores."""
        import numpy as np

        rng = np.random.default_rng(seed)
        searcher = self._system.searcher(self._nodes[-1], prefix, grid)
        elapsed_s = []
        for _ in range(2):
            scores = [rng.standard_normal((rows, size)).astype(np.float32) for size in grid]
            begin = time.monotonic()
            found = searcher.batch_find_best_experts(scores, beam_size)
            elapsed_s.append(time.monotonic() - begin)
            if not all(found):
                raise RuntimeError("a row has no experts")
        return elapsed_s[0], elapsed_s[1]


ROLES: dict[str, Callable[..., Any]] = {
    "server": Server,
    "traced server": TracedServer,
    "clients": Clients,
    "bare": Bare,
    "nodes": Nodes,
}


# --- being asked -----------------------------------------------------------------------------------------------------


def serve(connection: Connection, role: Callable[..., Any], system: System | None) -> None:
    """Start a role with the options that are told first, then run its methods, until the other side is gone."""
    target: Any = None
    while True:
        try:
            message = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            if target is None:
                target = role(system, **message)
                answer = {"result": target.started}
            else:
                answer = {"result": getattr(target, message["command"])(**message["arguments"])}
        except Exception as e:
            traceback.print_exc()
            answer = {"error": f"{type(e).__name__}: {e}"[:2000]}
        connection.send_bytes(json.dumps(answer).encode())


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def main() -> None:
    """See above."""
    role, system, descriptor = sys.argv[1:]
    connection = Connection(int(descriptor))
    from hivemind.utils.limits import increase_file_limit

    increase_file_limit()
    serve(connection, ROLES[role], SYSTEMS[system]() if system in SYSTEMS else None)
    os._exit(0)  # stock servers do not always end by themselves; whoever asked kills what is left of the session


if __name__ == "__main__":
    main()
