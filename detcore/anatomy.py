"""What a detector is made of, seen in one training pass over tensors that have shapes and no content: its
layers, what they cost, and the graph of their operations."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from detcore.backbones.layers import ConvNorm
from detcore.board import Operation
from detcore.config import Train
from detcore.loading import autocast
from detcore.models import build_model
from detcore.ops.targets import Targets

OBJECTS = 8  # in the image; they matter to the losses alone


@dataclass
class Cost:
    """shapes      of what comes out, without the batch: one for each map
    parameters  numbers that are learnt, or would be if nothing were frozen
    flops       of convolutions and products of matrices, a multiplication with its addition counted as two
    kept        bytes that stay for the backward pass, parameters not among them
    """

    kind: str
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    parameters: int = 0
    flops: int = 0
    kept: int = 0


@dataclass
class Anatomy:
    """layers      convolutions with their norms, and all other modules that have no parts, in the order they
                run, by name
    parts       the modules of the detector itself, by name; `losses` is what lies between and behind them
    operations  in the order they run
    """

    layers: dict[str, Cost]
    parts: dict[str, Cost]
    operations: list[Operation]


def dissect(cfg: Train, height: int, width: int) -> Anatomy:
    """The recipe's detector as it learns from one image, in the recipe's precision."""
    fake = FakeTensorMode()
    with fake:
        model = build_model(cfg.model, pretrained=False).train()
        images = torch.zeros(1, 3, height, width, dtype=torch.uint8)
        targets = Targets(torch.zeros(1, OBJECTS, 4), torch.zeros(1, OBJECTS, dtype=torch.int64))
        inputs = {"images": images, "sizes": torch.tensor([[height, width]])}
        inputs |= {"boxes": targets.boxes, "labels": targets.labels}
        watch = _Watch(model, inputs)
        hooks = torch.autograd.graph.saved_tensors_hooks(watch.keep, lambda tensor: tensor)
        with watch, hooks, autocast(cfg.amp, torch.device("cpu")):
            model(images, inputs["sizes"], targets)
    watch.parts["losses"] = watch.parts.pop("losses")  # it comes last, whatever came first
    return Anatomy(watch.layers, watch.parts, watch.operations)


class _Watch(TorchDispatchMode):
    """Looks on at each operation, and knows in which modules it happens."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.within: list[str] = []  # names of the modules that are running, outermost first
        self.layers: dict[str, Cost] = {}
        self.model, self.parts = model, {"losses": Cost("")}
        self.operations: list[Operation] = []
        self.numbers: Counter[str] = Counter()
        self.producers = {id(tensor): name for name, tensor in inputs.items()}
        self.alive: list[Any] = list(inputs.values())  # so that no id or address is used twice
        self.seen = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        for name, tensor in inputs.items():
            self.operations.append(Operation(name, "input", (), tuple(tensor.shape)))
        for name, module in model.named_modules():
            if name:
                module.register_forward_pre_hook(lambda module, _, name=name: self.enter(name, module))
                module.register_forward_hook(lambda *args, name=name: self.leave(name, args[-1]))

    def enter(self, name: str, module: nn.Module) -> None:
        part = name.split(".")[0]
        if part not in self.parts:
            self.parts[part] = _cost(self.model.get_submodule(part))
        whole = isinstance(module, ConvNorm) or not list(module.children())
        inside = any(outer in self.layers for outer in self.within)
        if whole and not inside and not isinstance(module, nn.Identity):
            self.layers.setdefault(name, _cost(module))
        self.within.append(name)

    def leave(self, name: str, out: Any) -> None:
        self.within.pop()
        shapes = [tuple(tensor.shape[1:]) for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        if not self.within:
            self.parts[name.split(".")[0]].shapes += shapes
        if name in self.layers:
            self.layers[name].shapes += shapes

    def costs(self) -> list[Cost]:
        """Whom something that happens now is put down to."""
        part = self.within[0].split(".")[0] if self.within else "losses"
        layers = [self.layers[name] for name in self.within if name in self.layers]
        return [self.parts[part], *layers[:1]]

    def keep(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self.seen:
            self.seen.add(_storage(tensor))
            self.alive.append(tensor)
            for cost in self.costs():
                cost.kept += tensor.untyped_storage().nbytes()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            for cost in self.costs():
                cost.flops += flops
        self.note(func.overloadpacket.__name__, (args, kwargs), out)
        return out

    def note(self, kind: str, given: Any, out: Any) -> None:
        """A node of the graph, if it is fed by one."""
        ids = [id(one) for one in tree_leaves(given) if isinstance(one, Tensor)]
        inputs = tuple(dict.fromkeys(self.producers[one] for one in ids if one in self.producers))
        tensors = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        if not inputs or not tensors:
            return
        scope = self.within[-1].replace(".", "/") if self.within else "losses"
        stem = f"{scope}/{kind}"
        self.numbers[stem] += 1
        name = stem if self.numbers[stem] == 1 else f"{stem}_{self.numbers[stem]}"
        self.operations.append(Operation(name, kind, inputs, tuple(tensors[0].shape)))
        self.alive += tensors
        self.producers |= {id(one): name for one in tensors}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _cost(module: nn.Module) -> Cost:
    return Cost(_kind(module), parameters=sum(one.numel() for one in module.parameters()))


def _kind(module: nn.Module) -> str:
    if isinstance(module, ConvNorm):
        inner = (module.conv, module.norm, module.activation)
        return ", ".join(_kind(one) for one in inner if not isinstance(one, nn.Identity))
    if isinstance(module, nn.Conv2d):
        kind = "depthwise" if 1 < module.groups == module.in_channels else "conv"
        stride, dilation = module.stride[0], module.dilation[0]
        further = (f" / {stride}" if stride > 1 else "") + (f" x {dilation} apart" if dilation > 1 else "")
        return f"{kind} {module.kernel_size[0]}x{module.kernel_size[1]}{further}"
    return type(module).__name__
