"""A program that keeps the contract in a hundred lines: no torch, one sum for weights. For tests.

Every rank counts to --steps; rank 0 writes heartbeat, metrics, checkpoints and outcome. Its arguments make it
crash, hang, dawdle or ignore signals; `--once` does so in the first attempt only.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--pace", type=float, default=0.02, help="seconds a step")
parser.add_argument("--every", type=int, help="steps between checkpoints; default: the recipe's, or 5")
parser.add_argument("--crash-at", type=int)
parser.add_argument("--crash-rank", type=int, default=0)
parser.add_argument("--hang-at", type=int)
parser.add_argument("--wait-at", type=int, nargs="+", default=[], help="a step of each attempt to stay at")
parser.add_argument("--once", action="store_true")
parser.add_argument("--deaf", action="store_true", help="ignore SIGTERM, and so does a child")
parser.add_argument("--late", type=float, default=0.0, help="seconds until the signal handler is there")
parser.add_argument("--save", type=float, default=0.0, help="seconds that saving takes")
parser.add_argument("--careless", action="store_true", help="leave at SIGTERM without a checkpoint")
parser.add_argument("--forgetful", action="store_true", help="go on from a sum that is not the saved one")
parser.add_argument("--ballast", type=int, default=0, help="MB that a checkpoint weighs; older ones go")
parser.add_argument("--fail", help="write the outcome `failed`")
args = parser.parse_args()
told = os.environ.get("LAUNCH_CHECKPOINT_EVERY", "")
every = args.every or (int(told[:-2]) if told.endswith("it") else 5)

RUN = Path(os.environ["LAUNCH_RUN_DIR"])
FENCE = int(os.environ["LAUNCH_ATTEMPT"])
RANK = int(os.environ["RANK"])
stopping = False


def write(path: Path, obj: object) -> None:
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    aside.write_text(json.dumps(obj))
    aside.replace(path)


def on_sigterm(number: int, frame: object) -> None:
    global stopping
    stopping = True


def candidates() -> list[Path]:
    """Checkpoints, newest first."""
    found = [path.parent for path in (RUN / "checkpoints").glob("step-*/manifest.json")]
    age = lambda path: (int(path.name.split("-")[3]), int(path.name.split("-")[1]))  # noqa: E731
    return sorted(found, key=age, reverse=True)


def newest() -> tuple[int, int]:
    """(step, sum) to go on from."""
    found = candidates()
    if not found:
        return 0, 0
    state = json.loads((found[0] / "train.pth").read_text())
    return state["step"], state["sum"] + args.forgetful


def checkpoint(step: int, total: int) -> None:
    folder = RUN / "checkpoints" / f"step-{step:08d}-fence-{FENCE}"
    if folder.exists():
        return
    beat("saving", step)
    aside = RUN / "checkpoints" / f".tmp-{FENCE}-{step}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    data = json.dumps({"step": step, "sum": total}).encode()
    (aside / "train.pth").write_bytes(data)
    if args.ballast:
        (aside / "model.pth").write_bytes(step.to_bytes(8, "big") * (args.ballast << 17))
    time.sleep(args.save)
    files = {path.name: file(path.read_bytes()) for path in aside.iterdir()}
    manifest = {"schema": 1, "step": step, "fence": FENCE, "files": files}
    (aside / "manifest.json").write_text(json.dumps(manifest))
    aside.rename(folder)
    if args.ballast:
        for old in candidates()[int(os.environ["LAUNCH_CHECKPOINT_KEEP"]) :]:
            (old / "manifest.json").unlink()
            shutil.rmtree(old)


def file(data: bytes) -> dict[str, object]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


counter = 0


def beat(phase: str, step: int, limit: float | None = None) -> None:
    global counter
    counter += 1
    write(
        RUN / "heartbeat.json",
        {"schema": 1, "fence": FENCE, "phase": phase, "counter": counter, "step": step, "of": args.steps}
        | {"resumed": resumed, "loss": 1 / (step + 1), "limit": limit},
    )


print(f"rank {RANK} of attempt {FENCE} begins", flush=True)
time.sleep(args.late)
signal.signal(signal.SIGTERM, signal.SIG_IGN if args.deaf else on_sigterm)
if args.deaf:
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", ignore])
if args.fail:
    if RANK == 0:
        write(RUN / "outcome.json", {"schema": 1, "fence": FENCE, "state": "failed", "reason": args.fail})
    sys.exit(1)

step, total = newest()
resumed = step
misbehave = FENCE == 1 or not args.once
stay = dict(enumerate(args.wait_at, 1)).get(FENCE)
if RANK == 0:
    for left in (RUN / "checkpoints").glob(".tmp-[0-9]*"):  # by a rank 0 that was killed
        shutil.rmtree(left)
    with contextlib.suppress(FileNotFoundError):
        lines = [
            line
            for line in (RUN / "metrics.jsonl").read_text().splitlines()
            if json.loads(line)["step"] <= step
        ]
        (RUN / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    beat("starting", step)
while step < args.steps and not stopping:
    step, total = step + 1, total + step
    time.sleep(args.pace)
    if RANK == 0:
        print(f"step {step}", flush=True)
        with (RUN / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps({"step": step, "sum": total}) + "\n")
        beat("training", step)
        if step % every == 0:
            checkpoint(step, total)
    if misbehave and step == args.crash_at and args.crash_rank == RANK:
        raise RuntimeError(f"told to crash at step {step}")
    if misbehave and step == args.hang_at and RANK == 0:
        beat("training", step, limit=3)
    while misbehave and step == args.hang_at and not stopping:
        time.sleep(0.05)
    while step == stay and not stopping:
        time.sleep(0.05)
        if RANK == 0:
            beat("training", step)
if RANK == 0 and not (stopping and args.careless):
    checkpoint(step, total)
    state = "stopped" if step < args.steps else "finished"
    outcome = {"schema": 1, "fence": FENCE, "state": state, "step": step, "metrics": {"sum": total}}
    write(RUN / "outcome.json", outcome)
