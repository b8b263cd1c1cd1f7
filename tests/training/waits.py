"""An accelerator that is none: its tensors say that they are on one, are computed on the CPU, and every operation for
which the host would have to wait is noted.

A tensor of it is a wrapper around a CPU tensor. As an accelerator's, it has no ``numpy()``, and does not mix with a
tensor of the host, but for numbers.
"""

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
# Of the device types without a backend in PyTorch's wheels, autograd runs this one's backward passes without a stream.
DEVICE = torch.device("lazy", 0)
# The host reads the result, or how large it is, before it can go on.
READING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.bincount,
    aten.unique_dim,
    aten._unique,
    aten._unique2,
    aten.unique_consecutive,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPYING = {aten._to_copy, aten.copy_, aten.copy}


class Wait(NamedTuple):
    """An operation that waits, and the lines of selkd (or, if there are none, of others) that led to it."""

    operation: str
    place: str


class OnDevice(Tensor):
    """A tensor of the accelerator."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {}, None)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner!r})"


class Accelerator(TorchDispatchMode):
    """Within the block, tensors can be made on ``DEVICE``; ``waits`` lists what the host waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {}, self.waits)


def _compute(function: Any, args: Any, kwargs: dict[str, Any], waits: list[Wait] | None) -> Any:
    """Run an operation on the CPU, note whether it waits, and wrap what is on the device."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    to = kwargs.get("device")
    if function.overloadpacket in COPYING and function.overloadpacket is not aten._to_copy:
        is_result_on_device = isinstance(args[0], OnDevice)
    else:
        is_result_on_device = bool(on_device) if to is None else torch.device(to).type == DEVICE.type
    if not on_device and not is_result_on_device:
        return function(*args, **kwargs)
    if waits is not None and _waits(function, args, kwargs, tensors, is_result_on_device):
        waits.append(Wait(str(function), _place()))
    if to is not None and torch.device(to).type == DEVICE.type:
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner = tree_map(lambda leaf: leaf.inner if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
    wrappers = {id(tensor.inner): tensor for tensor in on_device}
    answer = function(*inner[0], **inner[1])
    if not is_result_on_device:
        return answer
    return tree_map(lambda leaf: _wrapped(leaf, wrappers) if isinstance(leaf, Tensor) else leaf, answer)


def _wrapped(leaf: Tensor, wrappers: dict[int, OnDevice]) -> OnDevice:
    """The wrapper that an operation in place was called with, or a new one."""
    known = wrappers.get(id(leaf))
    return OnDevice(leaf) if known is None else known


def _waits(function: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], is_result_on_device: bool) -> bool:
    """Whether the host waits for the device; an AssertionError if the operation is impossible on one."""
    operation = function.overloadpacket
    if operation in COPYING:
        source = args[0] if operation is aten._to_copy else args[1]
        if isinstance(source, OnDevice) and is_result_on_device:
            return False
        to_device = is_result_on_device and not isinstance(source, OnDevice)
        is_number = operation is not aten._to_copy and source.dim() == 0
        is_asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        return not (to_device and (is_asynchronous or is_number))
    of_host = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    if operation in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, OnDevice) for index in indices):
            return True  # they are copied to the device
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        fills = operation is not aten.index and not isinstance(args[2], OnDevice) and args[2].numel() == 1
        return bool(masks) and not fills
    assert all(tensor.dim() == 0 for tensor in of_host), f"{function}: a tensor of the host among the device's"
    if operation is aten.where and of_host:
        return True  # PyTorch copies the number to the device
    if operation is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    return operation in READING


def _place() -> str:
    """The innermost lines outside torch and this file: selkd's, or else any other's."""
    frames = [
        f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_stack()
        if "/torch/" not in frame.filename and frame.filename != __file__
    ]
    return " < ".join(frames[-1:-4:-1])


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """``module`` with its parameters and buffers on the accelerator; tied parameters stay tied."""
    done: dict[int, Tensor] = {}
    for part in module.modules():
        for kind in (part._parameters, part._buffers):
            for name, tensor in kind.items():
                if tensor is None or isinstance(tensor, OnDevice):
                    continue
                if id(tensor) not in done:
                    wrapped: Tensor = OnDevice(tensor.detach().clone())
                    if isinstance(tensor, torch.nn.Parameter):
                        wrapped = torch.nn.Parameter(wrapped, requires_grad=tensor.requires_grad)
                    done[id(tensor)] = wrapped
                kind[name] = done[id(tensor)]
    return module


@contextlib.contextmanager
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """An ``Accelerator``; within the block autocast takes it for a CPU."""
    own, is_enabled = torch.autocast, torch.is_autocast_enabled

    class Autocast(own):  # type: ignore[misc,valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", Autocast)
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda device="cpu": is_enabled("cpu" if device == DEVICE.type else device)
    )
    # A tensor made of Python's numbers is one of the host first, and then copied, as on a real device.
    with Accelerator() as mode:
        previous = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield mode
        finally:
            torch._C._set_only_lift_cpu_tensors(previous)
