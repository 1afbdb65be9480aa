"""The `train` section: what is refused, how it is said, and what the recipes that we ship come to."""

import json
import subprocess
import sys
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import yaml

from detcore.check import check
from detcore.config import Train
from detcore.recipe import RecipeLoader
from detcore.weights.catalogue import CATALOGUE
from detcore.weights.fetch import published

ROOT = Path(__file__).resolve().parents[2]
GPUS = {"gpus": 4, "nodes": 1, "device": "cpu", "min_gpus": 1}


def problems(train: dict[str, Any], resources: dict[str, Any] = GPUS) -> list[dict[str, Any]]:
    return check({"train": train, "resources": resources})["problems"]


def merged(path: Path) -> dict[str, Any]:
    """A recipe with its `extends` resolved: mappings merge, all else replaces."""

    def merge(low: Any, high: Any) -> Any:
        if isinstance(low, dict) and isinstance(high, dict):
            return low | {key: merge(low[key], value) if key in low else value for key, value in high.items()}
        return high

    content = yaml.load(path.read_text(), RecipeLoader)
    bases = content.pop("extends", [])
    result: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        result = merge(result, merged(path.parent / base))
    return merge(result, content)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_have_no_mistake(recipe: Path) -> None:
    content = merged(recipe)
    answer = check({"train": content["train"], "resources": content["resources"]})
    assert [problem for problem in answer["problems"] if problem["kind"] == "recipe"] == []
    own = {"DETCORE_DATA", "DETCORE_CACHE"}
    assert own <= {*content["env"]["keep"]}, "a run in a window of its own finds data and weights"


def test_the_published_recipe_is_exact() -> None:
    """arXiv:2103.09460 and the configuration in chensnathan/YOLOF, number by number."""
    content = merged(ROOT / "recipes/yolof_r50_1x.yaml")
    train = Train.model_validate(content["train"])
    assert (content["resources"]["gpus"], content["resources"]["min_gpus"]) == (8, 4)
    assert "batch norm" in content["resources"]["min_gpus_why"]
    schedule, sgd = train.schedule, train.schedule.optimizer
    assert (train.data.batch, schedule.iterations, schedule.steps) == (64, 22500, [15000, 20000])
    assert (sgd.lr, sgd.momentum, sgd.weight_decay, sgd.norm_decay) == (0.12, 0.9, 1e-4, 0.0)
    assert (sgd.backbone_lr, sgd.clip) == (0.334, None)
    assert (schedule.warmup.iterations, schedule.warmup.factor) == (1500, 0.00066667)
    augment = train.data.augment
    assert (augment.short, augment.max, augment.flip) == ([800], 1333, 0.5)
    assert augment.shift and (augment.shift.pixels, augment.shift.p) == (32, 0.5)
    backbone = train.model.backbone
    assert (backbone.name, backbone.style, backbone.norm, backbone.freeze) == (
        "resnet50",
        "caffe",
        "frozen_bn",
        2,
    )
    assert published(CATALOGUE[str(backbone.weights)].url), "what is fetched can be verified"
    assert train.model.anchors == [32, 64, 128, 256, 512] and train.model.match.top == 4


def test_the_other_recipes_of_yolof_are_exact() -> None:
    """megvii-model/YOLOF's yolof.res101.C5.1x and yolof.res50.DC5.1x: where they differ from the first."""
    first, deep, dilated = (
        merged(ROOT / f"recipes/{name}.yaml")
        for name in ("yolof_r50_1x", "yolof_r101_1x", "yolof_r50_dc5_1x")
    )
    for content in (deep, dilated):
        same = (content["resources"], content["train"]["data"], content["train"]["schedule"])
        assert same == (first["resources"], first["train"]["data"], first["train"]["schedule"])
    first, deep, dilated = (Train.model_validate(c["train"]).model for c in (first, deep, dilated))
    changes = {"name": "resnet101", "weights": "openmmlab_msra_r101"}
    assert deep == first.model_copy(update={"backbone": first.backbone.model_copy(update=changes)})
    source = CATALOGUE[str(deep.backbone.weights)]
    assert (source.backbone, source.style) == ("resnet101", "caffe") and published(source.url)
    assert (dilated.backbone.dilate, dilated.backbone.weights) == (True, first.backbone.weights)
    assert (dilated.encoder.dilations, dilated.encoder.channels) == ([4, 8, 12, 16], 512)
    assert dilated.anchors == [16, 32, 64, 128, 256, 512]
    assert (dilated.match.top, dilated.match.pos_ignore, dilated.match.neg_ignore) == (8, 0.1, 0.7)


