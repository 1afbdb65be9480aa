"""torchvision's RetinaNet and FCOS, converted, give torchvision's numbers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.beside import VERSION
from detcore.convert import main as convert
from detcore.loading import load_run
from detcore.models import build_model
from detcore.ops.anchors import grid_anchors, whole_steps
from detcore.weights import WeightsError
from detcore.weights.classes import COCO
from detcore.weights.loading import _check_style, load
from tests.detcore.conftest import model_section
from tests.detcore.test_convert import fetched
from tests.detcore.test_weights import in_file_order, torchvision_names

ROOT = Path(__file__).parents[2]

# In a process of its own, for other libraries change their ways where torchvision can be imported.
THEIRS = """
import sys
from pathlib import Path
import torch
from torch import nn
from bench.beside import bring
from detcore.weights.classes import COCO

folder, name, out = sys.argv[1:]
bring(Path(folder))
from torchvision.models import detection

torch.manual_seed(0)
build = getattr(detection, f"{name}_resnet50_fpn")
model = build(weights=None, weights_backbone=None, num_classes=91).eval()
model.transform.resize = lambda image, target: (image, target)
for key, module in model.named_modules():
    if isinstance(module, nn.BatchNorm2d):
        module.running_mean.normal_(std=0.1)
        module.running_var.uniform_(0.5, 1.5)
        nn.init.uniform_(module.weight, 0.1, 0.3 if key.endswith("bn3") else 1.0)
        nn.init.normal_(module.bias, std=0.1)
    if key.startswith("head") and isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
        nn.init.normal_(module.bias, std=0.5)
gaps = [column for column in range(91) if column not in COCO]
with torch.no_grad():
    model.head.classification_head.cls_logits.bias.view(-1, 91)[:, gaps] = -20
    boxes = model.head.regression_head.bbox_reg  # in the image all of them: torchvision keeps empty ones
    boxes.weight *= 0.1
    nn.init.constant_(boxes.bias, 3.0 if name == "fcos" else 0.0)
images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in [(320, 416), (316, 410)]]
inputs = [image / 255 for image in images]
with torch.no_grad():
    batch, _ = model.transform(inputs)
    features = list(model.backbone(batch.tensors).values())
    head = model.head(features)
    anchors = model.anchor_generator(batch, features)
    regression = head["bbox_regression"]
    decode = model.box_coder.decode_single if name == "retinanet" else model.box_coder.decode
    boxes = [decode(*pair) for pair in zip(regression, anchors)]
    logits, found = head["cls_logits"], model(inputs)
centerness = head.get("bbox_ctrness")
torch.save({"state": model.state_dict(), "images": images, "logits": logits, "centerness": centerness,
            "boxes": torch.stack(boxes), "found": found}, out)
"""


@pytest.fixture(scope="session")
def released() -> Path:
    """The folder that torchvision lies in."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", "."]
    return fetched(f"torchvision=={VERSION}", [*pip, f"torchvision=={VERSION}"], "torchvision").parent


