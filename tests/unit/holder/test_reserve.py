"""A snapshot's memory is made ready before updates wait for it, and is the snapshot's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async.holder import holder as holder_module
from lightning_async.holder.amsgrad import AMSGrad
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.reserve import Reserve
from lightning_async.holder.types import Push
from lightning_async.runtime.failure import FailureLatch

LARGE, SMALL = 40_000, 3


def test_a_copy_takes_reserved_memory_once_and_new_memory_after_that() -> None:
    large = torch.arange(float(LARGE))
    reserve = Reserve([large])

    first, second = reserve.copy(large), reserve.copy(large)

    assert torch.equal(first, large) and torch.equal(second, large)
    assert len({each.untyped_storage().data_ptr() for each in (first, second, large)}) == 3


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.ones(LARGE, dtype=torch.float64), id="dtype"),
        pytest.param(torch.ones(LARGE // 2, 2), id="shape"),
        pytest.param(torch.ones(2, LARGE // 2).t(), id="strides"),
        pytest.param(torch.ones(SMALL), id="small"),
        pytest.param(nn.Parameter(torch.ones(LARGE)), id="parameter"),
        pytest.param(torch.ones(2 * LARGE)[LARGE:], id="view"),
    ],
)
def test_what_was_not_reserved_for_is_copied_as_well(tensor: Tensor) -> None:
    copied = Reserve([torch.zeros(LARGE, dtype=torch.int32)]).copy(tensor)

    assert torch.equal(copied, tensor) and copied.dtype == tensor.dtype and copied.stride() == tensor.stride()
    assert not copied.requires_grad
    assert copied.untyped_storage().nbytes() == copied.nbytes


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AMSGrad": lambda parameters: AMSGrad(parameters, lr=0.1),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, amsgrad=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, centered=True),
}


def stepped(make: Callable[[Any], torch.optim.Optimizer]) -> Holder:
    """A holder that has made one update."""
    parameters = [nn.Parameter(torch.ones(size)) for size in (LARGE, SMALL)]
    optimizer = make(parameters)
    layout = FlatLayout([parameters])
    holder = Holder(layout, torch.ones(LARGE + SMALL), [optimizer], StalenessBarrier(None), FailureLatch())
    version = holder.try_pull(0, layout.buffer())
    assert version is not None
    gradient = layout.buffer().fill_(1.0)
    values = tuple(HyperparamLayout(optimizer).read(optimizer.param_groups))
    assert holder.try_push(Push(0, 0, version, layout.views(gradient, 0), values)) is not None
    return holder


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_snapshot_makes_its_memory_ready_while_updates_go_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = stepped(OPTIMIZERS[name])
    missed: list[Tensor] = []

    class Watched(Reserve):
        def __init__(self, tensors: Iterable[Tensor]) -> None:
            assert not holder._lock._is_owned()  # type: ignore[attr-defined]
            super().__init__(tensors)

        def copy(self, tensor: Tensor) -> Tensor:
            assert holder._lock._is_owned()  # type: ignore[attr-defined]
            if tensor.numel() >= LARGE and not any(self._free.values()):
                missed.append(tensor)
            return super().copy(tensor)

    monkeypatch.setattr(holder_module, "Reserve", Watched)
    snapshot = holder.snapshot()

    assert missed == []
    own = {each.data_ptr() for held in holder._optimizers for each in held.tensors()} | {holder.lend().data_ptr()}
    copies = [snapshot.parameters] + [
        value
        for state_dict in snapshot.optimizer_states
        for state in state_dict["state"].values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    assert own.isdisjoint(each.data_ptr() for each in copies)
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in copies)
