"""A follower: a part of the holder that repeats, in the same order, what the sequencing holder has decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_async.exchange.shared_payload import SharedPayload, unpack
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.rebuild import assemble
from lightning_async.holder.types import Push
from lightning_async.policies.momentum import momentum_rule
from lightning_async.runtime.failure import FailureLatch
from lightning_async.shards import operations as told
from lightning_async.transport.shm import SharedSegment

__all__ = ["FindMemory", "Follower", "OutOfStepError", "attach_memory", "layout_of_pieces", "unpack_spec"]

# Gives this shard's part of a slot's gradient, and of its parameters.
FindMemory: TypeAlias = Callable[[told.Attach, told.ShardSpec], tuple[Tensor, Tensor]]


class OutOfStepError(RuntimeError):
    """A follower has come to something else than the sequencing holder; the message says what."""


@dataclass(frozen=True)
class _Slot:
    """A worker's slot, as far as this shard is concerned."""

    gradient: Tensor
    views: list[Tensor]
    parameters: Tensor


class Follower:
    """A `Holder` of one shard, told what to do.

    It comes to the same decisions as the sequencing holder, since it sees the same reads and pushes in the same order
    under the same rules; each is compared.

    Args:
        spec: what it holds.
        latch: the latch of its process.
        find_memory: gives the memory of a worker's slot.
    """

    def __init__(self, spec: told.ShardSpec, latch: FailureLatch, find_memory: FindMemory | None = None) -> None:
        self._find_memory = find_memory or attach_memory
        optimizer = assemble(spec.kind, spec.attributes)
        self._spec = spec
        self._layout = layout_of_pieces(optimizer, spec.parameters.dtype)
        rule = momentum_rule(spec.momentum_correction, spec.workers, spec.gradients_per_update)
        self._holder = Holder(
            self._layout,
            spec.parameters,
            [optimizer],
            StalenessBarrier(spec.max_staleness, spec.on_stale, spec.version, spec.gradients_per_update),
            latch,
            states=[spec.state],
            policy=spec.policy,
            momentum_rule=rule,
        )
        self._slots: dict[tuple[int, int], _Slot] = {}
        # By the place of the operation that has asked for them.
        self._payloads: dict[int, SharedPayload] = {}

    def do(self, place: int, operation: told.Operation) -> str | None:
        """Does what it is told; returns the address of a shared payload, if that is the answer.

        Args:
            place: the operation's number.
            operation: what to do.

        Raises:
            OutOfStepError: if it comes to something else than the sequencing holder.
        """
        holder = self._holder
        match operation:
            case told.ApplyPush():
                self._apply(operation)
            case told.CopyOut():
                self._copy_out(operation)
            case told.Attach():
                self._attach(operation)
            case told.Depart(worker, slot):
                holder.leave(worker, slot)
            case told.Complete():
                if not holder.complete_version():
                    raise OutOfStepError("it is to complete a version, and no gradient waits here")
            case told.Adjust(bound, on_stale, count, policy):
                rule = momentum_rule(self._spec.momentum_correction, self._spec.workers, count)
                holder.adjust(bound, on_stale, count, policy, rule)
            case told.LoadParameters(payload):
                holder.load_parameters([unpack(payload)])
            case told.LoadStates(payload):
                holder.load_states([unpack(payload)])
            case told.TakeAdapted():
                holder.take_adapted()
            case told.ReadState():
                return self._keep(place, holder.optimizer_state(0))
            case told.TakeSnapshot():
                return self._keep(place, holder.snapshot())
            case told.Restore(version, payload):
                state, gathered, policy = unpack(payload)
                holder.restore(version, [state], gathered, policy)
            case told.Forget(asked):
                self._payloads.pop(asked).close()
            case told.Serve():
                raise OutOfStepError("it serves already")
        return None

    def close(self) -> None:
        """Lets go of what it was asked for."""
        for payload in self._payloads.values():
            payload.close()
        self._payloads.clear()

    def _attach(self, attach: told.Attach) -> None:
        gradient, parameters = self._find_memory(attach, self._spec)
        self._slots[attach.worker, attach.slot] = _Slot(gradient, self._layout.views(gradient, 0), parameters)

    def _apply(self, told_push: told.ApplyPush) -> None:
        slot, present = self._slots[told_push.worker, told_push.slot], told_push.present
        gradients: list[Tensor | None] = [*slot.views]
        if present is not None:
            gradients = [
                view if present[place] else None for place, view in zip(self._spec.places, slot.views, strict=True)
            ]
        push = Push(
            told_push.worker,
            0,
            told_push.version_read,
            gradients,
            told_push.groups,
            samples=told_push.samples,
            slot=told_push.slot,
            flat=slot.gradient,
            finite=told_push.finite,
        )
        update = self._holder.try_push(push)
        mine = None if update is None else (update.version, update.applied)
        if mine != (told_push.version, told_push.applied):
            raise OutOfStepError(
                f"a gradient of rank {told_push.worker} was to make {(told_push.version, told_push.applied)} of "
                f"version and applied, and has made {mine}"
            )

    def _copy_out(self, read: told.CopyOut) -> None:
        out = self._slots[read.worker, read.slot].parameters
        version = self._holder.try_pull(read.worker, out, read.slot) if read.reads else self._holder.read(out)
        if version != read.version:
            raise OutOfStepError(f"rank {read.worker} was to read version {read.version}, and has read {version}")

    def _keep(self, place: int, value: Any) -> str:
        payload = self._payloads[place] = SharedPayload(value)
        return payload.address


def attach_memory(attach: told.Attach, spec: told.ShardSpec) -> tuple[Tensor, Tensor]:
    """This shard's part of the memory of a slot on this host, which all shards map.

    Raises:
        OSError: if it cannot be mapped.
    """
    buffers = SharedSegment.attach(attach.memory, spec.numel, spec.parameters.dtype)
    return buffers.gradient[spec.elements], buffers.parameters[spec.elements]


def layout_of_pieces(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> FlatLayout:
    """Where a shard's pieces lie in its part of the flat vector.

    Args:
        optimizer: over the pieces.
        dtype: of the flat vector: that of the widest of all parameters, which may be in another shard.
    """
    layout = FlatLayout([[piece for group in optimizer.param_groups for piece in group["params"]]])
    layout.dtype = dtype
    return layout


def unpack_spec(payload: str) -> told.ShardSpec:
    """A `ShardSpec` that was sent as a shared payload."""
    spec: told.ShardSpec = unpack(payload)
    # The initial values are copied by the holder; an optimizer's tensors must not map memory that others read.
    for parameter in [key for key in spec.attributes["state"] if isinstance(key, nn.Parameter)]:
        spec.attributes["state"][parameter] = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in spec.attributes["state"][parameter].items()
        }
    return spec
