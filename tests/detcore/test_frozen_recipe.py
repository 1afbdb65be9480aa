"""Frozen recipes as detcore reads them: which cannot be run, and what counts as a number."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from detcore.errors import InputError
from detcore.recipe import read_recipe


def test_recipes_that_cannot_be_run(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for text, words in [
        ("extends: base.yaml\ntrain: {}", "only a frozen one can be run; `launch .* --freeze` prints it"),
        ("train: [", "is not YAML"),
        ("name: x", "has no `train` section"),
        ("train: {seed: 24:00}", "`train.seed` must be a whole number"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            read_recipe(path)


def test_numbers_as_in_yaml_1_2(tiny: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = yaml.safe_dump({"train": tiny}).replace("lr: 0.02", "lr: 2e-2")
    assert "2e-2" in text
    path.write_text(text)
    assert read_recipe(path).schedule.optimizer.lr == 0.02
