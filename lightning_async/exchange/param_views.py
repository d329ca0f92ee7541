"""The module's parameters and gradients in a channel's flat buffers, without a copy where that is safe."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_async.holder.layout import FlatLayout
from lightning_async.transport.base import Buffers

__all__ = ["ParameterViews", "UnsupportedGradientError"]

# From here on copying a gradient while the processor's caches still hold it saves more than the hook costs.
_HOOKED_FROM_BYTES = 1 << 20
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BYTES, _KEPT_BYTES = 32 << 20, 256 << 20


class UnsupportedGradientError(RuntimeError):
    """A gradient that is no dense tensor.

    Args:
        parameter: whose gradient it is.
    """

    def __init__(self, parameter: Tensor) -> None:
        super().__init__(f"the gradient of a parameter of shape {tuple(parameter.shape)} is no dense tensor")
        self.parameter = parameter


class ParameterViews:
    """Ties a module's parameters to the buffer that the holder fills, and its gradients to the one that it reads.

    A parameter becomes a view of the buffer: fresh values install in it with the message that announces them, which
    comes only at a step boundary. Autograd is told of each installation, so that a graph kept across one fails loudly
    instead of giving a wrong gradient. Each has a storage of its own, of its own size, in the buffer's memory: what
    saves a tensor with its storage (torch.save, pickle) saves the parameter and not the buffer. What cannot be a view
    (another dtype, another memory format) or is no longer one (``module.to(...)``) is found at each installation, and
    copied.

    A gradient moves into the buffer once, when autograd has completed it: then ``.grad`` is a view of the buffer, on
    which accumulation, unscaling and clipping work in place. Small models are copied when they are pushed, which is
    cheaper than a hook per parameter.

    Args:
        parameters: the parameters of each optimizer, in the layout's order; their values are kept.
        layout: where each parameter lies.
        buffers: this rank's side of the channel.
        moves_gradients: whether gradients may stay in the buffer until the next step.
    """

    def __init__(
        self,
        parameters: Sequence[Sequence[Tensor]],
        layout: FlatLayout,
        buffers: Buffers,
        moves_gradients: bool = True,
    ) -> None:
        self._gradients = [layout.views(buffers.gradient, index) for index in range(len(parameters))]
        self._owned = [list(owned) for owned in parameters]
        views = [view for index in range(len(parameters)) for view in layout.views(buffers.parameters, index)]
        self._pairs = list(zip((p for owned in parameters for p in owned), views, strict=True))
        self._pointers = [view.data_ptr() for view in views]
        ends = [*itertools.accumulate(map(len, self._owned), initial=0)]
        self._places = [slice(start, stop) for start, stop in itertools.pairwise(ends)]
        self._bound: list[Tensor] = []
        for parameter, view in self._pairs:
            view.copy_(parameter.detach())
            if parameter.dtype is view.dtype and parameter.is_contiguous() and parameter.device == view.device:
                parameter.data = _with_own_storage(view)
                self._bound.append(parameter)
        bound = set(map(id, self._bound))
        self._bound_of = [[parameter for parameter in owned if id(parameter) in bound] for owned in self._owned]
        large = layout.numel * layout.dtype.itemsize >= _HOOKED_FROM_BYTES
        # On a GPU one copy of all gradients is a single kernel; a hook would launch one for each.
        on_host = buffers.gradient.device.type == "cpu"
        self._hooks = self._install_hooks() if moves_gradients and large and on_host else []
        if large and on_host:
            _return_freed_memory()
        if self._hooks:
            _keep_freed_memory()

    def gather(self, index: int, into: Sequence[Tensor] | None = None) -> list[bool]:
        """Brings the gradients of one optimizer into the buffer; returns which parameters have one.

        Args:
            index: the optimizer.
            into: views to copy them to in place of the buffer's, one per parameter.
        """
        present, targets, sources = [], [], []
        try:
            for parameter, view in zip(self._owned[index], into or self._gradients[index], strict=True):
                gradient = parameter.grad
                present.append(gradient is not None)
                if gradient is not None and gradient.data_ptr() != view.data_ptr():
                    targets.append(view)
                    sources.append(gradient)
        except RuntimeError as error:
            # Who has no data has no pointer. To ask each gradient what it is would take as long again.
            for parameter in self._owned[index]:
                if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                    raise UnsupportedGradientError(parameter) from error
            raise
        if targets:
            with torch.no_grad():
                torch._foreach_copy_(targets, sources)
        return present

    def install(self, index: int | None = None) -> None:
        """To be called when fresh parameters are in the buffer.

        Args:
            index: the optimizer whose parameters are fresh, where it is known that the others' are not; None for all.
        """
        places = slice(None) if index is None else self._places[index]
        strays = [
            (parameter, view)
            for (parameter, view), pointer in zip(self._pairs[places], self._pointers[places], strict=True)
            if parameter.data_ptr() != pointer
        ]
        if strays:
            with torch.no_grad():
                torch._foreach_copy_([parameter for parameter, _ in strays], [view for _, view in strays])
        bound = self._bound if index is None else self._bound_of[index]
        if bound:
            torch.autograd.graph.increment_version(bound)

    def release(self) -> None:
        """Gives the module memory of its own again: a view would keep, and save, the whole buffer."""
        for hook in self._hooks:
            hook.remove()
        for (parameter, _), pointer in zip(self._pairs, self._pointers, strict=True):
            if parameter.data_ptr() == pointer:
                parameter.data = parameter.data.clone()
        for owned, views in zip(self._owned, self._gradients, strict=True):
            for parameter, view in zip(owned, views, strict=True):
                gradient = parameter.grad
                if gradient is None or gradient.layout is not torch.strided:
                    continue
                if gradient.data_ptr() == view.data_ptr():
                    parameter.grad = gradient.clone()

    def _install_hooks(self) -> list[torch.utils.hooks.RemovableHandle]:
        hooks = []
        for owned, views in zip(self._owned, self._gradients, strict=True):
            parameter: Any  # torch does not type this method
            for parameter, view in zip(owned, views, strict=True):
                if parameter.requires_grad and parameter.dtype is view.dtype and parameter.device == view.device:
                    move = functools.partial(_move_gradient, view=view)
                    hooks.append(parameter.register_post_accumulate_grad_hook(move))
        return hooks


def _with_own_storage(view: Tensor) -> Tensor:
    """The same memory as a tensor whose storage ends where it does; the memory lives as long as either."""
    if view.numel() == 0:
        return view
    own: Tensor = torch.from_dlpack(view)
    return own


def _return_freed_memory() -> None:
    """Gives the storage that the parameters had before back to the system; glibc keeps it for the process otherwise."""
    if (trim := _of_libc("malloc_trim")) is not None:
        trim(0)


def _keep_freed_memory() -> None:
    """Lets glibc keep what the gradients' former storage gives back, for the next backward.

    A gradient that moves into the buffer leaves its storage behind at once. glibc returns blocks of that size to the
    system, and the next one is faulted in again page by page: 15,000 times in a step of ResNet18, 4 % of its time.
    Blocks of up to 32 MiB and 256 MiB in all are kept; who has set a limit of their own keeps that.
    """
    chosen = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if (set_option := _of_libc("mallopt")) is None or any(name in os.environ for name in chosen):
        return
    set_option(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
    set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _of_libc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _move_gradient(parameter: Tensor, view: Tensor) -> None:
    gradient = parameter.grad
    if gradient is not None and gradient.data_ptr() != view.data_ptr() and gradient.layout is torch.strided:
        view.copy_(gradient)
        parameter.grad = view
