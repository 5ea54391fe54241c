"""Starts one engine and stays beside it, so that nothing of it outlives the harness, even after `kill -9`.

    python warden.py GRACE_S COMMAND [ARGUMENT ...]

The harness holds the other end of our stdin and never writes: end of file means that it is done, or dead.  Then the
engine's process group gets SIGTERM, and GRACE_S later SIGKILL.  We are the sub-reaper (Linux) of all that the engine
starts, so what it leaves behind becomes our child and is killed too, whatever session it moved to.  The engine's pid
is the one line on stdout; its own output goes where our stderr goes, without the texts that RIDGELINE_SECRETS holds,
one a line: an engine prints its arguments.  The exit code is the engine's (128 + signal).
Runs by file path in any interpreter: standard library only, nothing of ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.2
YIELD = 5  # of nice: a third of the share, where there is not enough for both
SECRETS = "RIDGELINE_SECRETS"
LINE_BYTES = 65536  # a longer line is passed on in pieces, with enough held back that no secret is cut in two
OURS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a terminal's Ctrl-C must not take the warden before its ward


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def prepare_engine() -> None:
    """Runs in the child before exec.  Ignored signals would stay ignored: give the engine the usual ones back.
    Should the warden itself be killed, the kernel kills the engine."""
    for number in OURS:
        signal.signal(number, signal.SIG_DFL)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def give_way() -> None:
    """Where engine and client share too few cores, the client's few instructions go first: a stamp that waits for a
    turn of the engine's would be late.  Cores are shared by sessions where the system groups them (autogroup)."""
    with contextlib.suppress(OSError):
        os.nice(YIELD)
    if os.getsid(0) == os.getpid():  # else it would be the session of whoever started us
        with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as group:
            group.write(str(YIELD))


def pass_on(source: int, secrets: list[bytes]) -> None:
    """Copy the engine's output to our stderr, line by line, without secrets."""
    longest = max(map(len, secrets))
    pending = b""
    while data := os.read(source, LINE_BYTES):
        pending = blotted(pending + data, secrets)
        end = pending.rfind(b"\n") + 1 or (len(pending) - longest if len(pending) > LINE_BYTES else 0)
        write(pending[:end])
        pending = pending[end:]
    write(pending)


def blotted(data: bytes, secrets: list[bytes]) -> bytes:
    for secret in secrets:
        data = data.replace(secret, b"[redacted]")
    return data


def write(data: bytes) -> None:
    """All of it; a full disk costs the log, never the engine."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


def harness_is_gone(parent: int) -> bool:
    """End of file on stdin; or another parent, in case a forked child of the harness still holds the pipe."""
    readable, _, _ = select.select([0], [], [], POLL_S)
    return os.getppid() != parent or (bool(readable) and os.read(0, 4096) == b"")


def children() -> list[int]:
    """Pids of our children, zombies and adopted ones too (Linux; elsewhere none are adopted)."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        with contextlib.suppress(OSError):
            if name.isdigit():
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    # pid (name, which may hold anything) state ppid ...
                    if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                        found.append(int(name))
    return found


def all_gone(engine: subprocess.Popen[bytes]) -> bool:
    """Reaps what has ended.  True when the engine, its group and every child that came to us are gone."""
    ended = engine.poll() is not None  # first, so that nothing below steals its exit code from Popen
    for pid in children():
        if pid != engine.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
    try:
        os.killpg(engine.pid, 0)
    except ProcessLookupError:
        return ended and not children()
    except PermissionError:
        pass
    return False


def wait(done: Callable[[], bool], limit_s: float) -> bool:
    until = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def stop(engine: subprocess.Popen[bytes], grace_s: float) -> None:
    """Politely, then not.  Killing a process may hand us its children in turn, so repeat until none is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(engine.pid, signal.SIGTERM)
    if wait(lambda: all_gone(engine), grace_s):
        return
    for _ in range(50):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(engine.pid, signal.SIGKILL)
        for pid in children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if wait(lambda: all_gone(engine), 0.1):
            return


def main(arguments: list[str]) -> int:
    grace_s, command, parent = float(arguments[0]), arguments[1:], os.getppid()
    for number in OURS:
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    give_way()
    secrets = [secret for secret in os.environ.pop(SECRETS, "").encode().split(b"\n") if secret]
    try:
        engine = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if secrets else 2,
                                  stderr=subprocess.STDOUT, process_group=0, preexec_fn=prepare_engine)  # fmt: skip
    except OSError as error:
        print(f"error {error.strerror}", flush=True)
        return 127
    print(engine.pid, flush=True)
    copier = None
    if secrets and engine.stdout:
        copier = threading.Thread(target=pass_on, args=(engine.stdout.fileno(), secrets), daemon=True)
        copier.start()
    while engine.poll() is None and not harness_is_gone(parent):
        pass
    ended_with = engine.poll()
    # What an engine leaves behind, or a dead harness, needs no long goodbye.
    stop(engine, min(grace_s, 2.0) if ended_with is not None or os.getppid() != parent else grace_s)
    code = engine.wait() if ended_with is None else ended_with
    if copier:
        copier.join(2.0)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
