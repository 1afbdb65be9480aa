"""A copy of a state in memory of its own, so that training may change the state while the copy is written."""

import copy
from collections.abc import Callable
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Place = tuple[Any, ...]


class Snapshot:
    """CPU memory, allocated once, for one copy of a state after another: in fresh pages a copy takes three
    times as long.

    On CUDA it is pinned, and the copies run beside the next step, on a stream of their own. What a forward
    pass may change is copied before the next one, what `optimizer` alone changes before its next step: for
    both the device waits, never the host.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._memory: dict[Place, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        optimizer.register_step_pre_hook(lambda *_: self._before_step())

    def take(self, state: Any) -> Any:
        """A copy of `state`, of dicts, lists and tensors; the next one overwrites it. Its tensors have their
        content after `wait`."""
        pairs: list[tuple[Tensor, Tensor]] = []
        before, self._memory = self._memory, {}

        def room(place: Place, tensor: Tensor) -> Tensor:
            own = before.get(place)
            if own is None or not _fits(own, tensor):
                own = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
            self._memory[place] = own
            pairs.append((own, tensor.detach()))
            return own

        taken = _replaced(state, (), room)
        if any(tensor.is_cuda for _, tensor in pairs):
            self._copy_beside(pairs)
        else:
            for own, tensor in pairs:
                own.copy_(tensor)
        return taken

    def wait(self) -> None:
        """Until all is copied; from any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy_beside(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        own_state = (value for entry in self._optimizer.state.values() for value in entry.values())
        parameters = (p for group in self._optimizer.param_groups for p in group["params"])
        late = {t.data_ptr() for t in chain(parameters, own_state) if isinstance(t, Tensor)}
        pairs.sort(key=lambda pair: pair[1].data_ptr() in late)
        self._stream = self._stream or torch.cuda.Stream()
        training = torch.cuda.current_stream()
        self._stream.wait_stream(training)
        with torch.cuda.stream(self._stream):
            for is_late, group in groupby(pairs, key=lambda pair: pair[1].data_ptr() in late):
                for own, tensor in group:
                    own.copy_(tensor, non_blocking=True)
                    if tensor.is_cuda:
                        tensor.record_stream(self._stream)
                if not is_late:
                    training.wait_stream(self._stream)
            self._copied = self._stream.record_event()

    def _before_step(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)


def _fits(own: Tensor, tensor: Tensor) -> bool:
    """Strides count: torch.save keeps them, and so a resumed model's memory format."""
    return (own.shape, own.dtype, own.stride()) == (tensor.shape, tensor.dtype, tensor.stride())


def _replaced(value: Any, place: Place, room: Callable[[Place, Tensor], Tensor]) -> Any:
    """`value` with each tensor replaced by `room`'s; dicts and lists are new ones."""
    if isinstance(value, Tensor):
        return room(place, value)
    if isinstance(value, dict):
        new = copy.copy(value)  # also the `_metadata` that hangs on a module's state dict
        for key, inner in value.items():
            new[key] = _replaced(inner, (*place, key), room)
        return new
    if isinstance(value, list | tuple):
        return type(value)(_replaced(inner, (*place, i), room) for i, inner in enumerate(value))
    return value
