"""A step whose loss is not finite leaves no trace, so many of them pass, and people are told."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from detcore.distributed import World
from detcore.learner import Learner
from detcore.loading import load_run
from tests.detcore.conftest import Run, assert_same
from tests.detcore.sections import SECTIONS
from tests.detcore.test_learner import made, rescale

NAN = float("nan")


def spoilt(parts: list[Any]) -> list[Any]:
    """The last of the parts has images that are not numbers, and all that is computed from them is none."""
    return [*parts[:-1], parts[-1]._replace(images=parts[-1].images * NAN)]


def state_of(learner: Learner) -> dict[str, Any]:
    return copy.deepcopy({"model": dict(learner.model.state_dict()), **learner.state_dict()})


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["yolof", "retinanet", "fcos-detectron2"])
def test_it_leaves_no_trace(name: str, optimizer: str, tiny: dict[str, Any]) -> None:
    """Not in weights, momentum, step counts, running statistics and moving normalisers; what follows is as if
    the step had not been."""
    tiny["model"] = {"num_classes": 3, "backbone": tiny["model"]["backbone"]} | SECTIONS[name]
    tiny["skip_nonfinite"] = 1
    plain = {"optimizer": {"name": optimizer, "lr": 1e-3, "clip": 10.0}, "accumulate": 2}
    learner, feed = made(tiny, **plain)
    parts = {step: list(feed.step(step)) for step in range(1, 4)}
    assert learner.step(1, parts[1]).isfinite().all()
    before = state_of(learner)
    assert not learner.step(2, spoilt(parts[2])).isfinite().all()
    assert_same(state_of(learner)["model"], before["model"])
    after = learner.optimizer.state_dict()
    assert_same(after["state"], before["optimizer"]["state"])

    tiny["skip_nonfinite"] = 0
    other, _ = made(tiny, **plain)
    other.step(1, parts[1])
    assert_same(learner.step(3, parts[3]), other.step(3, parts[3]))
    assert_same(state_of(learner), state_of(other))


def test_with_fp16_a_loss_counts_and_what_the_scaler_handles_does_not(tiny: dict[str, Any]) -> None:
    tiny |= {"amp": "fp16", "skip_nonfinite": 1}
    learner, feed = made(tiny)
    parts = {step: list(feed.step(step)) for step in range(1, 4)}
    rescale(learner, 2.0**120)
    before = state_of(learner)["optimizer"]["state"]
    assert learner.step(1, parts[1]).isfinite().all(), "the gradients overflow, the loss does not"
    assert_same(learner.optimizer.state_dict()["state"], before)
    rescale(learner, 64.0)
    before = state_of(learner)
    assert not learner.step(2, spoilt(parts[2])).isfinite().all()
    assert_same(state_of(learner)["model"], before["model"])
    assert_same(learner.optimizer.state_dict()["state"], before["optimizer"]["state"])
    learner.step(3, parts[3])
    weights = learner.model.state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    assert any(not torch.equal(value, before["model"][key]) for key, value in weights.items())


def worker(rank: int, store: str, folder: str, tiny: dict[str, Any]) -> None:
    """One of two ranks; the images of the other are not numbers in the second step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"), dist.new_group(backend="gloo"))
    learner, feed = made(tiny, world)
    for step in (1, 2, 3):
        parts = list(feed.step(step))
        learner.step(step, spoilt(parts) if rank == 1 and step == 2 else parts)
        torch.save(state_of(learner), f"{folder}/{rank}-{step}.pth")
    dist.destroy_process_group()


def test_all_ranks_decide_alike(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["model"] |= {"norm": "sync_bn"}
    tiny["skip_nonfinite"] = 1
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"), str(tmp_path), tiny), nprocs=2)
    said = {
        (rank, step): torch.load(tmp_path / f"{rank}-{step}.pth", weights_only=True)
        for rank in (0, 1)
        for step in (1, 2, 3)
    }
    for rank in (0, 1):
        assert_same(said[rank, 2]["model"], said[rank, 1]["model"])
        assert_same(said[rank, 2]["optimizer"]["state"], said[rank, 1]["optimizer"]["state"])
        assert all(value.isfinite().all() for value in said[rank, 3]["model"].values())
    key = "decoder.bbox_pred.weight"
    assert torch.equal(said[0, 3]["model"][key], said[1, 3]["model"][key])
    assert not torch.equal(said[0, 3]["model"][key], said[0, 2]["model"][key])


def test_so_many_pass_also_across_a_resume(
    tiny: dict[str, Any], new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two ranks, then on one. The last good checkpoint is named. Besides, `norm: auto` is decided for each
    attempt anew, and said."""
    tiny["model"]["norm"] = "auto"
    tiny["skip_nonfinite"] = 2
    tiny["data"]["workers"] = 0
    tiny["evaluation"] = {"every": None}
    monkeypatch.setenv("POISONED", "3,9,12")
    monkeypatch.setenv("PREEMPTED", "5")
    run = new_run("run", tiny, every="5it")
    assert run.start(2, "tests.detcore.poisoned").wait(timeout=240) == 0, run.log()
    assert said(run) == [("3", "1 of at most 2")]
    assert "norm auto is sync_bn, over all 8 images: 4 images at a time on a worker" in run.log()
    stopped = run.read("outcome.json")["step"]

    monkeypatch.setenv("PREEMPTED", "")
    assert run.start(1, "tests.detcore.poisoned").wait(timeout=240) == 1, run.log()
    assert run.read("heartbeat.json")["resumed"] == stopped < 9
    assert said(run) == [("9", "2 of at most 2")]
    assert "norm auto is bn: 8 images at a time on a worker" in run.log()
    assert load_run(run.folder).cfg.model.norm == "auto"
    reason = run.read("outcome.json")["reason"]
    assert re.search(r"loss of step 12 is not finite \(.*nan.*\); it was computed from images \[\d", reason)
    assert "2 such steps have passed before" in reason
    last = max(folder.name for folder in (run.folder / "checkpoints").glob("step-*"))
    assert f"the last good checkpoint is {last};" in reason, reason
    lines = run.metrics().decode().splitlines()
    steps = [int(re.search(r'"step": (\d+)', line)[1]) for line in lines]
    assert steps == [step for step in range(1, 12) if step not in (3, 9)]
    assert not re.search(r'File ".*detcore', run.log())


def said(run: Run) -> list[tuple[str, str]]:
    """What the log says of steps that passed: which, and how many of how many. Images are named."""
    pattern = r"loss of step (\d+) is not finite .* images \[\d.*\]; this step changes nothing, (.*) such"
    return re.findall(pattern, run.log())
