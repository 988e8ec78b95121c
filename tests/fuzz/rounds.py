"""Rounds of fuzzing: honest and hostile clients together at one server, then a look inside when the hostile ones are gone.

Every choice of a client comes from its seed, which comes from that of the round, which is printed. (When things happen, no
seed decides: a round that failed may need a few repetitions.)
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.fuzz.honest import HonestClients, Report
from tests.fuzz.server import MIB, FuzzedServer, Inside
from tests.swarm.tools import _starter, report

HOSTILE_AT_ONCE = 4
ROUND_S = 4.0
SETTLED_WITHIN_S = 2.0
MAX_LAG_S = 3.0  # of the server's event loop, on a machine that has more to do than it can
SPARE_BYTES = 48 * MIB  # fragments of the heap, threads that were made, tables that have grown

Launch = Callable[[FuzzedServer, random.Random, float, Sequence[str]], Any]
"""(server, rng, seconds, names of behaviours) -> the process of a new hostile client"""


class Failed(AssertionError):
    """A round has found something; says what, and how to do it again."""


class Fuzzer:
    """A server, honest clients of it, and a way to make hostile ones. A context manager.

    :param launch: makes a hostile client
    :param transports: of the honest clients, a thread each
    :param only: names of the hostile behaviours; none: all
    """

    def __init__(self, launch: Launch, transports: Sequence[str], seed: int, only: Sequence[str] = ()):
        self._launch, self._transports, self._only = launch, list(transports), only
        self._seeds = random.Random(seed)
        self.total = Report()
        self.rounds = 0

    def __enter__(self) -> Fuzzer:
        with ExitStack() as stack:
            self.server = stack.enter_context(FuzzedServer())
            self.honest = stack.enter_context(
                HonestClients(list(self.server.peers), self.server.peer_id.to_base58(), self._transports, 0)
            )
            self._stack = stack.pop_all()
        self._warm_up()
        self.before = self.server.settled(self._links_allowed())
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _warm_up(self) -> None:
        """Whatever is made once, on first use."""
        for _ in range(3):
            self.honest.go()
            time.sleep(0.7)
            self._check_honest(self.honest.pause(), "before the first round")

    def _links_allowed(self) -> Counter[str]:
        return Counter({self.honest.peer: len(self._transports)})

    def run(self, seconds: float) -> None:
        """Rounds for about so long.

        :raises Failed: something is wrong
        """
        end = time.monotonic() + seconds
        while True:
            self.round(self._seeds.getrandbits(32), min(ROUND_S, max(1.0, end - time.monotonic())))
            if time.monotonic() + 1.0 > end:
                return

    def round(self, seed: int, seconds: float) -> None:
        """One round.

        :raises Failed: something is wrong
        """
        rng, begin = random.Random(seed), time.monotonic()
        self.honest.go()
        clients = 0
        with self._hostile(seed, seconds) as processes:
            while (left := begin + seconds - time.monotonic()) > 0:
                _forget_dead(processes)
                while len(processes) < HOSTILE_AT_ONCE:
                    processes.append(self._launch(self.server, rng, min(left, seconds * rng.random()), self._only))
                    clients += 1
                time.sleep(0.05)
        told = self.honest.pause()
        inside = self.server.settled(self._links_allowed(), SETTLED_WITHIN_S)
        self.rounds += 1
        report(
            f"round {self.rounds}, seed {seed}: {clients} hostile clients, {sum(told.answered.values())} answers, "
            f"{dict(told.failed)} failed, the longest {told.longest_s:.1f} s; {inside.rss_bytes // MIB} MiB "
            f"(peak {inside.peak_bytes // MIB}), {inside.descriptors} descriptors, lag {inside.lag_s:.2f} s"
        )
        again = f"--rounds-of {seed}"
        self._check_honest(told, again)
        self._check_inside(inside, again)

    @contextmanager
    def _hostile(self, seed: int, seconds: float) -> Iterator[list[Any]]:
        processes: list[Any] = []
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join(5)
            _forget_dead(processes)

    def _check_honest(self, told: Report, again: str) -> None:
        for name, count in (*told.answered.items(), *told.failed.items()):
            (self.total.answered if name in told.answered else self.total.failed)[name] += count
        problems = [f"an honest client got a wrong answer: {wrong}" for wrong in told.wrong[:5]]
        silent = [transport for transport in self._transports if not told.answered[transport]]
        if silent:
            problems.append(f"honest clients over {silent} got no answer at all, but {dict(told.failed)}")
        self._fail_if(problems, again)

    def _check_inside(self, inside: Inside, again: str) -> None:
        limits, before = self.server.limits, self.before
        problems = [f"{SETTLED_WITHIN_S:.0f} s later: {busy}" for busy in inside.busy]
        dead = inside.links - self._links_allowed()
        if dead:
            problems.append(f"links of peers that have gone: {dict(dead)}")
        more_links = sum(inside.links.values()) - sum(before.links.values())
        if inside.descriptors > before.descriptors + max(0, more_links):
            problems.append(f"{inside.descriptors} descriptors, {before.descriptors} before")
        if more := list((Counter(inside.threads) - Counter(before.threads)).elements()):
            problems.append(f"threads: {more}")
        kept = limits.once_max_bytes + 3 * limits.held_max_bytes
        if inside.rss_bytes > before.rss_bytes + kept + SPARE_BYTES:
            problems.append(f"{inside.rss_bytes // MIB} MiB of memory, {before.rss_bytes // MIB} MiB before")
        if inside.lag_s > MAX_LAG_S:
            problems.append(f"the event loop stood still for {inside.lag_s:.1f} s")
        healthy, failure = self.server.ask("healthy")
        if not healthy:
            problems.append(f"the server is not healthy: {failure}")
        self._fail_if(problems, again)

    @staticmethod
    def _fail_if(problems: Sequence[str], again: str) -> None:
        if problems:
            raise Failed("\n  ".join([f"again with: {again}", *problems]))


def _forget_dead(processes: list[Any]) -> None:
    for process in [process for process in processes if not process.is_alive()]:
        processes.remove(process)
        process.close()


def start(target: Callable[..., object], *args: Any) -> Any:
    """A process that is ended with this one."""
    process = _starter.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def main(make: Callable[[int, Sequence[str]], Any], names: Sequence[str]) -> None:
    """The command line of a fuzzer.

    :param make: (seed, names of behaviours) -> the Fuzzer
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--rounds-of", type=int, help="repeat the round of this seed, for --seconds")
    parser.add_argument("--only", nargs="*", default=(), choices=names, help="hostile behaviours")
    options = parser.parse_args()
    report(f"seed {options.seed}")
    with make(options.seed, options.only) as fuzzer:
        try:
            if options.rounds_of is None:
                fuzzer.run(options.seconds)
            end = time.monotonic() + options.seconds
            while options.rounds_of is not None and time.monotonic() < end:
                fuzzer.round(options.rounds_of, ROUND_S)
        except Failed as e:
            report(f"FAILED after {fuzzer.rounds} rounds: {e}")
            sys.exit(1)
        finally:
            report(
                f"{fuzzer.rounds} rounds: {dict(fuzzer.total.answered)} answered, {dict(fuzzer.total.failed)} failed"
            )
