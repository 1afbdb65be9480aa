"""`make demo`: the main job from beginning to end on this machine, each step as the command to type.

A store on loopback, a drawn data set, a detector on four workers, a preemption half-way, the way back, and
what is in the bucket at the end. Nothing outside `.demo/`, `runs/` and one tmux window is touched.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / ".demo"
LAUNCH = str(Path(sys.executable).parent / "launch")
RECIPE = "recipes/yolof_shapes.yaml"
console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    began = time.monotonic()
    os.chdir(ROOT)
    DEMO.mkdir(exist_ok=True)
    store = start_store()
    try:
        os.environ.update(read_exports(DEMO / "store/env.sh"))
        step("2. A data set of drawn shapes, so that nothing has to be downloaded")
        if not (ROOT / "data/shapes/annotations").exists():  # an earlier demo made it
            shell(sys.executable, "-m", "detcore.data.shapes", "data/shapes")
        run = train_and_preempt()
        report(run)
    finally:
        store.send_signal(signal.SIGTERM)
        store.wait()
    console.print(f"\n[bold]Done in {time.monotonic() - began:.0f} s.[/] Lines to type next:")
    for line, says in next_lines(run):
        console.print(f"  [cyan]{line}[/]   [dim]{says}[/]")
    return 0


def start_store() -> subprocess.Popen[bytes]:
    step("1. An S3-compatible store on this machine (SeaweedFS, loopback only, credentials of its own)")
    ready = DEMO / "store/env.sh"
    ready.unlink(missing_ok=True)
    console.print(f"[cyan]$ launch store serve {DEMO.name}/store &[/]")
    with (DEMO / "store.log").open("wb") as log:
        server = subprocess.Popen([LAUNCH, "store", "serve", str(DEMO / "store")], stdout=log, stderr=log)
    for _ in range(600):
        if ready.exists():
            return server
        if server.poll() is not None:
            break
        time.sleep(0.1)
    server.kill()
    sys.exit(f"The store did not start:\n{(DEMO / 'store.log').read_text()}")


def train_and_preempt() -> str:
    """Start the recipe in tmux, preempt it half-way, wait until it has come back and finished; its run id."""
    backend = "tmux" if shutil.which("tmux") else "local"
    step(f"3. The recipe, four workers, in {'a tmux window' if backend == 'tmux' else 'the background'}")
    argv = [LAUNCH, RECIPE, "--gpus", "4", "--backend", backend]
    before = {run["id"] for run in status()}
    if backend == "tmux":
        shell(*argv)
    else:
        console.print(f"[cyan]$ {printable(argv)} &[/]")
        subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    run = wait_for_new_run(before)
    preempted = False
    shown = None
    while True:
        now = status(run)[0]
        line = f"   {now['state']:<12} step {now['step'] or 0:>4} of {now['of'] or '?'}"
        line += f"   loss {now['loss']:.3f}" if now.get("loss") else ""
        if line != shown:
            console.print(line)
            shown = line
        if now["state"] in ("finished", "failed", "stopped", "lost"):
            break
        if not preempted and now["of"] and (now["step"] or 0) >= now["of"] // 2:
            step("4. Preempt it half-way: the signal that a cluster sends; it saves, leaves, and comes back")
            shell(LAUNCH, "preempt", run)
            preempted = True
            step("   It comes back by itself")
        time.sleep(1)
    if now["state"] != "finished":
        shell(LAUNCH, "logs", run)
        sys.exit(f"The run ended as {now['state']}: {now.get('reason')}")
    return run


def report(run: str) -> None:
    step("5. What came out")
    shell(LAUNCH, "status", run)
    folder = Path(os.environ.get("LAUNCH_RUNS", "runs")) / run
    detections = json.loads((folder / "inference/coco_instances_results.json").read_text())
    final = json.loads((folder / "final.json").read_text())
    figures = "  ".join(
        f"{name} {value:.3f}" for name, value in final["metrics"].items() if name.startswith("AP")
    )
    console.print(f"\n[bold]{figures}[/]")
    console.print(f"[bold]steps lost: {final['lost_steps']}[/] in {final['attempts']} attempts")
    console.print(f"{len(detections):,} detections in {folder}/inference/coco_instances_results.json")
    show_bucket(final["url"])


def show_bucket(url: str) -> None:
    from launcher.storage import StoreSettings, open_store

    console.print(f"\nIn the bucket, under {url}:")
    for entry in open_store(url, StoreSettings()).list(""):
        if not entry.key.startswith("code/"):
            console.print(f"  {entry.size:>12,}  {entry.key}")


def next_lines(run: str) -> list[tuple[str, str]]:
    return [
        ("source .venv/bin/activate", "so that `launch` is a command"),
        (f"launch status {run}", "attempts, checkpoints, what is durable"),
        (f"launch logs {run}", "what the window showed"),
        (f"launch tensorboard {run}", "curves and pictures"),
        (f"python -m detcore.infer runs/{run} data/shapes/val/*.png --out boxes", "boxes on pictures"),
        ("launch store serve .demo/store", "the store again, with what is in it"),
    ]


def status(*argv: str) -> list[dict[str, object]]:
    shown = subprocess.run([LAUNCH, "status", "--json", *argv], capture_output=True, text=True, check=True)
    answer = json.loads(shown.stdout)
    return answer.get("runs", [answer])


def wait_for_new_run(before: set[object]) -> str:
    for _ in range(300):
        new = [str(run["id"]) for run in status() if run["id"] not in before]
        if new:
            return new[0]
        time.sleep(0.2)
    sys.exit("The run did not appear in `launch status`.")


def read_exports(path: Path) -> dict[str, str]:
    """The variables of a file of `export NAME=value` lines."""
    words = [shlex.split(line) for line in path.read_text().splitlines() if line.startswith("export ")]
    return dict(word[1].split("=", 1) for word in words)


def shell(*argv: str) -> None:
    console.print(f"[cyan]$ {printable(list(argv))}[/]")
    if subprocess.run(argv).returncode:
        sys.exit(f"This failed: {shlex.join(argv)}")


def printable(argv: list[str]) -> str:
    return shlex.join([Path(argv[0]).name, *argv[1:]])


def step(text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


if __name__ == "__main__":
    sys.exit(main())
