"""AMSGrad against torch's own and against the paper, and the optimizer that the holder makes of a user's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Adam, AdamW, Optimizer

from lightning_async.holder.amsgrad import (
    AMSGrad,
    UnsupportedOptimizerError,
    check_optimizer,
    convert_to_amsgrad_state,
    holder_optimizer,
)

SHAPES = [(7, 5), (33,), (), (4, 3, 2, 2), (129,)]
HYPERS = ("lr", "betas", "eps", "weight_decay")
KERNELS = [None, True, False]


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def set_gradients(params: Sequence[Parameter], step: int) -> None:
    """Gradients whose size falls with the steps, so that the maximum of the second moment matters."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype) * 0.98**step


def train(optimizer: Optimizer, params: Sequence[Parameter], steps: int = 100, start: int = 0) -> None:
    for step in range(start, start + steps):
        set_gradients(params, step)
        optimizer.step()


def assert_same_bits(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


def assert_same_state(left: Optimizer, right: Optimizer) -> None:
    ours, theirs = left.state_dict()["state"], right.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index in ours:
        assert ours[index].keys() == theirs[index].keys()
        for name in ours[index]:
            assert torch.equal(ours[index][name], theirs[index][name]), (index, name)


# ---------------------------------------------------------------------------------- with bias correction


@pytest.mark.parametrize("fused", KERNELS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [False, True])
def test_with_bias_correction_it_is_torchs_bit_for_bit(
    fused: bool | None, weight_decay: float, decoupled: bool
) -> None:
    ours, theirs = parameters(), parameters()
    settings: dict[str, Any] = {
        "lr": 0.01,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "weight_decay": weight_decay,
        "fused": fused,
    }
    optimizer = AMSGrad(ours, decoupled_weight_decay=decoupled, **settings)
    reference = (AdamW if decoupled else Adam)(theirs, amsgrad=True, **settings)

    train(optimizer, ours)
    train(reference, theirs)

    assert_same_bits(ours, theirs)
    assert_same_state(optimizer, reference)


def test_amsgrad_differs_from_adam_on_these_gradients() -> None:
    ours, theirs = parameters(), parameters()

    train(AMSGrad(ours, lr=0.01, betas=(0.8, 0.95)), ours)
    train(Adam(theirs, lr=0.01, betas=(0.8, 0.95)), theirs)

    assert not torch.equal(ours[0], theirs[0])


def test_defaults_are_the_papers_step_size_and_torchs_other_values() -> None:
    group = AMSGrad(parameters()).param_groups[0]

    assert [group[key] for key in HYPERS] == [1e-4, (0.9, 0.999), 1e-8, 0.0]
    assert (group["amsgrad"], group["bias_correction"], group["decoupled_weight_decay"]) == (
        True,
        True,
        False,
    )


# ------------------------------------------------------------------------------- without bias correction


def algorithm_1(
    params: Sequence[Parameter],
    steps: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> list[torch.Tensor]:
    """The paper's Algorithm 1, written down in float64 from its formulas."""
    x = [param.detach().double().clone() for param in params]
    m, v, v_hat = ([torch.zeros_like(value) for value in x] for _ in range(3))
    carriers = [Parameter(param.detach().clone()) for param in params]
    for step in range(steps):
        set_gradients(carriers, step)
        for i, carrier in enumerate(carriers):
            assert carrier.grad is not None
            gradient = carrier.grad.double()
            if decoupled:
                x[i] = x[i] - lr * weight_decay * x[i]
            else:
                gradient = gradient + weight_decay * x[i]
            m[i] = betas[0] * m[i] + (1 - betas[0]) * gradient
            v[i] = betas[1] * v[i] + (1 - betas[1]) * gradient**2
            v_hat[i] = torch.where(v[i] > v_hat[i], v[i], v_hat[i])
            x[i] = x[i] - lr * m[i] / (v_hat[i] ** 0.5 + eps)
    return x


@pytest.mark.parametrize("fused", KERNELS)
@pytest.mark.parametrize(
    ("weight_decay", "decoupled", "eps"), [(0.0, False, 1e-8), (0.1, False, 1e-3), (0.1, True, 1e-2)]
)
def test_without_bias_correction_it_is_algorithm_1(
    fused: bool | None, weight_decay: float, decoupled: bool, eps: float
) -> None:
    params = parameters(dtype=torch.float64)
    expected = algorithm_1(params, 100, 0.01, (0.9, 0.99), eps, weight_decay, decoupled)
    optimizer = AMSGrad(params, 0.01, (0.9, 0.99), eps, weight_decay, decoupled, bias_correction=False, fused=fused)

    train(optimizer, params)

    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("fused", KERNELS)
def test_without_bias_correction_the_moments_and_the_count_are_still_torchs(fused: bool | None) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = AMSGrad(ours, bias_correction=False, fused=fused)
    reference = Adam(theirs, lr=1e-4, amsgrad=True, fused=fused)

    train(optimizer, ours, steps=17)
    train(reference, theirs, steps=17)

    assert_same_state(optimizer, reference)
    assert {state["step"].item() for state in optimizer.state.values()} == {17.0}
    assert not torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("bias_correction", [True, False])
def test_a_step_that_the_gradient_scaler_skips_is_not_counted(bias_correction: bool) -> None:
    params = parameters()
    before = [param.detach().clone() for param in params]
    optimizer = AMSGrad(params, bias_correction=bias_correction, fused=True)
    set_gradients(params, 0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)  # type: ignore[attr-defined]

    optimizer.step()

    assert_same_bits(params, before)
    assert {state["step"].item() for state in optimizer.state.values()} == {0.0}


# --------------------------------------------------------------------------------- groups, None gradients


def test_every_group_keeps_its_own_settings() -> None:
    params = parameters(dtype=torch.float64)
    lone = parameters(dtype=torch.float64)
    settings: list[dict[str, Any]] = [
        {"lr": 0.1},
        {"weight_decay": 0.2},
        {"weight_decay": 0.2, "decoupled_weight_decay": True},
        {"bias_correction": False},
        {"betas": (0.5, 0.6), "eps": 1e-3},
    ]
    optimizer = AMSGrad(
        [{"params": [param], **setting} for param, setting in zip(params, settings, strict=True)], lr=0.01
    )
    alone = [AMSGrad([param], **{"lr": 0.01, **setting}) for param, setting in zip(lone, settings, strict=True)]

    for step in range(20):
        set_gradients(params, step)
        set_gradients(lone, step)
        optimizer.step()
        for one in alone:
            one.step()

    assert_same_bits(params, lone)


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("fused", KERNELS)
def test_a_parameter_without_a_gradient_is_left_alone(bias_correction: bool, fused: bool | None) -> None:
    params = parameters()
    optimizer = AMSGrad(params, lr=0.1, bias_correction=bias_correction, fused=fused)
    train(optimizer, params, steps=3)
    before = params[1].detach().clone()
    state = copy.deepcopy(optimizer.state[params[1]])
    set_gradients(params, 3)
    params[1].grad = None

    optimizer.step()

    assert torch.equal(params[1], before)
    assert all(torch.equal(optimizer.state[params[1]][name], state[name]) for name in state)
    assert (optimizer.state[params[0]]["step"].item(), state["step"].item()) == (4.0, 3.0)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_a_step_without_any_gradient_does_nothing(bias_correction: bool) -> None:
    params = parameters()
    optimizer = AMSGrad(params, bias_correction=bias_correction)

    assert optimizer.step() is None
    assert not optimizer.state


# ------------------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("fused", KERNELS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dicts_are_exchanged_with_torch(fused: bool | None, ours_first: bool) -> None:
    kinds: list[Callable[[list[Parameter]], Optimizer]] = [
        lambda params: AMSGrad(params, lr=0.01, weight_decay=0.1, fused=fused),
        lambda params: Adam(params, lr=0.01, weight_decay=0.1, amsgrad=True, fused=fused),
    ]
    first, second = kinds if ours_first else reversed(kinds)
    whole = parameters()
    uninterrupted = first(whole)
    train(uninterrupted, whole, steps=20)
    split = parameters()
    before = first(split)
    train(before, split, steps=10)
    after = second(split)

    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(after, split, steps=10, start=10)

    assert_same_bits(whole, split)
    assert_same_state(uninterrupted, after)


def test_the_paper_variant_resumes_from_its_own_state_dict() -> None:
    whole, split = parameters(), parameters()
    train(AMSGrad(whole, lr=0.01, bias_correction=False), whole, steps=20)
    before = AMSGrad(split, lr=0.01, bias_correction=False)
    train(before, split, steps=10)
    after = AMSGrad(split)

    after.load_state_dict(before.state_dict())
    train(after, split, steps=10, start=10)

    assert after.param_groups[0]["bias_correction"] is False
    assert_same_bits(whole, split)


def test_settings_that_a_state_dict_lacks_stay_as_they_are() -> None:
    params = parameters()
    other = Adam(params, lr=0.5, amsgrad=True)
    train(other, params, steps=2)
    state = other.state_dict()
    del state["param_groups"][0]["decoupled_weight_decay"]  # As before torch 2.7.
    optimizer = AMSGrad(params, bias_correction=False, decoupled_weight_decay=True)

    optimizer.load_state_dict(state)

    group = optimizer.param_groups[0]
    assert (group["lr"], group["bias_correction"], group["decoupled_weight_decay"]) == (0.5, False, True)


@pytest.mark.parametrize("saved", KERNELS)
@pytest.mark.parametrize("own", KERNELS)
def test_the_kernel_is_the_optimizers_own_whatever_is_loaded(saved: bool | None, own: bool | None) -> None:
    params = parameters()
    other = Adam(params, amsgrad=True, fused=saved)
    train(other, params, steps=2)
    optimizer = AMSGrad(params, fused=own)

    optimizer.load_state_dict(other.state_dict())
    train(optimizer, params, steps=2)

    assert optimizer.param_groups[0]["fused"] is own
    assert {state["step"].item() for state in optimizer.state.values()} == {4.0}


def test_loading_an_adam_without_amsgrad_starts_the_maximum_from_its_second_moment() -> None:
    params = parameters()
    other = Adam(params)
    train(other, params, steps=5)
    state = other.state_dict()
    optimizer = AMSGrad(params)

    optimizer.load_state_dict(state)

    assert optimizer.param_groups[0]["amsgrad"] is True
    assert_same_bits(
        [optimizer.state[param]["max_exp_avg_sq"] for param in params],
        [other.state[param]["exp_avg_sq"] for param in params],
    )
    assert state["param_groups"][0]["amsgrad"] is False
    assert "max_exp_avg_sq" not in state["state"][0]
    train(optimizer, params, steps=1)


def test_adopt_amsgrad_state() -> None:
    params = parameters()
    other = Adam(params)
    train(other, params, steps=5)
    state = copy.deepcopy(other.state_dict())

    assert convert_to_amsgrad_state(state) is True
    assert convert_to_amsgrad_state(state) is False

    maximum, moment = state["state"][0]["max_exp_avg_sq"], state["state"][0]["exp_avg_sq"]
    assert torch.equal(maximum, moment)
    assert maximum.data_ptr() != moment.data_ptr()
    loaded = Adam(params, amsgrad=True)
    loaded.load_state_dict(state)
    train(loaded, params, steps=1)
    assert loaded.param_groups[0]["amsgrad"] is True


def test_a_state_dict_with_another_number_of_groups_is_refused() -> None:
    params = parameters()
    state = AMSGrad([{"params": params[:2]}, {"params": params[2:]}]).state_dict()

    with pytest.raises(ValueError, match="different number of parameter groups"):
        AMSGrad(params).load_state_dict(state)


def test_it_survives_pickle_and_deepcopy() -> None:
    params = parameters()
    optimizer = AMSGrad(params, lr=0.01, bias_correction=False)
    train(optimizer, params, steps=3)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]

    train(optimizer, params, steps=3, start=3)

    for twin in copies:
        twins = twin.param_groups[0]["params"]
        train(twin, twins, steps=3, start=3)
        assert_same_bits(params, twins)


# ------------------------------------------------------------------------------------------- check_optimizer


class Plain(Adam):
    """Another constructor only."""

    def __init__(self, params: list[Parameter]) -> None:
        super().__init__(params, lr=0.3, amsgrad=True)


class Lookahead(Adam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Preconditioned(AdamW):
    def _init_group(self, *args: Any) -> bool:
        return bool(super()._init_group(*args))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (AMSGrad, True),
        (Plain, True),
        (lambda params: Adam(params, amsgrad=True), True),
        (lambda params: Adam(params, amsgrad=True, fused=True), True),
        (lambda params: AdamW(params, amsgrad=True), True),
        (Adam, False),
        (AdamW, False),
        (lambda params: Adam([{"params": params[:1]}, {"params": params[1:], "amsgrad": True}]), False),
    ],
)
def test_check_optimizer_accepts_adam_and_says_whether_it_is_amsgrad(
    make: Callable[[list[Parameter]], Optimizer], expected: bool
) -> None:
    assert check_optimizer(make(parameters())) is expected


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (torch.optim.LBFGS, "cannot stand in for LBFGS, which re-evaluates its closure"),
        (torch.optim.SGD, "cannot stand in for SGD, which is not AMSGrad"),
        (torch.optim.NAdam, "cannot stand in for NAdam, which is not AMSGrad"),
        (torch.optim.RAdam, "cannot stand in for RAdam, which is not AMSGrad"),
        (torch.optim.SparseAdam, "cannot stand in for SparseAdam, whose gradients are sparse"),
        (Lookahead, "cannot stand in for Lookahead, which overrides Adam's step"),
        (Preconditioned, "cannot stand in for Preconditioned, which overrides Adam's _init_group"),
        (lambda params: Adam(params, capturable=True), "Adam with capturable=True"),
        (lambda params: AdamW(params, differentiable=True), "AdamW with differentiable=True"),
    ],
)
def test_check_optimizer_refuses_the_rest_and_says_what_to_return(
    make: Callable[[list[Parameter]], Optimizer], reason: str
) -> None:
    optimizer = make(parameters())

    with pytest.raises(UnsupportedOptimizerError) as refusal:
        check_optimizer(optimizer)

    assert reason in str(refusal.value)
    assert "Return lightning_async.AMSGrad(...) or torch.optim.Adam(..., amsgrad=True)" in str(refusal.value)
    assert 'strategy="ddp"' in str(refusal.value)


