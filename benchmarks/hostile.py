"""A run that strangers attack: what becomes of its updates a second, its memory and its threads.

Run ``python -m benchmarks.hostile``. Two workers push a ready gradient to one holder over TCP, and strangers come to
the holder's listener for as long as told: garbage, truncated and huge messages, handshakes that were recorded, others
that go on for ever a byte at a time, and floods of connections. Strangers take processor time of their own, so the run
is compared, in turns, with the same run while the same strangers come to a listener that is nobody's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.processes import SHAPES, hold, optimizer_of, push
from benchmarks.record import save
from lightning_async.runtime.handshake import Address
from lightning_async.transport.codec import encode
from lightning_async.transport.message import Hello, Proof, Push

__all__ = ["ATTACKS", "attack"]

_SLOW = 200


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="of the attack")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--size", default="44K", choices=list(SHAPES))
    parser.add_argument("--per-second", type=float, default=500.0, help="connections that the strangers make")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    ready, asked, told = context.SimpleQueue(), context.SimpleQueue(), context.SimpleQueue()
    holder = context.Process(target=_hold, args=(ready, asked, told, arguments.size))
    holder.start()
    addresses = ready.get()
    workers = [context.Process(target=push, args=(addresses, rank, 3, SHAPES[arguments.size])) for rank in (1, 2)]
    for worker in workers:
        worker.start()
    target = Address.from_json(json.loads(addresses)[0])
    with socket.create_server(("127.0.0.1", 0), backlog=256) as decoy:
        threading.Thread(target=_take_all, args=(decoy,), daemon=True).start()
        places = {"a decoy": decoy.getsockname()[1], "the run": target.port}
        found: list[dict[str, Any]] = []
        time.sleep(2.0)
        asked.put("look")
        before = told.get()
        print(f"before: {before['threads']} threads, {before['memory_mib']:.0f} MiB")
        print("strangers at   updates/s  connections  threads (most)  MiB (most)")
        part_s = arguments.seconds / arguments.turns
        for _ in range(arguments.turns):
            for name, port in places.items():
                stop, made = context.Event(), context.SimpleQueue()
                strangers = context.Process(target=_attack, args=(port, stop, made, arguments.per_second))
                strangers.start()
                asked.put(part_s)
                row = {"strangers_at": name, **told.get()}
                stop.set()
                row["attacks"] = made.get()
                strangers.join()
                found.append(row)
                print(
                    f"{name:<12} {row['updates_per_second']:>11.0f} {sum(row['attacks'].values()):>12}"
                    f" {row['threads']:>15} {row['memory_mib']:>11.0f}",
                    flush=True,
                )
    rates = {name: median(row["updates_per_second"] for row in found if row["strangers_at"] == name) for name in places}
    print(f"with strangers at the run: {rates['the run'] / rates['a decoy']:.3f} of the updates a second")
    for process in (*workers, holder):
        process.kill()
        process.join()
    save("hostile", vars(arguments), [{"before": before}, *found])


def _hold(ready: Any, asked: Any, told: Any, size: str) -> None:
    torch.set_num_threads(1)
    _, stats = hold(optimizer_of(SHAPES[size]), 3, ready.put, transport="tcp")
    while min(list(stats.updates_by_rank.values())[1:]) < 5:
        time.sleep(0.01)
    while True:
        wanted = asked.get()
        seen, started, updates = [_usage()], time.perf_counter(), stats.updates
        while wanted != "look" and time.perf_counter() - started < wanted:
            time.sleep(0.1)
            seen.append(_usage())
        rate = (stats.updates - updates) / max(time.perf_counter() - started, 1e-9)
        threads, memory = (max(values) for values in zip(*seen, strict=True))
        told.put(
            {
                "updates_per_second": rate,
                "threads": threads,
                "memory_mib": memory,
                "refused": stats.refused,
            }
        )


def _usage() -> tuple[int, float]:
    """Threads of this process, and its memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/task")), pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _take_all(listener: socket.socket) -> None:
    while True:
        with suppress(OSError):
            listener.accept()[0].close()


def _attack(port: int, stop: Any, made: Any, per_second: float) -> None:
    os.nice(19)
    made.put(dict(attack("127.0.0.1", port, stop.is_set, per_second)))


# --- what strangers do ------------------------------------------------------------------------------------------------


def _header() -> bytearray:
    return bytearray(encode(Hello(1, 0, json.dumps({"role": "control", "nonce": "00" * 16}))))


def _garbage() -> bytes:
    return random.randbytes(random.randrange(1, 4096))


def _truncated() -> bytes:
    data = bytes(_header())
    return data[: random.randrange(1, len(data))]


def _huge() -> bytes:
    """Announces as much as a header can."""
    data = bytearray(encode(Push(1)))
    data[16:28] = struct.pack("<III", 0xFFFF, 0xFFFFF, 0x3FFF)
    return bytes(data) + random.randbytes(1 << 16)


def _replayed() -> bytes:
    """Both messages of a handshake that was recorded elsewhere."""
    return bytes(_header()) + encode(Proof(1, "ab" * 32 + json.dumps({"model": {}})))


def _nothing() -> bytes:
    return b""


ATTACKS: dict[str, Callable[[], bytes]] = {
    "garbage": _garbage,
    "truncated": _truncated,
    "huge": _huge,
    "replayed": _replayed,
    "flood": _nothing,
}


def attack(host: str, port: int, is_over: Callable[[], bool], per_second: float, slow: int = _SLOW) -> Counter[str]:
    """Attacks a listener until told to stop.

    Args:
        host: its address.
        port: its port.
        is_over: whether to stop.
        per_second: connections a second, of all kinds in turn.
        slow: connections that are kept open besides, and send a byte a second each.

    Returns:
        How many connections of each kind were made.
    """
    made: Counter[str] = Counter()
    held: list[socket.socket] = []
    dripping: list[socket.socket] = []
    drip, names, started = bytes(_header()), [*ATTACKS], time.monotonic()
    next_drip = started
    while not is_over():
        name = names[made.total() % len(names)]
        sock = _come(host, port, ATTACKS[name]())
        if sock is not None:
            made[name] += 1
            held.append(sock)
        while len(held) > slow:
            held.pop(0).close()
        if time.monotonic() >= next_drip:
            next_drip += 1.0
            dripping = [one for one in dripping if _drip(one, drip[:1])]
            while len(dripping) < slow and (sock := _come(host, port, drip[:1])) is not None:
                made["slow"] += 1
                dripping.append(sock)
        ahead_s = (made.total() - made["slow"]) / per_second - (time.monotonic() - started)
        if ahead_s > 0:
            time.sleep(min(ahead_s, 0.1))
    for sock in held + dripping:
        sock.close()
    return made


def _come(host: str, port: int, data: bytes) -> socket.socket | None:
    sock = socket.socket()
    try:
        sock.settimeout(0.5)
        sock.connect((host, port))
        sock.setblocking(False)
        sock.send(data)
    except OSError:
        sock.close()
        return None
    return sock


def _drip(sock: socket.socket, data: bytes) -> bool:
    try:
        sock.send(data)
    except OSError:
        sock.close()
        return False
    return True


if __name__ == "__main__":
    main()
