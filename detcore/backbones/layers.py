"""Convolution with its norm, the norms by name, and how pixels become a backbone's input."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.Module):
    """Batch norm as a fixed affine map: weight (x - mean) / sqrt(var + eps) + bias, all four buffers.

    It may change its input: it stands behind a convolution, and nothing else needs what that gave. Nor does
    the backward pass.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        scale, shift = scale[:, None, None].to(x.dtype), shift[:, None, None].to(x.dtype)
        if x.is_cuda:
            return torch.addcmul(shift, x, scale)  # reads and writes once
        return x.mul_(scale).add_(shift)  # memory that is warm is the faster on a CPU


class BatchNorm2d(nn.BatchNorm2d):
    """PyTorch's. Where a channel has one value only (one image, a 1x1 map), and so no variance, PyTorch's
    refuses to train; this uses the running statistics there, as in eval mode, and leaves them as they are.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and input.numel() == input.shape[1]):
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class FixedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics it was loaded with, whose affine map is trained (mmdetection's
    norm_eval)."""

    def train(self, mode: bool = True) -> "FixedBatchNorm2d":
        return super().train(False)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all ranks, and that of its gradient on the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class SyncBatchNorm(BatchNorm2d):
    """Batch norm over all ranks. PyTorch's own on CUDA; on the CPU, which it refuses, sums by gloo.

    No subclass of PyTorch's: DistributedDataParallel refuses to train one on the CPU.
    """

    process_group = None
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        if input.is_cuda:
            return nn.SyncBatchNorm.forward(self, input)
        x, own_count = input.float(), input.numel() / input.shape[1]
        # In float32 E[x^2] - E[x]^2 is noise where the mean is large. So x is told from this rank's mean, and
        # what the ranks share is float64. Neither result nor gradient depends on where the origin is.
        origin = x.detach().mean((0, 2, 3))
        x = x - origin[:, None, None]
        total, square, origin = x.sum((0, 2, 3)).double(), x.square().sum((0, 2, 3)).double(), origin.double()
        square = square + 2 * origin * total + origin.square() * own_count
        own = torch.cat([total + origin * own_count, square, total.new_full((1,), own_count)])
        sums = _Sum.apply(own)
        count = sums[-1]
        mean, square = (sums[:-1] / count).chunk(2)
        var = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_((var * count / (count - 1)).float(), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt().float()
        shift = self.bias - (mean - origin).float() * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(input.dtype)


def _group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as published for 256 channels, fewer where they are fewer, of four or more."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4)), channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "frozen_bn": FrozenBatchNorm2d,
    "fixed_bn": FixedBatchNorm2d,
    "auto": BatchNorm2d,  # not decided, for it is not trained: bn and sync_bn differ in training only
    "bn": BatchNorm2d,
    "sync_bn": SyncBatchNorm,
    "gn": _group_norm,
}


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's padding SAME: ceil(size / stride) outputs, and where the padding is odd,
    as with stride 2 on even sizes, one more right and below than left and above."""

    def forward(self, input: Tensor) -> Tensor:
        above, below = self._padding(input.shape[-2], 0)
        left, right = self._padding(input.shape[-1], 1)
        return super().forward(F.pad(input, (left, right, above, below)))

    def _padding(self, size: int, axis: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[axis], self.stride[axis]
        missing = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
        return missing // 2, missing - missing // 2


class ConvNorm(nn.Module):
    """Convolution, norm, activation. Padding keeps the size at stride 1.

    same        pad as TensorFlow does; see `SameConv2d`
    activation  in place, for nothing else needs what the norm gave
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        norm: str,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        same: bool = False,
        activation: type[nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        if same:
            self.conv = SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=bias)
        else:
            padding = dilation * (kernel // 2)
            self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias)
        self.norm = NORMS[norm](outputs)
        self.activation = activation(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class Pixels(NamedTuple):
    """The input that a set of weights was trained on: channel order, mean and std of values 0..255."""

    order: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# detectron2's MSRA models, torchvision's, and TensorFlow's MobileNets.
CAFFE_PIXELS = Pixels("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
TORCHVISION_PIXELS = Pixels("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
TENSORFLOW_PIXELS = Pixels("RGB", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5))


class Normalize(nn.Module):
    """RGB bytes to a backbone's input, on the device, with padding that is zero afterwards.

    The references pad after normalising, so that padding looks like the mean colour.
    """

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        self.reverse = pixels.order == "BGR"
        self.register_buffer("mean", torch.tensor(pixels.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(pixels.std)[:, None, None], persistent=False)

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        """images (N, 3, H, W) uint8 RGB, sizes (N, 2) int64 true (h, w) -> (N, 3, H, W) float32."""
        if self.reverse:
            images = images.flip(1)
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device) < sizes[:, :1]
        columns = torch.arange(width, device=images.device) < sizes[:, 1:]
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return torch.where(inside, (images.float() - self.mean) / self.std, 0.0)
