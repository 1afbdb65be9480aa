"""COCO's numbers: equal to pycocotools', and the same on any number of ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detcore.data.transforms import read_image
from detcore.evaluate import coco_eval, stats
from detcore.infer import main as infer
from detcore.models import build_model
from tests.detcore.conftest import Run

FIXTURES = Path(os.environ.get("FIXTURES") or Path(__file__).resolve().parents[1] / "fixtures")


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*coco_eval*.npz")), ids=lambda path: path.stem)
def test_fixture_coco_eval(path: Path) -> None:
    """Ties, crowds, images without objects, a category that no object has (pycocotools 2.0.11)."""
    data = np.load(path, allow_pickle=False)
    images = zip(
        data["target/image_id"], data["target/image_height"], data["target/image_width"], strict=True
    )
    annotations = zip(
        *(data[f"target/ann_{name}"] for name in ("id", "image_id", "category_id", "iscrowd")),
        data["target/ann_area"].astype(np.float64).tolist(),
        data["target/ann_bbox_xywh"].astype(np.float64).tolist(),
        strict=True,
    )
    truth = {
        "images": [{"id": int(i), "height": int(h), "width": int(w)} for i, h, w in images],
        "categories": [{"id": int(i), "name": str(i)} for i in data["target/category_id"]],
        "annotations": [
            {"id": int(i), "image_id": int(j), "category_id": int(k), "iscrowd": int(c), "area": a, "bbox": b}
            for i, j, k, c, a, b in annotations
        ],
    }
    results = [
        {"image_id": int(i), "category_id": int(k), "bbox": b, "score": s}
        for i, k, b, s in zip(
            data["input/det_image_id"],
            data["input/det_category_id"],
            data["input/det_bbox_xywh"].astype(np.float64).tolist(),
            data["input/det_score"].astype(np.float64).tolist(),
            strict=True,
        )
    ]
    evaluation = coco_eval(truth, results)
    assert np.allclose(evaluation.stats[:12], data["expect/stats"], atol=1e-6, rtol=0)
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    assert np.allclose(precision, data["expect/precision_area_all_max100"], atol=1e-6, rtol=0)
    assert np.allclose(evaluation.eval["recall"], data["expect/recall"], atol=1e-6, rtol=0)
    assert stats(evaluation)["AP50"] == pytest.approx(100 * data["expect/stats"][1], abs=1e-4)


def test_nothing_detected_is_zero() -> None:
    truth = {
        "images": [{"id": 1, "height": 9, "width": 9}],
        "categories": [{"id": 4, "name": "x"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 4, "bbox": [1, 1, 4, 4]}],
    }
    metrics = stats(coco_eval(truth, []))
    assert metrics["AP"] == metrics["AR100"] == 0 and "APl" not in metrics


def test_ids_of_annotations_may_be_missing_or_repeated() -> None:
    objects = [
        {"image_id": 1, "category_id": 4, "bbox": [10 * n, 1, 8, 8], "area": 64, "iscrowd": 0}
        for n in range(3)
    ]
    truth = {"images": [{"id": 1, "height": 40, "width": 40}], "categories": [{"id": 4, "name": "x"}]}
    results = [{"image_id": 1, "category_id": 4, "bbox": [10 * n, 1, 8, 8], "score": 0.9} for n in range(2)]
    for ids in ([{}] * 3, [{"id": 7}] * 3, [{"id": n} for n in (5, 6, 7)]):
        annotations = [one | id_ for one, id_ in zip(objects, ids, strict=True)]
        metrics = stats(coco_eval(truth | {"annotations": annotations}, results))
        assert metrics["AR100"] == pytest.approx(100 * 2 / 3)


@pytest.fixture
def trained(tiny: dict[str, Any], new_run: Callable[..., Run]) -> Run:
    """A run with weights that detect something, anything."""
    from detcore.checkpoint import save
    from detcore.config import Train
    from detcore.rundir import RunDir

    torch.manual_seed(0)
    tiny["data"]["workers"] = 0
    tiny["model"]["test"] = {"score": 0.001, "max": 20}
    run = new_run("trained", tiny)
    model = build_model(Train.model_validate(tiny).model, pretrained=False)
    save(RunDir(run.folder), 5, {"classes": ["disc", "square", "triangle"]}, model.state_dict(), lambda: None)
    return run


def evaluate(run: Run, ranks: int, out: Path) -> list[dict[str, Any]]:
    argv = ["torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "detcore.evaluate"]
    done = subprocess.run(
        [sys.executable, "-m", *argv, str(run.folder), "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "AP 0." in done.stdout or "AP " in done.stdout
    return json.loads((out / "coco_instances_results.json").read_text())


def test_detections_do_not_depend_on_the_number_of_ranks(trained: Run, tmp_path: Path) -> None:
    one, three = (evaluate(trained, ranks, tmp_path / str(ranks)) for ranks in (1, 3))
    assert one == three and len({result["image_id"] for result in one}) == 12
    assert {result["category_id"] for result in one} <= {1, 3, 4}, "ids of the data set, not labels"
    assert all(result["bbox"][2] > 0 and 0 < result["score"] < 1 for result in one)


def test_boxes_on_pictures(trained: Run, shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    images = [str(path) for path in sorted((shapes / "val").iterdir())[:2]]
    assert infer([str(trained.folder), *images, "--out", str(out), "--score", "0.001"]) == 0
    answers = json.loads((out / "detections.json").read_text())
    assert [answer["image"] for answer in answers] == images
    assert answers[0]["detections"][0]["label"] in ("disc", "square", "triangle")
    assert sorted(path.name for path in out.glob("*.jpg")) == ["000001.jpg", "000002.jpg"]
    for answer in answers:
        before, after = (
            np.asarray(read_image(Path(path))) for path in (answer["image"], out / answer["picture"])
        )
        x1, y1, x2, y2 = answer["detections"][0]["box"]
        assert -1 <= x1 < x2 <= 65 and -1 <= y1 < y2 <= 65
        assert before.shape == after.shape
        moved = np.abs(before.astype(int) - after).max(axis=2)
        assert (moved > 60).any() and (moved < 60).any(), "boxes are drawn into the image"


def test_pictures_are_not_written_over_one_another(trained: Run, shapes: Path, tmp_path: Path) -> None:
    image = (shapes / "val" / "000001.png").read_bytes()
    (tmp_path / "b").mkdir()
    mine = [tmp_path / "a.jpg", tmp_path / "a.png", tmp_path / "b" / "a.png"]
    for path in mine:
        path.write_bytes(image)
    assert infer([str(trained.folder), *map(str, mine), "--out", str(tmp_path)]) == 0
    assert [path.read_bytes() for path in mine] == [image] * 3
    answers = json.loads((tmp_path / "detections.json").read_text())
    assert [answer["picture"] for answer in answers] == ["a-2.jpg", "a-3.jpg", "a-4.jpg"]
    assert all((tmp_path / answer["picture"]).is_file() for answer in answers)


def test_bad_input_of_infer(
    trained: Run, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, images = tmp_path / "out", [str(shapes / "val" / "000001.png")]
    torn = tmp_path / "torn.png"
    torn.write_bytes(Path(images[0]).read_bytes()[:200])
    other = tmp_path / "other.yaml"
    other.write_text(
        (trained.folder / "recipe.yaml").read_text().replace("mid_channels: 16", "mid_channels: 8")
    )
    weights = next((trained.folder / "checkpoints").glob("step-*/model.pth"))

    for argv, words in [
        ([str(trained.folder), "none.png", "--out", str(out)], "none.png does not exist"),
        ([str(tmp_path / "nothing"), images[0], "--out", str(out)], "nothing does not exist"),
        ([images[0], images[0], "--out", str(out)], "name the recipe with --recipe"),
        ([str(trained.folder), str(torn), "--out", str(out)], str(torn)),
        ([str(trained.folder), images[0], "--out", f"{torn}/out"], "Not a directory"),
        ([str(weights), images[0], "--out", str(out), "--recipe", str(other)], "does not fit the recipe"),
    ]:
        assert infer(argv) == 2
        assert words in capsys.readouterr().err
