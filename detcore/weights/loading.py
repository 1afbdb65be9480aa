"""Weights from elsewhere into a backbone or a whole detector; what did not match is said."""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detcore.backbones.layers import ConvNorm, FrozenBatchNorm2d
from detcore.ops.losses import MovingCount
from detcore.weights import WeightsError
from detcore.weights.catalogue import CATALOGUE
from detcore.weights.fetch import locate
from detcore.weights.keys import best_table, rename
from detcore.weights.reading import read_state


class Report(NamedTuple):
    """table: whose names the file has; loaded: how many tensors were taken; unused: the others' names."""

    spec: str
    table: str
    loaded: int
    unused: tuple[str, ...]

    def __str__(self) -> str:
        unused = f"; not used: {_some(self.unused)}" if self.unused else ""
        return f"weights {self.spec}: {self.loaded} tensors loaded ({self.table} names){unused}"


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
    """Loads what `spec` means (see `fetch.locate`) into `module`: a backbone or a detector.

    Every weight and statistic of `module` must be there in the right shape; names may be any project's in
    `keys.TABLES`. What the file has beyond that is left over, and printed by rank 0.
    """
    state = read_state(locate(spec))
    ours = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    table = best_table(state, set(ours))
    renamed = {rename(name, table): (name, value) for name, value in state.items()}
    _fill_implied(module, renamed)

    missing = [name for name in ours if name not in renamed]
    if missing:
        raise WeightsError(
            f"weights {spec}: {len(missing)} of {len(ours)} tensors are not in the file (read with {table} "
            f"names): {_some(missing)}; is it for another architecture or depth?"
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
    unused = tuple(name for name in unused if not name.endswith("num_batches_tracked"))
    report = Report(spec, table, len(ours), unused)
    if os.environ.get("RANK", "0") == "0":
        print(report, flush=True)
    return report


def _fill_implied(module: nn.Module, renamed: dict[str, tuple[str, Tensor]]) -> None:
    """What a file may leave out, since it means the same.

    Detectron's oldest files have batch norm folded to a factor and an offset: mean 0, and variance 1 - eps,
    so that FrozenBatchNorm2d gives exactly that factor. mmdetection's convolutions have no bias where a norm
    follows: a bias of 0. Nobody else keeps a moving normaliser: the one that training starts from.
    """
    for name, layer in module.named_modules():
        folded = f"{name}.weight" in renamed and f"{name}.running_mean" not in renamed
        if folded and isinstance(layer, FrozenBatchNorm2d):
            renamed[f"{name}.running_mean"] = ("", torch.zeros_like(layer.running_mean))
            renamed[f"{name}.running_var"] = ("", torch.full_like(layer.running_var, 1 - layer.eps))
        if isinstance(layer, ConvNorm) and layer.conv.bias is not None and f"{name}.conv.weight" in renamed:
            renamed.setdefault(f"{name}.conv.bias", ("", torch.zeros_like(layer.conv.bias)))
        if isinstance(layer, MovingCount):
            renamed.setdefault(f"{name}.average", ("", layer.average))


def _some(names: Any, limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(list(names)[:limit]) + more
