"""Weights from elsewhere into a backbone or a whole detector; what did not match is said."""

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detcore.backbones.layers import TORCHVISION_PIXELS, ConvNorm, FixedBatchNorm2d, FrozenBatchNorm2d
from detcore.ops.losses import MovingCount
from detcore.weights import WeightsError, tensorflow, torchvision
from detcore.weights.catalogue import CATALOGUE
from detcore.weights.fetch import locate
from detcore.weights.keys import best_table, owner, rename
from detcore.weights.reading import read_state

# Names of detectors that say their style: that of their pixels, and the recipe that has it.
STYLED = {
    "torchvision_retinanet": ("torchvision", "retinanet_r50_torchvision"),
    "torchvision_fcos": ("torchvision", "fcos_r50_torchvision"),
    "mmdet_cornernet": ("torchvision", "cornernet_hg104_mmdet"),
    "cornernet": ("cornernet", "cornernet_hg104"),
}
# Keys of `train.model` that decide what the same tensors mean.
MEANING = ("name", "style", "backbone.style", "distances", "centerness")


class Report(NamedTuple):
    """table: whose names the file has; loaded: how many tensors each part took; implied: how many of them the
    file leaves out, since they follow from others; unused: the others' names."""

    spec: str
    table: str
    loaded: Counter[str]
    implied: int
    unused: tuple[str, ...]

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {count}" for part, count in self.loaded.items())
        implied = f"; {self.implied} of them follow from others" if self.implied else ""
        unused = f"; not used: {_some(self.unused)}" if self.unused else ""
        names = f"{self.table} names: {parts}"
        return f"weights {self.spec}: {self.loaded.total()} tensors loaded ({names}){implied}{unused}"


def load_backbone(backbone: nn.Module, cfg: Any) -> Report:
    """Loads `cfg.weights` (cfg: the recipe's `train.model.backbone`) into a backbone that `cfg` built."""
    source = CATALOGUE.get(cfg.weights)
    if source and source.backbone != cfg.name:
        raise WeightsError(f"weights {cfg.weights} are for backbone {source.backbone}, not {cfg.name}")
    if source and source.style and source.style != cfg.style:
        raise WeightsError(
            f"weights {cfg.weights} were trained with backbone.style {source.style} (stride, pixel values), "
            f"the recipe says {cfg.style}"
        )
    return load(backbone, cfg.weights)


def load(module: nn.Module, spec: str) -> Report:
    """Loads what `spec` means (see `fetch.locate`) into `module`: a backbone or a detector. See `fit`."""
    return fit(module, spec, read_state(locate(spec)))


def fit(module: nn.Module, spec: str, state: Mapping[str, Tensor]) -> Report:
    """Loads `state`, read from `spec`, into `module`: a backbone or a detector.

    Every weight and statistic of `module` must be there in the right shape; names may be any project's in
    `keys.TABLES`. What the file has beyond that is left over, and printed by rank 0.
    """
    ours = weights_of(module)
    table = best_table(state, set(ours))
    renamed = {rename(name, table): (name, value) for name, value in state.items()}
    if table == "tensorflow_ssdlite":
        tensorflow.reorder(renamed, ours)
    _check_style(module, spec, owner(state, table))
    if table in ("torchvision_retinanet", "torchvision_fcos"):
        torchvision.reorder(renamed, ours, len(getattr(module, "ratios", [1.0])))
    _fill_implied(module, renamed)

    missing = [name for name in ours if name not in renamed]
    if missing:
        folded = all(".norm." in name for name in missing)
        raise WeightsError(
            f"weights {spec}: {len(missing)} of {len(ours)} tensors are not in the file (read with {table} "
            f"names): {_some(missing)}; "
            + (
                "its batch norm has no statistics, so it fits `norm: frozen_bn` or `fixed_bn` only"
                if folded
                else "is it for another architecture or depth?"
            )
        )
    wrong = [name for name in ours if renamed[name][1].shape != ours[name].shape]
    if wrong:
        there, here = tuple(renamed[wrong[0]][1].shape), tuple(ours[wrong[0]].shape)
        raise WeightsError(
            f"weights {spec}: {len(wrong)} tensors have another shape, first {wrong[0]}: {there} in the "
            f"file, {here} in the model; do width, depth and class count agree?"
        )
    module.load_state_dict({name: renamed[name][1] for name in ours}, strict=False)
    unused = tuple(old for new, (old, _) in renamed.items() if new not in ours and old)
    report = Report(
        spec,
        table,
        Counter(name.split(".")[0] for name in ours),
        sum(not renamed[name][0] for name in ours),
        tuple(name for name in unused if not name.endswith("num_batches_tracked")),
    )
    if os.environ.get("RANK", "0") == "0":
        print(report, flush=True)
    return report


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """All that a file of weights has to have."""
    return {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}


