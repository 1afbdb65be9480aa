"""TensorFlow's SSDLite as TensorFlow.js has it: names, layouts, orders and folded batch norm become ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detcore.backbones.layers import ConvNorm
from detcore.backbones.mobilenetv2 import BLOCKS
from detcore.convert import main as convert
from detcore.loading import load_run
from detcore.models import build_model
from detcore.recipe import read_recipe
from detcore.weights import WeightsError
from detcore.weights.classes import COCO
from detcore.weights.tfjs import read_tfjs
from tests.detcore.conftest import TINY

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
        loaded.model.scored(images, sizes)[:2], model.eval().scored(images, sizes)[:2], strict=True
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
