"""A trained detector from what people point at: a run folder, a checkpoint in one, or a file of weights."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from detcore.annotations import read_categories
from detcore.checkpoint import Checkpoint, newest
from detcore.config import Train
from detcore.errors import InputError
from detcore.models import build_model
from detcore.recipe import read_recipe, read_unfrozen
from detcore.weights.classes import class_names

DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Loaded(NamedTuple):
    """model in eval mode on the CPU; names of its classes, numbers if nobody knows them (`named`); folder of
    its run, if it has one; what it is."""

    model: nn.Module
    cfg: Train
    names: list[str]
    named: bool
    folder: Path | None
    what: str


def autocast(amp: str, device: torch.device) -> AbstractContextManager[None]:
    """Mixed precision as `train.amp` says."""
    return torch.autocast(device.type, DTYPES[amp], enabled=amp != "none")


def load_run(spec: Path, recipe: Path | None = None) -> Loaded:
    """Raises InputError, naming what is missing."""
    if not spec.exists():
        raise InputError(f"{spec} does not exist")
    folder = next((f for f in (spec, *spec.resolve().parents[:3]) if (f / "recipe.yaml").is_file()), None)
    if recipe is None and folder is None:
        raise InputError(f"{spec} is not in a run folder (no recipe.yaml); name the recipe with --recipe")
    cfg = read_unfrozen(recipe) if recipe else read_recipe(folder / "recipe.yaml")
    checkpoint = None
    if (spec / "checkpoints").is_dir():
        checkpoint = newest(spec / "checkpoints", print)
    elif (spec / "manifest.json").is_file():
        checkpoint = Checkpoint(0, 0, spec)
    elif spec.name == "model.pth" and (spec.parent / "manifest.json").is_file():
        checkpoint = Checkpoint(0, 0, spec.parent)
    if checkpoint is None and spec.is_dir():
        raise InputError(f"{spec} has no checkpoint that is whole")

    model = build_model(cfg.model, pretrained=False)
    weights = checkpoint.path / "model.pth" if checkpoint else spec
    try:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # torch names a dozen kinds
        said = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise InputError(f"{weights} does not fit the recipe: {said[:300]}") from None
    names = checkpoint.training()["classes"] if checkpoint else _names(cfg)
    named = names[:1] != class_names(1)  # else they are numbers
    return Loaded(model.eval(), cfg, names, named, folder, str(checkpoint.path if checkpoint else spec))


def _names(cfg: Train) -> list[str]:
    """Class names of the recipe's data set if it is here, else what their number says."""
    annotations = cfg.data.path(cfg.data.val.annotations)
    names = list(read_categories(annotations).values()) if annotations.is_file() else []
    return names if len(names) == cfg.model.num_classes else class_names(cfg.model.num_classes)
