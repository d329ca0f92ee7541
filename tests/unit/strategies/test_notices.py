"""Claims about what a run says before it begins."""

from __future__ import annotations

import pytest

from lightning_async.strategies.notices import start_notices


@pytest.mark.parametrize(
    ("ranks", "of_host", "cores", "said"),
    [
        (1, 1, 8, "Nothing is asynchronous with one rank: pass devices=4"),
        (1, 1, 1, "Nothing is asynchronous with one rank"),
        (4, 4, 2, "4 ranks on 2 cores"),
        (2, 2, 1, "2 ranks on 1 core:"),
        # On two hosts.
        (8, 4, 3, "4 ranks on 3 cores"),
    ],
)
def test_a_run_that_is_not_what_it_seems_says_so(ranks: int, of_host: int, cores: int, said: str) -> None:
    (notice,) = start_notices(ranks, of_host, cores)

    assert notice.startswith(said)


@pytest.mark.parametrize(("ranks", "of_host", "cores"), [(2, 2, 2), (8, 4, 4), (4, 4, 96)])
def test_a_run_with_a_core_for_each_rank_says_nothing(ranks: int, of_host: int, cores: int) -> None:
    assert start_notices(ranks, of_host, cores) == []