@pytest.fixture(scope="module", params=["retinanet", "fcos"])
def theirs(request: Any, released: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("theirs") / "theirs.pth"
    argv = [sys.executable, "-c", THEIRS, str(released), request.param, str(out)]
    subprocess.run(argv, cwd=ROOT, check=True)
    return {"name": request.param, **torch.load(out, weights_only=True)}


def in_our_order(rows: Tensor, ratios: int) -> Tensor:
    """(N, cells * ratios * sizes, D) with a cell's anchors of one size as neighbours."""
    return rows.unflatten(1, (-1, ratios, ratios)).transpose(2, 3).flatten(1, 3)  # as many sizes as ratios


def test_torchvisions_numbers_come_out(theirs: dict[str, Any], tmp_path: Path) -> None:
    """On a canvas that the strides of P6 and P7 do not divide, with an image smaller than it."""
    name, source, out = theirs["name"], tmp_path / "theirs.pth", tmp_path / "ours.pth"
    torch.save(theirs["state"], source)
    recipe = ROOT / f"recipes/{name}_r50_torchvision.yaml"
    assert convert([str(source), str(out), "--recipe", str(recipe)]) == 0
    loaded = load_run(out)
    assert loaded.names == list(COCO.values())

    sizes = torch.tensor([image.shape[1:] for image in theirs["images"]])
    canvas = torch.zeros(2, 3, 320, 416, dtype=torch.uint8)
    for row, image in enumerate(theirs["images"]):
        canvas[row, :, : image.shape[1], : image.shape[2]] = image
    ratios = 3 if name == "retinanet" else 1
    boxes, logits = (in_our_order(theirs[key], ratios) for key in ("boxes", "logits"))
    scores = logits[..., list(COCO)].sigmoid()
    if name == "fcos":
        scores = (scores * theirs["centerness"].sigmoid()).sqrt()
    assert logits.std() > 1 and boxes.std() > 10
    scored = loaded.model.scored(canvas, sizes)
    torch.testing.assert_close(scored.scores, scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(scored.boxes, boxes, atol=1e-3, rtol=1e-4)

    found, ids = loaded.model.detect(canvas, sizes), torch.tensor(list(COCO))
    for row, wanted in enumerate(theirs["found"]):
        count = int(found.count[row])
        torch.testing.assert_close(found.scores[row, :count], wanted["scores"], atol=1e-4, rtol=0)
        torch.testing.assert_close(found.boxes[row, :count], wanted["boxes"], atol=1e-3, rtol=1e-4)
        assert ids[found.labels[row, :count]].equal(wanted["labels"])


def named_as_before(model: nn.Module, columns: int) -> dict[str, Tensor]:
    """A state of `model`, a RetinaNet, under the names of the released file, for `columns` classes. Each of
    the predictors' outputs is a number that says which it is."""
    old = {"head.cls_tower": "classification_head.conv", "head.reg_tower": "regression_head.conv"}
    neck = {"lateral": "inner_blocks", "output": "layer_blocks"}
    body = [f"backbone.body.{name}" for name in torchvision_names(50)]
    state = dict(zip(body, in_file_order(model.backbone), strict=True))
    for name, values in model.state_dict().items():
        part, kind, *rest = name.split(".")
        if part == "neck":
            place = f"extra_blocks.{kind}" if kind in ("p6", "p7") else f"{neck[kind]}.{rest.pop(0)}"
            state[f"backbone.fpn.{place}.{rest[-1]}"] = values + 1
        if f"{part}.{kind}" in old:
            state[f"head.{old[f'{part}.{kind}']}.{2 * int(rest[0])}.{rest[-1]}"] = values + 1
    for layer, depth in (("classification_head.cls_logits", columns), ("regression_head.bbox_reg", 4)):
        codes = [
            1000 * ratio + 100 * size + d for ratio in range(3) for size in range(3) for d in range(depth)
        ]
        bias = torch.tensor(codes, dtype=torch.float32)
        state[f"head.{layer}.bias"] = bias
        state[f"head.{layer}.weight"] = bias[:, None, None, None].expand(-1, model.neck.p7.out_channels, 3, 3)
    return state


def small(classes: int, style: str = "torchvision") -> nn.Module:
    section = {"name": "retinanet", "style": style, "num_classes": classes, "head": {"channels": 32}}
    return build_model(model_section(section | {"backbone": {"name": "resnet50", "width": 0.0625}}))


@pytest.mark.parametrize(
    ("columns", "classes", "kept"),
    [(3, 3, [0, 1, 2]), (3, 2, [1, 2]), (91, 80, list(COCO)), (91, 90, list(range(1, 91)))],
)
def test_the_released_names_load_and_anchors_and_classes_find_their_place(
    columns: int, classes: int, kept: list[int], tmp_path: Path
) -> None:
    model = small(classes)
    state = named_as_before(model, columns)
    torch.save(state, tmp_path / "old.pth")
    report = load(model, str(tmp_path / "old.pth"))
    assert (report.table, report.unused) == ("torchvision_retinanet", ())
    assert model.head.reg_tower[2].conv.weight.equal(state["head.regression_head.conv.4.weight"])
    assert model.neck.p6.weight.equal(state["backbone.fpn.extra_blocks.p6.weight"])
    assert model.neck.lateral[1].weight.equal(state["backbone.fpn.inner_blocks.1.weight"])
    for layer, depth in ((model.head.cls_score, kept), (model.head.bbox_pred, range(4))):
        codes = [1000 * ratio + 100 * size + d for size in range(3) for ratio in range(3) for d in depth]
        assert layer.bias.tolist() == codes == layer.weight[:, 5, 1, 2].tolist()


def test_norms_in_retinanets_head_are_refused(tmp_path: Path) -> None:
    """retinanet_resnet50_fpn_v2 has them, and no bias before them."""
    model = small(2)
    state = named_as_before(model, 2)
    for name in [name for name in state if ".conv." in name]:
        at, number, kind = name.rsplit(".", 2)
        values = state.pop(name)
        state |= {f"{at}.{int(number) // 2}.1.{kind}": torch.ones(32)}
        state |= {f"{at}.{int(number) // 2}.0.weight": values} if kind == "weight" else {}
    torch.save(state, tmp_path / "v2.pth")
    with pytest.raises(WeightsError, match=r"8 of \d+ tensors are not in the file.*cls_tower\.0\.conv\.bias"):
        load(model, str(tmp_path / "v2.pth"))


def test_a_model_of_other_classes_or_arithmetic_is_refused(tmp_path: Path) -> None:
    torch.save(named_as_before(small(2), 91), tmp_path / "coco.pth")
    with pytest.raises(
        WeightsError, match=r"2 tensors have another shape, first head\.cls_score.*class count"
    ):
        load(small(20), str(tmp_path / "coco.pth"))
    with pytest.raises(WeightsError, match=r"they want `train\.model\.style: torchvision`"):
        load(small(80, "detectron2"), str(tmp_path / "coco.pth"))
    with pytest.raises(WeightsError, match=r"they want `train\.model\.style: detectron2`$"):
        _check_style(small(80), "weights.pth", "detectron2_retinanet")


def test_anchors_of_whole_pixels() -> None:
    """Sizes 32, 40.3 and 50.8 and ratios 0.5, 1 and 2, as torchvision rounds them; and on a canvas of 800 by
    1344 pixels, 13 by 21 cells of P6, and 7 by 11 of P7."""
    point, sizes = torch.zeros(1, 2), [32 * 2 ** (i / 3) for i in range(3)]
    anchors = grid_anchors(point, sizes, [0.5, 1.0, 2.0], whole=True)
    corners = [(23, 11), (16, 16), (11, 23), (28, 14), (20, 20), (14, 28), (35, 18), (25, 25), (18, 35)]
    assert anchors[:, 2:].tolist() == [list(corner) for corner in corners]
    assert anchors[:, :2].equal(-anchors[:, 2:])
    shapes = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
    assert whole_steps(shapes, 8) == [(8, 8), (16, 16), (32, 32), (61, 64), (114, 122)]
