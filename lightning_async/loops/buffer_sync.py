"""What becomes of a module's buffers where the ranks meet. The rules are stated here once.

Under DDP all ranks have rank 0's buffers, each of which has seen one of N equal shares of the batches. Here each rank
changes its own between two meetings, over as many batches as it computes. Where the ranks meet,

- the running statistics of batch and instance normalization, and buffers that a module names in ``averaged_buffers``,
  become the mean over the ranks, which have seen different batches;
- counters, which every rank has advanced by the same amount for each of its batches, become what they are under DDP;
- all other buffers become rank 0's, as under DDP;
- what DDP is told to ignore (``_ddp_params_and_buffers_to_ignore``), and what does not have one shape and dtype on all
  ranks, stays each rank's own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_async.holder.layout import all_parameters
from lightning_async.loops.tensor_sync import average, broadcast_tensors, take_unlike_from_rank_0

__all__ = ["BufferSync", "check_averaged", "check_ignored", "counted_as_ddp", "ignored_names", "share_module"]

_Gather = Callable[[Any], list[Any]]

_RUNNING_STATISTICS = ("running_mean", "running_var")
_MAX_COUNTER_ELEMENTS = 1024


class _Report(NamedTuple):
    """What one rank tells the others of its buffers.

    Attributes:
        layout: digest of their names, shapes and dtypes.
        batches: batches that it has computed since the last meeting.
        advanced: by how much each small buffer that has changed since then has.
    """

    layout: str
    batches: int
    advanced: dict[str, tuple[float, ...]]


class BufferSync:
    """The buffers of one module from meeting to meeting.

    Args:
        module: the module; its buffers may be replaced, and others be added, at any time.
        gather: collects an object from every rank, in their order.
        rank: this rank.
    """

    def __init__(self, module: nn.Module, gather: _Gather, rank: int) -> None:
        self._module = module
        self._gather = gather
        self._rank = rank
        self._noted: dict[str, Tensor] = {}
        self._kept: set[str] = set()

    def begin_segment(self) -> None:
        """Notes where counters stand, before the ranks part."""
        buffers = _shared_buffers(self._module)
        self._noted = {name: buffer.detach().clone() for name, buffer in buffers.items() if _may_count(buffer)}

    def meet(self, batches: int, batches_as_ddp: int) -> None:
        """Gives every rank the same buffers; a collective call.

        Args:
            batches: those that this rank has computed since `begin_segment`.
            batches_as_ddp: those that every rank would have computed under DDP.
        """
        buffers = _shared_buffers(self._module)
        layouts = {name: _describe(buffer) for name, buffer in buffers.items()}
        reports: list[_Report] = self._gather(_Report(_digest(layouts), batches, self._advanced(buffers)))
        if len({report.layout for report in reports}) > 1:
            common, unlike = _compare(self._gather(layouts))
            self._keep(unlike)
            buffers = {name: buffers[name] for name in sorted(common)}
        means = _averaged(self._module)
        if self._rank == 0:
            self._count_as_ddp({n: b for n, b in buffers.items() if id(b) not in means}, reports, batches_as_ddp)
        average([buffer for buffer in buffers.values() if id(buffer) in means])
        take_unlike_from_rank_0([buffer for buffer in buffers.values() if id(buffer) not in means])

    def _advanced(self, buffers: dict[str, Tensor]) -> dict[str, tuple[float, ...]]:
        advanced = {}
        for name, before in self._noted.items():
            now = buffers.get(name)
            if now is None or _describe(now) != _describe(before) or torch.equal(now, before):
                continue
            wide = torch.float64 if now.is_floating_point() else torch.int64
            advanced[name] = tuple((now.detach().to(wide) - before.to(wide)).double().reshape(-1).tolist())
        return advanced

    def _count_as_ddp(self, buffers: dict[str, Tensor], reports: Sequence[_Report], batches_as_ddp: int) -> None:
        shares = [report.batches for report in reports]
        for name in self._noted.keys() & buffers.keys():
            buffer, before = buffers[name], self._noted[name]
            advanced = [report.advanced.get(name, (0.0,) * before.numel()) for report in reports]
            if not any(name in report.advanced for report in reports) or _describe(buffer) != _describe(before):
                continue
            rounding = _rounding(buffer, before)
            by_element = [counted_as_ddp(one, shares, batches_as_ddp, rounding) for one in zip(*advanced, strict=True)]
            counted = [one for one in by_element if one is not None]
            if len(counted) < len(by_element):
                continue
            wide = torch.float64 if rounding else torch.int64
            added = torch.tensor(counted, dtype=wide, device=buffer.device).view_as(buffer)
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                buffer.copy_(before.to(wide) + added)

    def _keep(self, unlike: dict[str, list[str]]) -> None:
        """Says once of each buffer that is unlike on the ranks that it stays so."""
        news = sorted(unlike.keys() - self._kept)
        self._kept.update(news)
        if news:
            rank_zero_warn(
                "These buffers do not have one shape and dtype on all ranks, so each rank keeps its own: "
                f"{_list_unlike(news, unlike)}. Name them in the module's _ddp_params_and_buffers_to_ignore if that is "
                "meant."
            )


def counted_as_ddp(
    advanced: Sequence[float], batches: Sequence[int], batches_as_ddp: int, rounding: float = 0.0
) -> float | None:
    r"""By how much a counter has advanced under DDP, if it is one.

    A counter advances by the same amount :math:`c` for each batch. Rank r, which has computed :math:`n_r` batches,
    has advanced it by :math:`a_r = c\,n_r`; under DDP, with n batches on every rank, it advances by :math:`c\,n`.

    Args:
        advanced: :math:`a_r` of each rank.
        batches: :math:`n_r` of each rank.
        batches_as_ddp: n.
        rounding: what one addition to it may be off by; 0 for integers, whose result is rounded down.

    Returns:
        :math:`c\,n`, or None if the ranks' advances have no such :math:`c` in common.

    Examples:
        >>> counted_as_ddp([28, 4], batches=[28, 4], batches_as_ddp=16)
        16.0
        >>> counted_as_ddp([14, 2], batches=[28, 4], batches_as_ddp=15)
        7.0
        >>> counted_as_ddp([100, 3], batches=[28, 4], batches_as_ddp=16)
    """
    total = sum(batches)
    if total == 0:
        return None
    rate = sum(advanced) / total
    for a, n in zip(advanced, batches, strict=True):
        if abs(a - rate * n) > 1e-9 * abs(a) + rounding * n:
            return None
    return rate * batches_as_ddp if rounding else float(math.floor(rate * batches_as_ddp + 1e-6))


def share_module(module: nn.Module, gather: _Gather) -> None:
    """Gives every rank rank 0's parameters and buffers before training; a collective call.

    Raises:
        ValueError: if the ranks' parameters are unlike; on every rank.
    """
    ignored = ignored_names(module)
    parameters = {n: p for n, p in module.named_parameters() if n not in ignored and not is_lazy(p)}
    buffers = _shared_buffers(module)
    described = [{name: _describe(tensor) for name, tensor in kind.items()} for kind in (parameters, buffers)]
    everyone: list[list[dict[str, str]]] = gather(described)
    _, unlike = _compare([of_rank[0] for of_rank in everyone])
    if unlike:
        raise ValueError(
            f"the ranks have built different modules: {_list_unlike(sorted(unlike), unlike)}. Build the same module on "
            "every rank"
        )
    common, _ = _compare([of_rank[1] for of_rank in everyone])
    broadcast_tensors([*(parameters[n] for n in sorted(parameters)), *(buffers[n] for n in sorted(common))])


def ignored_names(module: nn.Module) -> frozenset[str]:
    """Parameters and buffers that stay each rank's own, as the module tells DDP."""
    return frozenset(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))


