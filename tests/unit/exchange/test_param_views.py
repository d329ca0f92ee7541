"""Parameters and gradients in the channel's buffers, and what could break that silently."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_async.exchange import param_views as views
from lightning_async.exchange.param_views import ParameterViews
from lightning_async.holder.layout import FlatLayout
from lightning_async.transport.base import Buffers
from tests.launch import launch, report


@pytest.fixture(params=[False, True], ids=["gathered", "hooked"])
def hooked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setattr(views, "_HOOKED_FROM_BYTES", 0)
    return bool(request.param)


def bound(module: nn.Module) -> tuple[ParameterViews, Buffers]:
    owned = [list(module.parameters())]
    layout = FlatLayout(owned)
    buffers = Buffers.allocate(layout.numel, layout.dtype)
    return ParameterViews(owned, layout, buffers), buffers


def test_values_are_kept_and_fresh_ones_land_without_a_copy() -> None:
    module = nn.Linear(3, 2)
    before = [parameter.detach().clone() for parameter in module.parameters()]

    tie, buffers = bound(module)
    kept = [torch.equal(p, value) for p, value in zip(module.parameters(), before, strict=True)]
    buffers.parameters.fill_(7.0)
    tie.install()

    assert kept == [True, True]
    assert all((parameter == 7.0).all() for parameter in module.parameters())


def test_gradients_are_in_the_buffer_when_they_are_pushed(hooked: bool) -> None:
    module = nn.Linear(3, 2)
    tie, buffers = bound(module)

    module(torch.ones(1, 3)).sum().backward()
    module(torch.ones(1, 3)).sum().backward()
    in_place = [
        p.grad.data_ptr() == buffers.gradient.data_ptr() + 4 * start
        for p, start in zip(module.parameters(), (0, 6), strict=True)
        if p.grad is not None
    ]
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-1)
    present = tie.gather(0)

    assert in_place == [hooked, hooked]
    assert present == [True, True]
    clipped = torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None])
    assert torch.equal(buffers.gradient, clipped)
    assert buffers.gradient.norm() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.usefixtures("hooked")
def test_a_parameter_without_a_gradient_is_absent() -> None:
    module = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    tie, _ = bound(module)

    module[0](torch.ones(1, 2)).sum().backward()

    assert tie.gather(0) == [True, True, False, False]


@pytest.mark.usefixtures("hooked")
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_starts_a_new_gradient(set_to_none: bool) -> None:
    module = nn.Linear(2, 1, bias=False)
    tie, buffers = bound(module)

    for value in (5.0, 2.0):
        module.zero_grad(set_to_none=set_to_none)
        (module(torch.full((1, 2), value))).sum().backward()
        tie.gather(0)

    assert buffers.gradient.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("moved", [{"dtype": torch.float64}, {"memory_format": torch.channels_last}], ids=str)
def test_parameters_that_are_no_longer_views_are_found_and_copied(moved: dict[str, Any]) -> None:
    module = nn.Conv2d(2, 3, 3)
    tie, buffers = bound(module)

    module.to(**moved)
    assert module.weight.data_ptr() != buffers.parameters.data_ptr()
    buffers.parameters.copy_(torch.arange(57.0))
    tie.install()

    landed = torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])
    assert landed.tolist() == list(range(57))


def test_half_precision_parameters_are_copied_both_ways() -> None:
    module = nn.Linear(3, 2).to(torch.bfloat16)
    tie, buffers = bound(module)

    module(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    tie.gather(0)
    buffers.parameters.fill_(1.5)
    tie.install()

    assert buffers.gradient.dtype is torch.float32
    assert buffers.gradient.tolist() == [1.0] * 8
    assert all((parameter == 1.5).all() for parameter in module.parameters())


def test_a_graph_that_is_kept_across_a_landing_fails_instead_of_lying() -> None:
    module = nn.Linear(3, 3)
    tie, buffers = bound(module)
    loss = module(module(torch.ones(1, 3))).sum()

    buffers.parameters.mul_(2.0)
    tie.install()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_after_release_the_module_owns_its_memory(hooked: bool) -> None:
    module = nn.Linear(3, 2)
    tie, buffers = bound(module)
    module(torch.ones(1, 3)).sum().backward()

    tie.release()
    values = [parameter.detach().clone() for parameter in module.parameters()]
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    buffers.parameters.fill_(9.0)
    buffers.gradient.fill_(9.0)

    assert all(torch.equal(p, value) for p, value in zip(module.parameters(), values, strict=True))
    kept = [p.grad for p in module.parameters() if p.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(kept, gradients, strict=True))
    assert module.weight.untyped_storage().nbytes() == 24


def test_moved_gradients_leave_their_memory_to_the_next_backward(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        parameters = [torch.nn.Parameter(torch.ones(1 << 20)) for _ in range(8)]
        layout = FlatLayout([parameters])
        ParameterViews([parameters], layout, Buffers.allocate(layout.numel, layout.dtype))

        def backward() -> None:
            for parameter in parameters:
                parameter.grad = None
            (torch.stack([(parameter * 2.0).sum() for parameter in parameters]).sum()).backward()

        faults = []
        for _ in range(20):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            backward()
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        # The median: a forked process copies its parent's pages when it first writes to them.
        report(folder, 0, faults=sorted(faults)[10])

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    pages = 8 * (4 << 20) // resource.getpagesize()
    assert run.report(0)["faults"] < pages / 10


@pytest.mark.parametrize(("numel", "asked"), [(1 << 20, [0]), (8, [])], ids=["large", "small"])
def test_the_former_storage_of_a_large_models_parameters_is_returned(
    monkeypatch: pytest.MonkeyPatch, numel: int, asked: list[int]
) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(views, "_of_libc", lambda name: trimmed.append if name == "malloc_trim" else None)
    parameters = [torch.nn.Parameter(torch.ones(numel))]
    layout = FlatLayout([parameters])

    ParameterViews([parameters], layout, Buffers.allocate(layout.numel, layout.dtype))

    assert trimmed == asked
