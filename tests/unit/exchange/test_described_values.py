"""Values with tensors in them are described in JSON, or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lightning_async.exchange.described_values import describe, rebuild
from lightning_async.holder.held_state import same_state
from lightning_async.transport.fields import WireError

EVERYTHING = {
    0: {
        "step": torch.tensor(3.0),
        "exp_avg": torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).t(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "rotation": torch.tensor([1 + 2j]),
        "nothing": torch.empty(0, 3),
        "history": [torch.arange(3), (1, 2.5, None)],
        "name": "second-order",
        "largest": float("inf"),
    },
    7: {},
    "calls": 12,
}


def test_every_value_arrives_as_it_was() -> None:
    tensors: list[torch.Tensor] = []
    described = json.loads(json.dumps(describe(EVERYTHING, tensors)))
    again = rebuild(described, lambda dtype, shape: tensors.pop(0))

    assert same_state(EVERYTHING, again)
    assert again[0]["history"][1] == (1, 2.5, None)
    assert list(again) == [0, 7, "calls"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.eye(2).to_sparse(), "a tensor of torch.float32, torch.sparse_coo"),
        (torch.ones(2).to(torch.float8_e5m2fnuz), "a tensor of torch.float8_e5m2fnuz"),
        ({1, 2}, "a set"),
        (object(), "a object"),
    ],
    ids=["sparse", "dtype", "set", "object"],
)
def test_what_cannot_be_described_is_named(value: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        describe({"state": [value]}, [])


def test_what_is_no_description_is_refused() -> None:
    with pytest.raises(WireError, match="cannot be read"):
        rebuild({"unknown": 1}, lambda dtype, shape: torch.empty(shape))