def test_a_subclass_is_accepted_whichever_class_torch_saw_first() -> None:
    class First(Adam):
        pass

    # What torch does to the first class of a family that is instantiated in a process.
    First.step = Optimizer.profile_hook_step(First.step)  # type: ignore[method-assign]

    assert check_optimizer(First(parameters(), amsgrad=True)) is True


# ------------------------------------------------------------------------------------------ holder_optimizer


def flat_parameters(params: Sequence[Parameter]) -> tuple[Parameter, list[slice]]:
    ends = torch.tensor([param.numel() for param in params]).cumsum(0).tolist()
    flat = Parameter(torch.cat([param.detach().reshape(-1) for param in params]))
    return flat, [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("whole", [True, False])
def test_the_holder_over_a_flat_buffer_computes_what_the_template_would(
    bias_correction: bool, decoupled: bool, whole: bool
) -> None:
    params = parameters()
    template = AMSGrad(params, 0.01, (0.8, 0.95), 1e-6, 0.1, decoupled, bias_correction, fused=True)
    flat, slices = flat_parameters(params)
    held = [flat] if whole else [Parameter(flat.detach()[piece]) for piece in slices]
    holder = holder_optimizer(template, [held])

    for step in range(100):
        set_gradients(params, step)
        gradient = torch.cat([param.grad.reshape(-1) for param in params if param.grad is not None])
        for tensor, piece in zip(held, [slice(None)] if whole else slices, strict=True):
            tensor.grad = gradient[piece]
        template.step()
        holder.step()

    expected = torch.cat([param.detach().reshape(-1) for param in params])
    if whole:
        # The kernel rounds the last few elements of a tensor, which fill no vector register, differently.
        torch.testing.assert_close(flat.detach(), expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(flat, expected)


def test_the_holder_keeps_kind_and_settings_of_every_group() -> None:
    params = parameters()
    template = AdamW(
        [
            {"params": params[:2], "lr": torch.tensor(0.5), "weight_decay": 0.25, "maximize": True},
            {"params": params[2:], "betas": (0.5, 0.75), "eps": 0.125, "name": "rest"},
        ]
    )

    holder = holder_optimizer(template, [[flat_parameters(params[:2])[0]], [flat_parameters(params[2:])[0]]])

    first, second = holder.param_groups
    assert isinstance(holder, AMSGrad)
    assert [first[key] for key in HYPERS] == [0.5, (0.9, 0.999), 1e-8, 0.25]
    assert [second[key] for key in HYPERS] == [1e-3, (0.5, 0.75), 0.125, 1e-2]
    assert [group["maximize"] for group in holder.param_groups] == [True, False]
    for group in holder.param_groups:
        assert isinstance(group["lr"], float)
        assert (group["amsgrad"], group["fused"], group["decoupled_weight_decay"]) == (True, True, True)
    assert check_optimizer(holder) is True


def test_a_coupled_template_gives_a_coupled_holder() -> None:
    template = Adam(parameters(), weight_decay=0.1)

    group = holder_optimizer(template, [parameters()]).param_groups[0]

    assert (group["decoupled_weight_decay"], group["bias_correction"]) == (False, True)


def test_the_holder_stays_fused_after_loading_a_checkpoint_of_another_kernel() -> None:
    params = parameters()
    template = Adam(params, amsgrad=True)
    train(template, params, steps=2)
    holder = holder_optimizer(template, [parameters()])

    holder.load_state_dict(template.state_dict())

    assert holder.param_groups[0]["fused"] is True


def test_the_holder_leaves_the_fused_kernel_where_it_does_not_exist() -> None:
    complex_weight = Parameter(torch.ones(3, dtype=torch.complex64))
    holder = holder_optimizer(Adam([complex_weight]), [[Parameter(complex_weight.detach().clone())]])

    assert holder.param_groups[0]["fused"] is None


def test_the_holder_wants_one_list_for_every_group() -> None:
    with pytest.raises(ValueError, match="has 1 param groups, and tensors came for 2"):
        holder_optimizer(Adam(parameters()), [parameters(), parameters()])