def test_the_recipe_of_ssdlite_is_exact() -> None:
    """mmdetection's ssdlite_mobilenetv2-scratch_8xb24-600e_coco, number by number."""
    content = merged(ROOT / "recipes/ssdlite_mbv2_320.yaml")
    train = Train.model_validate(content["train"])
    model, schedule, sgd = train.model, train.schedule, train.schedule.optimizer
    backbone, test = model.backbone, model.test
    assert (backbone.name, backbone.weights, backbone.norm) == ("mobilenetv2", None, "bn")
    assert (backbone.style, backbone.freeze, backbone.width) == ("torchvision", 0, 1)
    assert (model.style, model.extra, model.norm) == ("mmdet", [512, 256, 256, 128], "bn")
    assert model.priors.strides == [16, 32, 64, 107, 160, 320] and model.priors.ratios == [2, 3]
    assert model.priors.sizes == [48, 100, 150, 202, 253, 304, 320]
    assert (model.match.positive, model.match.negatives) == (0.5, 3)
    assert (test.score, test.topk, test.nms, test.max) == (0.02, 1000, 0.45, 200)
    assert (content["resources"]["gpus"], train.data.batch) == (8, 192)
    # 120 times its epoch, which is five of COCO's, shared out to 8 GPUs
    assert schedule.iterations == 120 * ceil(ceil(5 * 117266 / 8) / 24) and schedule.cosine
    assert (sgd.name, sgd.lr, sgd.momentum, sgd.clip) == ("sgd", 0.015, 0.9, None)
    assert (sgd.weight_decay, sgd.norm_decay) == (4e-5, 4e-5)
    assert (schedule.warmup.iterations, schedule.warmup.factor) == (500, 0.001)
    augment = train.data.augment
    assert (augment.square, train.data.test.square, augment.flip) == (320, 320, 0.5)
    assert (augment.expand.most, augment.expand.p) == (4, 0.5)
    assert (augment.crop.overlaps, augment.crop.least) == ([0.1, 0.3, 0.5, 0.7, 0.9], 0.3)
    assert augment.photometric and augment.channel_swap == 0.5 and not train.data.group_by_aspect


