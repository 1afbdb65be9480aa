"""On a GPU: the numbers of the CPU, a host that waits for nothing, checkpoints beside the steps, and a run
that comes back bit for bit. Skipped where there is none."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from detcore.config import Train
from detcore.data.feed import Inputs
from detcore.distributed import World
from detcore.learner import Learner, settle
from detcore.models import build_model
from detcore.snapshot import Snapshot
from tests.detcore.conftest import Run, assert_same, batch, model_section, total
from tests.detcore.sections import BACKBONE, HEAD, SECTIONS
from tests.detcore.test_cornernet import SMALL
from tests.detcore.test_train import terminate

HRNET = {"name": "fcos", "backbone": {"name": "hrnet_w18", "width": 0.25, "norm": "bn"}, "neck": "hrfpn"}
EVERY = SECTIONS | {"cornernet": SMALL, "hrnet": HRNET | {"head": HEAD}}
EACH = pytest.mark.parametrize("name", EVERY)


def section(name: str) -> dict[str, Any]:
    return {"num_classes": 3, "backbone": BACKBONE} | EVERY[name]


def learner(tiny: dict[str, Any], name: str, device: torch.device, **train: Any) -> Learner:
    cfg = Train.model_validate(tiny | {"model": section(name)} | train)
    settle(cfg)
    return Learner(cfg, World(0, 1, device), pretrained=False)


def part(device: torch.device, seed: int = 0) -> Inputs:
    images, sizes, targets = batch(seed=seed)
    return Inputs(images.to(device), sizes.to(device), targets.map(lambda tensor: tensor.to(device)))


@contextmanager
def never_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def exact() -> Iterator[None]:
    """Products in float32 as the CPU has them, not in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def bit_exact() -> Iterator[None]:
    """What `settle` sets for `deterministic: true` is set back."""
    yield
    torch.use_deterministic_algorithms(False)


def computed(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Loss terms and all gradients in one, on the CPU. Batch norm takes its stored statistics: those of a few
    values of a small map magnify every rounding."""
    torch.manual_seed(0)
    model = build_model(model_section(section(name)), pretrained=False).to(device).eval()
    losses = model(*part(device))
    total(losses).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return torch.stack(list(losses.values())).cpu(), gradients.cpu()


@EACH
def test_losses_and_gradients_are_those_of_the_cpu(name: str, cuda: torch.device, exact: None) -> None:
    losses, gradients = computed(name, cuda)
    expected, wanted = computed(name, torch.device("cpu"))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert (gradients - wanted).norm() <= 1e-2 * wanted.norm()


@EACH
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_whole_step_never_waits(name: str, amp: str, tiny: dict[str, Any], cuda: torch.device) -> None:
    """Clipped, guarded, scaled and recorded, channels last."""
    learning = learner(tiny, name, cuda, amp=amp, channels_last=True, skip_nonfinite=1)
    parts = [part(cuda, seed) for seed in range(3)]
    learning.step(1, [parts[0]])
    with never_waiting():
        terms = [learning.step(step, [parts[step - 1]]) for step in (2, 3)]
    assert torch.stack(terms).isfinite().all()
    assert all(p.isfinite().all() for p in learning.model.parameters())


@EACH
def test_it_goes_on_bit_for_bit(name: str, tiny: dict[str, Any], cuda: torch.device, bit_exact: None) -> None:
    """From what a checkpoint holds, with `deterministic: true`, in bf16."""
    made = [learner(tiny, name, cuda, amp="bf16", deterministic=True) for _ in range(2)]
    one, other = made
    for step in (1, 2):
        one.step(step, [part(cuda, step)])
    weights, state = copy.deepcopy((one.model.state_dict(), one.state_dict()))
    other.model.load_state_dict(weights)
    other.load_state_dict(state)
    for step in (3, 4):
        assert_same(other.step(step, [part(cuda, step)]), one.step(step, [part(cuda, step)]))
    assert_same(dict(other.model.state_dict()), dict(one.model.state_dict()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what inductor imports
def test_a_compiled_step_learns_the_same(tiny: dict[str, Any], cuda: torch.device, exact: None) -> None:
    plain, compiled = (learner(tiny, "fcos", cuda, compile=on) for on in (False, True))
    compiled.model.load_state_dict(plain.model.state_dict())
    for step in (1, 2):
        inputs = part(cuda, step)
        torch.testing.assert_close(
            compiled.step(step, [inputs]), plain.step(step, [inputs]), rtol=2e-2, atol=2e-3
        )


def test_a_snapshot_is_of_its_moment(cuda: torch.device) -> None:
    """Though the steps that change all of it are under way before the first byte is copied."""
    weights, counts = (torch.zeros(1 << 26, device=cuda, requires_grad=grad) for grad in (True, False))
    optimizer = torch.optim.SGD([weights], lr=1.0)
    weights.grad = torch.full_like(weights, -1.0)
    snapshot = Snapshot(optimizer)
    state = {"weights": weights.detach(), "counts": counts}
    snapshot.take(state)
    for moment in range(1, 5):
        with never_waiting():
            optimizer.step()
            counts.add_(1)  # as a forward pass does
            taken = snapshot.take(state)
            counts.add_(1)
            optimizer.step()
        snapshot.wait()
        for name, tensor in taken.items():
            assert tensor.is_pinned() and (tensor == 2 * moment - 1).all(), name


def test_a_run_that_was_stopped_ends_the_same(
    tiny: dict[str, Any], new_run: Callable[..., Run], cuda: torch.device
) -> None:
    """Bit for bit, on the GPU, through NCCL."""
    tiny |= {"deterministic": True, "amp": "bf16", "channels_last": True}
    tiny["schedule"]["iterations"], tiny["evaluation"] = 300, {"every": 250}
    undisturbed, run = new_run("undisturbed", tiny), new_run("disturbed", tiny)
    for each in (undisturbed, run):
        each.env |= {"CUDA_VISIBLE_DEVICES": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        each.env["MASTER_PORT"] = "29517"
    undisturbed.finish(ranks=1)
    for _ in range(2):
        process = run.start(ranks=1)
        run.wait(run.phase("training"), process)
        assert terminate(run, process)["saved"], run.log()
    run.finish(ranks=1)
    assert_same(run.final(), undisturbed.final())
    assert run.metrics() == undisturbed.metrics()
