"""The updates of AMSGrad, Adam and AdamW by torch's fused kernel; a large model's in parts, and several at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.holder import blocks
from lightning_async.holder.amsgrad import STEP_AT_INFINITY
from lightning_async.holder.blocks import Block, cut
from lightning_async.holder.step_update import StepUpdate
from lightning_async.holder.team import Team

__all__ = ["FusedUpdate", "Kernel", "Step"]

# What the optimizer keeps of a parameter and the kernel takes, in its order.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Kernel(NamedTuple):
    """What the kernel is told of a param group besides tensors.

    Attributes:
        call: the kernel.
        options: its numbers and switches.
        counts: whether it is told the step counts, for bias correction.
    """

    call: Any
    options: Mapping[str, Any]
    counts: bool


class Step(NamedTuple):
    """One of several updates that are made in one pass over memory.

    Attributes:
        gradient: of all parameters, in a row.
        kernels: of each param group; see `FusedUpdate.kernels`.
        out: what the parameters after it are copied to; None where nobody reads them.
    """

    gradient: Tensor
    kernels: Sequence[Kernel]
    out: Tensor | None


class _Part(NamedTuple):
    """What one call of the kernel is about: tensors of one param group, or pieces of them, and their state.

    Attributes:
        group: index of the param group.
        pieces: their places among all tensors, or among all pieces.
        places: of each the place of its parameter.
        parameters: the tensors, or pieces.
        moments: of the state, what the kernel takes.
        counts: of the state, the step counts.
    """

    group: int
    pieces: slice
    places: Sequence[int]
    parameters: Sequence[Tensor]
    moments: Sequence[Sequence[Tensor]]
    counts: Sequence[Tensor]


class _Cut:
    """A large model's tensors and their state in blocks.

    Args:
        cuts: where they are cut.
        whole: the tensors, by param groups.
    """

    def __init__(self, cuts: Sequence[Block], whole: Sequence[_Part]) -> None:
        self.pieces = [piece for block in cuts for piece in block.pieces]
        self.piece_sizes = [piece.stop - piece.start for piece in self.pieces]
        self.block_sizes = [block.stop - block.start for block in cuts]
        self.blocks: list[list[_Part]] = []
        first = 0
        for block in cuts:
            last = first + len(block.pieces)
            self.blocks.append([*self._parts(whole, first, last)])
            first = last

    def _parts(self, whole: Sequence[_Part], first: int, last: int) -> Iterator[_Part]:
        for group in whole:
            own = [place for place in range(first, last) if self.pieces[place].tensor in group.places]
            if own:
                pieces = self.pieces[own[0] : own[-1] + 1]
                chosen = [piece.tensor - group.places[0] for piece in pieces]
                parameters, *moments = [
                    [
                        tensors[index].view(-1)[piece.start : piece.stop]
                        for index, piece in zip(chosen, pieces, strict=True)
                    ]
                    for tensors in (group.parameters, *group.moments)
                ]
                places = [piece.tensor for piece in pieces]
                counts = [group.counts[index] for index in chosen]
                yield _Part(group.group, slice(own[0], own[-1] + 1), places, parameters, moments, counts)


class FusedUpdate(StepUpdate):
    """An update with the kernel's arguments made once, for a holder that steps thousands of times a second.

    ``optimizer.step`` spends twice the kernel's time on small models gathering the same lists again. This calls the
    same kernel on the same tensors; where a parameter has no gradient, or the tensors cannot be fused, it is
    ``optimizer.step``. A large model's tensors are cut where the bits stay those of the whole: for several threads, and
    for several updates in one pass.

    Args:
        optimizer: from `holder_optimizer`, or torch's Adam or AdamW; its state is the state.
        team: the holder's threads.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, team: Team | None = None) -> None:
        super().__init__(optimizer)
        self._team = team or Team()
        self._whole: list[_Part] | None = None
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._is_large = sum(self._sizes) >= blocks.LARGE and all(parameter.is_cpu for parameter in self._parameters)
        # Of a large model, once its state is there: cut for the threads, and for one pass.
        self._shares: _Cut | None = None
        self._blocks: _Cut | None = None
        # The step counts of all parameters: one addition for all of them, where the kernel reads them. NumPy's takes a
        # fraction of torch's time, and keeps the interpreter's lock.
        device = self._parameters[0].device if self._parameters else None
        self._counts = torch.zeros(len(self._parameters), device=device)
        self._count: Any = self._counts.numpy() if self._counts.is_cpu else self._counts

    @override
    def forget(self) -> None:
        self._whole = self._shares = self._blocks = None

    @override
    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        if self._whole is None or any(gradient is None for gradient in gradients):
            self._step(gradients)
            self._gather()
            return
        self._count += 1
        # None is none of them from here on.
        given: Any = gradients
        kernels = self.kernels()
        if self._shares is None or not all(gradient.is_contiguous() for gradient in given):
            _update(self._whole, given, kernels)
            return
        pieces = [given[piece.tensor].view(-1)[piece.start : piece.stop] for piece in self._shares.pieces]
        self._team.run([partial(_update, parts, pieces, kernels) for parts in self._shares.blocks])

    @property
    def joins(self) -> bool:
        """Whether updates may be made together: of a large model whose state is there."""
        return self._blocks is not None

    def kernels(self) -> list[Kernel]:
        """What the kernel is told of each param group, by its present hyperparameters."""
        return [
            Kernel(
                torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_,
                {
                    "lr": group["lr"],
                    "beta1": group["betas"][0],
                    "beta2": group["betas"][1],
                    "weight_decay": group["weight_decay"],
                    "eps": group["eps"],
                    "amsgrad": group["amsgrad"],
                    "maximize": group["maximize"],
                },
                group.get("bias_correction", True),
            )
            for group in self._optimizer.param_groups
        ]

    @torch.no_grad()
    def together(self, flat: Tensor, steps: Sequence[Step]) -> None:
        """Makes updates one after the other, block by block: a block is in the cache for all of them.

        Memory moves 32 bytes a parameter for all updates, and for each of them 4 for its gradient and 8 for a copy; one
        after the other they are 36 and 8 for each.

        Args:
            flat: the parameters, in a row.
            steps: the updates in their order; `joins` must hold.
        """
        cuts = self._blocks
        assert cuts is not None
        counts = []
        for _ in steps:
            # As often as there are updates: a float32 counts to 2**24 and no further.
            self._count += 1
            counts.append(self._counts.clone().unbind())
        values = flat.split_with_sizes(cuts.block_sizes)
        gradients = [step.gradient.split_with_sizes(cuts.piece_sizes) for step in steps]
        outs = [None if step.out is None else step.out.split_with_sizes(cuts.block_sizes) for step in steps]

        def update(indices: range) -> None:
            for index in indices:
                for step, counted, pieces, out in zip(steps, counts, gradients, outs, strict=True):
                    _update(cuts.blocks[index], pieces, step.kernels, counted)
                    if out is not None:
                        out[index].copy_(values[index])

        threads, number = self._team.threads, len(values)
        # With several threads more parts than threads: one that is kept from its core has less left to be waited for.
        size = number if threads == 1 else -(-number // (4 * threads))
        self._team.run([partial(update, range(start, min(start + size, number))) for start in range(0, number, size)])

    def _gather(self) -> None:
        groups, state = self._optimizer.param_groups, self._optimizer.state
        if not all(group["fused"] for group in groups) or any(not state.get(p) for p in self._parameters):
            return
        for parameter, count in zip(self._parameters, self._counts.unbind(), strict=True):
            count.copy_(state[parameter]["step"])
            state[parameter]["step"] = count
        self._whole = [*self._parts_of_groups()]
        held = [tensor for part in self._whole for tensors in (part.parameters, *part.moments) for tensor in tensors]
        if self._is_large and all(tensor.is_contiguous() for tensor in held):
            self._blocks = _Cut(cut(self._sizes, blocks.BLOCK), self._whole)
            if self._team.threads > 1:
                share = -(-sum(self._sizes) // self._team.threads)
                self._shares = _Cut(cut(self._sizes, share), self._whole)

    def _parts_of_groups(self) -> Iterator[_Part]:
        state, first = self._optimizer.state, 0
        for index, group in enumerate(self._optimizer.param_groups):
            own, last = group["params"], first + len(group["params"])
            if own:
                moments = _MOMENTS if group["amsgrad"] else _MOMENTS[:2]
                yield _Part(
                    index,
                    slice(first, last),
                    range(first, last),
                    # Detached, autograd has no part in what happens to the parameters.
                    [parameter.detach() for parameter in own],
                    [[state[parameter][name] for parameter in own] for name in moments],
                    [state[parameter]["step"] for parameter in own],
                )
            first = last


def _update(
    parts: Sequence[_Part],
    gradients: Sequence[Tensor],
    kernels: Sequence[Kernel],
    counts: Sequence[Tensor] | None = None,
) -> None:
    """Updates some parts.

    Args:
        parts: of one block, or of all.
        gradients: of all tensors, or of all pieces.
        kernels: of each param group.
        counts: the step counts of all parameters, if they are not those of the state.
    """
    for part in parts:
        kernel, moments = kernels[part.group], part.moments
        counted = part.counts if counts is None else [counts[place] for place in part.places]
        if not kernel.counts:
            counted = [torch.full_like(counted[0], STEP_AT_INFINITY)] * len(counted)
        if len(moments) < len(_MOMENTS):
            moments = [*moments, []]
        kernel.call(part.parameters, gradients[part.pieces], *moments, counted, **kernel.options)
