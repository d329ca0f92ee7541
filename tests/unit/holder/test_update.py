"""The holder's optimizer against the same optimizer on a single device: the same bits, whatever the optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_async.holder.amsgrad import AMSGrad, UnsupportedOptimizerError
from lightning_async.holder.fused import FusedUpdate
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.rebuild import check_steppable, rebuild
from lightning_async.holder.update import HeldOptimizer

SHAPES = ((7, 5), (33,), (), (4, 3, 2))

Make = Callable[[Any], Optimizer]


class SignDescent(Optimizer):
    """A user's own optimizer: an attribute that is no default, state of its own, and a value that its steps adapt."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "gain": 1.0, "steps": 0, "schedule": None})
        self.exponent = 0.5
        self.first = self.param_groups[0]["params"][0]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            group["gain"] *= 1.01
            group["steps"] += 1
            group["schedule"] = [group["steps"]]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    seen = self.state[parameter].setdefault("seen", torch.zeros_like(parameter))
                    seen.add_(parameter.grad.abs() ** self.exponent)
                    scale = 0.5 if parameter is self.first else 1.0
                    parameter.sub_(parameter.grad.sign() * seen, alpha=group["lr"] * group["gain"] * scale)


class Lookahead(Optimizer):
    """A wrapper around another optimizer, as users write them."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        super().__init__(base.param_groups, {"alpha": 0.5})
        self.param_groups = base.param_groups
        self.slow = {
            parameter: parameter.detach().clone() for group in base.param_groups for parameter in group["params"]
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()
        for parameter, slow in self.slow.items():
            slow.lerp_(parameter, self.param_groups[0]["alpha"])


ELEMENTWISE: dict[str, Make] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, fused=True),
    "SGD-nesterov": lambda params: torch.optim.SGD(
        params, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True, fused=True
    ),
    "SGD-foreach": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.1, foreach=True),
    "SGD-loop": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False, maximize=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01, weight_decay=0.01, fused=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, fused=True),
    "AdamW-foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
    "Adagrad": lambda params: torch.optim.Adagrad(
        params, lr=0.01, lr_decay=0.01, initial_accumulator_value=0.1, fused=True
    ),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.9, centered=True, foreach=True),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01, foreach=True),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=0.01, foreach=True),
    "Adamax": lambda params: torch.optim.Adamax(params, lr=0.01, foreach=True),
    "Adadelta": lambda params: torch.optim.Adadelta(params, lr=1.0, foreach=True),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=0.01, foreach=True),
    "ASGD": lambda params: torch.optim.ASGD(params, lr=0.01, t0=3, foreach=True),
    "AMSGrad": lambda params: AMSGrad(params, lr=0.01, fused=True),
    "own": SignDescent,
    "wrapper": lambda params: Lookahead(torch.optim.SGD(params, lr=0.1, momentum=0.9)),
}


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def in_groups(params: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": list(params[:2])}, {"params": list(params[2:]), "lr": 0.003}]


def each_in_a_group(params: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """The same: torch's fused SGD fails where only some parameters of a group have their momentum yet."""
    return [{"params": [p], "lr": lr} for p, lr in zip(params, (0.1, 0.1, 0.003, 0.003), strict=True)]


class HolderSpec:
    """A module's optimizer, and its stand-in over the views of one flat buffer."""

    def __init__(self, make: Make, params: Sequence[nn.Parameter]) -> None:
        self.shell = make(in_groups(params))
        owned = [parameter for group in self.shell.param_groups for parameter in group["params"]]
        layout = FlatLayout([owned])
        self.flat = layout.buffer()
        self.views = layout.views(self.flat, 0)
        for view, parameter in zip(self.views, owned, strict=True):
            view.copy_(parameter.detach())
        views = iter(self.views)
        groups = [[nn.Parameter(next(views)) for _ in group["params"]] for group in self.shell.param_groups]
        self.held = HeldOptimizer(self.shell, groups)
        self.hyperparams = HyperparamLayout(self.shell)

    def apply(self, gradients: Sequence[Tensor | None]) -> None:
        self.held.apply(
            [None if gradient is None else gradient.clone() for gradient in gradients],
            self.hyperparams.read(self.shell.param_groups),
        )


