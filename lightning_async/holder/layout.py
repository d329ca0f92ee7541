"""Where each parameter lies in the flat buffers that holder and workers exchange."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_async.holder.hyperparams import HyperparamLayout

__all__ = ["FlatLayout", "all_parameters", "describe_model", "exchanged", "exchanged_parameters", "laid_out_like"]


def exchanged(parameter: Tensor) -> bool:
    """Whether a parameter travels: whether it is of a real floating-point dtype.

    Others (the codes of a quantised layer, say) never have a gradient here; the optimizers that hold them leave them
    where they are.

    Examples:
        >>> exchanged(torch.zeros(2)), exchanged(torch.zeros(2, dtype=torch.uint8))
        (True, False)
    """
    return parameter.is_floating_point()


def all_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """An optimizer's parameters, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def exchanged_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """An optimizer's parameters that travel, in the order of its groups."""
    return [parameter for parameter in all_parameters(optimizer) if exchanged(parameter)]


def laid_out_like(value: Tensor, parameter: Tensor) -> Tensor:
    """What an optimizer keeps for a parameter, in the memory order of the parameter; itself if it is in that order.

    Torch's fused kernels go over both memories in one order, without a look at the strides. A state that was saved for
    a module in channels_last is in the order of that.

    Args:
        value: of any shape; one of another shape than the parameter's is left as it is.
        parameter: whose it is.

    Examples:
        >>> saved = torch.arange(6.0).view(1, 2, 3, 1).to(memory_format=torch.channels_last)
        >>> laid_out = laid_out_like(saved, torch.zeros(1, 2, 3, 1))
        >>> torch.equal(laid_out, saved), laid_out.is_contiguous(), saved.is_contiguous()
        (True, True, False)
    """
    if value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


class FlatLayout:
    """The order, shapes and offsets of all parameters that the optimizers own.

    One flat buffer holds the parameters of optimizer 0, then those of optimizer 1, and so on, each in the order of
    its ``param_groups``. The buffer's dtype is at least float32, so a module in bfloat16 has float32 master weights.

    Args:
        optimizers: for each optimizer its parameters, in the order of its groups.

    Raises:
        ValueError: if there is no parameter, one is not floating point, or two optimizers share one.

    Examples:
        >>> layout = FlatLayout([[torch.zeros(2, 3), torch.zeros(4)]])
        >>> layout.numel
        10
        >>> [tuple(view.shape) for view in layout.views(torch.zeros(10), 0)]
        [(2, 3), (4,)]
    """

    def __init__(self, optimizers: Sequence[Sequence[Tensor]]) -> None:
        parameters = [parameter for owned in optimizers for parameter in owned]
        if not parameters:
            raise ValueError("the optimizers hold no parameter, so there is nothing to train")
        if len({id(parameter) for parameter in parameters}) != len(parameters):
            raise ValueError("two optimizers share a parameter; give each parameter to one optimizer")
        if not all(parameter.is_floating_point() for parameter in parameters):
            raise ValueError("every parameter must be of a real floating-point dtype")
        dtype = torch.float32
        for parameter in parameters:
            dtype = torch.promote_types(dtype, parameter.dtype)
        self.dtype = dtype
        self.shapes = [[tuple(parameter.shape) for parameter in owned] for owned in optimizers]
        sizes = [sum(parameter.numel() for parameter in owned) for owned in optimizers]
        bounds = [0, *itertools.accumulate(sizes)]
        self.ranges = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        self.numel = bounds[-1]

    def buffer(self) -> Tensor:
        """A new zeroed flat buffer for all parameters, shape ``(numel,)``."""
        return torch.zeros(self.numel, dtype=self.dtype)

    def segment(self, flat: Tensor, optimizer: int) -> Tensor:
        """The part of ``flat`` that belongs to one optimizer: the payload of its push."""
        return flat[self.ranges[optimizer]]

    def segment_bytes(self, optimizer: int) -> int:
        """Size of one optimizer's part in bytes."""
        chosen = self.ranges[optimizer]
        return (chosen.stop - chosen.start) * self.dtype.itemsize

    def views(self, flat: Tensor, optimizer: int) -> list[Tensor]:
        """Views into ``flat``, one per parameter of ``optimizer``, in its own shape."""
        views, offset = [], self.ranges[optimizer].start
        for shape in self.shapes[optimizer]:
            numel = torch.Size(shape).numel()
            views.append(flat[offset : offset + numel].view(shape))
            offset += numel
        return views

    def fingerprint(self) -> dict[str, Any]:
        """What two processes must agree on before the first payload: count, dtype and a digest of the shapes."""
        digest = hashlib.sha256(json.dumps(self.shapes).encode()).hexdigest()[:16]
        return {"parameters": self.numel, "dtype": str(self.dtype).removeprefix("torch."), "shapes": digest}


def describe_model(layout: FlatLayout, groups: Sequence[HyperparamLayout]) -> dict[str, Any]:
    """What a worker and the holder must agree on before the first payload, as JSON values.

    Args:
        layout: where each parameter lies.
        groups: which hyperparameters each optimizer's param groups have.
    """
    return {
        **layout.fingerprint(),
        "groups": [len(hyperparams.names) for hyperparams in groups],
        "optimizers": [f"{hyperparams.kind} {hyperparams.digest()}" for hyperparams in groups],
    }
