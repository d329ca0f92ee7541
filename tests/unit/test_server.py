"""What a session's thread does to the process around it."""

from __future__ import annotations

import threading

import torch

from lightning_async.server import use_one_thread


def test_the_limit_on_a_sessions_thread_leaves_the_training_thread_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen: list[int] = []

    def session() -> None:
        use_one_thread()
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=session)
    thread.start()
    thread.join()
    # A thread that torch has not met yet takes the process's number, as rank 0's may: the limit must not be in it.
    training = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    training.start()
    training.join()
    main = torch.get_num_threads()
    torch.set_num_threads(before)

    assert (seen, main) == ([1, 2], 2)
