"""What a test leaves behind: child processes, threads, open descriptors; and memory that a process goes on taking. Owns: what
is counted and what is allowed.

Some things belong to a process, not to a test, and stay after their first use: hivemind's MPFuture has a thread and a
pipe, multiprocessing a thread, torch a helper process for shared memory, our clients one event loop. They are allowed
by name; the descriptors they open are allowed once, in the test in which the thread first appears.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from moe.server.heap import trim_heap

PATIENCE_S = 5.0  # for what is ending by itself
ALLOWED_THREADS = re.compile(
    r"hivemind\.utils\.mpfuture\.BACKEND|moe-client-loop"
    r"|Thread-\d+ \(_serve\)"  # multiprocessing.resource_sharer, which hands descriptors to other processes
    r"|(asyncio|uvloop)_\d+|ThreadPoolExecutor-\d+_\d+"  # default pools, of event loops and other packages; ours are named
)
ALLOWED_CHILDREN = re.compile(r"torch_shm_manager|multiprocessing\.(resource_tracker|forkserver)")
ALLOWED_DESCRIPTORS = re.compile(r"/dev/u?random|/dev/null|/dev/pts/\d+|/dev/shm/(torch_|pym-).*")  # shared heaps
DESCRIPTORS_OF_A_SINGLETON = 24  # an event loop, its sockets to the libp2p daemon, a pipe; measured 3 to 13


def resident_bytes() -> int:
    """Memory of this process."""
    size: int = psutil.Process().memory_info().rss
    return size


def held_bytes() -> int:
    """Memory of this process that is held. (What tests have freed can stay in the heap of a process that lives long.)"""
    gc.collect()
    trim_heap()
    return resident_bytes()


@dataclass(frozen=True)
class Snapshot:
    """What a process has at one time.

    :ivar children: (pid, start time) of each descendant
    :ivar threads: those of Python
    :ivar descriptors: number and target, where the system tells the targets
    :ivar descriptor_count: how many there are
    """

    children: frozenset[tuple[int, float]]
    threads: frozenset[threading.Thread]
    descriptors: frozenset[tuple[int, str]] = field(repr=False)
    descriptor_count: int = 0

    @classmethod
    def take(cls) -> Snapshot:
        """The present state of this process."""
        descriptors = _open_descriptors()
        children = frozenset((child.pid, child.create_time()) for child in _children())
        count = len(descriptors) if descriptors is not None else psutil.Process().num_fds()
        return cls(children, frozenset(threading.enumerate()), frozenset(descriptors or ()), count)


def find_leaks(before: Snapshot, patience_s: float = PATIENCE_S) -> list[str]:
    """What is there now and was not before, in words, after giving it time to vanish.

    :param patience_s: longest wait; nothing is waited for if there is nothing left
    """
    deadline = time.monotonic() + patience_s
    pause_s = 0.0
    while True:
        leaks = _compare(before)
        if not leaks or time.monotonic() > deadline:
            return leaks
        gc.collect()  # sockets and pipes in reference cycles
        time.sleep(pause_s)
        pause_s = min(pause_s + 0.02, 0.25)


def growth_bytes(measure: Callable[[], int], cycle: Callable[[int], object], cycles: int) -> int:
    """How much more memory a process has after twice as many cycles. What it takes once, or up to a bound that it reaches in
    the first half, does not count.

    :param measure: bytes that the process has now; what is free in its heap should not be among them
    :param cycle: what should leave nothing behind; gets its number
    :param cycles: in each half
    """
    for number in range(cycles):
        cycle(number)
    before = measure()
    for number in range(cycles, 2 * cycles):
        cycle(number)
    return measure() - before


def _compare(before: Snapshot) -> list[str]:
    now = Snapshot.take()
    new_threads = [thread for thread in now.threads - before.threads if thread.is_alive()]
    leaks = [f"child process {_describe(pid)}" for pid, started in sorted(now.children - before.children)]
    leaks += [
        f"{'daemon ' if thread.daemon else ''}thread {thread.name!r}"
        for thread in new_threads
        if not ALLOWED_THREADS.fullmatch(thread.name)
    ]
    singletons = sum(thread.daemon and bool(ALLOWED_THREADS.fullmatch(thread.name)) for thread in new_threads)
    growth = now.descriptor_count - before.descriptor_count
    if growth > singletons * DESCRIPTORS_OF_A_SINGLETON:
        new = sorted(now.descriptors - before.descriptors)
        named = ": " + ", ".join(f"{number} -> {target}" for number, target in new) if new else ""
        leaks.append(f"{growth} more open descriptors than before{named}")
    return leaks


def _children() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            name = f"{child.name()} {' '.join(child.cmdline())}"
        except psutil.Error:  # gone meanwhile, or a zombie that tells nothing
            name = ""
        if not ALLOWED_CHILDREN.search(name) and child.is_running():
            found.append(child)
    return found


def _describe(pid: int) -> str:
    try:
        child = psutil.Process(pid)
        return f"{pid} ({child.status()}: {' '.join(child.cmdline())[:200] or child.name()})"
    except psutil.Error:
        return str(pid)


def _open_descriptors() -> set[tuple[int, str]] | None:
    """Number and target of each; None where /proc does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:  # the descriptor the directory itself was read with
            continue
        if not ALLOWED_DESCRIPTORS.fullmatch(target):
            found.add((int(link.name), target))
    return found
