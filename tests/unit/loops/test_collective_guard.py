"""What user code may not call in a batch: every way to a collective over several ranks, and nothing else.

Over torch's fake process group, which claims to have two ranks and answers at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed import all_reduce as imported_all_reduce
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_async.loops.collective_guard import allow_collectives, collective_operators, refuse_collectives
from lightning_async.loops.phase import Phase


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def world() -> dist.ProcessGroup:
    found = dist.group.WORLD
    assert found is not None
    return found


def ones() -> torch.Tensor:
    return torch.ones(2)


def in_inference_mode() -> None:
    with torch.inference_mode():
        dist.all_reduce(ones())


def in_backward() -> None:
    leaf = torch.ones(2, requires_grad=True)
    leaf.register_hook(lambda gradient: dist.all_reduce(gradient))
    leaf.sum().backward()


def in_a_thread() -> None:
    caught: list[BaseException] = []

    def call() -> None:
        try:
            dist.all_reduce(ones())
        except MisconfigurationException as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if caught:
        raise caught[0]


CALLS: dict[str, Callable[[], Any]] = {
    "torch.distributed.all_reduce": lambda: dist.all_reduce(ones()),
    "torch.distributed.all_reduce, imported by name": lambda: imported_all_reduce(ones()),
    "torch.distributed.all_reduce, not waited for": lambda: dist.all_reduce(ones(), async_op=True),
    "torch.distributed.all_reduce, under inference_mode": in_inference_mode,
    "torch.distributed.all_reduce, in backward": in_backward,
    "torch.distributed.all_reduce, in a thread": in_a_thread,
    "torch.distributed.barrier": dist.barrier,
    "torch.distributed.broadcast": lambda: dist.broadcast(ones(), 0),
    "torch.distributed.reduce": lambda: dist.reduce(ones(), 0),
    "torch.distributed.all_gather": lambda: dist.all_gather([ones(), ones()], ones()),
    "torch.distributed.gather": lambda: dist.gather(ones(), [ones(), ones()]),
    "torch.distributed.scatter": lambda: dist.scatter(ones(), [ones(), ones()]),
    "torch.distributed.all_to_all_single": lambda: dist.all_to_all_single(ones(), ones()),
    "torch.distributed.all_gather_object": lambda: dist.all_gather_object([None, None], 1),
    "torch.distributed.broadcast_object_list": lambda: dist.broadcast_object_list([1]),
    "torch.distributed.send": lambda: dist.send(ones(), 1),
    "torch.distributed.recv": lambda: dist.recv(ones(), 1),
    "torch.distributed.recv, from anyone": lambda: dist.recv(ones()),
    "torch.distributed._functional_collectives.all_reduce": lambda: functional.wait_tensor(
        functional.all_reduce(ones(), "sum", world())
    ),
    "c10d.allreduce_": lambda: world().allreduce(ones()),
    "torch.distributed.new_group": lambda: dist.new_group([0, 1]),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_collective_in_a_batch_is_refused_by_its_name_and_place(call: str) -> None:
    with (
        Phase().asynchronous(),
        pytest.raises(MisconfigurationException, match="while the ranks train asynchronously") as refused,
    ):
        CALLS[call]()

    name = call.partition(",")[0]
    assert str(refused.value).startswith(f"{name} ({__file__}:")
    assert "Call it in validation or at the end of the epoch" in str(refused.value)


# The fake group cannot tell who has sent.
@pytest.mark.parametrize("call", [call for call in CALLS if "from anyone" not in call])
def test_between_segments_the_same_call_is_torchs_own(call: str) -> None:
    with Phase().asynchronous():
        pass

    CALLS[call]()


def test_a_group_of_user_code_with_several_ranks_is_refused_too() -> None:
    both = dist.new_group([0, 1])

    with Phase().asynchronous(), pytest.raises(MisconfigurationException, match=r"all_reduce \(.* asynchronously"):
        dist.all_reduce(ones(), group=both)


def test_a_group_of_this_rank_alone_waits_for_nobody_and_works() -> None:
    alone = dist.new_group([0])
    tensor, gathered = ones(), [torch.zeros(2)]

    with Phase().asynchronous():
        dist.all_reduce(tensor, group=alone)
        dist.barrier(group=alone)
        dist.all_gather(gathered, tensor, group=alone)

    assert tensor.tolist() == gathered[0].tolist() == [1.0, 1.0]


def test_the_guard_may_come_and_go_any_number_of_times() -> None:
    for _ in range(3):
        refuse_collectives()
        refuse_collectives()
        with pytest.raises(MisconfigurationException):
            dist.barrier()
        allow_collectives()
        allow_collectives()
        dist.barrier()


def test_the_operators_that_are_guarded_are_all_that_run_on_a_group() -> None:
    assert set(collective_operators()) >= {
        *("allreduce_", "allgather_", "broadcast_", "reduce_", "gather_", "scatter_", "reduce_scatter_"),
        *("alltoall_", "alltoall_base_", "barrier", "monitored_barrier_", "send", "recv_", "recv_any_source_"),
    }