@pytest.mark.parametrize("width", [18, 32])
def test_the_recipes_of_fcos_on_hrnet_are_exact(width: int) -> None:
    """mmdetection's fcos_hrnetv2p-w*-gn-head_4xb4-1x_coco, number by number."""
    train = Train.model_validate(merged(ROOT / f"recipes/fcos_hrnet_w{width}_1x.yaml")["train"])
    model, schedule, sgd = train.model, train.schedule, train.schedule.optimizer
    assert (model.backbone.name, model.neck) == (f"hrnet_w{width}", "hrfpn")
    assert (model.backbone.norm, model.backbone.freeze) == ("fixed_bn", 0)
    source = CATALOGUE[str(model.backbone.weights)]
    assert source.backbone == model.backbone.name and published(source.url)
    assert (model.distances, model.centerness, model.radius, model.box_loss) == ("exp", "cls", None, "iou")
    assert (model.test.score, model.test.topk, model.test.nms, model.test.max) == (0.05, 1000, 0.5, 100)
    epoch = -(-117266 // 16)
    assert train.data.batch == 16 and schedule.steps == [8 * epoch, 11 * epoch]
    assert schedule.iterations == 12 * epoch
    assert (sgd.lr, sgd.momentum, sgd.weight_decay, sgd.norm_decay, sgd.clip) == (0.01, 0.9, 1e-4, 1e-4, 35)
    assert (sgd.bias_lr, sgd.bias_decay, sgd.bias_norms) == (2.0, 0.0, False)
    assert schedule.warmup.iterations == 500 and schedule.warmup.constant
    assert round(3 * schedule.warmup.factor, 6) == 1
    assert (train.data.augment.short, train.data.augment.max, train.data.augment.flip) == ([800], 1333, 0.5)


@pytest.mark.parametrize("name", ["retinanet_r50_1x", "fcos_r50_1x", "fcos_r50_imprv_1x", "atss_r50_1x"])
def test_what_the_published_recipes_on_a_pyramid_share(name: str) -> None:
    content = merged(ROOT / f"recipes/{name}.yaml")
    train, own = Train.model_validate(content["train"]), content["train"]["model"]
    schedule, sgd = train.schedule, train.schedule.optimizer
    assert (content["resources"]["gpus"], train.data.batch, sgd.lr) == (8, 16, 0.01)
    assert (sgd.momentum, sgd.weight_decay, sgd.clip) == (0.9, 1e-4, None)
    assert (own["head"], own["neck"]) == ({"channels": 256, "convs": 4}, "fpn")
    assert train.data.augment.max == 1333 and max(train.data.augment.short) == train.data.test.short == 800
    assert train.model.backbone.freeze == 2 and published(CATALOGUE[train.model.backbone.weights].url)
    epochs = (schedule.iterations, *schedule.steps)
    assert epochs == ((87960, 58640, 80630) if name == "atss_r50_1x" else (90000, 60000, 80000))


def test_the_published_recipes_on_a_pyramid_are_exact() -> None:
    """Where they differ: detectron2's RetinaNet, the authors' FCOS, mmdetection's ATSS."""
    names = ("retinanet_r50_1x", "fcos_r50_1x", "fcos_r50_imprv_1x", "atss_r50_1x")
    retinanet, fcos, improved, atss = (
        Train.model_validate(merged(ROOT / f"recipes/{name}.yaml")["train"]) for name in names
    )
    model, warmup = retinanet.model, retinanet.schedule.warmup
    assert (model.match.negative, model.match.positive, model.test.nms) == (0.4, 0.5, 0.5)
    assert (model.anchors.scale, model.anchors.octave, model.anchors.ratios) == (4, 3, [0.5, 1, 2])
    assert retinanet.data.augment.short == [640, 672, 704, 736, 768, 800]
    assert (warmup.iterations, warmup.factor, warmup.constant) == (1000, 0.001, False)

    for train, parts in ((fcos, ("exp", "cls", None, "iou")), (improved, ("relu", "reg", 1.5, "giou"))):
        model, warmup, sgd = train.model, train.schedule.warmup, train.schedule.optimizer
        assert (model.distances, model.centerness, model.radius, model.box_loss) == parts
        assert (model.ranges, model.test.nms, model.style) == ([64, 128, 256, 512], 0.6, "original")
        assert (warmup.iterations, round(warmup.factor * 3, 6), warmup.constant) == (500, 1, True)
        assert (sgd.bias_lr, sgd.bias_decay, sgd.norm_decay) == (2, 0, 1e-4)

    model, warmup, backbone = atss.model, atss.schedule.warmup, atss.model.backbone
    assert (model.scale, model.style, model.candidates, model.test.nms) == (8, "mmdet", 9, 0.6)
    assert (warmup.iterations, warmup.factor, warmup.constant) == (500, 0.001, False)
    assert (backbone.weights, backbone.norm) == ("torchvision_resnet50", "fixed_bn")


def test_another_batch_scales_the_schedule_as_a_whole() -> None:
    train = Train.model_validate(merged(ROOT / "recipes/yolof_r50_1x.yaml")["train"])
    assert train.schedule.scaled(64) is train.schedule
    half = train.schedule.scaled(32)
    assert (half.optimizer.lr, half.iterations, half.steps) == (0.06, 45000, [30000, 40000])
    assert (half.warmup.iterations, round(half.warmup.factor, 9)) == (3000, 0.000333335)


def test_a_constant_warmup_stays_a_share_of_the_learning_rate() -> None:
    """Scaled with the batch it would be none: a third of the rate times three."""
    recipe = merged(ROOT / "recipes/fcos_r50_1x.yaml")["train"]
    plan = Train.model_validate(recipe).schedule
    large = plan.scaled(48)
    assert (round(large.optimizer.lr, 9), large.iterations, large.steps) == (0.03, 30000, [20000, 26667])
    warmup = plan.warmup.model_copy(update={"iterations": 167})
    assert large.warmup == warmup and warmup.constant and warmup.factor < 0.34
    recipe["data"]["batch"] = 48
    (note,) = [n for n in check({"train": recipe, "resources": {"gpus": 8}})["notes"] if "scaled" in n]
    assert note.endswith("warm-up 167 at a constant 0.333333")


def test_norms_that_lack_their_statistics_are_told_of(tiny: dict[str, Any]) -> None:
    """In a note, for what such a recipe is there for is no training."""

    def told(train: dict[str, Any]) -> list[str]:
        notes = check({"train": train, "resources": GPUS})["notes"]
        return [note.partition(" is ")[0] for note in notes if "keeps the statistics" in note]

    both = ["`train.model.backbone.norm`", "`train.model.norm`"]
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        expected = both if recipe.stem == "ssdlite_mbv2_tensorflow" else []
        assert told(merged(recipe)["train"]) == expected, recipe

    assert told(tiny) == []
    tiny["model"]["backbone"]["norm"] = "frozen_bn"
    assert told(tiny) == both[:1]
    tiny["model"]["backbone"]["weights"] = "some.pth"
    assert told(tiny) == []


def test_what_batch_and_gpus_decide_is_said() -> None:
    """The schedule of another batch, and YOLOF's batch norm: plain from 8 images that a GPU sees at a time,
    shared between the GPUs below."""
    recipe = merged(ROOT / "recipes/yolof_r50_1x.yaml")["train"]
    train = Train.model_validate(recipe)
    assert train.on(8).model.norm == train.on(4).model.norm == "bn"
    assert train.on(8).schedule is train.schedule
    notes = check({"train": recipe, "resources": {"gpus": 4, "nodes": 2}})["notes"]
    assert "norm auto is bn: 8 images at a time on a GPU, and batch norm wants 8" in notes

    recipe["data"]["batch"] = 32
    notes = check({"train": recipe, "resources": {"gpus": 8}})["notes"]
    assert (
        "schedule scaled from batch 64 to 32: lr 0.06, 45000 iterations, steps at [30000, 40000], "
        "warm-up 3000 from 0.000333335" in notes
    )
    shared = "norm auto is sync_bn, over all 32 images: 4 images at a time on a GPU, and batch norm wants 8"
    assert shared in notes
    half = Train.model_validate(recipe)
    assert (half.on(8).model.norm, half.on(4).model.norm) == ("sync_bn", "bn")
    recipe["schedule"]["accumulate"] = 2
    parts = Train.model_validate(recipe)
    assert parts.on(4).model.norm == "sync_bn", "4 images at a time"
    recipe["data"]["batch"], recipe["schedule"]["accumulate"] = 4, 1
    (note,) = [n for n in check({"train": recipe, "resources": {"gpus": 1}})["notes"] if n.startswith("norm")]
    assert "one GPU alone gains nothing" in note
    recipe["model"]["norm"] = "bn"
    assert Train.model_validate(recipe).on(1).model.norm == "bn", "who says it gets it"


def test_unknown_keys_come_with_the_known_ones(tiny: dict[str, Any]) -> None:
    tiny["schedule"]["optimizer"]["lerning_rate"] = 1
    (problem,) = problems(tiny)
    assert problem["loc"] == ["train", "schedule", "optimizer", "lerning_rate"]
    assert "lr" in problem["known"] and problem["message"].endswith("is unknown")


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("data", "batch"), "many", "must be a whole number"),
        (("data", "batch"), 0, "must be at least 1, not 0"),
        (("data", "augment", "flip"), 2, "must be at most 1, not 2"),
        (("amp",), "fp8", "must be `none`, `bf16` or `fp16`, not `fp8`"),
        (("model", "backbone", "name"), "resnet5", "`train.model.backbone.name` must be `resnet18`"),
        (("model", "name"), "yolo", "`train.model` must have as `name` one of `yolof`, `retinanet`"),
        (("model", "match", "tops"), 4, "`train.model.match.tops` is unknown"),
        (("schedule",), [], "must hold `key: value` lines"),
        (("data", "batch"), 6, "cannot be shared out evenly to 4 workers"),
        (("schedule", "steps"), [30], "needs rising `steps`"),
        (("model", "num_classes"), 80, "is 80, but"),
        (("model", "backbone", "weights"), "torchvision_resnet50", "are weights of resnet50, not resnet18"),
        (("model", "backbone", "dilate"), True, "has `dilate`, which only resnet50 and resnet101 have"),
    ],
)
def test_mistakes_in_a_sentence(where: tuple[str, ...], value: Any, words: str, tiny: dict[str, Any]) -> None:
    section = tiny
    for key in where[:-1]:
        section = section.setdefault(key, {})
    section[where[-1]] = value
    found = [problem for problem in problems(tiny) if words in problem["message"]]
    assert found and found[0]["kind"] == "recipe" and found[0]["loc"][0] == "train"