def check_ignored(module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Refuses to train what DDP is told to ignore.

    Raises:
        ValueError: if an optimizer has such a parameter; the message names it.
    """
    owned = {id(parameter) for optimizer in optimizers for parameter in all_parameters(optimizer)}
    ignored = ignored_names(module)
    both = [name for name, parameter in module.named_parameters() if name in ignored and id(parameter) in owned]
    if both:
        raise ValueError(
            f"{', '.join(both)}: named in _ddp_params_and_buffers_to_ignore and given to an optimizer. DDP lets each "
            "rank train its own there; here what an optimizer has is the holder's, and the same on all ranks. Take it "
            "out of one of the two"
        )


def check_averaged(module: nn.Module) -> None:
    """Refuses a choice of ``averaged_buffers`` that means nothing.

    Raises:
        ValueError: if a name is not that of a floating-point buffer.
    """
    for path, part in module.named_modules():
        buffers = dict(part.named_buffers())
        for name in _choice(part):
            if name not in buffers or not buffers[name].is_floating_point():
                found = ", ".join(n for n, b in buffers.items() if b.is_floating_point()) or "none"
                raise ValueError(
                    f"averaged_buffers of {path or 'the module itself'} names {name!r}, which is not one of its "
                    f"floating-point buffers ({found})"
                )


def _choice(part: nn.Module) -> Collection[str]:
    names = getattr(part, "averaged_buffers", ())
    if isinstance(names, str) or not isinstance(names, Collection):
        raise ValueError(f"averaged_buffers of a {type(part).__name__} must be a list of names of its buffers")
    return names


def _averaged(module: nn.Module) -> set[int]:
    """The buffers that become the mean over the ranks, by identity."""
    found = set()
    for part in module.modules():
        names = {*_choice(part), *(_RUNNING_STATISTICS if isinstance(part, _NormBase) else ())}
        if names:
            found |= {id(b) for name, b in part.named_buffers() if name in names and b.is_floating_point()}
    return found


def _shared_buffers(module: nn.Module) -> dict[str, Tensor]:
    ignored = ignored_names(module)
    named = {n: b for n, b in module.named_buffers() if n not in ignored and not is_lazy(b) and _is_dense(b)}
    return {name: named[name] for name in sorted(named)}


def _is_dense(buffer: Tensor) -> bool:
    # A sparse one is a constant, such as a graph, and no collective takes it.
    return buffer.layout is torch.strided


def _may_count(buffer: Tensor) -> bool:
    return buffer.numel() <= _MAX_COUNTER_ELEMENTS and buffer.dtype is not torch.bool and not buffer.is_complex()


def _rounding(buffer: Tensor, before: Tensor) -> float:
    if not buffer.is_floating_point():
        return 0.0
    largest = max(float(tensor.detach().abs().max()) for tensor in (buffer, before))
    return torch.finfo(buffer.dtype).eps * max(largest, torch.finfo(buffer.dtype).tiny)


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _digest(layouts: dict[str, str]) -> str:
    return hashlib.blake2b(repr(layouts).encode(), digest_size=16).hexdigest()


def _compare(everyone: Sequence[dict[str, str]]) -> tuple[list[str], dict[str, list[str]]]:
    """Names that are alike on all ranks; and for each other one what it is on each rank."""
    names = sorted(set().union(*everyone))
    of_ranks = {name: [layouts.get(name, "none") for layouts in everyone] for name in names}
    common = [name for name in names if len(set(of_ranks[name])) == 1]
    return common, {name: of_ranks[name] for name in names if len(set(of_ranks[name])) > 1}


def _list_unlike(names: Iterable[str], unlike: dict[str, list[str]]) -> str:
    def one(name: str) -> str:
        return f"{name} ({', '.join(f'rank {rank}: {what}' for rank, what in enumerate(unlike[name]))})"

    return "; ".join(map(one, names))
