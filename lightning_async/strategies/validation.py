"""What cannot be trained, refused before anything waits, with the way out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_async.exchange.child_process import APART, check_policy_can_travel
from lightning_async.exchange.engine import check_overlap
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.holder.layout import all_parameters, exchanged
from lightning_async.holder.staleness import resolve_max_staleness
from lightning_async.policies.momentum import check_has_momentum
from lightning_async.policies.registry import make_policy
from lightning_async.shards.template import check_policy_can_be_cut
from lightning_async.transport.devices import place_holder

__all__ = [
    "check_module",
    "check_momentum",
    "check_parameters",
    "describe_gradient",
    "is_ray_worker",
    "refuse_beside_spread",
    "refuse_finders",
    "refuse_options",
    "refuse_ray_worker",
    "refuse_sync_batchnorm",
]

_ADVICE = {
    "SyncBatchNorm": "Use BatchNorm: its running statistics are averaged over the ranks at each stop",
    "DistributedDataParallel": "Take the module out of its wrapper: the strategy trains it as it is",
    "FullyShardedDataParallel": 'Take the module out of its wrapper, or shard it with strategy="fsdp"',
    "FSDPModule": 'Leave fully_shard out, or shard it with strategy="fsdp"',
    "DeepSpeedEngine": 'Take the module out of its engine, or use strategy="deepspeed"',
}


def refuse_sync_batchnorm(name: str) -> NoReturn:
    """Refuses ``Trainer(sync_batchnorm=True)``.

    Args:
        name: the strategy's name.
    """
    raise MisconfigurationException(
        f"{name} cannot take Trainer(sync_batchnorm=True): synchronised batch norm is a collective in every forward, "
        "and the ranks do not run forward together. Leave it out (running statistics are averaged over the ranks "
        'before each validation), or use strategy="ddp".'
    )


def refuse_ray_worker(kind: str, environment: object) -> None:
    """Refuses a worker of Ray Train to a strategy that takes its process for its own.

    Args:
        kind: the strategy's class.
        environment: where its ranks would find each other.

    Raises:
        MisconfigurationException: if this is a worker of Ray Train, or that is Ray's environment.
    """
    if is_ray_worker() or type(environment).__module__.startswith("ray."):
        raise MisconfigurationException(
            f"{kind} starts its ranks and ends them, and in Ray Train both are Ray's: take "
            f"strategy=lightning_async.ray.Ray{kind}(...) there, with the same arguments."
        )


def is_ray_worker() -> bool:
    """Whether this process runs a training function of Ray Train; imports nothing of Ray's."""
    train = sys.modules.get("ray.train")
    if train is None:
        return False
    try:
        return train.get_context().get_world_size() is not None
    except (AttributeError, RuntimeError, Warning):
        # A release without it; outside of such a function; in one of Ray Tune's.
        return False


def refuse_finders(trainer: Trainer, name: str) -> None:
    """Refuses the callbacks that ``Tuner.lr_find`` and ``Tuner.scale_batch_size`` add, or that the user has added.

    Args:
        trainer: the trainer, with all of its callbacks.
        name: the strategy's name.

    Raises:
        MisconfigurationException: if there is one; the message says how to search on one device.
    """
    connected: Any = trainer  # attributes that connectors set are unknown to type checkers
    for callback in connected.callbacks:
        if isinstance(callback, LearningRateFinder):
            what, method, reason = (
                "learning-rate",
                "lr_find",
                "it raises the learning rate from batch to batch, and here a batch's loss is not that of the last rate",
            )
        elif isinstance(callback, BatchSizeFinder):
            what, method, reason = (
                "batch-size",
                "scale_batch_size",
                "it restarts when memory runs out, which is not at the same batch on all ranks",
            )
        else:
            continue
        raise MisconfigurationException(
            f"{name} cannot run the {what} finder: {reason}. Run it first on one device, "
            f'`Tuner(Trainer(devices=1, strategy="auto")).{method}(model)`, then train with what it has found.'
        )


def refuse_options(options: ExchangeOptions, name: str, device: torch.device, world_size: int) -> None:
    """Refuses options that this machine or this number of ranks cannot have.

    Args:
        options: the strategy's.
        name: the strategy's name.
        device: what this rank computes on.
        world_size: number of ranks.

    Raises:
        MisconfigurationException: if there are such; the message says what can be had.
    """
    try:
        if device.type != "cuda":
            place_holder(options.holder_device, options.transport, ())
        if options.overlap:
            bound = resolve_max_staleness(options.max_staleness, world_size, options.gradients_per_update)
            readers = world_size * options.slots(world_size)
            check_overlap(bound, readers, 1, options.gradients_per_update)
        if options.holder == "process" and world_size > 1:
            check_policy_can_travel(make_policy(options.staleness_policy), *APART)
        if options.shards(world_size) > 1:
            check_policy_can_be_cut(make_policy(options.staleness_policy))
    except ValueError as error:
        raise MisconfigurationException(f"{name} cannot train here: {error}.") from None


