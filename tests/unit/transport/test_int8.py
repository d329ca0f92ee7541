"""A byte for each value: what rounding loses comes later, errors do not add up, and both sides agree bit by bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lightning_async.transport.fields import pack_bitmap
from lightning_async.transport.int8 import BLOCK, GradientWire, ParameterWire, dequantize, quantize, wire_bytes
from lightning_async.transport.message import Message, Parameters, Push
from lightning_async.transport.wire import PIECE

# Less than a block, whole blocks, several chunks with a rest.
SIZES = [1, 255, 256, 257, 1000, 3 * 65536 + 77, PIECE + 300]


def normal(numel: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * scale


def gradients(numel: int, sizes: list[list[int]] | None = None) -> tuple[GradientWire, GradientWire]:
    return GradientWire(numel, torch.float32, sizes or [[numel]]), GradientWire(numel, torch.float32)


def passed(
    sender: GradientWire | ParameterWire,
    receiver: GradientWire | ParameterWire,
    payload: Tensor,
    message: Message | None = None,
) -> Tensor:
    """What arrives of a payload."""
    out = torch.full_like(payload, torch.nan)
    if sender.needs_exact:
        assert receiver.needs_exact
        sender.pass_exact(payload)
        receiver.pass_exact(out.copy_(payload))
        return out
    assert not receiver.needs_exact
    for sent, arrived in zip(sender.encode(payload, message or Push(worker=1)), receiver.decode(out), strict=True):
        arrived.copy_(sent)
    return out


@pytest.mark.parametrize("numel", SIZES)
def test_a_value_is_off_by_at_most_half_a_step_of_its_block(numel: int) -> None:
    values = normal(numel)
    sender, receiver = gradients(numel)

    arrived = passed(sender, receiver, values)

    for start in range(0, numel, BLOCK):
        block = slice(start, start + BLOCK)
        step = values[block].abs().max() / 127
        assert (arrived[block] - values[block]).abs().max() <= step * 0.501
    sent = sum(piece.numel() for piece in sender.encode(values, Push(worker=1)))
    assert sent == sender.size(values) == wire_bytes(numel) <= 1.016 * numel + 4


@pytest.mark.parametrize("numel", SIZES)
def test_what_rounding_loses_of_a_gradient_is_sent_with_later_ones(numel: int) -> None:
    sender, receiver = gradients(numel)
    sent, arrived = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    for seed in range(20):
        # Most of a block is far below a step of its largest value.
        payload = normal(numel, seed, 1e-4)
        payload[::BLOCK] += 1.0
        sent += payload
        arrived += passed(sender, receiver, payload)

    assert torch.allclose(arrived + sender.lost, sent, atol=1e-5)
    # Without feedback all that is small would have been lost.
    assert sender.lost.abs().max() <= 0.6 / 127


def test_a_parameter_without_a_gradient_keeps_what_it_has_lost() -> None:
    sender, receiver = gradients(600, [[200, 100], [300]])
    passed(sender, receiver, normal(300), Push(worker=1, present=pack_bitmap([True, True])))
    kept = sender.lost.clone()
    stale = normal(300, seed=1)

    arrived = passed(sender, receiver, stale, Push(worker=1, present=pack_bitmap([True, False])))

    assert torch.equal(sender.lost[200:], kept[200:])
    assert not torch.equal(sender.lost[:200], kept[:200])
    assert not arrived[200:].any()
    # What is sent stays as it was.
    assert torch.equal(stale, normal(300, seed=1))


def test_each_optimizer_has_losses_of_its_own() -> None:
    sender, receiver = gradients(600, [[200, 100], [300]])

    passed(sender, receiver, normal(300), Push(worker=1, optimizer=1))

    assert not sender.lost[:300].any()
    assert sender.lost[300:].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives_as_nan_and_spoils_nothing_that_is_sent_later(value: float) -> None:
    sender, receiver = gradients(1000)
    payload = normal(1000)
    payload[300] = value

    arrived = passed(sender, receiver, payload)
    again = passed(sender, receiver, normal(1000, seed=1))

    assert arrived[256:512].isnan().all()
    assert arrived[:256].isfinite().all()
    assert arrived[512:].isfinite().all()
    assert again.isfinite().all()
    assert sender.lost.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_rejected_leaves_nothing_behind_and_takes_nothing_with_it(value: float) -> None:
    sender, receiver = gradients(1000)
    passed(sender, receiver, normal(1000))
    lost = sender.lost.clone()
    # What overflows in one place is seldom small in the others: finite, and a step of theirs is beyond all gradients.
    exploded = normal(1000, seed=1, scale=1e30)
    exploded[300] = value

    arrived = passed(sender, receiver, exploded, Push(worker=1, finite=False))

    assert arrived[256:512].isnan().all()
    assert torch.equal(sender.lost, lost)
    assert passed(sender, receiver, normal(1000, seed=2)).abs().max() < 10.0


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-30, 3e38])
def test_the_smallest_and_the_largest_numbers_are_passed(value: float) -> None:
    sender, receiver = gradients(1000)
    payload = torch.full((1000,), value)

    arrived = passed(sender, receiver, payload)

    assert torch.allclose(arrived + sender.lost, payload, rtol=1e-6, atol=0.0)


@example([torch.finfo(torch.float32).max])
@example([torch.finfo(torch.float32).min, 1.0])
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=600))
def test_codes_and_what_they_lose_make_the_value(values: list[float]) -> None:
    tensor = torch.tensor(values)
    left, scales, codes = (
        tensor.clone(),
        torch.empty(-(-len(values) // BLOCK)),
        torch.empty(len(values), dtype=torch.int8),
    )

    quantize(left, scales, codes)
    out = torch.empty_like(tensor)
    dequantize(scales, codes, out)

    assert codes.min() >= -127
    assert left.isfinite().all()
    assert torch.allclose((out.double() + left), tensor.double(), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("numel", SIZES)
def test_both_sides_have_the_same_parameters_and_errors_do_not_add_up(numel: int) -> None:
    sender, receiver = (ParameterWire(numel, torch.float32) for _ in range(2))
    parameters = normal(numel)
    first = passed(sender, receiver, parameters, Parameters(worker=1))
    assert torch.equal(first, parameters)

    for seed in range(30):
        step = normal(numel, seed, 1e-3)
        parameters += step
        arrived = passed(sender, receiver, parameters, Parameters(worker=1))
        assert torch.equal(arrived, sender.shown)
        # A difference has the step and the last error in it.
        assert (arrived - parameters).abs().max() <= 1.1 * step.abs().max() / 127

    # Once nothing changes, the receiver comes to have them.
    for _ in range(3):
        arrived = passed(sender, receiver, parameters, Parameters(worker=1))
    assert torch.allclose(arrived, parameters, rtol=1e-6, atol=1e-9)


def test_what_a_worker_does_to_its_parameters_is_overwritten_as_with_fp32() -> None:
    sender, receiver = (ParameterWire(1000, torch.float32) for _ in range(2))
    parameters = normal(1000)
    passed(sender, receiver, parameters, Parameters(worker=1))
    own = torch.zeros(1000)

    for sent, arrived in zip(sender.encode(parameters, Parameters(worker=1)), receiver.decode(own), strict=True):
        arrived.copy_(sent)

    assert torch.equal(own, parameters)


def test_parameters_are_sent_as_they_are_after_they_were_not_finite() -> None:
    sender, receiver = (ParameterWire(1000, torch.float32) for _ in range(2))
    parameters = normal(1000)
    passed(sender, receiver, parameters)
    spoilt = parameters.clone()
    spoilt[0] = math.nan

    assert passed(sender, receiver, spoilt)[:256].isnan().all()
    assert sender.needs_exact
    assert torch.equal(passed(sender, receiver, parameters), parameters)


def test_the_bytes_are_the_same_with_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        sender = GradientWire(SIZES[-1], torch.float32, [[SIZES[-1]]])
        data = [piece.clone() for seed in range(3) for piece in sender.encode(normal(SIZES[-1], seed), Push(worker=1))]
        found.append((torch.cat(data), sender.lost))
    torch.set_num_threads(threads)

    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_flat_buffers_dtype_is_kept(dtype: torch.dtype) -> None:
    sender, receiver = ParameterWire(300, dtype), ParameterWire(300, dtype)
    parameters = normal(300).to(dtype)
    passed(sender, receiver, parameters)
    arrived = passed(sender, receiver, parameters + 1e-3)

    assert arrived.dtype is dtype
    assert torch.equal(arrived, sender.shown)
    assert torch.allclose(arrived, parameters + 1e-3, atol=1e-4)
