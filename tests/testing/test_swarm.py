"""LocalSwarm: starts, kills and restarts processes, says why something did not start, and leaves nothing behind.

What it runs here is a small program that stands for a server; swarms of real servers are in tests/swarm.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe.errors import LifecycleError
from moe.server.idle import LEFT_AT_THE_END
from moe.testing import LocalSwarm
from moe.testing.processes import kill_session, session_members

FAKE = (sys.executable, "-S", str(Path(__file__).with_name("fake_server.py")))
WAIT_S = 20.0


def swarm_of(*servers: list[str], **options: Any) -> LocalSwarm:
    return LocalSwarm(*servers, command=FAKE, **options)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_servers_start_in_one_swarm_and_end_with_it() -> None:
    with swarm_of([], ["--children", "2"], env={"COLOR": "blue"}) as swarm:
        assert len(swarm) == 2
        assert len(swarm.initial_peers) == 2
        assert all(peer.startswith("/ip4/127.0.0.1/tcp/") for peer in swarm.initial_peers)
        assert "started with peers [] and COLOR=blue" in swarm.log(0)
        assert f"started with peers ['{swarm.initial_peers[0]}']" in swarm.log(1)
        assert [swarm.is_running(i) for i in range(2)] == [True, True]
        assert [len(swarm.processes(i)) for i in range(2)] == [1, 3]
        assert "2 of 2 servers run" in repr(swarm)
        directory = swarm.directory
        assert directory.exists()
    assert swarm.initial_peers == []
    assert [swarm.processes(i) for i in range(2)] == [[], []]
    assert not directory.exists()


def test_a_server_that_has_lost_count_of_its_requests_fails_the_test() -> None:
    lost = f"{LEFT_AT_THE_END}bytes in flight: 10"
    with pytest.raises(AssertionError, match="server1: .*bytes in flight: 10"), swarm_of([], ["--says", lost]) as swarm:
        pass
    assert len(swarm.left_behind) == 1
    with pytest.raises(ValueError, match="mine"), swarm_of(["--says", lost]):  # what has failed already says why
        raise ValueError("mine")


def test_a_killed_server_is_gone_with_its_children_and_comes_back_as_the_same_peer() -> None:
    with swarm_of(["--children", "2", "--deaf"], [], stop_timeout_s=0.5) as swarm:
        before = swarm.initial_peers
        swarm.kill(0)
        assert not swarm.is_running(0)
        assert swarm.processes(0) == []
        assert swarm.initial_peers == before[1:]
        swarm.restart(0)
        assert swarm.initial_peers == before
        assert f"started with peers ['{before[1]}']" in swarm.log(0)
        swarm.restart(1)  # also while it runs
        assert swarm.initial_peers == before


def test_a_terminated_server_tells_its_exit_code_and_what_it_left() -> None:
    with swarm_of(["--children", "1"], ["--children", "1", "--leave"]) as swarm:
        assert swarm.terminate(0) == 0
        assert swarm.processes(0) == []
        assert "stopped" in swarm.log(0)
        assert swarm.terminate(1) == 0
        (left,) = swarm.processes(1)
    wait_until(lambda: left not in session_members(os.getsid(0)) and not Path(f"/proc/{left}").exists())


def test_a_server_that_does_not_end_in_time_is_killed() -> None:
    with swarm_of(["--deaf", "--children", "1"], stop_timeout_s=0.2) as swarm:
        with pytest.raises(LifecycleError, match=r"(?s)server0 did not end within 0\.2 s.*started with"):
            swarm.terminate(0)
        assert swarm.processes(0) == []


def test_a_server_that_ends_by_itself_can_be_waited_for() -> None:
    with swarm_of(["--exit-after", "0.1"]) as swarm:
        assert swarm.wait(0, WAIT_S) == 3
        assert not swarm.is_running(0)
    with pytest.raises(LifecycleError, match="not running"):
        swarm_of([]).wait(0, 1.0)


def test_a_server_that_cannot_start_says_why_and_nothing_is_left() -> None:
    swarm = swarm_of(["--children", "1"], ["--fail"])
    with pytest.raises(LifecycleError, match=r"(?s)server1 ended with code 5.*the moon is in the wrong house"):
        swarm.start()
    assert swarm.processes(0) == []
    assert not swarm.directory.exists()


def test_a_server_that_is_never_ready_is_given_up() -> None:
    swarm = swarm_of(["--silent", "--children", "1"], start_timeout_s=0.5)
    with pytest.raises(LifecycleError, match=r"server0 was not ready within 0\.5 s"):
        swarm.start()
    assert swarm.processes(0) == []


def test_a_failing_test_shows_the_logs_and_leaves_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    swarm = swarm_of(["--children", "1", "--deaf"], directory=tmp_path, stop_timeout_s=0.2)
    with caplog.at_level(logging.ERROR), pytest.raises(ZeroDivisionError), swarm:
        raise ZeroDivisionError
    assert "log of server0:\nstarted with peers" in caplog.text
    assert swarm.processes(0) == []
    assert (tmp_path / "server0.log").exists()  # a directory of one's own is kept


def test_it_is_started_once_at_a_time() -> None:
    with swarm_of([]) as swarm:
        with pytest.raises(LifecycleError, match="started before"):
            swarm.start()
        assert swarm.is_running(0)
    swarm.stop()
    with pytest.raises(LifecycleError, match="not running"):
        swarm.restart(0)


def test_nothing_is_left_however_the_test_process_ends() -> None:
    program = f"""
        import os, sys
        from moe.testing.swarm import LocalSwarm
        swarm = LocalSwarm(["--children", "1"], command={FAKE!r}, stop_timeout_s=5.0)
        swarm.start()
        print(os.path.basename(swarm.directory), swarm.processes(0)[0], flush=True)
        sys.stdin.readline()
        sys.exit(4)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as killed,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as leaving,
    ):
        sessions = []
        for test in (killed, leaving):
            assert test.stdout is not None
            sessions.append(os.getsid(int(test.stdout.readline().split()[1])))
        assert [len(session_members(session)) for session in sessions] == [2, 2]
        killed.kill()
        leaving.communicate("\n", timeout=WAIT_S)
        assert leaving.returncode == 4
        for session in sessions:
            wait_until(lambda session=session: session_members(session) == [])  # type: ignore[misc]


def test_a_session_is_killed_with_what_is_born_meanwhile() -> None:
    program = (
        "import os, time\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        os.setpgid(0, 0)\n"
        "        time.sleep(600)\n"
        "time.sleep(600)\n"
    )
    leader = subprocess.Popen([sys.executable, "-S", "-c", program], start_new_session=True)
    try:
        wait_until(lambda: len(session_members(leader.pid)) == 4)
        leader.send_signal(signal.SIGKILL)
        leader.wait(WAIT_S)
        assert len(session_members(leader.pid)) == 3  # found also without their leader
    finally:
        assert kill_session(leader.pid) == []
    assert session_members(leader.pid) == []
    assert os.getpid() in session_members(os.getsid(0))
