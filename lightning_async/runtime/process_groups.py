"""The process group of the strategy's own collectives.

User code, torchmetrics and Lightning's data utilities use ``torch.distributed``'s default group. A call of theirs that
not every rank makes must never be answered by a collective of the strategy's, so those run in a group of their own.
Process-wide, like the default group.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from statistics import median
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import default_pg_timeout

from lightning_async.runtime.attempts import agree_on_attempt

__all__ = [
    "break_groups",
    "breakable",
    "end_groups_of_one_rank",
    "exchange_group",
    "forget_inherited_groups",
    "form_default_group",
    "forming_timeout",
    "open_exchange_group",
    "open_store",
    "reform_default_group",
    "reformed_place",
    "time_all_reduce",
]

# 16 MB.
_MOST_ELEMENTS = 1 << 22
_APART_S = 0.005
_Group: TypeAlias = "dist.ProcessGroup"

# The default group and the group that was opened beside it. Weak: torch alone decides how long they live, and Gloo's
# threads must be gone before the interpreter is.
_pair: tuple[weakref.ref[_Group], weakref.ref[_Group]] | None = None

# What must never come to an end in this process.
_inherited: list[_Group] = []

# The default group, if it was formed by ranks that have outlived others, and not by all that were started.
_reformed: weakref.ref[_Group] | None = None
# The sockets of the present groups, by inode; and those that were open before the groups that are being formed.
_sockets: frozenset[int] = frozenset()
_open_before: frozenset[int] | None = None
# The ports that this process listened at then.
_old_ports: frozenset[int] = frozenset()

# All have just met. One that is lost meanwhile is waited for: where Gloo waits for its connection there is none yet
# that could be broken, and it waits five times as long as this. A slow machine gets longer at the next attempt.
_SHORTEST_FORMING_S, _LONGEST_FORMING_S = 2.0, 60.0
# Of a group that is formed once, where nobody tries again.
_FIRST_FORMING = timedelta(seconds=30)
_LOOK_S = 0.1


def open_exchange_group(timeout: timedelta | None) -> None:
    """Opens the group beside the present default group, unless there is one; a collective call.

    Args:
        timeout: of its collectives; None for the backend's own.
    """
    global _pair
    if exchange_group() is not None or dist.get_world_size() == 1:
        return
    own = dist.new_group(timeout=timeout, group_desc="lightning_async")
    _pair = weakref.ref(_default_group()), weakref.ref(own)


def form_default_group(
    store: dist.Store,
    rank: int,
    world_size: int,
    backend: str,
    timeout: timedelta | None,
    device: torch.device | None = None,
) -> None:
    """Forms the default group in a store that ranks of before have been in; a collective call.

    Args:
        store: that all ranks come to, and that outlives them.
        rank: this rank.
        world_size: number of ranks.
        backend: the group's.
        timeout: for all to come, and of its collectives; None for the backend's own.
        device: that this rank's part of the group is bound to, if to any.

    Raises:
        TimeoutError: if a rank does not come.
    """
    attempt = agree_on_attempt(store, rank, world_size, timeout or default_pg_timeout)
    _form(
        dist.PrefixStore(f"lightning_async/{attempt}", store),
        rank,
        world_size,
        backend,
        timeout,
        _FIRST_FORMING,
        device,
    )


def exchange_group() -> _Group | None:
    """The group of the strategy's own collectives; None, which stands for the default group, if none was opened."""
    if _pair is None or not dist.is_initialized() or _pair[0]() is not _default_group():
        return None
    return _pair[1]()


def time_all_reduce(elements: int, device: torch.device, repetitions: int = 7) -> float:
    """Seconds that an all-reduce of float32 values takes, as DDP makes one in each step; a collective call.

    The ranks come to each from something else, as to the one of a step: one after the other takes a fraction of that.

    Args:
        elements: how many; of a large number a part is reduced, and the time scaled.
        device: where they are.
        repetitions: how often it is measured; the median counts.
    """
    part = min(max(elements, 1), _MOST_ELEMENTS)
    values = torch.zeros(part, device=device)
    seconds = []
    for _ in range(repetitions + 1):
        time.sleep(_APART_S)
        started = time.perf_counter()
        dist.all_reduce(values, group=exchange_group())
        # Waits for a device that reduces by itself.
        values[0].item()
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:]) * max(elements, 1) / part


