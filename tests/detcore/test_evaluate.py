"""COCO's numbers: equal to pycocotools', and the same on any number of ranks."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detcore.evaluate import main as evaluate_here
from detcore.scoring import as_results, coco_eval, stats
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


def test_results_are_left_as_they_were_and_collected_garbage_stays_on() -> None:
    truth = {
        "images": [{"id": 1, "height": 9, "width": 9}],
        "categories": [{"id": 4, "name": "x"}],
        "annotations": [{"image_id": 1, "category_id": 4, "bbox": [1, 1, 4, 4]}],
    }
    boxes, scores = np.array([[1, 1, 5.00049, 5], [0, 0, 2, 2]], np.float32), np.array([0.9, 0.5], np.float32)
    results = as_results(1, boxes, scores, np.array([1, 0]), [None, 4])
    assert results == [
        {"image_id": 1, "category_id": 4, "bbox": [1.0, 1.0, 4.0, 4.0], "score": scores[0].item()}
    ]
    before = json.dumps(results)
    assert stats(coco_eval(truth, results))["AP"] == pytest.approx(100)
    assert json.dumps(results) == before and gc.isenabled()


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


def relabelled(shapes: Path, folder: Path, names: dict[int, str]) -> Path:
    """The evaluation split with ids 10 higher, of the categories with a name here."""
    content = json.loads((shapes / "annotations/instances_val.json").read_text())
    content["categories"] = [{"id": 10 + id_, "name": name} for id_, name in names.items()]
    content["annotations"] = [
        one | {"category_id": 10 + one["category_id"]}
        for one in content["annotations"]
        if one["category_id"] in names
    ]
    path = folder / "other.json"
    path.write_text(json.dumps(content))
    return path


def test_other_data_is_matched_by_the_names_of_classes(trained: Run, shapes: Path, tmp_path: Path) -> None:
    def seen(spec: Path, *argv: str) -> list[dict[str, Any]]:
        assert evaluate_here([str(spec), *argv, "--out", str(tmp_path / "out")]) == 0
        return json.loads((tmp_path / "out/coco_instances_results.json").read_text())

    own = seen(trained.folder)
    assert {one["category_id"] for one in own} == {1, 3, 4}
    checkpoint = next((trained.folder / "checkpoints").glob("step-*"))
    data = ["--images", str(shapes / "val"), "--annotations"]
    turned = relabelled(shapes, tmp_path, {4: "disc", 3: "square", 1: "triangle"})
    swapped = {1: 14, 3: 13, 4: 11}
    assert seen(checkpoint, *data, str(turned)) == [
        one | {"category_id": swapped[one["category_id"]]} for one in own
    ]

    fewer = relabelled(shapes, tmp_path, {3: "square"})
    assert seen(checkpoint, *data, str(fewer)) == [
        one | {"category_id": 13} for one in own if one["category_id"] == 3
    ]


def test_a_file_of_weights_with_a_recipe(trained: Run, shapes: Path, tmp_path: Path) -> None:
    """It knows no names: those of the recipe's data are taken, or, if that is not here, the order of ids."""
    weights = tmp_path / "alone.pth"
    weights.write_bytes(next((trained.folder / "checkpoints").glob("step-*/model.pth")).read_bytes())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((trained.folder / "recipe.yaml").read_text().replace(str(shapes), "/gone"))
    argv = [str(weights), "--recipe", str(recipe), "--out", str(tmp_path)]
    other = relabelled(shapes, tmp_path, {1: "a", 3: "b", 4: "c"})
    assert evaluate_here([*argv, "--images", str(shapes / "val"), "--annotations", str(other)]) == 0
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert results and {one["category_id"] for one in results} <= {11, 13, 14}


def test_bad_input_of_evaluate(
    trained: Run, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, own = str(shapes / "val"), str(shapes / "annotations/instances_val.json")
    unknown = str(relabelled(shapes, tmp_path, {1: "disc", 3: "cube", 4: "triangle"}))
    torn = tmp_path / "torn.json"
    torn.write_text('{"images": [],\n "categories": [}')
    for argv, words in [
        (["--images", images], "--images and --annotations go together"),
        (["--images", f"{images}/none", "--annotations", own], f"{images}/none does not exist"),
        (["--images", images, "--annotations", f"{own}.gone"], f"{own}.gone cannot be read"),
        (["--images", images, "--annotations", str(torn)], "not JSON (Expecting value: line 2 column 17"),
        (["--images", images, "--annotations", unknown], "classes that the model does not know: cube; the"),
        (["--images", images, "--annotations", unknown], "the model's are disc, square, triangle"),
        (["--images", str(tmp_path), "--annotations", own], ".png does not exist"),
    ]:
        assert evaluate_here([str(trained.folder), *argv]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said, said
    twice = str(relabelled(shapes, tmp_path, {1: "disc", 3: "square", 4: "disc"}))
    assert evaluate_here([str(trained.folder), "--images", images, "--annotations", twice]) == 2
    assert "more than one class called disc" in capsys.readouterr().err
    assert not (trained.folder / "inference").exists()
