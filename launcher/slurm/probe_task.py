"""The probe's task on a compute node: `python probe_task.py FOLDER ROLE PYTHON`. Only the standard library.

Three processes in the places that a supervisor (task), torchrun (child) and its workers (grandchild, in a
session of its own) have. Each appends to FOLDER/ROLE.jsonl which signals it gets, and that it is alive. The
task also looks at the node and answers the questions that appear in the folder. Times are CLOCK_MONOTONIC,
which all processes of one machine share.
"""

import contextlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
BELOW = {"task": "child", "child": "grandchild"}
TORCH = "--torch"
POLL = 0.1  # seconds
LONGEST = 300.0  # seconds; whatever happens, nothing of the probe lives longer
AFTERLIFE = 2.0  # seconds that a process outlives its parent: long enough to be noticed


def main() -> int:
    if sys.argv[1:] == [TORCH]:
        print(json.dumps(torch()))
        return 0
    folder, role, python = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)  # nothing is interrupted; they are fetched below
    # On a network disk others see what is written when it is closed, or at once if it is written so.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_DSYNC
    record = os.open(folder / f"{role}.jsonl", flags, 0o644)

    def tell(event: str, **more: object) -> None:
        os.write(record, json.dumps({"event": event, "at": time.monotonic(), **more}).encode() + b"\n")

    tell("up", pid=os.getpid())
    if role in BELOW:
        argv = [sys.executable, "-I", __file__, str(folder), BELOW[role], python]
        subprocess.Popen(argv, start_new_session=BELOW[role] == "grandchild")
    if role == "task":
        tell("node", **node(folder, python))
    parent, began, orphaned, answered = os.getppid(), time.monotonic(), 0.0, 0
    while time.monotonic() < began + LONGEST and folder.is_dir():
        got = signal.sigtimedwait(HEARD, POLL)
        tell("alive") if got is None else tell("signal", name=signal.Signals(got.si_signo).name)
        orphaned = orphaned or (time.monotonic() if os.getppid() != parent else 0.0)
        if orphaned and time.monotonic() > orphaned + AFTERLIFE:
            break
        if role == "task" and (folder / f"question-{answered}").exists():
            answer = folder / f".answer-{answered}"
            answer.write_text(json.dumps({"time": time.time()}))
            answer.rename(folder / f"answer-{answered}")
            answered += 1
    return 0


def node(folder: Path, python: str) -> dict[str, Any]:
    """What a run would find here. `folder` is in the folder of runs; `python` is to run torchrun."""
    places = sorted({folder.parent, Path(os.environ.get("TMPDIR") or "/tmp")})
    return {
        "host": socket.gethostname(),
        "cores": len(os.sched_getaffinity(0)),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "free": {str(place): shutil.disk_usage(place).free for place in places if place.is_dir()},
        "gpus": gpus(),
        "torch": ask_torch(python),
    }


def gpus() -> dict[str, Any]:
    """What nvidia-smi says, or why it says nothing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"count": 0, "why": "there is no nvidia-smi"}
    ask = [tool, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return {"count": 0, "why": "nvidia-smi does not answer within a minute"}
    rows = [line.split(", ", 1) for line in said.stdout.splitlines() if ", " in line]
    if said.returncode or not rows:
        words = (said.stderr or said.stdout).strip().splitlines() or ["nvidia-smi sees no GPU"]
        return {"count": 0, "why": words[-1]}
    return {"count": len(rows), "driver": rows[0][0], "name": rows[0][1]}


def ask_torch(python: str) -> dict[str, Any]:
    """What `torch` says in another Python."""
    with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
        said = subprocess.run([python, "-I", __file__, TORCH], capture_output=True, text=True, timeout=60)
        return {"python": python, **json.loads(said.stdout)}
    return {"python": python, "version": None, "shutdown_timeout": False}


def torch() -> dict[str, Any]:
    """The version of torch that this Python would import, and whether its torchrun waits for a save."""
    with contextlib.suppress(metadata.PackageNotFoundError, ImportError, OSError):
        version, spec = metadata.version("torch"), importlib.util.find_spec("torch")
        if spec and spec.origin:  # found, not imported: that takes seconds, from a network disk minutes
            torchrun = (Path(spec.origin).parent / "distributed" / "run.py").read_text(encoding="utf-8")
            return {"version": version, "shutdown_timeout": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in torchrun}
    return {"version": None, "shutdown_timeout": False}


if __name__ == "__main__":
    sys.exit(main())
