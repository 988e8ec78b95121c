"""The check that runs after every test finds what it is for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

from tests.leaks import Snapshot, find_leaks, growth_bytes


def test_nothing_is_found_where_nothing_is_left() -> None:
    before = Snapshot.take()
    left, right = socket.socketpair()
    left.close()
    right.close()
    assert find_leaks(before) == []


def test_waits_for_what_is_ending() -> None:
    before = Snapshot.take()
    threading.Timer(0.2, lambda: None).start()
    assert find_leaks(before) == []


def test_finds_a_child_process() -> None:
    before = Snapshot.take()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        leaks = find_leaks(before, patience_s=0.0)
    finally:
        child.communicate(b"\n")
    assert any("child process" in leak and str(child.pid) in leak and "input()" in leak for leak in leaks)
    assert find_leaks(before) == []


def test_finds_a_thread() -> None:
    before, release = Snapshot.take(), threading.Event()
    thread = threading.Thread(target=release.wait, name="moe-forgotten", daemon=True)
    thread.start()
    assert find_leaks(before, patience_s=0.0) == ["daemon thread 'moe-forgotten'"]
    release.set()
    thread.join()


def test_finds_descriptors() -> None:
    before = Snapshot.take()
    reader, writer = os.pipe()
    leaks = find_leaks(before, patience_s=0.0)
    os.close(reader)
    os.close(writer)
    assert len(leaks) == 1
    assert leaks[0].startswith("2 more open descriptors")


def test_a_singleton_may_keep_its_descriptors_once() -> None:
    before, release = Snapshot.take(), threading.Event()
    thread = threading.Thread(target=release.wait, name="moe-client-loop", daemon=True)
    thread.start()
    reader, writer = os.pipe()
    assert find_leaks(before, patience_s=0.0) == []
    after = Snapshot.take()
    more = os.dup(reader)
    assert len(find_leaks(after, patience_s=0.0)) == 1
    for descriptor in (reader, writer, more):
        os.close(descriptor)
    release.set()
    thread.join()


def test_growth_is_what_each_cycle_adds() -> None:
    kept = [1000]  # taken once
    assert growth_bytes(lambda: sum(kept), lambda number: kept.append(number * 0 + 10), 5) == 50
    assert growth_bytes(lambda: min(100, len(kept)), kept.append, 200) == 0  # up to a bound
