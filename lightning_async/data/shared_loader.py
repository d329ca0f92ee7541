"""A train loader that all ranks share: what user code sees of it, and what the fetcher iterates.

User code sees a loader that behaves as under DDP (`loader_proxy.py`): it yields this rank's share of the epoch and
draws nothing. The fetcher has another one of the same class and attributes, which a `TicketFeed` feeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

from torch.utils.data import DataLoader, DistributedSampler

from lightning_async.data.loader_proxy import SamplerProxy, order_behind, show_share
from lightning_async.data.orders import BatchSource
from lightning_async.data.ticket_feed import LoaderError, TicketFeed

__all__ = ["SharedLoader", "share_loader", "shared_behind", "walks_one_order"]

# Where a loader that user code sees keeps what is behind it.
_BEHIND = "_lightning_async_shared"
# Attributes that the private loader does not take over.
_OWN = frozenset({"batch_sampler", "sampler", "_iterator", "_get_iterator", "in_order", _BEHIND})


class SharedLoader:
    """What is behind a loader that user code sees: the private one, and its feed.

    The private loader has the visible one's class and attributes. What user code changes there is followed when an
    epoch begins, and what the private one keeps for itself (a count, an iterator for all epochs) stays its own.

    Args:
        visible: the loader that user code sees.
        world_size: number of ranks N.
        rank: this rank.
        seed: the seed of the run.

    Attributes:
        loader: the private loader.
        feed: its feed.
    """

    def __init__(self, visible: DataLoader[Any], world_size: int, rank: int, seed: int) -> None:
        self._visible = visible
        self._place = "sampler" if visible.batch_sampler is None else "batch_sampler"
        self._source = BatchSource(getattr(visible, self._place), seed, shares_rest=world_size > 1)
        show_share(visible, self._source, world_size, rank)
        self.loader: DataLoader[Any] = object.__new__(type(visible))
        own = vars(self.loader)
        own.update(vars(visible), _iterator=None, _get_iterator=self._make_iterator)
        if "in_order" in own:
            # Else nobody could say which ticket a batch belongs to.
            own["in_order"] = True
        self._followed = dict(vars(visible))
        self.feed = TicketFeed(self.loader, self._source, world_size)
        self._follow_sampler()

    def begin_epoch(self, epoch: int, limit: int | None) -> str:
        """Draws the global order of ``epoch``, as loader and sampler are now; returns its digest.

        Args:
            epoch: number of the epoch.
            limit: batches that it has at most, over all ranks.

        Raises:
            LoaderError: if user code has put in the sampler's place what cannot be shared.
        """
        now = vars(self._visible)
        for attribute, value in now.items():
            if attribute not in _OWN and self._followed.get(attribute, self) is not value:
                vars(self.loader)[attribute] = value
        self._followed = dict(now)
        self._follow_sampler()
        return self.feed.begin_epoch(epoch, limit)

    def close(self) -> None:
        """Ends what the private loader has running: its worker processes, and its threads that wait for tickets."""
        self.feed.close()
        iterator = vars(self.loader).pop("_iterator", None)
        vars(self.loader)["_iterator"] = None
        if isinstance(iterator, LoadingIterator):
            iterator.discard(for_good=True)

    def _follow_sampler(self) -> None:
        now = vars(self._visible)
        try:
            self._source.batches = order_behind(now[self._place], self._source.batches)
        except ValueError as error:
            name = type(self._visible).__name__
            raise LoaderError(f"{name} cannot be shared by all ranks any more: {error}.") from error
        feeding = SamplerProxy(self._source.batches, lambda: len(self.feed), lambda: _Feeding(self.feed))
        vars(self.loader).update(sampler=now["sampler"], batch_sampler=now["batch_sampler"])
        vars(self.loader)[self._place] = feeding

    def _make_iterator(self) -> LoadingIterator:
        kind: Any = type(self.loader)
        return LoadingIterator(self.feed, self.loader, lambda: kind._get_iterator(self.loader))


class _Feeding:
    """What the private loader's batch sampler gives when it is iterated."""

    def __init__(self, feed: TicketFeed) -> None:
        self._feed = feed

    def __iter__(self) -> _Feeding:
        return self

    def __next__(self) -> Any:
        return self._feed.load_next()


class LoadingIterator:
    """Torch's iterator of the private loader, made once there are tickets for it.

    It starts worker processes. So it is made in the training thread where it can be: a process that is forked by one
    thread inherits the locks that others hold.

    Args:
        feed: the feed.
        loader: the private loader.
        make: makes torch's iterator.
    """

    def __init__(self, feed: TicketFeed, loader: DataLoader[Any], make: Callable[[], Any]) -> None:
        self._feed = feed
        self._loader = loader
        self._make = make
        self._created_in = feed.current_pass
        self._base: Any = None
        self._stale = False
        self._prepare()

    def __iter__(self) -> LoadingIterator:
        return self

    def __next__(self) -> Any:
        feed = self._feed
        feed.claim(self, self._created_in)
        with feed.loads():
            self._refresh()
            put = getattr(self._base, "_try_put_index", None)
            if put is not None and not feed.loading:
                # Nothing was put for a while, since a segment had ended.
                before = -1
                while before < feed.loading < feed.most_loading:
                    before = feed.loading
                    put()
            try:
                batch = next(self._base)
            except StopIteration:
                self._base = None
                raise
        feed.came_out()
        return batch

    def __len__(self) -> int:
        return len(self._feed)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.__dict__.get("_base") is None:
            raise AttributeError(name)
        return getattr(self._base, name)

    def _reset(self, loader: DataLoader[Any], first_iter: bool = False) -> None:
        """Begins a new pass with the same worker processes; called by a loader whose workers are persistent."""
        self._created_in = self._feed.current_pass
        self._stale = True
        self._prepare()

    def discard(self, for_good: bool = False) -> None:
        """Drops what is loading, and with it the worker processes, unless they are persistent."""
        if self._base is not None and getattr(self._base, "_persistent_workers", False) and not for_good:
            self._stale = True
            return
        shutdown = getattr(self._base, "_shutdown_workers", None)
        self._base = None
        if shutdown is not None:
            shutdown()

    def _prepare(self) -> None:
        if self._feed.is_asked_here:
            self._feed.activate(self)
            with self._feed.loads():
                self._refresh()

    def _refresh(self) -> None:
        if self._base is None:
            self._base = self._make()
        elif self._stale:
            self._feed.reload()
            self._base._reset(self._loader)
        self._stale = False


def walks_one_order(loader: object) -> TypeGuard[DataLoader[Any]]:
    """Whether a loader has the sampler that Lightning gives one which all ranks share: one replica of the data."""
    if not isinstance(loader, DataLoader):
        return False
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    return any(isinstance(sampler, DistributedSampler) and sampler.num_replicas == 1 for sampler in samplers)


def share_loader(loader: DataLoader[Any], world_size: int, rank: int, seed: int) -> SharedLoader:
    """Makes ``loader`` one that all ranks share, in place; returns what is behind it.

    Args:
        loader: a map-style loader whose sampler walks the same order on every rank.
        world_size: number of ranks.
        rank: this rank.
        seed: the seed of the run.
    """
    behind = shared_behind(loader)
    if behind is None:
        behind = SharedLoader(loader, world_size, rank, seed)
        vars(loader)[_BEHIND] = behind
    return behind


def shared_behind(loader: object) -> SharedLoader | None:
    """What is behind a loader, if it is one that all ranks share."""
    behind = getattr(loader, "__dict__", {}).get(_BEHIND)
    return behind if isinstance(behind, SharedLoader) else None
