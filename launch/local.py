#!/usr/bin/env python3
"""Starts several processes of one job on this machine, joined over loopback: the same command, N times.

Each line of their output gets the process's number. SIGTERM and Ctrl-C are passed on; a training run then saves and
stops. When one process dies the others end too, within 15 seconds, and so does this one, with its exit code; the same
command again goes on from the newest checkpoint. With --restarts it does so by itself, but not after an end that
another start would not change: all done, a signal, wrong input (2), too many bad steps (3), a full disk (4).
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

HEARTBEAT_S = 10  # without a sign of life, then the others notice
GRACE_S = 12  # after the first death, for the others to end by themselves
FINAL = (0, 2, 3, 4, 128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes after which nothing is started again
EXAMPLES = """
examples:
  python launch/local.py -n 4 -- llamax train recipes/scout_pretrain.py:tiny --workdir runs/four --config.mesh.data=-1
  python launch/local.py -n 8 --gpus-each 1 -- llamax train recipes/scout_pretrain.py --workdir runs/scout
  python launch/local.py -n 2 --dry-run -- llamax train recipes/scout_pretrain.py:tiny --workdir runs/two
"""


def main() -> int:
    args = arguments()
    if args.dry_run:
        for own in variables(args):
            print(shlex.join(["env", *(f"{name}={value}" for name, value in own.items()), *args.command]))
        return 0
    processes: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []  # signals received

    def pass_on(signum: int, _: object) -> None:
        asked.append(signum)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, pass_on)
    for left in reversed(range(args.restarts + 1)):
        code = once(args, processes, asked)
        if code in FINAL or asked or not left:
            return code
        print(f"local.py: starting all of them again ({left} times at most)", file=sys.stderr, flush=True)
    raise AssertionError("the last start returns")


def once(args: argparse.Namespace, processes: list[subprocess.Popen[bytes]], asked: list[int]) -> int:
    """Starts all of them and waits for their end; their exit code. `processes` and `asked` are the signal handler's."""
    processes.clear()
    try:
        for number, own in enumerate(variables(args)):
            processes.append(start(args.command, own))
            threading.Thread(target=prefix_lines, args=(number, processes[-1].stdout), daemon=True).start()
        for process in processes if asked else ():  # it came while they were being started
            process.send_signal(asked[0])
        return watch(processes)
    except OSError as error:
        print(f"local.py: {shlex.join(args.command)} cannot be started: {error}", file=sys.stderr)
        return 2
    finally:
        for process in processes:
            process.kill()


def arguments() -> argparse.Namespace:
    about = (__doc__ or "").strip()
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=EXAMPLES, formatter_class=form, allow_abbrev=False)
    parser.add_argument("-n", "--processes", type=int, required=True, metavar="N", help="how many, from 1 up")
    parser.add_argument("--gpus-each", type=int, metavar="K", help="process i sees the GPUs i*K ... i*K+K-1 alone")
    parser.add_argument("--restarts", type=int, default=0, metavar="R", help="starts after a failure, at most (0)")
    parser.add_argument("--port", type=int, help="of process 0 on the loopback interface (one that is free)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what each of them runs, after --")
    args = parser.parse_args()
    if args.processes < 1 or args.restarts < 0:
        parser.error(f"-n {args.processes} --restarts {args.restarts}: it takes one process and no restarts at least")
    return args


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def variables(args: argparse.Namespace) -> list[dict[str, str]]:
    """What each process has in its environment beside ours."""
    shared = {
        "LLAMAX_COORDINATOR": f"127.0.0.1:{args.port or free_port()}",
        "LLAMAX_PROCESSES": f"{args.processes}",
        "LLAMAX_HEARTBEAT_S": f"{HEARTBEAT_S}",
    }
    environments = []
    for number in range(args.processes):
        own = shared | {"LLAMAX_PROCESS": f"{number}"}
        if args.gpus_each:
            gpus = range(number * args.gpus_each, (number + 1) * args.gpus_each)
            own["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, gpus))
        environments.append(own)
    return environments


def start(command: list[str], own: dict[str, str]) -> subprocess.Popen[bytes]:
    """In a group of its own: a Ctrl-C in the terminal reaches it once, through us."""
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen(command, env=os.environ | own, start_new_session=True, **pipes)


def prefix_lines(number: int, output: IO[bytes]) -> None:
    for line in output:
        sys.stdout.buffer.write(b"[%d] %s\n" % (number, line.rstrip(b"\r\n")))
        sys.stdout.buffer.flush()


def watch(processes: list[subprocess.Popen[bytes]]) -> int:
    """Waits for all; the exit code of the first that failed."""
    code, ends = 0, float("inf")
    while any(process.poll() is None for process in processes):
        failed = [i for i, process in enumerate(processes) if process.poll()]
        if failed and not code:
            code, ends = exit_code(processes[failed[0]]), time.monotonic() + GRACE_S
            others = "" if len(failed) == len(processes) else "; the others end too"
            print(f"local.py: process {failed[0]} {how(processes[failed[0]])}{others}", file=sys.stderr, flush=True)
        if time.monotonic() > ends:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    time.sleep(0.2)  # the last lines
    return code or next((exit_code(process) for process in processes if process.returncode), 0)


def exit_code(process: subprocess.Popen[bytes]) -> int:
    """As a shell gives it: 128 + the number of the signal that killed it."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def how(process: subprocess.Popen[bytes]) -> str:
    killed = process.returncode < 0
    return f"was killed by {signal.Signals(-process.returncode).name}" if killed else f"ended with {process.returncode}"


if __name__ == "__main__":
    sys.exit(main())