def step(optimizer: Optimizer, gradients: Sequence[Tensor | None]) -> None:
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(owned, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    optimizer.step()


def made_gradients(seeds: Sequence[int | None], scale: float) -> list[Tensor | None]:
    return [
        None if seed is None else torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
        for seed, shape in zip(seeds, SHAPES, strict=True)
    ]


def differing(plain: Sequence[Tensor], held: Sequence[Tensor]) -> list[int]:
    return [i for i, (first, second) in enumerate(zip(plain, held, strict=True)) if not torch.equal(first, second)]


updates = st.lists(
    st.tuples(
        st.lists(st.one_of(st.none(), st.integers(0, 10**6)), min_size=4, max_size=4),
        st.sampled_from([1e-3, 1.0, 30.0]),
        st.sampled_from([None, 0.02, 0.3]),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("name", ELEMENTWISE)
@settings(max_examples=12, deadline=None)
@given(updates=updates)
def test_the_holders_update_is_the_plain_optimizers_bit_for_bit(
    name: str, updates: list[tuple[list[int | None], float, float | None]]
) -> None:
    params = parameters()
    plain = ELEMENTWISE[name](in_groups(params) if name != "SGD-nesterov" else each_in_a_group(params))
    both = HolderSpec(ELEMENTWISE[name], parameters())

    for seeds, scale, lr in updates:
        if lr is not None:
            both.shell.param_groups[1]["lr"] = lr
            for group in plain.param_groups[len(plain.param_groups) // 2 :]:
                group["lr"] = lr
        gradients = made_gradients(seeds, scale)
        step(plain, gradients)
        both.apply(gradients)

    assert differing(params, both.views) == []


# The wrapper's state dict leaves out its own weights, wherever it is stepped.
@pytest.mark.parametrize("name", sorted(ELEMENTWISE.keys() - {"wrapper"}))
def test_state_goes_to_a_single_device_and_back_without_a_trace(name: str) -> None:
    gradients = [made_gradients([seed, seed + 1, seed + 2, seed + 3], 1.0) for seed in range(6)]
    params = parameters()
    plain = ELEMENTWISE[name](in_groups(params))
    first = HolderSpec(ELEMENTWISE[name], parameters())
    for gradient in gradients[:2]:
        step(plain, gradient)
        first.apply(gradient)

    # From the holder to a plain optimizer.
    state = first.held.state_dict()
    state["param_groups"] = [
        group | adapted
        for group, adapted in zip(first.shell.state_dict()["param_groups"], first.held.adapted(), strict=True)
    ]
    middle_params = [nn.Parameter(view.clone()) for view in first.views]
    middle = ELEMENTWISE[name](in_groups(middle_params))
    middle.load_state_dict(copy.deepcopy(state))
    for gradient in gradients[2:4]:
        step(plain, gradient)
        step(middle, gradient)
    # From there to another holder.
    last = HolderSpec(ELEMENTWISE[name], middle_params)
    last.shell.load_state_dict(middle.state_dict() | {"state": {}})
    last.held.load(middle.state_dict())
    for gradient in gradients[4:]:
        step(plain, gradient)
        last.apply(gradient)

    assert differing(params, last.views) == []


# Muon comes with torch 2.9.
@pytest.mark.parametrize(
    ("name", "options"),
    [("Adafactor", {"foreach": False}), *([("Muon", {})] if hasattr(torch.optim, "Muon") else [])],
)
def test_an_optimizer_that_is_not_elementwise_sees_each_parameters_shape(name: str, options: dict[str, Any]) -> None:
    shapes = ((6, 4), (5, 5))
    gradients = [
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for shape in shapes] for seed in (1, 2)
    ]
    params = parameters(shapes)
    optimizer = getattr(torch.optim, name)
    plain = optimizer(params, lr=0.1, **options)
    template = optimizer(parameters(shapes), lr=0.1, **options)
    views = [nn.Parameter(parameter.detach().clone()) for parameter in parameters(shapes)]
    held = HeldOptimizer(template, [views])

    for gradient in gradients:
        step(plain, gradient)
        held.apply(gradient, ())

    assert differing(params, views) == []


@pytest.mark.parametrize(
    ("make", "kernel"),
    [
        (lambda params: torch.optim.SGD(params), {"fused": True, "foreach": None}),
        (lambda params: torch.optim.Adagrad(params), {"fused": True, "foreach": None}),
        (lambda params: torch.optim.Adam(params, fused=False), {"fused": False, "foreach": True}),
        (lambda params: torch.optim.Adam(params, foreach=False), {"fused": None, "foreach": False}),
        (lambda params: torch.optim.RMSprop(params), {"foreach": True}),
    ],
    ids=["SGD", "Adagrad", "not-fused", "loop", "RMSprop"],
)
def test_the_holder_takes_the_fastest_kernel_that_the_user_has_left_open(make: Make, kernel: dict[str, Any]) -> None:
    group = rebuild(make(parameters()), [parameters()]).param_groups[0]

    assert {key: group[key] for key in kernel} == kernel


def test_the_kernel_outlives_a_checkpoint_of_another_one() -> None:
    template = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9)
    held = HeldOptimizer(template, [parameters()])

    held.load(torch.optim.SGD(parameters(), lr=0.2, momentum=0.9, foreach=False).state_dict())

    group = held.optimizer.param_groups[0]
    assert (group["fused"], group["foreach"], group["lr"]) == (True, None, 0.2)


def test_a_stand_in_shares_nothing_with_its_template() -> None:
    template = torch.optim.Adagrad(parameters(dtype=torch.bfloat16), lr=torch.tensor(0.5))
    template.register_step_post_hook(lambda *_: pytest.fail("the module's hook ran at the holder"))
    mine = parameters()

    held = rebuild(template, [mine])
    step(held, made_gradients([1, 2, 3, 4], 1.0))

    assert [id(p) for p in held.param_groups[0]["params"]] == [id(p) for p in mine]
    assert {state["sum"].dtype for state in held.state.values()} == {torch.float32}
    assert held.param_groups[0]["lr"] == 0.5
    assert all(float(state["step"]) == 0 and not state["sum"].any() for state in template.state.values())


def test_what_an_optimizer_adapts_in_its_groups_stays_and_is_told() -> None:
    both = HolderSpec(SignDescent, parameters())
    for seed in range(3):
        both.shell.param_groups[0]["lr"] = 0.01 * (seed + 1)
        both.apply(made_gradients([seed] * 4, 1.0))

    adapted = both.held.adapted()

    assert [sorted(group) for group in adapted] == [["gain", "schedule", "steps"]] * 2
    assert [(group["steps"], group["schedule"]) for group in adapted] == [(3, [3])] * 2
    assert both.held.optimizer.param_groups[0]["lr"] == 0.03


def test_amsgrad_keeps_its_kernel_under_any_name() -> None:
    for template in (AMSGrad(parameters()), torch.optim.AdamW(parameters(), amsgrad=True)):
        held = HeldOptimizer(template, [parameters()])
        assert isinstance(held.optimizer, AMSGrad)
        assert isinstance(held._update, FusedUpdate)


# ------------------------------------------------------------------------------------------------ what is refused


class NeedsClosure(SignDescent):
    def step(self, closure: Any = None) -> None:
        if closure is None:
            raise RuntimeError("closure, please")


class KeepsModule(SignDescent):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.net = nn.Linear(2, 2)


class Uncopyable(SignDescent):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.stream = (number for number in range(3))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (torch.optim.LBFGS, "LBFGS, which re-evaluates its closure"),
        (torch.optim.SparseAdam, "SparseAdam, whose gradients are sparse"),
        (lambda params: torch.optim.SGD(params, differentiable=True), "differentiable=True"),
        (lambda params: torch.optim.RMSprop(params, capturable=True), "leave capturable out"),
        (NeedsClosure, "a copy of it made a step without a closure: RuntimeError('closure, please')"),
        (KeepsModule, "keeps a module in its attribute net"),
        (Uncopyable, "cannot pickle 'generator' object"),
    ],
    ids=["LBFGS", "SparseAdam", "differentiable", "capturable", "closure", "module", "uncopyable"],
)
def test_what_cannot_be_stepped_with_gradients_alone_is_refused(make: Make, problem: str) -> None:
    with pytest.raises(UnsupportedOptimizerError) as refusal:
        check_steppable(make(parameters()))

    assert problem in str(refusal.value)
    assert 'Return another optimizer from configure_optimizers, or use strategy="ddp"' in str(refusal.value)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_what_can_be_stepped_is_accepted_and_left_as_it_was(name: str) -> None:
    params = parameters()
    optimizer = ELEMENTWISE[name](in_groups(params))
    state = copy.deepcopy(optimizer.state_dict())
    before = torch.get_rng_state()

    check_steppable(optimizer)

    assert differing(parameters(), params) == []
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("way", ["load", "load_state"])
@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
        lambda params: torch.optim.AdamW(params, lr=0.1),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.Adagrad(params, lr=0.1, initial_accumulator_value=0.5),
        lambda params: torch.optim.RMSprop(params, lr=0.1),
    ],
    ids=["Adam with AMSGrad", "AdamW", "SGD", "Adagrad", "RMSprop"],
)
def test_a_state_that_was_saved_in_another_memory_order_is_gone_on_with(make: Make, way: str) -> None:
    shape, generator = (4, 3, 5, 2), torch.Generator().manual_seed(3)
    gradients = [torch.randn(shape, generator=generator) for _ in range(6)]
    # A module in channels_last, on a single device.
    theirs = nn.Parameter(torch.randn(shape, generator=generator).to(memory_format=torch.channels_last))
    single = make([theirs])
    held_by = nn.Parameter(torch.zeros(shape))
    held = HeldOptimizer(make([nn.Parameter(theirs.detach().clone())]), [[held_by]])
    for gradient in gradients[:3]:
        theirs.grad = gradient.to(memory_format=torch.channels_last)
        single.step()
    held_by.data.copy_(theirs.detach())

    saved = copy.deepcopy(single.state_dict())
    assert any(isinstance(one, Tensor) and not one.is_contiguous() for one in saved["state"][0].values())
    held.load(saved) if way == "load" else held.load_state(saved["state"])
    for gradient in gradients[3:]:
        theirs.grad = gradient.to(memory_format=torch.channels_last)
        single.step()
        held.apply([gradient], ())

    assert torch.allclose(held_by, theirs, rtol=1e-5, atol=1e-6)


def test_what_a_constructor_has_made_for_a_module_in_channels_last_is_saved_as_it_is() -> None:
    theirs = nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    held_by = nn.Parameter(torch.zeros(2, 3, 4, 5))
    held = HeldOptimizer(torch.optim.Adagrad([theirs], lr=0.1), [[held_by]])
    gradient = torch.arange(120.0).view(2, 3, 4, 5)

    held.apply([gradient], ())

    assert torch.equal(held.state_dict()["state"][0]["sum"], gradient**2)
