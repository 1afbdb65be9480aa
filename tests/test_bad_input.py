"""Wrong input to the launcher with detcore behind it: one clear sentence, exit status 2, nothing left behind.

What needs no trainer is in tests/launcher/test_cli.py, what needs a run or a store in test_cli_runs.py there.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import ROOT, launch

SHAPES = str(ROOT / "recipes" / "yolof_shapes.yaml")
R50 = str(ROOT / "recipes" / "yolof_r50_1x.yaml")
TRAIN = "annotations/instances_train.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images to train on and four to evaluate on, with annotation files that are broken in some way."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    sizes = ["--train", "8", "--val", "4", "--size", "64"]
    subprocess.run([sys.executable, "-m", "detcore.data.shapes", str(folder), *sizes], check=True)
    whole = json.loads((folder / TRAIN).read_text())
    first, *others = whole["annotations"]
    broken: dict[str, Any] = {
        "list": [],
        "empty": {},
        "no-objects": whole | {"annotations": []},
        "no-box": whole | {"annotations": [*others, {k: v for k, v in first.items() if k != "bbox"}]},
        "no-such-image": whole | {"annotations": [first | {"image_id": 77}, *others]},
        "no-such-category": whole | {"annotations": [first | {"category_id": 99}, *others]},
        "no-such-file": whole | {"images": [one | {"file_name": "gone.png"} for one in whole["images"]]},
    }
    for name, content in broken.items():
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))
    (folder / "annotations" / "cut.json").write_text(json.dumps(whole)[:500])
    return folder


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No run folder, no window, no file in the working directory."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    yield
    assert not (tmp_path / "runs").exists() and not [
        path for path in here.iterdir() if path.suffix != ".yaml"
    ]
    if shutil.which("tmux"):
        socket = os.environ["LAUNCH_TMUX_SOCKET"]
        assert subprocess.run(["tmux", "-L", socket, "list-windows"], capture_output=True).returncode != 0


def refused(*argv: str) -> str:
    """What is said on stderr: one message, for people."""
    done = launch(*argv, cwd=Path.cwd(), check=False)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr and done.stdout == ""
    said = done.stderr.partition("launch: ")[2]
    assert said and "launch: " not in said
    return said


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.data.batches=8", "`train.data.batches` is unknown; did you mean `batch`?"),
        ("train.modle.num_classes=3", "`train.modle` is unknown; did you mean `model`?"),
        ("train.model.backbone.width.x=3", "`train.model.backbone.width` holds no keys to override"),
        ("train.data.batch=many", "`train.data.batch` must be a whole number"),
        ("train.schedule.optimizer.lr=-1", "`train.schedule.optimizer.lr` must be more than 0, not -1"),
        ("train.data.batch=15", "`train.data.batch` 15 cannot be shared out evenly to 4 workers"),
        ("train.schedule.accumulate=3", "cannot be shared out evenly to 4 workers x 3 parts"),
        ("train.model.num_classes=80", "`train.model.num_classes` is 80, but"),
        ("train.model.backbone.weights=nowhere.pth", "nowhere.pth"),
    ],
)
def test_a_value_that_cannot_be(override: str, sentence: str, data: Path) -> None:
    said = refused(SHAPES, f"train.data.root={data}", override)
    assert sentence in said.partition("\n")[0], said


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.data.root={data}/gone", "the data set's folder {data}/gone does not exist"),
        ("train.data.val.images=gone", "the folder of images {data}/gone does not exist"),
        ("{train}gone.json", "the annotation file {data}/annotations/gone.json does not exist"),
        ("{train}cut.json", "cut.json is not a COCO annotation file: it is not JSON"),
        ("{train}list.json", "list.json is not a COCO annotation file: it does not hold an object"),
        ("{train}empty.json", "empty.json is not a COCO annotation file: it has no list `categories`"),
        ("{train}no-objects.json", "no-objects.json has no image with an object"),
        ("{train}no-box.json", "has no `bbox`"),
        ("{train}no-such-image.json", "annotations[0] names image 77"),
        ("{train}no-such-category.json", "annotations[0] names category 99"),
        ("{train}no-such-file.json", "the image {data}/train/gone.png does not exist"),
    ],
)
def test_a_data_set_that_is_not_whole(override: str, sentence: str, data: Path) -> None:
    filled = {"data": data, "train": "train.data.train.annotations=annotations/"}
    argv = [SHAPES, f"train.data.root={data}", override.format(**filled)]
    said = refused(*argv)
    assert sentence.format(**filled) in said.partition("\n")[0], said


def test_a_data_set_that_another_machine_may_have(data: Path) -> None:
    for override, sentence in (
        ("train.data.root=gone", "the data set's folder gone does not exist"),
        (f"train.data.root={data}", "no-box.json is not a COCO annotation file"),
    ):
        argv = [SHAPES, override, "train.data.train.annotations=annotations/no-box.json", "--dry-run"]
        dry = launch(*argv, cwd=Path.cwd())
        assert "warning: " in dry.stderr and sentence in dry.stderr


def test_a_mistake_in_a_file_is_shown_where_it_stands(data: Path) -> None:
    recipe = Path("mine.yaml")
    recipe.write_text(f"extends: {SHAPES}\ntrain:\n  data: {{root: {data}}}\n  schedul: {{iterations: 5}}\n")
    assert refused("mine.yaml").splitlines() == [
        "mine.yaml:4:3: `train.schedul` is unknown; did you mean `schedule`?",
        "      schedul: {iterations: 5}",
        "      ^",
    ]
    assert "mine.yaml:4:3" in launch("validate", "mine.yaml", cwd=Path.cwd(), check=False).stderr


def test_recipes_in_a_circle() -> None:
    Path("one.yaml").write_text(f"extends: [{SHAPES}, two.yaml]\n")
    Path("two.yaml").write_text("extends: one.yaml\n")
    said = refused("one.yaml")
    assert "two.yaml:1:10: `extends` goes in a circle: one.yaml -> two.yaml -> one.yaml" in said


def test_gpus_too_few_or_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--gpus 2: 2 GPUs are too few; this recipe needs 4: YOLOF trains with plain batch norm" in refused(
        R50, "--gpus", "2"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "--gpus 8: this machine has no GPUs, the recipe asks for 8" in refused(R50, "--gpus", "8")
    dry = launch(R50, "--gpus", "8", "--dry-run", cwd=Path.cwd())
    assert "warning: --gpus 8: this machine has no GPUs" in dry.stderr and "--nproc-per-node=8" in dry.stdout
    four = json.loads(launch(R50, "--gpus", "4", "--json", cwd=Path.cwd()).stdout)
    eight = json.loads(launch(R50, "--gpus", "8", "--json", cwd=Path.cwd()).stdout)
    assert four["recipe"]["train"] == eight["recipe"]["train"], "batch and schedule stay"
