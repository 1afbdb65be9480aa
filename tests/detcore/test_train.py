"""Training in real processes: stopped, killed, started again, and the same in the end."""

import io
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.detcore.conftest import Run, assert_same
from tests.detcore.sections import section

NewRun = Callable[..., Run]
SEVEN = ["yolof", "retinanet", "fcos", "atss", "fcos-hrnet", "cornernet", "ssdlite"]


def workers(torchrun: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks, without their loader processes."""
    return [child for child in psutil.Process(torchrun.pid).children() if "RANK" in child.environ()]


def terminate(run: Run, process: subprocess.Popen[str]) -> dict[str, Any]:
    """SIGTERM to torchrun (or to a single process) -> the outcome of the attempt."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    outcome = run.read("outcome.json")
    assert outcome["fence"] == run.attempt, run.log()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    return outcome


def test_stopped_twice_and_killed_once_ends_the_same(tiny: dict[str, Any], new_run: NewRun) -> None:
    """With four ranks; two would hide what DDP does to the order of sums."""
    undisturbed = new_run("undisturbed", tiny).finish(ranks=4)

    run = new_run("disturbed", tiny)
    for step in (3, 8):  # in the warm-up of the learning rate, and right before an evaluation
        process = run.start(ranks=4)
        run.wait(run.reached(step), process)
        outcome = terminate(run, process)
        assert outcome["state"] == "stopped" and outcome["saved"], run.log()
        assert (run.folder / f"checkpoints/step-{outcome['step']:08d}-fence-{run.attempt}").is_dir()

    process = run.start(ranks=4)
    run.wait(run.reached(13), process)
    assert run.read("heartbeat.json")["resumed"] == outcome["step"], "a graceful stop loses no step"
    workers(process)[2].kill()
    process.wait(timeout=120)
    assert run.read("outcome.json")["fence"] < run.attempt, "a killed attempt has no outcome"
    killed_at = max(json.loads(line)["step"] for line in run.metrics().splitlines())

    run.finish(ranks=4)
    assert killed_at - run.read("heartbeat.json")["resumed"] <= 5, "no more than the interval is lost"
    assert_same(run.final(), undisturbed.final())
    assert run.metrics() == undisturbed.metrics()
    assert len(list((run.folder / "tensorboard").iterdir())) == 4, "an event file for each attempt"
    for each in (undisturbed, run):
        assert_board_shows(each)


@pytest.mark.parametrize("name", SEVEN)
def test_each_detector_is_preempted_and_ends_the_same(
    name: str, tiny: dict[str, Any], new_run: NewRun
) -> None:
    """Bit for bit: stopped by a signal, its checkpoint written, and taken up by another process."""
    tiny["model"] = section(name)
    tiny["data"]["workers"] = 0
    tiny["schedule"] |= {"iterations": 24, "steps": [18]}
    tiny["evaluation"] = {"every": None}
    undisturbed, run = new_run("undisturbed", tiny).finish(ranks=1), new_run("disturbed", tiny)
    process = run.start(ranks=1)
    run.wait(run.reached(3), process)
    outcome = terminate(run, process)
    assert outcome["state"] == "stopped" and outcome["saved"] and 3 <= outcome["step"] < 24, run.log()
    run.finish(ranks=1)
    assert run.read("heartbeat.json")["resumed"] == outcome["step"]
    assert_same(run.final(), undisturbed.final())
    assert run.metrics() == undisturbed.metrics()


def assert_board_shows(run: Run) -> None:
    """TensorBoard has what metrics.jsonl and timing.jsonl have, each step once, and pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    lines = [json.loads(line) for line in run.metrics().splitlines()]
    terms = {name: f"loss/{name}" for name in lines[0] if name.startswith("loss_") or name in ("cls", "box")}
    assert len(terms) == 2, lines[0]
    for name, tag in {"loss": "loss", "lr": "lr", "AP": "eval/AP", "AP50": "eval/AP50", **terms}.items():
        shown = [(event.step, event.value) for event in board.Scalars(tag)]
        assert shown == [(line["step"], pytest.approx(line[name])) for line in lines if name in line], tag
    assert [event.step for event in board.Scalars("eval/AP")] == [9, 18, 24]
    timing = [json.loads(line) for line in (run.folder / "timing.jsonl").read_text().splitlines()]
    for name in ("images_per_s", "step_s", "data_s", "memory_mb"):
        shown = [(event.step, event.value) for event in board.Scalars(f"speed/{name}")]
        assert shown == [(line["step"], pytest.approx(line[name])) for line in timing], name
        assert all(value >= 0 for _, value in shown)
    for event in board.Images("detections/0"):
        picture = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
        white = (np.asarray(picture) == 255).all(2).sum()
        assert max(picture.size) == 64 and white >= 8, "the true boxes are drawn into it"


def test_fp16_in_parts_with_sync_bn_goes_on_the_same(tiny: dict[str, Any], new_run: NewRun) -> None:
    tiny["amp"] = "fp16"
    tiny["model"]["norm"] = tiny["model"]["backbone"]["norm"] = "sync_bn"
    tiny["data"]["workers"] = 0
    tiny["schedule"] |= {"iterations": 6, "steps": [5], "accumulate": 2}
    tiny["evaluation"] = {"every": None}
    run = new_run("run", tiny, every="3it").finish(ranks=2)
    final, metrics = run.final(), run.metrics()
    assert final["train.pth"]["scaler"]["scale"] > 0
    shutil.rmtree(run.folder / "checkpoints" / "step-00000006-fence-1")
    run.finish(ranks=2)
    assert run.read("heartbeat.json")["resumed"] == 3
    assert_same(run.final(), final)
    assert run.metrics() == metrics


def test_sigterm_at_every_place(tiny: dict[str, Any], new_run: NewRun, tmp_path: Path) -> None:
    """Before the first step, in the final evaluation, in a hail of signals while saves follow one another:
    the run comes back and is the same."""
    tiny["data"]["workers"] = 0
    tiny["schedule"] |= {"iterations": 8, "steps": []}
    tiny["evaluation"] = {"every": None}
    tiny["data"]["val"] = many_images(tiny["data"], tmp_path)
    undisturbed = new_run("undisturbed", tiny).finish(ranks=1)

    run = new_run("disturbed", tiny, every="1it", keep=1)
    process = run.start(ranks=1)
    run.wait(run.phase("starting"), process)
    assert terminate(run, process) | {"metrics": {}} == {
        "schema": 1, "fence": 1, "state": "stopped", "step": 0, "metrics": {}, "saved": True
    }  # fmt: skip

    process = run.start(ranks=1)
    run.wait(run.reached(2), process)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.003)
    assert run.read("outcome.json")["state"] == "stopped", run.log()

    process = run.start(ranks=1)
    run.wait(run.phase("evaluating"), process)
    outcome = terminate(run, process)
    assert (outcome["state"], outcome["step"]) == ("stopped", 8), run.log()

    run.finish(ranks=1)
    assert "step 8/8" not in run.log(), "only the evaluation is done again"
    assert run.read("outcome.json")["metrics"] == undisturbed.read("outcome.json")["metrics"]
    assert_same(run.final(), undisturbed.final())
    assert run.metrics() == undisturbed.metrics()


def many_images(data: dict[str, Any], folder: Path) -> dict[str, str]:
    """A split of the same images over and over: its evaluation is not over before a signal comes."""
    content = json.loads(Path(data["root"], data["val"]["annotations"]).read_text())
    again = [
        image | {"id": 1000 * turn + image["id"]} for turn in range(1, 40) for image in content["images"]
    ]
    content["images"] += again
    (folder / "many.json").write_text(json.dumps(content))
    return data["val"] | {"annotations": str(folder / "many.json")}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hang_before_the_ranks_have_met_is_seen(
    rank: int, tiny: dict[str, Any], new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank never comes."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
    own = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    run = new_run("alone", tiny)
    process = run.start(ranks=1)
    try:
        if rank == 0:
            run.wait(run.phase("starting"), process)
            beat = run.read("heartbeat.json")
            assert (beat["fence"], beat["step"], beat["resumed"]) == (1, None, None)
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=4)
            assert not run.read("heartbeat.json"), "rank 0 alone writes"
    finally:
        process.kill()
        process.wait()


def test_no_checkpoint_can_be_written(tiny: dict[str, Any], new_run: NewRun) -> None:
    """A disk that takes no large file: training goes on and says so, the last checkpoint stays as it was, and
    the run does not claim to have finished."""
    tiny["data"]["workers"] = 0
    tiny["schedule"] |= {"iterations": 6, "steps": []}
    run = new_run("full", tiny, every="2it")
    process = run.start(ranks=1)
    run.wait(run.reached(2), process)
    terminate(run, process)
    before = run.final()

    process = run.start(ranks=1)
    psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (20_000, 20_000))
    assert process.wait(timeout=120) == 1
    assert "no checkpoint of step 6 could be written" in run.log()
    outcome = run.read("outcome.json")
    assert outcome["state"] == "failed" and "could not be written" in outcome["reason"]
    assert not list((run.folder / "checkpoints").glob(".tmp-*"))
    assert_same(run.final(), before)
    run.finish(ranks=1)


def test_loss_that_is_not_finite_ends_the_run(tiny: dict[str, Any], new_run: NewRun) -> None:
    tiny["schedule"]["optimizer"] = {"lr": 1e30}
    tiny["schedule"]["warmup"] = {"iterations": 0}
    run = new_run("diverging", tiny, every="1it")
    process = run.start(ranks=2)
    process.wait(timeout=120)
    outcome = run.read("outcome.json")
    assert outcome["state"] == "failed" and "is not finite" in outcome["reason"], run.log()
    assert not re.search(r'File ".*detcore', run.log()), "torchrun's own traceback is the only one"


@pytest.mark.parametrize("damage", ["unreadable", "missing", "classes", "names"])
def test_wrong_input_is_named(damage: str, tiny: dict[str, Any], new_run: NewRun, tmp_path: Path) -> None:
    """One clear sentence, the outcome `failed`, no traceback."""
    images = Path(tiny["data"]["root"], "train")
    bad = tmp_path / "images"
    bad.mkdir()
    for image in images.iterdir():
        (bad / image.name).symlink_to(image)
    tiny["data"]["train"]["images"] = str(bad)
    victim = bad / "000007.png"
    victim.unlink()
    if damage == "unreadable":
        victim.write_bytes((images / victim.name).read_bytes()[:500])
    if damage == "classes":
        tiny["model"]["num_classes"] = 4
    if damage == "names":
        victim = tmp_path / "val.json"
        told = json.loads(Path(tiny["data"]["root"], tiny["data"]["val"]["annotations"]).read_text())
        told["categories"][0]["name"] = "stranger"
        victim.write_text(json.dumps(told))
        tiny["data"]["val"]["annotations"] = str(victim)
    run = new_run(damage, tiny)
    process = run.start(ranks=1)
    assert process.wait(timeout=120) == 2
    outcome = run.read("outcome.json")
    expected = "num_classes is 4" if damage == "classes" else str(victim)
    assert outcome["state"] == "failed" and expected in outcome["reason"]
    assert "Traceback" not in run.log()
