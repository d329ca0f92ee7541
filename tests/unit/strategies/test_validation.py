"""Modules that run collectives of their own are refused before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from lightning_async.strategies.validation import check_module


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
