"""Run folders as a program and its supervisor would write them, for the tests of the mirror.

As a program (`python -m tests.launcher.mirrored RUN_DIR URL`) it writes a run and mirrors it, until killed.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

from launcher.checkpoints import Mark, checkpoints, read_manifest
from launcher.mirror import Mirror
from launcher.rundir import RunDir, append_json, write_json
from launcher.storage import open_store

ID = "demo-20260102-030405-abcd"
KEEP = 2
LOCAL = ("synced.json", "mirrored.json", "lease.json")


def make_run(root: Path, url: str) -> RunDir:
    """A run folder that has everything but checkpoints."""
    run = RunDir(root / ID)
    (run.code / "package").mkdir(parents=True)
    run.attempt_logs(1).mkdir(parents=True)
    write_json(run.run, {"schema": 1, "id": ID, "name": "demo", "url": url})
    run.recipe.write_text("program: {module: detcore.train}\n")
    (run.code / "package" / "__init__.py").touch()
    (run.code / "café.py").write_text("print('ü')\n")
    run.rank_log(1, 0).write_bytes(b"\xff\x00 bytes\n")
    append_json(run.attempts, {"event": "start", "attempt": 1, "fence": 1})
    return run


def add_checkpoint(run: RunDir, step: int, fence: int = 1, size: int = 1000) -> Mark:
    """As the contract has it: metrics up to `step`, then data, manifest, rename."""
    append_json(run.metrics, {"step": step, "loss": 1 / (step + 1)})
    mark = Mark(fence, step)
    aside = run.checkpoints / f".tmp-{os.urandom(4).hex()}"
    aside.mkdir(parents=True)
    files = {}
    for name in ("train.pth", "model.pth"):
        data = hashlib.sha256(f"{name} {step} {fence}".encode()).digest() * (size // 32 + 1)
        (aside / name).write_bytes(data)
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_json(aside / "manifest.json", {"schema": 1, "step": step, "fence": fence, "files": files})
    aside.rename(run.checkpoints / mark.name)
    write_json(run.checkpoints / "latest.json", {"name": mark.name})
    return mark


def prune(run: RunDir, keep: int = KEEP) -> None:
    for mark in checkpoints(run)[keep:]:
        (run.checkpoints / mark.name / "manifest.json").unlink()
        shutil.rmtree(run.checkpoints / mark.name)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` that the store should hold."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {key: path.read_bytes() for key, path in files.items() if key not in LOCAL}


def durable(files: dict[str, bytes]) -> list[Mark]:
    """Marks that have a manifest in a bucket, newest first; each is shown to be whole, and resumable from."""
    marks = []
    for key in files:
        if key.startswith("checkpoints/step-") and key.endswith("/manifest.json"):
            name = key.split("/")[1]
            mark = Mark(int(name.split("-")[3]), int(name.split("-")[1]))
            for file, said in read_manifest(files[key], mark).items():
                data = files[f"checkpoints/{name}/{file}"]
                assert (len(data), hashlib.sha256(data).hexdigest()) == (said.size, said.sha256)
            steps = [json.loads(line)["step"] for line in files["metrics.jsonl"].splitlines()]
            assert mark.step in steps, "metrics in the store reach the step of a checkpoint there"
            marks.append(mark)
    return sorted(marks, reverse=True)


def main() -> None:
    run = RunDir(Path(sys.argv[1]))
    mirror = Mirror(run, open_store(sys.argv[2]), every=0.05, keep=KEEP)
    last = max((mark.fence for mark in checkpoints(run)), default=0)
    fence = mirror.claim(os.urandom(8).hex(), last + 1)
    mirror.restore()
    mirror.start()
    print("ready", flush=True)
    step = max((mark.step for mark in checkpoints(run)), default=0)
    while mirror.lost is None:
        step += 1
        add_checkpoint(run, step, fence, size=300_000)
        prune(run)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
