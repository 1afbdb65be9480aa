"""Every detector learns drawn shapes from nothing, as its small recipe says; `make soak`. What it prints goes
to docs/results.md."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*_shapes.yaml"))
WORKERS, SECONDS = 4, 600

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    subprocess.run([sys.executable, "-m", "detcore.data.shapes", str(folder)], check=True)
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_ap50_reaches_90_within_ten_minutes(recipe: Path, data: Path, tmp_path: Path) -> None:
    frozen, run = tmp_path / "frozen.yaml", tmp_path / "run"
    launch = str(Path(sys.executable).with_name("launch"))
    freeze = [launch, str(recipe), f"train.data.root={data}", "--freeze"]
    frozen.write_text(subprocess.run(freeze, check=True, stdout=subprocess.PIPE, text=True).stdout)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORKERS)]
    program = ["-m", "detcore.train", str(frozen), "--run-dir", str(run)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    began = time.monotonic()
    subprocess.run([*torchrun, *program], check=True, env=env, stdout=subprocess.DEVNULL)
    took = time.monotonic() - began
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ap50 = next(line["AP50"] for line in reversed(lines) if "AP50" in line)
    print(f"\n{recipe.stem}: AP50 {ap50:.1f} after {took / 60:.1f} minutes")
    assert ap50 >= 90 and took < SECONDS
