"""Refuses user code's collectives while the ranks train asynchronously, before anything waits.

No two ranks are at the same batch then: a collective would wait for ever, or be answered by another one that the call
does not belong to. The guard sits in torch's dispatcher, where every call on a process group passes: those of
``torch.distributed`` however they were imported, functional ones, compiled ones, methods of a group, from any thread.
The package's own data channels use Gloo's and NCCL's backends directly and do not pass there.

Process-wide while it is in place.
"""

from __future__ import annotations

import functools
import sys
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed import distributed_c10d

__all__ = ["allow_collectives", "asynchronous_call_error", "refuse_collectives"]

# Wins over every backend's kernel, also under torch.inference_mode.
_KEY = "BackendSelect"

_guard: Any = None  # a torch.library.Library, whose methods have no types
_new_group = distributed_c10d._new_group_with_tag


def asynchronous_call_error(call: str) -> MisconfigurationException:
    """What a user reads whose code calls a collective in a batch.

    Args:
        call: the function, and where it was called if its traceback does not say.
    """
    return MisconfigurationException(
        f"{call} was called while the ranks train asynchronously: no two of them are at the same batch, so it would "
        "wait for ranks that do not come. Call it in validation or at the end of the epoch (on_validation_epoch_end, "
        'on_train_epoch_end), or in on_train_start, on every rank; or use strategy="ddp".'
    )


def refuse_collectives() -> None:
    """Makes every collective call on a group of several ranks an error; idempotent."""
    global _guard
    if _guard is not None or not dist.is_available():
        return
    library: Any = torch.library.Library
    guard = library("c10d", "IMPL")
    for name in collective_operators():
        guard.impl(name, _refusal(name), _KEY, with_keyset=True)
    # To make a group is a collective as well, and waits on a store, past the dispatcher.
    distributed_c10d._new_group_with_tag = _refuse_new_group
    _guard = guard


def allow_collectives() -> None:
    """Undoes `refuse_collectives`; idempotent."""
    global _guard
    guard, _guard = _guard, None
    if guard is not None:
        guard._destroy()
        distributed_c10d._new_group_with_tag = _new_group


@functools.cache
def collective_operators() -> tuple[str, ...]:
    """The operators of torch's dispatcher that run on a process group, send and receive included."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("c10d::")]
    operators = [name.removeprefix("c10d::") for name in names]
    return tuple(sorted(name for name in operators if "ProcessGroup" in str(_overload(name)._schema)))


def _overload(name: str) -> Any:
    return getattr(torch.ops.c10d, name).default


def _refusal(name: str) -> Any:
    overload = _overload(name)
    types = [str(argument.type) for argument in overload._schema.arguments]
    position = next(index for index, kind in enumerate(types) if kind.endswith("c10d.ProcessGroup"))

    def check(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if dist.ProcessGroup.unbox(arguments[position]).size() > 1:
            raise asynchronous_call_error(_describe_call(sys._getframe(1), name))
        after = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
        return overload.redispatch(keys & after, *arguments)

    return check


def _refuse_new_group(*_: Any, **__: Any) -> Any:
    raise asynchronous_call_error(_describe_call(sys._getframe(1), "new_group"))


def _describe_call(frame: FrameType | None, operator: str) -> str:
    """The outermost function of torch's on the way to ``frame``, which is what user code has called, and from where."""
    name = f"c10d.{operator}"
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] != "torch":
            return f"{name} ({frame.f_code.co_filename}:{frame.f_lineno})"
        # torch logs each collective in a wrapper.
        if frame.f_code.co_name != "wrapper":
            name = f"{module.removesuffix('.distributed_c10d')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return name
