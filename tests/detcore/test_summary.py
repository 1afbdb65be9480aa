"""What a detector is made of: counted without computing, and equal to what computing it shows."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from detcore.anatomy import OBJECTS, dissect
from detcore.config import Train
from detcore.models import build_model
from detcore.ops.targets import Targets
from detcore.recipe import read_unfrozen
from detcore.summary import main, shown, size_of, total
from tests.detcore.conftest import TINY
from tests.detcore.sections import BACKBONE, EVERY

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FROZEN = BACKBONE | {"freeze": 1}
NAMES = ["yolof", "retinanet", "fcos", "fcos-hrnet", "atss", "cornernet", "ssdlite"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_a_real_step_costs(name: str) -> None:
    cfg = Train.model_validate(TINY | {"model": {"num_classes": 3, "backbone": FROZEN} | EVERY[name]})
    anatomy = dissect(cfg, 128, 160)

    model = build_model(cfg.model, pretrained=False).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    images = torch.zeros(1, 3, 128, 160, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 10, 60, 60]]).repeat(1, OBJECTS, 1)
    inputs = images, torch.tensor([[128, 160]]), Targets(boxes, torch.zeros(1, OBJECTS, dtype=torch.int64))
    own |= {tensor.untyped_storage().data_ptr() for tensor in [images, inputs[1], *inputs[2]]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    cost = total(anatomy)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.flops == counter.get_total_flops()
    seen = sum(one.untyped_storage().nbytes() for at, one in kept.items() if at not in own)
    assert abs(cost.kept - seen) <= 0.02 * seen

    inner = [cost for layer, cost in anatomy.layers.items()]
    assert sum(layer.parameters for layer in inner) >= 0.99 * cost.parameters  # scales belong to no layer
    assert sum(layer.flops for layer in inner) >= 0.98 * cost.flops and all(one.shapes for one in inner)
    names = {one.name for one in anatomy.operations}
    assert len(names) == len(anatomy.operations)
    assert all(set(one.inputs) <= names for one in anatomy.operations)
    above = {anatomy.operations[-1].name}
    for one in reversed(anatomy.operations):
        above |= set(one.inputs) if one.name in above else set()
    assert {name.split("/")[0] for name in above} >= {"images", "sizes", "backbone", "boxes", "losses"}


def test_a_recipe_that_extends_others_in_full_size() -> None:
    cfg = read_unfrozen(RECIPES / "yolof_r50_1x.yaml")
    assert size_of(cfg.data) == (1067, 800), "what a photograph of 640x480 becomes"
    anatomy = dissect(cfg, 256, 256)
    assert round(total(anatomy).parameters / 1e6, 2) == 44.11, "as published"
    stem = anatomy.layers["backbone.stem"]
    assert stem.shapes == [(64, 128, 128)] and stem.flops == 2 * 3 * 7 * 7 * 64 * 128 * 128
    assert stem.kept == 0, "it is frozen"
    assert anatomy.parts["backbone"].shapes == [(2048, 8, 8)]


def test_a_table_and_a_graph_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe, board = tmp_path / "recipe.yaml", tmp_path / "board"
    recipe.write_text(yaml.safe_dump({"train": TINY}))
    assert main([str(recipe), "--size", "90x64", "--tensorboard", str(board)]) == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line for line in said.splitlines() if line}
    assert (
        "conv 7x7 / 2, FrozenBatchNorm2d, ReLU" in lines["backbone.stem"]
        and "8x32x48" in lines["backbone.stem"]
    )
    assert "One image of 90x64, padded to 96x64, in training, float32" in said
    events = EventAccumulator(str(board))
    events.Reload()
    nodes = {node.name: node for node in events.Graph().node}
    convolution = nodes["backbone/stem/conv/convolution"]
    assert convolution.op == "convolution" and convolution.input[0].startswith("normalize/")
    assert [dim.size for dim in convolution.attr["_output_shapes"].list.shape[0].dim] == [1, 8, 32, 48]
    assert all(name in nodes for node in nodes.values() for name in node.input)


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, file = tmp_path / "recipe.yaml", tmp_path / "file"
    recipe.write_text(yaml.safe_dump({"train": TINY}))
    file.write_text("")
    extends = tmp_path / "extends.yaml"
    extends.write_text(f"extends: {RECIPES}/yolof_shapes.yaml\ntrain: {{modle: 3}}\n")
    for argv, words in [
        ([str(tmp_path / "none.yaml")], "none.yaml: cannot be read"),
        ([str(extends)], "extends.yaml:2:9: `train.modle` is unknown; did you mean `model`?"),
        ([str(recipe), "--size", "big"], "--size big: must be WIDTHxHEIGHT in pixels"),
        ([str(recipe), "--tensorboard", f"{file}/board"], "Not a directory"),
    ]:
        assert main(argv) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and words in said.err, said


def test_maps_of_a_pyramid_in_one_line() -> None:
    assert shown([(256, 100, 136), (256, 50, 68), (80, 7, 9), ()]) == "256x100x136, 50x68, 80x7x9, 1"
