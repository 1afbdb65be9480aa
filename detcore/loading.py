"""A trained detector from what people point at: a run folder, a checkpoint in one, or a file of weights."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from detcore.annotations import read_categories
from detcore.checkpoint import Checkpoint, newest
from detcore.config import Train
from detcore.errors import InputError
from detcore.models import build_model
from detcore.recipe import read_recipe, read_unfrozen, train_section
from detcore.weights import WeightsError
from detcore.weights.classes import class_names
from detcore.weights.fetch import MODEL, locate
from detcore.weights.loading import check_recipe, fit
from detcore.weights.reading import read_content, tensors_of

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
    """Raises InputError, naming what is missing. The names in a file of weights may be any project's, see
    `detcore.weights.keys`; one that detcore.convert wrote brings recipe and class names with it."""
    if not spec.exists():
        raise InputError(f"{spec} does not exist")
    folder = next((f for f in (spec, *spec.resolve().parents[:3]) if (f / "recipe.yaml").is_file()), None)
    checkpoint = _checkpoint(spec)
    if checkpoint is None and spec.is_dir() and not (spec / MODEL).is_file():
        raise InputError(f"{spec} has no checkpoint that is whole")
    weights = checkpoint.path / "model.pth" if checkpoint else locate(str(spec))
    nowhere = f"{spec} is not in a run folder (no recipe.yaml); name the recipe with --recipe"
    try:
        content = checkpoint.model() if checkpoint else read_content(weights)
    except WeightsError as error:
        raise (InputError(f"{error}; {nowhere}") if recipe is None and folder is None else error) from None
    if recipe is not None:
        cfg = read_unfrozen(recipe)
        if checkpoint is None and isinstance(told := content.get("train"), dict):
            check_recipe(str(spec), told.get("model"), cfg.model.model_dump(mode="json"))
    elif checkpoint is None and "train" in content:
        cfg = train_section(spec, content)
    elif folder is not None:
        cfg = read_recipe(folder / "recipe.yaml")
    else:
        raise InputError(nowhere)

    model = build_model(cfg.model, pretrained=False)
    if checkpoint is None:
        fit(model, str(spec), tensors_of(content, weights))
        told = content.get("classes")
        names = [str(name) for name in told] if isinstance(told, list) else []
        if len(names) != cfg.model.num_classes:
            names = _names(cfg)
    else:
        names = checkpoint.training()["classes"]
        try:
            model.load_state_dict(content)
        except Exception as error:  # torch names a dozen kinds
            said = " ".join(line.strip() for line in str(error).splitlines()[:2])
            raise InputError(f"{weights} does not fit the recipe: {said[:300]}") from None
    named = names[:1] != class_names(1)  # else they are numbers
    return Loaded(model.eval(), cfg, names, named, folder, str(checkpoint.path if checkpoint else spec))


def packed(loaded: Loaded) -> dict[str, Any]:
    """A detector as a file of weights that `load_run` needs no recipe for."""
    train = loaded.cfg.model_dump(mode="json")
    return {"model": loaded.model.state_dict(), "classes": loaded.names, "train": train}


def _checkpoint(spec: Path) -> Checkpoint | None:
    """The newest of a run, or the one that is meant."""
    if (spec / "checkpoints").is_dir():
        return newest(spec / "checkpoints", print)
    folder = spec.parent if spec.name == "model.pth" else spec
    return Checkpoint(0, 0, folder) if (folder / "manifest.json").is_file() else None


def _names(cfg: Train) -> list[str]:
    """Class names of the recipe's data set if it is here, else what their number says."""
    annotations = cfg.data.path(cfg.data.val.annotations)
    names = list(read_categories(annotations).values()) if annotations.is_file() else []
    return names if len(names) == cfg.model.num_classes else class_names(cfg.model.num_classes)
