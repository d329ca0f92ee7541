"""Shared tensors, over a group of one rank: what is changed, and what is left as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_async.loops import tensor_sync as buffers
from lightning_async.loops.buffer_sync import BufferSync
from lightning_async.loops.tensor_sync import average, average_unlike, broadcast_tensors, take_unlike_from_rank_0


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_half", torch.tensor([60000.0, 1.5], dtype=torch.float16))
        self.register_buffer("mean", torch.tensor([[1e30, -2.5]]))
        self.register_buffer("in_double", torch.tensor(1 / 3, dtype=torch.float64))
        self.register_buffer("mask", torch.tensor([float("-inf"), 0.0]))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("phase", torch.tensor([1j, 2.0]))
        self.register_buffer("short", torch.tensor([[3], [4]], dtype=torch.int16))


def meet(module: nn.Module) -> None:
    sync = BufferSync(module, lambda mine: [mine], rank=0)
    sync.begin_segment()
    sync.meet(batches=1, batches_as_ddp=1)


def test_what_all_ranks_agree_on_stays_exactly_what_it_is() -> None:
    module = Buffers()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    storages = {name: buffer.data_ptr() for name, buffer in module.named_buffers()}

    module.averaged_buffers = ["in_half", "mean", "in_double", "mask", "empty"]  # type: ignore[assignment]
    meet(module)

    for name, buffer in module.named_buffers():
        assert buffer.dtype is before[name].dtype
        assert buffer.equal(before[name]), name
        assert buffer.data_ptr() == storages[name]


def test_what_nccl_cannot_reach_goes_through_the_gpu_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Copied(torch.Tensor):
        """What has been moved; the host's memory stands for a GPU's."""

    reached: list[type] = []

    def collective(tensor: torch.Tensor, **arguments: Any) -> None:
        reached.append(type(tensor))
        tensor.fill_(3)

    def broadcast(tensor: torch.Tensor, **arguments: Any) -> None:
        # Bytes, which every backend can move, here those of a whole number.
        assert tensor.dtype is torch.uint8
        collective(tensor.view(torch.int64))

    module = Buffers()
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "broadcast", broadcast)
    monkeypatch.setattr(dist, "all_reduce", collective)
    monkeypatch.setattr(buffers, "_gpu", lambda: "gpu")
    real = torch.Tensor.to

    def move(tensor: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return tensor.clone().as_subclass(Copied) if arguments == ("gpu",) else real(tensor, *arguments)

    monkeypatch.setattr(torch.Tensor, "to", move)
    average([module.mean, module.mask])
    broadcast_tensors([module.count])

    assert reached == [Copied] * 2
    assert module.count.item() == 3
    assert module.mean.tolist() == [[3.0, 3.0]]


def test_a_module_without_buffers_is_left_alone() -> None:
    meet(nn.Linear(2, 2))


def test_only_what_differs_between_ranks_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    alike, unlike = nn.Linear(3, 3), nn.Linear(2, 2).half()
    others = (torch.ones(2, 3, dtype=torch.complex64), torch.tensor(3, dtype=torch.uint8), torch.tensor([True]))
    sent: list[torch.Size] = []

    def reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        if op == dist.ReduceOp.MAX:
            tensor[2:4] += 1  # as if another rank had others
        elif op == dist.ReduceOp.SUM:
            sent.append(tensor.shape)

    monkeypatch.setattr(dist, "all_reduce", reduce)
    before = [parameter.detach().clone() for parameter in unlike.parameters()]
    average_unlike([*alike.parameters(), *unlike.parameters(), *others])

    assert sent == [(4,), (2,)]
    assert all(map(torch.equal, unlike.parameters(), before))


def test_parameters_keep_their_strides_and_need_no_gradient_for_it() -> None:
    weight = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    before, strides = weight.detach().clone(), weight.stride()

    broadcast_tensors([weight])

    assert weight.stride() == strides
    assert weight.equal(before)
    assert weight.requires_grad
    assert weight.grad_fn is None


def pretend_unlike(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Makes all tensors differ between ranks, and rank 0's hold ``value``."""

    def reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        if op == dist.ReduceOp.MAX:
            tensor += 1

    monkeypatch.setattr(dist, "all_reduce", reduce)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src, group: tensor.view(torch.float32).fill_(value))


def test_a_buffer_that_validation_has_made_is_overwritten_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        made = torch.zeros(2)
    pretend_unlike(monkeypatch, 5.0)

    take_unlike_from_rank_0([made])

    assert made.tolist() == [5.0, 5.0]


def test_a_buffer_that_is_one_element_many_times_need_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    expanded = torch.full((1,), 5.0).expand(4)
    pretend_unlike(monkeypatch, 5.0)

    take_unlike_from_rank_0([expanded])

    assert expanded.tolist() == [5.0] * 4
