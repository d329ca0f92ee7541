"""What user code sees of a train loader that all ranks share: this rank's share of the epoch, as under DDP.

The sampler behind walks the whole order on every rank. A proxy in its place has its attributes and methods, which user
code reads, sets and calls; its length and what it yields are this rank's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_async.data.orders import BatchSource, walk

__all__ = ["SamplerProxy", "order_behind", "show_share"]


class SamplerProxy:
    """Stands in a sampler's place: its attributes and methods reach the sampler, its length and iteration do not.

    Args:
        real: the sampler.
        length: gives the length.
        iterate: gives an iterator.
        shown: what some attributes are read as.

    Examples:
        >>> real = BatchSampler(range(6), batch_size=2, drop_last=False)
        >>> proxy = SamplerProxy(real, lambda: 1, lambda: iter([[0, 1]]))
        >>> proxy.batch_size = 3
        >>> isinstance(proxy, BatchSampler), len(proxy), list(proxy), list(real)
        (True, 1, [[0, 1]], [[0, 1, 2], [3, 4, 5]])
    """

    __slots__ = ("_proxy_iterate", "_proxy_length", "_proxy_real", "_proxy_shown")

    def __init__(
        self,
        real: Any,
        length: Callable[[], int],
        iterate: Callable[[], Iterator[Any]],
        shown: Mapping[str, Callable[[], Any]] | None = None,
    ) -> None:
        object.__setattr__(self, "_proxy_real", real)
        object.__setattr__(self, "_proxy_length", length)
        object.__setattr__(self, "_proxy_iterate", iterate)
        object.__setattr__(self, "_proxy_shown", shown or {})

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            # It passes for one of the sampler's class.
            return type(object.__getattribute__(self, "_proxy_real"))
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> Any:
        shown = self._proxy_shown.get(name)
        return getattr(self._proxy_real, name) if shown is None else shown()

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._proxy_real, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._proxy_real, name)

    def __len__(self) -> int:
        length: int = self._proxy_length()
        return length

    def __iter__(self) -> Iterator[Any]:
        iterator: Iterator[Any] = self._proxy_iterate()
        return iterator

    def __repr__(self) -> str:
        return repr(self._proxy_real)

    def __copy__(self) -> SamplerProxy:
        return self

    def __deepcopy__(self, memo: object) -> SamplerProxy:
        return self


def show_share(loader: DataLoader[Any], source: BatchSource, world_size: int, rank: int) -> None:
    """Puts faces in the places of the loader's samplers.

    Args:
        loader: the loader that user code sees.
        source: the global order, whose sampler is the loader's batch sampler, or its sampler if it does not batch.
        world_size: number of ranks.
        rank: this rank.
    """
    batches = source.batches
    walks_samples = isinstance(batches, DistributedSampler)
    injected = batches if walks_samples else getattr(batches, "sampler", None)
    sampler_proxy: SamplerProxy | None = None
    if isinstance(injected, DistributedSampler):
        sampler = injected
        sampler_proxy = SamplerProxy(
            sampler,
            lambda: len(_share(sampler, world_size, rank)),
            lambda: iter(walk(_share(sampler, world_size, rank), source.seed)),
            {
                "num_replicas": lambda: world_size,
                "rank": lambda: rank,
                "num_samples": lambda: _share(sampler, world_size, rank).num_samples,
                "total_size": lambda: _share(sampler, world_size, rank).total_size,
            },
        )
    # DataLoader.__setattr__ refuses these attributes; another loader would lose what its subclass keeps.
    places = vars(loader)
    if sampler_proxy is not None and places["sampler"] is injected:
        places["sampler"] = sampler_proxy
    if not walks_samples:
        shown = {} if sampler_proxy is None else {"sampler": lambda: sampler_proxy}
        places["batch_sampler"] = SamplerProxy(
            batches,
            lambda: -(-len(batches) // world_size),
            lambda: _share_of_batches(batches, source.seed, world_size, rank),
            shown,
        )


def order_behind(current: Any, before: Any) -> Any:
    """The sampler that walks the global order, behind what a loader has as its (batch) sampler.

    Args:
        current: what the loader has now; user code may have put something else there.
        before: the sampler that walked the order until now.

    Raises:
        ValueError: if no order that all ranks walk can be made of it.
    """
    if isinstance(current, SamplerProxy) or type(current) is SamplerProxy:
        return current._proxy_real
    if current is before:
        return before
    sampler = getattr(current, "sampler", None)
    if type(sampler) is SamplerProxy:
        # A batch sampler over the sampler that the loader shows.
        order = copy.copy(current)
        order.sampler = sampler._proxy_real
        return order
    raise ValueError(
        f"its sampler was replaced by a {type(current).__name__} that is made for this rank alone. Set the attributes "
        "of the one that it has, build the new one over `loader.sampler`, or return a new loader with "
        "Trainer(reload_dataloaders_every_n_epochs=...)"
    )


def _share(sampler: DistributedSampler[Any], world_size: int, rank: int) -> DistributedSampler[Any]:
    """The same sampler as under DDP: over all samples, for one of N ranks."""
    share = copy.copy(sampler)
    if type(sampler) is not DistributedSampler:
        # Lightning's wrapper keeps what it has drawn in its data set.
        share.dataset = copy.copy(sampler.dataset)
    share.num_replicas, share.rank = world_size, rank
    share.num_samples = math.ceil(len(sampler.dataset) / world_size)  # type: ignore[arg-type]
    share.total_size = share.num_samples * world_size
    return share


def _share_of_batches(batches: Any, seed: int, world_size: int, rank: int) -> Iterator[Any]:
    """This rank's share of an epoch's batches; as many for each rank, so some may be on two of them."""
    walked = copy.copy(batches)
    injected = getattr(batches, "sampler", None)
    if type(batches).__iter__ is BatchSampler.__iter__ and isinstance(injected, DistributedSampler):
        walked.sampler = _share(injected, world_size, rank)
        return iter(walk(walked, seed))
    try:
        length = len(batches)
    except TypeError:
        return islice(iter(walked), rank, None, world_size)
    every = walk(walked, seed, length)
    share = math.ceil(len(every) / world_size)
    return iter([every[(position * world_size + rank) % len(every)] for position in range(share)])
