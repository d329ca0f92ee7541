"""What goes on training changes nothing in a checkpoint that is being written."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from lightning_async.strategies.frozen import frozen_copy


def test_nothing_that_lives_on_changes_a_frozen_checkpoint() -> None:
    net = nn.Linear(2, 1)
    computed = (net.weight * 2).sum()
    flat = torch.zeros(1_000)
    alive: dict[str, Any] = {
        "state_dict": OrderedDict(net.state_dict()),
        "parameter": net.bias,
        "computed": computed,
        "callbacks": {"losses": [1.0, torch.ones(2)], "pair": (torch.ones(1), {"deep": {"er": [0]}})},
        "view": flat[:3],
    }
    frozen = frozen_copy(alive)
    before = [net.weight.detach().clone(), net.bias.detach().clone()]
    with torch.no_grad():
        net.weight.zero_(), net.bias.fill_(7.0)
        alive["callbacks"]["losses"][1].zero_()
        alive["callbacks"]["pair"][0].zero_()
        flat.fill_(7.0)
    alive["callbacks"]["losses"].append(2.0)
    alive["callbacks"]["pair"][1]["deep"]["er"].append(1)

    assert torch.equal(frozen["state_dict"]["weight"], before[0])
    assert isinstance(frozen["parameter"], nn.Parameter)
    assert torch.equal(frozen["parameter"], before[1])
    assert frozen["computed"].item() == computed.item()
    assert frozen["callbacks"]["losses"] == [1.0, frozen["callbacks"]["losses"][1]]
    assert frozen["callbacks"]["losses"][1].tolist() == [1.0, 1.0]
    assert frozen["callbacks"]["pair"][0].item() == 1.0
    assert frozen["callbacks"]["pair"][1] == {"deep": {"er": [0]}}
    assert frozen["view"].tolist() == [0.0, 0.0, 0.0]
    assert frozen["view"].untyped_storage().nbytes() == 12


def test_tensors_that_nobody_else_has_are_not_copied_and_shared_ones_stay_shared() -> None:
    owned, shared = torch.ones(2), torch.ones(2)
    cycle: dict[str, Any] = {"owned": owned, "one": shared, "other": [shared]}
    cycle["itself"] = cycle
    frozen = frozen_copy(cycle, {id(owned)})

    assert frozen["owned"] is owned
    assert frozen["one"] is frozen["other"][0]
    assert frozen["one"] is not shared
    assert frozen["itself"] is frozen
