"""Ranks that share a batch compute what one process does with all of it: losses, gradients, moving averages,
batch norm."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from detcore.backbones.layers import SyncBatchNorm
from detcore.models import build_model
from detcore.ops.targets import Targets
from tests.detcore.conftest import batch, model_section, total
from tests.detcore.sections import SECTIONS
from tests.detcore.test_cornernet import SMALL
from tests.detcore.test_detectors import small

NAMES = [*SECTIONS, "cornernet"]
MOVING = ["retinanet", "fcos-detectron2"]


def built(name: str) -> nn.Module:
    """Batch norm uses its stored statistics, and is the same however the images are shared out; a normaliser
    moves."""
    if name == "cornernet":
        torch.manual_seed(0)
        model = build_model(model_section(SMALL))
    else:
        model = small(name)
    model.eval()
    if name in MOVING:
        model.normalizer.train()
    return model


def four() -> tuple[Tensor, Tensor, Targets]:
    """Images with two objects and with one, then two without any: all that the second rank has."""
    images, sizes, targets = batch(3)
    others, _, _ = batch(3, seed=1)
    order = [0, 2, 1, 1]
    images = torch.cat([images[order[:3]], others[1:2]])
    return images, sizes[order], targets.map(lambda tensor: tensor[order])


def computed(model: nn.Module, images: Tensor, sizes: Tensor, targets: Targets) -> list[Tensor]:
    """Loss terms and gradients."""
    losses = model(images, sizes, targets)
    total(losses).backward()
    return [torch.stack(list(losses.values())).detach(), *(p.grad for p in model.parameters())]


def far() -> Tensor:
    """Two images whose channels have a mean near 300 and a standard deviation of 0.1; one's a little more."""
    noise = torch.randn(2, 3, 16, 4, generator=torch.Generator().manual_seed(0))
    return 300 + 0.1 * noise + torch.tensor([0.0, 0.05])[:, None, None, None]


def worker(rank: int, store: str, results: str) -> None:
    """One of two ranks, with half of the batch; writes the means over ranks."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    images, sizes, targets = four()
    own = slice(2 * rank, 2 * rank + 2)
    said: dict[str, Any] = {}
    for name in NAMES:
        model = built(name)
        said[name] = computed(model, images[own], sizes[own], targets.map(lambda tensor: tensor[own]))
        for tensor in said[name]:
            dist.all_reduce(tensor)
            tensor /= 2
        if name in MOVING:
            said[name].append(model.normalizer.average)

    norm, one = SyncBatchNorm(3), slice(rank, rank + 1)
    x = torch.arange(48.0).reshape(2, 3, 2, 4).sin().requires_grad_()
    y = norm(x[one])
    y.square().mul(torch.arange(4.0)).sum().backward()
    said["norm"] = [y.detach(), x.grad[one], norm.state_dict()]
    norm, x = SyncBatchNorm(3), far().requires_grad_()
    y = norm(x[one])
    y.square().mul(torch.arange(4.0)).sum().backward()
    said["far"] = [y.detach(), x.grad[one], norm.state_dict()]
    torch.save(said, f"{results}/{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has come to."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder / "store"), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one_big_batch(name: str, ranks: list[dict[str, Any]]) -> None:
    """The one without objects counts in the normalisers."""
    model = built(name)
    together = computed(model, *four())
    if name in MOVING:
        together.append(model.normalizer.average)
    for rank in ranks:
        for ours, wanted in zip(rank[name], together, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_norms_share_their_statistics(ranks: list[dict[str, Any]]) -> None:
    norm = nn.BatchNorm2d(3)
    x = torch.arange(48.0).reshape(2, 3, 2, 4).sin().requires_grad_()
    y = norm(x)
    y.square().mul(torch.arange(4.0)).sum().backward()
    ys, gradients, states = zip(*(rank["norm"] for rank in ranks), strict=True)
    torch.testing.assert_close(torch.cat(ys), y.detach())
    torch.testing.assert_close(torch.cat(gradients), x.grad, rtol=1e-4, atol=1e-5)
    for state in states:
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(state[key], value)


def test_norms_of_values_far_from_zero(ranks: list[dict[str, Any]]) -> None:
    """Where E[x^2] - E[x]^2 of float32 has no digit left; against float64."""
    norm, x = nn.BatchNorm2d(3).double(), far().double().requires_grad_()
    y = norm(x)
    y.square().mul(torch.arange(4.0)).sum().backward()
    ys, gradients, states = zip(*(rank["far"] for rank in ranks), strict=True)
    torch.testing.assert_close(torch.cat(ys), y.detach().float(), rtol=0, atol=1e-3)
    error = (torch.cat(gradients) - x.grad).norm() / x.grad.norm()
    assert error < 1e-4, error
    for state in states:
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(state[key], value.to(state[key].dtype))