def check_recipe(spec: str, told: Any, model: dict[str, Any]) -> None:
    """Raises WeightsError if weights that bring a recipe (told: its `train.model`) are to be read by one of
    another kind (model: its own). Keys that either does not have say nothing."""
    for key in MEANING:
        theirs, ours = _at(told, key), _at(model, key)
        if None not in (theirs, ours) and theirs != ours:
            raise WeightsError(
                f"weights {spec} bring their own recipe, with `train.model.{key}: {theirs}`; the one named "
                f"has `{ours}`, which gives them another meaning: leave --recipe out, or name one with "
                f"`{theirs}`"
            )


def _at(section: Any, key: str) -> Any:
    for step in key.split("."):
        section = section.get(step) if isinstance(section, dict) else None
    return section


def _check_style(module: nn.Module, spec: str, whose: str) -> None:
    """Refuses weights that fit but would compute something else. whose: see `keys.owner`."""
    project, _, detector = whose.partition("_")
    if whose == "mmdet_retinanet":
        raise WeightsError(
            f"weights {spec} are of mmdetection's RetinaNet, and no style here computes as it does: it has "
            "no ReLU between P6 and P7, bounds deltas on both sides, and cuts boxes to the image before NMS. "
            "Take detectron2's weights (for recipes/retinanet_r50_1x.yaml) or torchvision's (for "
            "recipes/retinanet_r50_torchvision.yaml)"
        )
    if whose in ("mmdet_fcos", "mmdet_atss"):
        ours = type(module).__name__
        if ours.lower() != detector:
            raise WeightsError(
                f"weights {spec} are of mmdetection's {detector.upper()}, and {ours} makes other boxes of "
                f"the same numbers: they want `train.model.name: {detector}`"
            )
        if getattr(module, "detectron2", False):
            raise WeightsError(
                f"weights {spec} are from mmdetection, whose boxes have scales that are learned: they want "
                "`train.model.style: original`"
            )
    theirs = project == "torchvision"
    pixels, recipe = STYLED.get(whose, ("", ""))
    if project in ("torchvision", "detectron2") and getattr(module, "torchvision", theirs) != theirs:
        where = f", as in recipes/{recipe}.yaml" if theirs else ""
        raise WeightsError(
            f"weights {spec} are from {project}, whose boxes are computed otherwise: they want "
            f"`train.model.style: {project}`{where}"
        )
    if pixels and (module.backbone.pixels == TORCHVISION_PIXELS) != (pixels == "torchvision"):
        raise WeightsError(
            f"weights {spec} ({whose} names) were trained with other pixel values: they want "
            f"`train.model.backbone.style: {pixels}`, as in recipes/{recipe}.yaml"
        )


def _fill_implied(module: nn.Module, renamed: dict[str, tuple[str, Tensor]]) -> None:
    """What a file may leave out, or say elsewhere, since it means the same.

    Detectron's oldest files and graphs that TensorFlow optimised have batch norm folded to a factor and an
    offset: mean 0, and variance 1 - eps, so that a norm with fixed statistics gives exactly that factor,
    which is 1 where the convolution before it has it in its weights. mmdetection's convolutions have no bias
    where a norm follows: a bias of 0. Others' may have one where ours do not: subtracted from the mean.
    Nobody else keeps a moving normaliser: the one that training starts from.
    """
    for name, layer in module.named_modules():
        folded = f"{name}.bias" in renamed and f"{name}.running_mean" not in renamed
        if folded and isinstance(layer, FrozenBatchNorm2d | FixedBatchNorm2d):
            renamed.setdefault(f"{name}.weight", ("", torch.ones_like(layer.running_var)))
            renamed[f"{name}.running_mean"] = ("", torch.zeros_like(layer.running_mean))
            renamed[f"{name}.running_var"] = ("", torch.full_like(layer.running_var, 1 - layer.eps))
        if isinstance(layer, MovingCount):
            renamed.setdefault(f"{name}.average", ("", layer.average))
    for name, layer in module.named_modules():
        if not isinstance(layer, ConvNorm) or f"{name}.conv.weight" not in renamed:
            continue
        bias, mean = f"{name}.conv.bias", f"{name}.norm.running_mean"
        if layer.conv.bias is not None and not isinstance(layer.norm, nn.Identity):
            renamed.setdefault(bias, ("", torch.zeros_like(layer.conv.bias)))
        elif bias in renamed and mean in renamed and renamed[bias][1].shape == renamed[mean][1].shape:
            old, value = renamed[mean]
            renamed[mean] = (old, value - renamed.pop(bias)[1])


def _some(names: Any, limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(list(names)[:limit]) + more