def refuse_beside_spread(
    options: ExchangeOptions, name: str, device: torch.device, measures: bool, goes_on: bool, is_owned: bool = False
) -> None:
    """Refuses what shards that are reached over the network cannot be beside.

    Args:
        options: the strategy's.
        name: the strategy's name.
        device: what this rank computes on.
        measures: whether step times decide how many gradients make an update.
        goes_on: whether the run goes on without ranks that it loses.
        is_owned: whether an engine owns the processes.

    Raises:
        MisconfigurationException: if there is such; the message says what to do.
    """
    refused = (
        (options.transport == "shm", 'transport="shm"', "leave transport out, or have all ranks on one host"),
        (options.overlap, "overlap=True", "leave overlap out"),
        (options.wire_dtype != "fp32", f'wire_dtype="{options.wire_dtype}"', "leave wire_dtype out"),
        (
            options.parameter_wire_dtype != "fp32",
            f'parameter_wire_dtype="{options.parameter_wire_dtype}"',
            "leave parameter_wire_dtype out",
        ),
        (measures, 'gradients_per_update="auto"', "give a number, such as 1"),
        (goes_on, 'on_worker_failure="continue"', "leave on_worker_failure out, and let a restart resume"),
        (device.type != "cpu", f"ranks on {device.type.upper()}", "train on CPUs"),
        (is_owned, "Ray Train", "start the ranks by torchrun or SLURM"),
    )
    for is_asked, what, way_out in refused:
        if is_asked:
            raise MisconfigurationException(
                f"{name} cannot train here: holder_shards={options.holder_shards} with shards that are reached over "
                f"the network cannot be used with {what}: {way_out}, or leave holder_shards out."
            )


def check_momentum(options: ExchangeOptions, optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that the staleness policy or the momentum correction cannot work with.

    Args:
        options: the strategy's.
        optimizer: the module's.

    Raises:
        MisconfigurationException: if they cannot; the message says what can be had.
    """
    try:
        make_policy(options.staleness_policy).check(optimizer)
        if options.momentum_correction is not None:
            check_has_momentum(optimizer)
    except ValueError as error:
        raise MisconfigurationException(f"{error}.") from None


def check_module(module: nn.Module) -> None:
    """Refuses a module in which ranks would wait for one another, or whose gradients cannot be exchanged.

    Raises:
        ValueError: if there is such a module in it; the message says which, and what to do.
    """
    for name, part in module.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            raise ValueError(
                f"{name or 'the module itself'} has sparse gradients, and gradients are exchanged as dense tensors. "
                "Set sparse=False"
            )
        # By name: the packages are large, and not all of them are installed.
        for kind in type(part).__mro__:
            if kind.__name__ in _ADVICE and kind.__module__.partition(".")[0] in ("torch", "deepspeed"):
                raise ValueError(
                    f"{name or 'the module itself'} is a {kind.__name__}, whose collectives need all ranks at the same "
                    f"batch. {_ADVICE[kind.__name__]}"
                )


def check_parameters(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuses parameters that are to be trained and cannot be exchanged.

    Args:
        module: knows the parameters' names.
        optimizers: have the parameters.

    Raises:
        ValueError: if there is one; the message names it, and says what to do.
    """
    for optimizer in optimizers:
        for parameter in all_parameters(optimizer):
            if parameter.requires_grad and not exchanged(parameter):
                raise ValueError(
                    f"{_name_of(module, parameter)} is trained and of {parameter.dtype}, and gradients are "
                    "exchanged in real numbers. Keep it as a real parameter and take torch.view_as_complex(...) of "
                    'it in forward, freeze it with requires_grad=False, or use strategy="ddp"'
                )


def describe_gradient(module: nn.Module, parameter: Tensor) -> str:
    """What is wrong with a gradient that cannot be exchanged, and what to do."""
    layout = "missing" if parameter.grad is None else str(parameter.grad.layout).removeprefix("torch.")
    return (
        f"the gradient of {_name_of(module, parameter)} is {layout}, and gradients are exchanged as dense tensors. "
        "Make it dense: pass sparse=False where the parameter is used (torch.nn.functional.embedding, for example)."
    )


def _name_of(module: nn.Module, parameter: Tensor) -> str:
    names = [name for name, own in module.named_parameters() if own is parameter]
    return names[0] if names else f"a parameter of shape {tuple(parameter.shape)} that is none of the module's"
