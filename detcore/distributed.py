"""Ranks: starting them, small messages between them, and data parallelism that is exact across a resume."""

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detcore.errors import InputError
from detcore.ops.targets import Targets


@dataclass(frozen=True)
class World:
    """This process among the others. Messages between hosts' memories go over a gloo group of their own, so
    that they never wait for a GPU."""

    rank: int
    size: int
    device: torch.device
    control: Any = None

    @classmethod
    def join(cls) -> "World":
        """Join the process group that torchrun's environment describes; alone without one."""
        rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
        size = int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                cure = "start fewer processes, or hide the GPUs with CUDA_VISIBLE_DEVICES= to use the CPU"
                raise InputError(f"rank {rank} has no GPU: there are {torch.cuda.device_count()}; {cure}")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        if "RANK" not in os.environ:
            return cls(rank, size, device)
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        return cls(rank, size, device, dist.new_group(backend="gloo"))

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. Waits for all."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag))
        dist.all_reduce(value, group=self.control)
        return bool(value > 0)

    def from_first(self, thing: Any) -> Any:
        """Rank 0's `thing`, on every rank."""
        if self.size == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, thing: Any) -> list[Any]:
        """Every rank's `thing`, on rank 0; an empty list elsewhere."""
        if self.size == 1:
            return [thing]
        box = [None] * self.size if self.rank == 0 else None
        dist.gather_object(thing, box, dst=0, group=self.control)
        return box or []


class Heard(NamedTuple):
    """What all ranks said after one step: sums of `flags`, means of `terms`; `own` terms beside them."""

    step: int
    flags: list[float]
    terms: list[float]
    own: list[float]


class Murmur:
    """One small all-reduce per step, heard a step later (on CUDA two), so that no step waits for another
    rank, nor the host for the device. What was said and not yet heard is fetched by `drain`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.lag = 1 if world.device.type == "cuda" else 0
        self._copying: deque[tuple[int, Tensor, Any]] = deque()
        self._flying: tuple[int, Tensor, list[float], int, Any] | None = None

    def say(self, step: int, flags: Sequence[float], terms: Tensor) -> list[Heard]:
        """After `step`: this rank's flags, known now, and loss terms (T,), known once the device is done."""
        if self.lag:
            host = torch.empty(terms.shape, dtype=terms.dtype, pin_memory=True)
            host.copy_(terms, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
            self._copying.append((step, host, done))
        else:
            self._copying.append((step, terms, None))
        return self._post(flags) if len(self._copying) > self.lag else []

    def drain(self, flags: Sequence[float]) -> list[Heard]:
        """All that is still on its way. Every rank must call this after the same step."""
        heard = []
        while self._copying:
            heard += self._post(flags)
        return heard + self._hear()

    def _post(self, flags: Sequence[float]) -> list[Heard]:
        heard = self._hear()
        step, terms, done = self._copying.popleft()
        if done is not None:
            done.synchronize()
        own = terms.tolist()
        message = torch.tensor([*flags, *own], dtype=torch.float64)
        work = (
            dist.all_reduce(message, group=self.world.control, async_op=True) if self.world.size > 1 else None
        )
        self._flying = (step, message, own, len(flags), work)
        return heard

    def _hear(self) -> list[Heard]:
        if self._flying is None:
            return []
        (step, message, own, flags, work), self._flying = self._flying, None
        if work is not None:
            work.wait()
        sums = message.tolist()
        return [Heard(step, sums[:flags], [total / self.world.size for total in sums[flags:]], own)]


class Losses(nn.Module):
    """The detector as data parallelism sees it: a batch -> the sum of its loss terms, and the terms (T,)."""

    def __init__(self, model: nn.Module, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self.names: list[str] = []
        self._forward = torch.compile(model) if compiled else model

    def forward(self, images: Tensor | None, sizes: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        if images is None:
            total = torch.stack([p.flatten()[0] * 0 for p in self.parameters() if p.requires_grad]).sum()
            return total, total.detach()
        terms = self._forward(images, sizes, targets)
        self.names = list(terms)
        values = torch.stack(list(terms.values()))
        return values.sum(), values.detach()


def parallel(losses: Losses, world: World) -> nn.Module:
    """`losses` with gradients averaged over the ranks, in the same order in every attempt.

    DistributedDataParallel puts gradients into buckets by the order in which they became ready in its first
    backward pass, from the second step on. A resumed run would add up its first step's gradients in other
    buckets than an undisturbed one, and with four ranks that is another rounding. So before the first step
    it gets a backward pass that costs nothing: a zero that touches the parameters in their order, and so
    makes their gradients ready last to first, about as the real one does. From then on all is settled, and
    no step pays for it (`find_unused_parameters`, which has the same effect, walks the graph every time).

    Buffers are not broadcast at every step: batch norm's running statistics are rank 0's wherever it counts.
    """
    if world.size == 1:
        return losses
    ddp = DistributedDataParallel(
        losses,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )
    total, _ = ddp(None, None, None)
    total.backward()
    ddp.zero_grad(set_to_none=True)
    return ddp


def share_statistics(model: nn.Module, world: World) -> None:
    """Rank 0's running statistics of batch norm, on every rank."""
    if world.size == 1:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            dist.broadcast(module.running_mean, 0)
            dist.broadcast(module.running_var, 0)
