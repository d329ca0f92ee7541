"""Modules that cannot be trained: those with collectives of their own, for which ranks would have to run together.

Below `strategy.py`. Knows no Lightning.
"""

from __future__ import annotations

from torch import nn

__all__ = ["check_module"]

_ADVICE = {
    "SyncBatchNorm": "Use BatchNorm: its running statistics are averaged over the ranks at each stop",
    "DistributedDataParallel": "Take the module out of its wrapper: the strategy trains it as it is",
    "FullyShardedDataParallel": 'Take the module out of its wrapper, or shard it with strategy="fsdp"',
    "FSDPModule": 'Leave fully_shard out, or shard it with strategy="fsdp"',
    "DeepSpeedEngine": 'Take the module out of its engine, or use strategy="deepspeed"',
}


def check_module(module: nn.Module) -> None:
    """Refuses a module in which ranks would wait for one another, or whose gradients cannot be exchanged.

    Raises:
        ValueError: if there is such a module in it; the message says which, and what to do.
    """
    for name, part in module.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            raise ValueError(
                f"{name or 'the module itself'} has sparse gradients, which Adam cannot use. Set sparse=False"
            )
        # By name: the packages are large, and not all of them are installed.
        for kind in type(part).__mro__:
            if kind.__name__ in _ADVICE and kind.__module__.partition(".")[0] in ("torch", "deepspeed"):
                raise ValueError(
                    f"{name or 'the module itself'} is a {kind.__name__}, whose collectives need all ranks at the same "
                    f"batch. {_ADVICE[kind.__name__]}"
                )
