"""Stands for ``hivemind-server`` in the tests of LocalSwarm: starts in a moment, behaves as its arguments say.

``--children N`` processes in groups of their own (as hivemind's DHT has), ``--deaf`` to SIGTERM, ``--leave`` children
behind on SIGTERM, ``--fail`` to start, ``--silent``: never ready, ``--exit-after`` seconds with code 3, ``--says``
this on SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--host_maddrs")
parser.add_argument("--identity_path", type=Path)
parser.add_argument("--initial_peers", nargs="*", default=[])
parser.add_argument("--children", type=int, default=0)
parser.add_argument("--exit-after", type=float)
parser.add_argument("--says")
for flag in ("--deaf", "--leave", "--fail", "--silent"):
    parser.add_argument(flag, action="store_true")
options = parser.parse_args()

sys.stderr.write(f"started with peers {options.initial_peers} and COLOR={os.environ.get('COLOR')}\n")
if options.fail:
    sys.stderr.write("cannot start: the moon is in the wrong house\n")
    sys.exit(5)
OWN_GROUP = "import os, time; os.setpgid(0, 0); time.sleep(600)"
children = [subprocess.Popen([sys.executable, "-S", "-c", OWN_GROUP]) for _ in range(options.children)]


def stop(number: int, frame: object) -> None:
    if not options.leave:
        for child in children:
            child.kill()
            child.wait()
    sys.stderr.write(f"{options.says}\nstopped\n" if options.says else "stopped\n")
    sys.exit(0)


signal.signal(signal.SIGTERM, signal.SIG_IGN if options.deaf else stop)
if not options.identity_path.exists():
    options.identity_path.write_text(f"Qm{os.getpid()}")
port = int(options.host_maddrs.rsplit("/", 1)[1]) or 20_000 + os.getpid() % 10_000
if not options.silent:
    sys.stdout.write(f"--initial_peers /ip4/127.0.0.1/tcp/{port}/p2p/{options.identity_path.read_text()}\n")
    sys.stdout.flush()
if options.exit_after is not None:
    time.sleep(options.exit_after)
    sys.exit(3)
time.sleep(600)