def end_groups_of_one_rank() -> None:
    """Ends the groups that a fit with one rank has left here, before ranks are forked.

    None of them has Gloo's threads, and what the threads were at when they were forked is left as it was: now and then
    a rank waits for ever for a connection that another one believes to have. The next fit, or evaluation, makes groups
    of its own.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() == 1:
        dist.destroy_process_group()


def forget_inherited_groups() -> None:
    """Leaves the groups of several ranks that a forked process has from the one before it.

    Neither can they be used nor come to an end here: Gloo's threads, which that waits for, are in the other process.
    """
    if dist.is_available() and dist.is_initialized():
        _inherited.extend(distributed_c10d._world.pg_map)
        dist.destroy_process_group()


def _default_group() -> _Group:
    group = dist.group.WORLD
    assert group is not None
    return group


# --- groups that can be left ------------------------------------------------------------------------------------------


@contextmanager
def breakable(is_outdated: Callable[[], bool] | None = None) -> Iterator[None]:
    """While process groups are formed whose collectives `break_groups` can end, in place of those of before.

    Args:
        is_outdated: whether a rank has been lost since it was settled who is to be in them. It may have been before the
            forming began, and a break ends the waits of its moment only: while this is so, they are broken again.
    """
    global _sockets, _open_before, _old_ports
    _open_before, _old_ports = frozenset(_tcp_sockets()), frozenset(_listening_ports())
    over = threading.Event()
    if is_outdated is not None:
        args = (is_outdated, over)
        threading.Thread(target=_break_while, args=args, name="group-watch", daemon=True).start()
    try:
        yield
        # A group of before may still be the present one: Lightning keeps the default group from one fit to the next.
        _sockets = (_sockets & frozenset(_tcp_sockets())) | frozenset(_opened_since(_open_before))
    finally:
        over.set()
        _open_before = None


def break_groups() -> None:
    """Makes this rank's collectives in the present groups fail, or the forming of new ones; for any thread.

    One that waits for a rank that is stopped, or cut off, would wait for half an hour: Gloo's own ``abort`` does not
    wake it. It does see the end of its connections.
    """
    # The rank's own thread may be leaving the group right now: then torch knows it no more.
    with suppress(AttributeError, RuntimeError, ValueError):
        group: Any = dist.group.WORLD if dist.is_available() else None
        if group is not None and dist.get_backend(group) == "nccl":
            group._get_backend(torch.device("cuda")).abort()
    forming = _open_before
    doomed = {inode: descriptor for inode, descriptor in _tcp_sockets().items() if inode in _sockets}
    if forming is not None:
        doomed |= _opened_since(forming)
    for descriptor in doomed.values():
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as own:
            own.shutdown(socket.SHUT_RDWR)


def _break_while(is_outdated: Callable[[], bool], over: threading.Event) -> None:
    while not over.wait(_LOOK_S):
        if is_outdated():
            break_groups()


def _opened_since(before: frozenset[int]) -> dict[int, int]:
    """The connections that the groups being formed have opened, not those that a listener of before has accepted."""
    found = {}
    for inode, descriptor in _tcp_sockets().items():
        if inode in before:
            continue
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as own:
            if own.getsockname()[1] not in _old_ports:
                found[inode] = descriptor
    return found


def open_store(host: str) -> dist.TCPStore:
    """A store on this rank that a group can be formed by, at a port of its own."""
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)


def forming_timeout(attempt: int) -> timedelta:
    """How long a rank waits for each other one while a group is formed.

    Args:
        attempt: how often it was tried before.

    Examples:
        >>> [forming_timeout(attempt).seconds for attempt in (0, 1, 2, 9)]
        [2, 4, 8, 60]
    """
    return timedelta(seconds=min(_SHORTEST_FORMING_S * 2 ** min(attempt, 10), _LONGEST_FORMING_S))


def reform_default_group(
    store: dist.Store, place: int, size: int, backend: str, timeout: timedelta | None, forming: timedelta
) -> None:
    """Puts a default group of other ranks in the place of the present one; a collective call of those ranks.

    Args:
        store: that they all have come to.
        place: this rank's place among them.
        size: number of them.
        backend: the group's.
        timeout: of its collectives; None for the backend's own.
        forming: how long each is waited for.

    Raises:
        RuntimeError: if one of them does not come.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    _form(store, place, size, backend, timeout, forming)
    global _reformed
    _reformed = weakref.ref(_default_group())


def _form(
    store: dist.Store,
    place: int,
    size: int,
    backend: str,
    timeout: timedelta | None,
    forming: timedelta,
    device: torch.device | None = None,
) -> None:
    lasting = timeout or default_pg_timeout
    store.set_timeout(forming)
    dist.init_process_group(backend, store=store, rank=place, world_size=size, timeout=forming, device_id=device)
    store.set_timeout(lasting)
    for kind in _default_group()._device_types:
        own: Any = _default_group()._get_backend(kind)
        own._set_default_timeout(lasting)


def reformed_place() -> tuple[int, int] | None:
    """This rank's place in the default group and its size, if `reform_default_group` has formed it; else None."""
    if _reformed is None or not dist.is_initialized() or _reformed() is not _default_group():
        return None
    return dist.get_rank(), dist.get_world_size()


def _listening_ports() -> Iterator[int]:
    """The ports that this process takes connections at."""
    for _, own in _own_sockets():
        if own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            yield own.getsockname()[1]


def _tcp_sockets() -> dict[int, int]:
    """This process's connected TCP sockets: inode -> descriptor."""
    found = {}
    for (inode, descriptor), own in _own_sockets():
        if not own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            found[inode] = descriptor
    return found


def _own_sockets() -> Iterator[tuple[tuple[int, int], socket.socket]]:
    """This process's TCP sockets: inode and descriptor, and a duplicate that is closed when the next is asked for."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError, ValueError):
            link = os.readlink(f"/proc/self/fd/{name}")
            if not link.startswith("socket:["):
                continue
            with socket.socket(fileno=os.dup(int(name))) as own:
                if own.family in (socket.AF_INET, socket.AF_INET6) and own.type == socket.SOCK_STREAM:
                    yield (int(link[8:-1]), int(name)), own