def test_what_is_missing_on_this_machine(tiny: dict[str, Any], tmp_path: Path) -> None:
    """A data set that is not here is the machine's matter, not the recipe's."""

    def one(words: str) -> None:
        (problem,) = problems(tiny)
        assert problem["kind"] == "machine" and words in problem["message"], problem

    weights = tiny["model"]["backbone"]
    weights["weights"] = str(tmp_path / "no.pth")
    one("no.pth")
    weights["weights"] = None
    broken = tmp_path / "broken.json"
    whole = json.loads(Path(tiny["data"]["root"], tiny["data"]["val"]["annotations"]).read_text())
    tiny["data"]["val"]["annotations"] = str(broken)
    one(f"the annotation file {broken} does not exist")
    for text, words in [
        ("{", "is not a COCO"),
        ("{}", "has no list `categories`"),
        ('{"images": 1}', "is not a COCO"),
        (json.dumps(whole | {"annotations": [{"image_id": 1}]}), "annotations[0] has no `bbox`"),
        (json.dumps(whole | {"annotations": []}), "has no image with an object"),
        (
            json.dumps(whole | {"images": [one | {"file_name": "no.png"} for one in whole["images"]]}),
            "no.png does not exist",
        ),
    ]:
        broken.write_text(text)
        one(words)
    tiny["data"]["root"] = str(tmp_path / "nowhere")
    (problem, *_) = problems(tiny)
    assert "does not exist" in problem["message"] and problem["kind"] == "machine"


def test_large_annotation_files_are_only_looked_into(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detcore.check.LARGE", 1000)
    assert problems(tiny) == []
    tiny["model"]["num_classes"] = 2
    (problem,) = problems(tiny)
    assert "has 3 categories" in problem["message"]


def test_the_check_as_a_command(tiny: dict[str, Any]) -> None:
    asked = json.dumps({"train": tiny, "resources": GPUS})
    code = "import runpy, sys; sys.argv[1:] = ['--check']; "
    code += "runpy.run_module('detcore.config', run_name='__main__'); assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], input=asked, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert answer["problems"] == []
    assert any("2 images per worker" in note for note in answer["notes"])
    assert any("24 iterations are 8.0 epochs of 24 images" in note for note in answer["notes"])
