"""Learning rate and optimizer. The rate is a pure function of the step, so there is no state to resume."""

import math

import torch
from torch import nn

from detcore.config import Optimizer, Schedule


def lr_factor(step: int, schedule: Schedule) -> float:
    """What the learning rate of step `step` (from 0) is multiplied with: warm-up times decay."""
    warmup = schedule.warmup
    factor = 1.0
    if step < warmup.iterations:
        progress = 0.0 if warmup.constant else step / warmup.iterations
        factor = warmup.factor * (1 - progress) + progress
    if schedule.cosine:
        return factor * 0.5 * (1 + math.cos(math.pi * step / schedule.iterations))
    return factor * 0.1 ** sum(step >= milestone for milestone in schedule.steps)


def learning_rate(step: int, schedule: Schedule) -> float:
    """The rate of step `step`, counted from 1 as everywhere in a run, before each group's own `scale`."""
    return schedule.optimizer.lr * lr_factor(step - 1, schedule)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """`lr`, times each group's own `scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def build_optimizer(model: nn.Module, cfg: Optimizer) -> torch.optim.Optimizer:
    """Over the trained parameters: those of the backbone with `backbone_lr`, norms with `norm_decay`, biases
    with `bias_lr` and, if given, `bias_decay`."""
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for path, module in model.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                bias = name == "bias" and (cfg.bias_norms or not norm)
                kind = (path.split(".")[0] == "backbone", norm, bias)
                groups.setdefault(kind, []).append(parameter)

    def options(backbone: bool, norm: bool, bias: bool) -> dict[str, float]:
        decay = cfg.norm_decay if norm else cfg.weight_decay
        return {
            "scale": (cfg.backbone_lr if backbone else 1.0) * (cfg.bias_lr if bias else 1.0),
            "weight_decay": cfg.bias_decay if bias and cfg.bias_decay is not None else decay,
        }

    parts = [{"params": parameters, **options(*kind)} for kind, parameters in groups.items()]
    # Fused: one kernel, and with fp16 no host synchronisation.
    if cfg.name == "adam":
        return torch.optim.Adam(parts, lr=cfg.lr, betas=(cfg.momentum, 0.999), fused=True)
    optimizer = torch.optim.SGD(parts, lr=cfg.lr, momentum=cfg.momentum, fused=True)
    if cfg.momentum:
        # Its own buffers it leaves uninitialised where fp16 overflows in the first step, which fp16 does.
        for parameter in (parameter for group in groups.values() for parameter in group):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
