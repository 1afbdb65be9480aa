"""Every detector runs elsewhere: what torch.export and ONNX make of it computes what it computes."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detcore import export
from detcore.config import Train
from detcore.convert import main as convert
from detcore.errors import InputError
from detcore.models import build_model
from tests.detcore.conftest import TINY, model_section
from tests.detcore.sections import section

NAMES = ["yolof", "retinanet", "fcos", "fcos-hrnet", "atss", "cornernet", "ssdlite-tensorflow"]
QUICK = ("cornernet",)  # of the others, which take as long each, the command is tested with one
SIZE = (64, 96)


def model(name: str) -> nn.Module:
    """With numbers that matter everywhere."""
    torch.manual_seed(0)
    built = build_model(model_section(section(name))).eval()
    for parameter in built.parameters():
        if parameter.dim() == 4 and parameter.shape[-1] == 1 and name == "cornernet":
            nn.init.normal_(parameter, std=0.5)
    return built


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.soak) for name in NAMES]
)
def test_what_is_exported_computes_the_same(name: str, tmp_path: Path) -> None:
    """Traced with two images, compared by `write` on three, and here on one."""
    detector = model(name)
    program = export.trace(detector, SIZE)
    worst = export.write(program, detector, SIZE, tmp_path / "m.onnx")
    assert all(value < 1e-5 for value in worst.values()), worst
    assert export.write(program, detector, SIZE, tmp_path / "m.pt2") == dict.fromkeys(worst, 0.0)

    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    images = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)
    sizes = torch.tensor([[50, 90]])  # the rest is padding
    boxes, scores = session.run(["boxes", "scores"], {"images": images.numpy(), "sizes": sizes.numpy()})[:2]
    wanted = detector.scored(images, sizes)
    torch.testing.assert_close(torch.from_numpy(scores), wanted.scores, atol=1e-5, rtol=1e-5)
    if name != "cornernet":  # its pairs of one score may have changed places
        torch.testing.assert_close(torch.from_numpy(boxes), wanted.boxes, atol=1e-3, rtol=1e-5)


class Wrong(nn.Module):
    """Computes something else whenever it is not being traced."""

    backbone = nn.Identity()

    def scored(self, images: torch.Tensor, sizes: torch.Tensor) -> Any:
        from detcore.ops.targets import Candidates

        scores = images.float().mean((2, 3))[:, None]
        scores = scores if torch.compiler.is_compiling() else scores + 1
        return Candidates(sizes[:, None].repeat(1, 1, 2).float(), scores)


def test_a_wrong_program_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    with pytest.raises(InputError, match="something else: scores by 1"):
        export.write(export.trace(Wrong(), (4, 4)), Wrong(), (4, 4), path)
    assert not list(tmp_path.iterdir())


def test_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def of(test: dict[str, Any], augment: dict[str, Any] | None = None) -> tuple[int, int]:
        train = copy.deepcopy(TINY)
        train["data"] |= {"root": "nowhere", "test": test, "augment": augment or {}}
        return export.canvas(Train.model_validate(train))

    assert of({"short": 800, "max": 1333}) == (1344, 800)
    assert of({"square": 300}) == (300, 300)
    assert of({"short": None}, {"square": 511}) == (511, 511)
    with pytest.raises(InputError, match="--size WIDTHxHEIGHT"):
        of({"short": None})
    with pytest.raises(InputError, match="multiples of 16, or a pixel less"):
        export.trace(model("cornernet"), (64, 97))


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    program = torch.export.export(nn.Identity(), (torch.zeros(1),))
    with pytest.raises(InputError, match=r"onnxscript: pip install 'launch-detcore\[export\]'"):
        export._onnx(program)


def test_the_command_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = copy.deepcopy(TINY)
    train["data"]["root"] = "nowhere"
    recipe, weights, out = (tmp_path / name for name in ("r.yaml", "w.pth", "w.pt2"))
    recipe.write_text(json.dumps({"train": train}))
    torch.save(build_model(Train.model_validate(train).model).state_dict(), weights)
    assert convert([str(weights), str(out), "--recipe", str(recipe), "--size", "96x64"]) == 0
    assert "images of 96x64; largest difference to PyTorch: boxes 0" in capsys.readouterr().out
    one = torch.zeros(1, 3, 64, 96, dtype=torch.uint8), torch.tensor([[64, 96]])
    found = torch.export.load(out).module()(*one)
    assert found["boxes"].shape == (1, 2 * 3 * 2, 4)
