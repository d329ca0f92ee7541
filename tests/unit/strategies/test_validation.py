"""Modules that run collectives of their own are refused before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from lightning_async.exchange.options import ExchangeOptions
from lightning_async.policies import StalenessPolicy
from lightning_async.strategies.validation import check_module, refuse_beside_spread, refuse_options


def unbuilt(kind: Any) -> nn.Module:
    """An instance of a wrapper that would need a process group to be built."""
    wrapper = object.__new__(kind)
    nn.Module.__init__(wrapper)
    assert isinstance(wrapper, nn.Module)
    return wrapper


class Sharded(FSDPModule, nn.Linear):
    """What fully_shard makes of a layer: a class of its own."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)


@pytest.mark.compatibility(
    "Refused",
    "FSDP, DDP or DeepSpeed wrappers inside the module, `fully_shard`, `SyncBatchNorm` layers",
    "refused",
    "Their collectives need all ranks at the same batch. Take the module out of its wrapper; use BatchNorm.",
)
@pytest.mark.parametrize(
    ("part", "advice"),
    [
        (nn.SyncBatchNorm(3), "is a SyncBatchNorm,.* Use BatchNorm"),
        (unbuilt(DistributedDataParallel), "is a DistributedDataParallel,.* out of its wrapper"),
        (unbuilt(FullyShardedDataParallel), 'is a FullyShardedDataParallel,.* strategy="fsdp"'),
        (Sharded(2, 2), 'is a FSDPModule,.* strategy="fsdp"'),
        (
            unbuilt(type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})),
            'is a DeepSpeedEngine,.* strategy="deepspeed"',
        ),
    ],
    ids=["SyncBatchNorm", "DDP", "FSDP", "fully_shard", "DeepSpeed"],
)
def test_a_part_with_collectives_of_its_own_is_refused_by_name(part: nn.Module, advice: str) -> None:
    module = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(2, 2), part)})

    with pytest.raises(ValueError, match=r"encoder\.1 " + advice):
        check_module(module)


@pytest.mark.compatibility(
    "Refused", "embeddings with `sparse=True`", "refused", "Adam cannot use their gradients. Set `sparse=False`."
)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused(kind: Any) -> None:
    check_module(nn.ModuleList([kind(4, 2)]))

    with pytest.raises(ValueError, match=r"0 has sparse gradients.* Set sparse=False"):
        check_module(nn.ModuleList([kind(4, 2, sparse=True)]))


def test_plain_modules_and_classes_of_the_same_name_pass() -> None:
    own = type("DeepSpeedEngine", (nn.Module,), {})()

    check_module(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), own))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"transport": "nccl"}, 'transport="nccl" was asked for, and rank 0 does not compute on a CUDA device'),
        ({"holder_device": "cuda"}, 'holder_device="cuda" was asked for'),
        ({"overlap": True, "max_staleness": 2}, "Take max_staleness of at least 7, or leave overlap out"),
    ],
)
def test_options_that_cannot_be_had_are_refused_under_the_strategys_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"^async cannot train here: ") as error:
        refuse_options(ExchangeOptions(**options), "async", torch.device("cpu"), world_size=4)

    assert said in str(error.value)


def test_shards_are_refused_for_policies_that_need_whole_parameters() -> None:
    def refuse(policy: str | StalenessPolicy) -> None:
        options = ExchangeOptions(holder_shards=2, staleness_policy=policy)
        refuse_options(options, "async", torch.device("cpu"), world_size=4)

    class Whole(StalenessPolicy):
        def after_step(self, optimizer: Any, late: Any) -> None:
            return

    class Local(StalenessPolicy):
        def gradient_factor(self, arrival: Any) -> float:
            return 0.5

    refuse("look_ahead")
    for policy, said in (
        (Whole(), "Whole overrides after_step or look_ahead, which may need whole ones"),
        (Local(), "Local cannot go there: .* Define it in a module that can be imported"),
    ):
        with pytest.raises(MisconfigurationException, match=said):
            refuse(policy)


@pytest.mark.parametrize(
    ("options", "facts", "said"),
    [
        ({"overlap": True}, {}, "with overlap=True: leave overlap out, or leave holder_shards out"),
        ({"transport": "shm"}, {}, 'with transport="shm": leave transport out, or have all ranks on one host'),
        ({"wire_dtype": "int8"}, {}, 'with wire_dtype="int8": leave wire_dtype out'),
        ({"parameter_wire_dtype": "bf16"}, {}, 'with parameter_wire_dtype="bf16": leave parameter_wire_dtype out'),
        ({}, {"measures": True}, 'with gradients_per_update="auto": give a number'),
        ({}, {"goes_on": True}, 'with on_worker_failure="continue": leave on_worker_failure out'),
        ({}, {"device": torch.device("cuda")}, "with ranks on CUDA: train on CPUs"),
        ({}, {"is_owned": True}, "with Ray Train: start the ranks by torchrun or SLURM"),
    ],
)
def test_shards_on_several_hosts_are_refused_with_what_they_cannot_be_beside(
    options: dict[str, Any], facts: dict[str, Any], said: str
) -> None:
    alone: dict[str, Any] = {"device": torch.device("cpu"), "measures": False, "goes_on": False}
    refuse_beside_spread(ExchangeOptions(holder_shards=2), "async", **alone)

    with pytest.raises(MisconfigurationException, match=said):
        refuse_beside_spread(ExchangeOptions(holder_shards=2, **options), "async", **(alone | facts))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"holder_shards": 0}, "holder_shards must be an int of at least 1, not 0"),
        ({"holder_shards": True}, "holder_shards must be an int of at least 1, not True"),
        ({"holder_threads": 2}, "holder_threads=2 is for a holder in one piece: leave one of them out"),
        ({"holder": "process"}, 'holder="process" has one for the whole holder: leave one of them out'),
        ({"transport": "nccl"}, 'transport="nccl" goes another way: leave one of them out'),
        ({"holder_device": "cuda"}, 'holder_device="cuda" goes another way: leave one of them out'),
    ],
)
def test_shards_are_refused_with_what_they_cannot_be_beside(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ExchangeOptions(**({"holder_shards": 2} | options))


def test_one_rank_has_a_holder_in_one_part() -> None:
    assert ExchangeOptions(holder_shards=3).shards(1) == 1


def test_options_that_can_be_had_are_not_refused() -> None:
    refuse_options(ExchangeOptions(overlap=True), "async", torch.device("cpu"), world_size=4)


def test_a_gpu_is_asked_for_what_it_can_do_later() -> None:
    refuse_options(ExchangeOptions(transport="nccl"), "async", torch.device("cuda", 0), world_size=4)
