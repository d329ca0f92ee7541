"""The arithmetic is serial AMSGrad's, bit for bit: alone, in turns, and with the staleness that occurred."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_async import AMSGrad, AsyncAMSGradStrategy
from lightning_async.exchange import param_views as binding
from lightning_async.holder.gradient_mean import GradientMean
from lightning_async.holder.layout import FlatLayout
from lightning_async.policies import Arrival, StalenessPolicy, make_policy
from lightning_async.policies.momentum import corrected_momentum
from lightning_async.transport import message as wire_messages
from lightning_async.transport.int8 import GradientWire, ParameterWire
from tests.faults.injector import Fault, FaultInjector
from tests.harness import eventually
from tests.launch import launch, report
from tests.models import Recorder, TinyClassifier, fork_trainer, indexed_data, loader

BATCH_SIZE = 4
SEED = 11


@pytest.fixture(params=[False, True], ids=["gathered", "hooked"])
def hooks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are gathered when they are pushed, or moved by a hook as soon as they are complete."""
    if request.param:
        monkeypatch.setattr(binding, "_HOOKED_FROM_BYTES", 0)


class Oddly(TinyClassifier):
    """Sizes that fill no vector register, and an optimizer of the test's choice."""

    def __init__(self, make_optimizer: Callable[[Any], Any] = AMSGrad, sleep_s: tuple[float, ...] = ()) -> None:
        super().__init__(sleep_s)
        self.net = nn.Sequential(nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 7), nn.Tanh(), nn.Linear(7, 2))
        self.make_optimizer = make_optimizer

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())

    def on_train_end(self) -> None:
        parameters = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
        report(Path.cwd(), self.global_rank, parameters=parameters, step=self.trainer.global_step)


def global_order(data: TensorDataset) -> DistributedSampler[Any]:
    """The one order that all ranks walk."""
    return DistributedSampler(data, num_replicas=1, rank=0, shuffle=True, seed=SEED)


def train_twice(folder: Path, make_module: Callable[[], Oddly], **arguments: Any) -> None:
    """Trains a module by the strategy with one rank, then on a single device: reports as ranks 0 and 1."""
    seed_everything(SEED, verbose=False)
    module = make_module()
    alone = copy.deepcopy(module)
    data = indexed_data(samples=200)
    fork_trainer(folder, 1, **arguments).fit(module, DataLoader(data, BATCH_SIZE, shuffle=True))
    (folder / "rank0.pt").rename(folder / "async.pt")
    order = global_order(data)
    fork_trainer(folder, 1, "auto", **arguments).fit(alone, DataLoader(data, BATCH_SIZE, sampler=order))
    (folder / "rank0.pt").rename(folder / "rank1.pt")
    (folder / "async.pt").rename(folder / "rank0.pt")


def assert_equal_bit_for_bit(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    assert {name: torch.equal(first[name], second[name]) for name in first} == dict.fromkeys(first, True)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        pytest.param(
            lambda parameters: torch.optim.Adam(parameters, lr=1e-2, amsgrad=True, fused=True),
            id="Adam",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, amsgrad=True, fused=True),
            id="AdamW",
        ),
        pytest.param(lambda parameters: AMSGrad(parameters, lr=1e-2, weight_decay=0.01, fused=True), id="AMSGrad"),
    ],
)
def test_one_rank_is_single_device_training_bit_for_bit(tmp_path: Path, make_optimizer: Callable[[Any], Any]) -> None:
    def script(folder: Path) -> None:
        train_twice(folder, lambda: Oddly(make_optimizer), max_epochs=4)

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    ours, theirs = run.reports()
    assert ours["step"] == theirs["step"] == 200
    assert_equal_bit_for_bit(ours["parameters"], theirs["parameters"])


class Unusual(Oddly):
    """Param groups of their own, tied, frozen and sometimes unused parameters, schedulers and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 5)
        self.decoder = nn.Linear(6, 5)
        self.decoder.weight = self.encoder.weight
        self.sometimes = nn.Linear(5, 2)
        self.rarely = nn.Linear(5, 3)
        self.never = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(5)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
        for frozen in self.net[2].parameters():
            frozen.requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        hidden = self.norm(self.encoder(batch[0]) + self.decoder(batch[0]))
        logits = self.net(hidden)
        first = int(batch[2][0]) // BATCH_SIZE
        if first % 2:
            logits = logits + self.sometimes(hidden)
        if first % 7 == 3:
            logits = logits + self.rarely(hidden)[:, :2]
        return nn.functional.cross_entropy(logits, batch[1])

    def configure_optimizers(self) -> Any:
        named = dict(self.named_parameters())
        decayed = [parameter for name, parameter in named.items() if name.endswith("weight")]
        others = [parameter for name, parameter in named.items() if not name.endswith("weight")]
        optimizer = torch.optim.Adam(
            [
                {"params": decayed, "lr": 3e-2, "weight_decay": 0.05},
                {"params": others, "lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6},
            ],
            amsgrad=True,
            fused=True,
        )
        # Changes the learning rates and, as it cycles momentum, the betas of both groups.
        one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[3e-2, 1e-2], total_steps=300)
        return [optimizer], [{"scheduler": one_cycle, "interval": "step"}]


@pytest.mark.usefixtures("hooks")
@pytest.mark.parametrize(
    "arguments",
    [
        {"max_epochs": 4},
        {"max_epochs": 3, "accumulate_grad_batches": 4, "gradient_clip_val": 0.3},
        {"max_steps": 70, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
    ids=["plain", "accumulated-and-clipped", "max-steps"],
)
def test_one_rank_is_single_device_training_whatever_the_parameters_are(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    def script(folder: Path) -> None:
        train_twice(folder, Unusual, **arguments)

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    ours, theirs = run.reports()
    assert ours["step"] == theirs["step"]
    assert_equal_bit_for_bit(ours["parameters"], theirs["parameters"])


Wire = tuple[torch.dtype, torch.dtype]
UNROUNDED: Wire = (torch.float32, torch.float32)


class Int8Link:
    """What a worker reads of parameters, and what arrives of its gradients, with a byte for each value."""

    def __init__(self, parameters: list[Tensor]) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        self._gradients = GradientWire(sum(sizes), torch.float32, [sizes])
        self._parameters = ParameterWire(sum(sizes), torch.float32)

    def meet(self, parameters: list[Tensor]) -> None:
        """The ranks read the holder's own parameters."""
        self._parameters.pass_exact(_flat(parameters))

    def read(self, parameters: list[Tensor]) -> None:
        """Replaces the parameters by those that arrive."""
        flat = _flat(parameters)
        if self._parameters.needs_exact:
            self._parameters.pass_exact(flat)
            return
        deque(self._parameters.encode(flat, wire_messages.Parameters(worker=1)), maxlen=0)
        _unflatten(self._parameters.shown, parameters)

    def arrived(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradients that arrive."""
        flat = _flat(gradients)
        out = torch.empty_like(flat)
        # It has one piece, in the same memory at both sides.
        for _ in zip(
            self._gradients.encode(flat, wire_messages.Push(worker=1)), self._gradients.decode(out), strict=True
        ):
            pass
        arrived = [torch.empty_like(gradient) for gradient in gradients]
        _unflatten(out, arrived)
        return arrived


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _unflatten(flat: Tensor, into: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor, part in zip(into, flat.split([tensor.numel() for tensor in into]), strict=True):
            tensor.copy_(part.view_as(tensor))


def replay(
    module: TinyClassifier,
    updates: list[dict[str, Any]],
    samples: int,
    optimizer: torch.optim.Optimizer | None = None,
    wire: Wire = UNROUNDED,
    gradients_per_update: int = 1,
    policy: StalenessPolicy | None = None,
    then: tuple[int, int, StalenessPolicy] | None = None,
    int8: bool = False,
) -> None:
    """Trains ``module`` in this process as the record says, each gradient at the version that was read.

    ``then`` is what holds from a version on: the version, gradients in an update, and the policy. ``wire`` is what
    gradients and parameters are rounded to between rank 0 and the others; ``int8`` takes a byte for each. What an
    epoch's last gradients lack to an update is left out of it.
    """
    links = {rank: Int8Link(list(module.parameters())) for rank in (1, 2) if int8}
    layout = FlatLayout([list(module.parameters())])
    device = next(module.parameters()).device
    mean, late = (GradientMean(total, layout.views(total, 0)) for total in layout.buffer().to(device).repeat(2, 1))
    data = indexed_data(samples)
    optimizer = optimizer or AMSGrad(module.parameters(), lr=module.lr, fused=True)
    group = optimizer.param_groups[0]
    policy = policy or StalenessPolicy()
    arrivals: list[Arrival] = []
    worker = copy.deepcopy(module)

    def answer() -> dict[str, Tensor]:
        answered = copy.deepcopy(module)
        with torch.no_grad():
            policy.look_ahead(list(answered.parameters()), optimizer)
        return answered.state_dict()

    versions = [answer()]
    order = global_order(data)
    per_epoch = -(-samples // BATCH_SIZE)
    computed, batches = 0, []
    for update in updates:
        if computed % per_epoch == 0:
            order.set_epoch(computed // per_epoch)
            batches = list(torch.tensor(list(order)).split(BATCH_SIZE))
            for link in links.values() if computed else ():
                link.meet(list(module.parameters()))
        computed += len(update["tickets"])
        if update["applied"]:
            gradients, parameters = UNROUNDED if update["worker"] == 0 else wire
            read = versions[update["version_read"]]
            worker.load_state_dict({name: value.to(parameters) for name, value in read.items()})
            link = links.get(update["worker"])
            if link is not None:
                link.read(list(worker.parameters()))
            worker.zero_grad()
            for ticket in update["tickets"]:
                (worker.loss(data[batches[ticket]]) / len(update["tickets"])).backward()
            arrived = [source.grad.to(gradients).to(source.dtype) for source in worker.parameters()]  # type: ignore[union-attr]
            if link is not None:
                arrived = link.arrived(arrived)
            count = sum(len(batches[ticket]) for ticket in update["tickets"])
            arrivals.append(Arrival(update["worker"], update["staleness"], len(versions) - 1, count))
            factor, lateness = policy.gradient_factor(arrivals[-1]), policy.lateness(arrivals[-1], group)
            mean.add(arrived, count, factors=factor)
            if lateness:
                late.add(arrived, count, factors=factor * lateness)
        is_full, is_last = len(arrivals) == gradients_per_update, computed % per_epoch == 0
        if is_full or (is_last and arrivals):
            too_late = late.take(mean.weight) if late.weight else None
            taken = mean.take()
            if gradients_per_update == 1:
                # Not divided by its own weight.
                taken = arrived if factor == 1.0 else [gradient * factor for gradient in arrived]
                too_late = [gradient * lateness for gradient in taken if gradient is not None] if lateness else None
            for parameter, gradient in zip(module.parameters(), taken, strict=True):
                parameter.grad = gradient
            lr = group["lr"]
            group["lr"] = lr * policy.step_factor(arrivals)
            optimizer.step()
            if too_late is not None:
                with torch.no_grad():
                    policy.after_step(optimizer, too_late)
            group["lr"] = lr
            versions.append(answer())
            # The epoch's end completes a version after the push has been told of.
            assert len(versions) - 1 == update["version"] + (not is_full)
            arrivals.clear()
            if then is not None and len(versions) - 1 == then[0]:
                _, gradients_per_update, policy = then
                versions[-1] = answer()
    assert computed == per_epoch * 2


def train_and_replay(
    folder: Path,
    options: dict[str, Any],
    arguments: dict[str, Any] | None = None,
    wire: Wire = UNROUNDED,
    int8: bool = False,
    sleep_s: tuple[float, ...] = (0.001, 0.003, 0.006),
) -> None:
    """Trains with three ranks, then replays what has happened: ``updates.pt`` and ``replayed.pt``."""
    samples = 160
    seed_everything(SEED, verbose=False)
    recorder = Recorder()

    class Module(Oddly):
        def on_train_end(self) -> None:
            super().on_train_end()
            if self.global_rank == 0:
                torch.save(recorder.updates, folder / "updates.pt")
                torch.save((strategy.stats.evicted, strategy.stats.joined), folder / "churn.pt")

    module = Module(lambda parameters: AMSGrad(parameters, lr=1e-2), sleep_s=sleep_s)
    alone = copy.deepcopy(module)
    strategy = AsyncAMSGradStrategy(start_method="fork", **options)
    strategy.observers.append(recorder)
    trainer = fork_trainer(folder, 3, strategy, max_epochs=2, **(arguments or {}))
    trainer.fit(module, loader(samples, BATCH_SIZE, shuffle=True))
    made_of = strategy.options.gradients_per_update
    policy = make_policy(strategy.options.staleness_policy)
    policy.bind(3, made_of)
    policy.check(AMSGrad(alone.parameters()))
    beta = 0.9 if options.get("momentum_correction") is None else corrected_momentum(0.9, 3, made_of)
    optimizer = AMSGrad(alone.parameters(), lr=1e-2, betas=(beta, 0.999), fused=True)
    rules: tuple[Any, ...] = (made_of, policy)
    if chosen := strategy.configuration.get("auto"):
        rules = (3, StalenessPolicy(), (chosen["version"], *rules))
    replay(alone, torch.load(folder / "updates.pt"), samples, optimizer, wire, *rules, int8=int8)
    torch.save({name: p.detach() for name, p in alone.named_parameters()}, folder / "replayed.pt")


WAYS: dict[str, dict[str, Any]] = {
    "shm": {"transport": "shm"},
    "tcp": {"transport": "tcp"},
    "holder-process": {"transport": "shm", "holder": "process"},
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "in-turns": ({"max_staleness": 0}, {}),
    "auto": ({"max_staleness": "auto"}, {}),
    "accumulated": ({"max_staleness": 2}, {"accumulate_grad_batches": 2}),
    "drop": ({"max_staleness": 1, "on_stale": "drop"}, {}),
    "sharded": ({"max_staleness": 3, "batches": "sharded"}, {}),
    "overlap": ({"max_staleness": 5, "overlap": True}, {}),
    "overlap-accumulated": ({"max_staleness": "auto", "overlap": True}, {"accumulate_grad_batches": 2}),
    "overlap-drop": ({"max_staleness": 5, "overlap": True, "on_stale": "drop", "batches": "sharded"}, {}),
    "mean": ({"max_staleness": 2, "gradients_per_update": 3}, {}),
    "mean-drop": ({"max_staleness": 1, "gradients_per_update": 2, "on_stale": "drop"}, {}),
    "mean-overlap-accumulated": (
        {"max_staleness": 1, "gradients_per_update": 7, "overlap": True},
        {"accumulate_grad_batches": 2},
    ),
}
# `make soak` takes the others over TCP and with the holder apart, too: there it does not matter how the batches of a
# push were chosen.
_BY_EVERY_WAY = ("in-turns", "overlap")


# And most with hooks, by which gradients take another way before they are pushed.
_HOOKED = ("in-turns", "overlap", "overlap-accumulated", "mean")


def is_soaked(case: str, way: str, is_hooked: bool) -> bool:
    """Whether `make soak` alone takes a case this way."""
    is_far = way != "shm" and (is_hooked or case not in _BY_EVERY_WAY)
    return case == "mean-drop" or is_far or (is_hooked and case not in _HOOKED)


def replayed_cases() -> list[Any]:
    """Each case by each way."""
    return [
        pytest.param(
            is_hooked,
            options,
            arguments,
            taken,
            id=f"{case}-{way}-{'hooked' if is_hooked else 'gathered'}",
            marks=[pytest.mark.soak] if is_soaked(case, way, is_hooked) else [],
        )
        for case, (options, arguments) in CASES.items()
        for way, taken in WAYS.items()
        for is_hooked in (False, True)
    ]


@pytest.mark.usefixtures("hooks")
@pytest.mark.parametrize(("hooks", "options", "arguments", "way"), replayed_cases(), indirect=["hooks"])
def test_a_recorded_run_replayed_in_one_process_gives_the_same_bits(
    tmp_path: Path, options: dict[str, Any], arguments: dict[str, Any], way: dict[str, Any]
) -> None:
    run = launch(lambda folder: train_and_replay(folder, {**way, **options}, arguments), tmp_path)

    assert run.returncode == 0, run.output
    updates = torch.load(tmp_path / "updates.pt")
    replayed = torch.load(tmp_path / "replayed.pt")
    assert len({update["worker"] for update in updates}) == 3
    stale = [update for update in updates if update["staleness"] > 0]
    assert bool(stale) == (options["max_staleness"] != 0)
    for rank in run.reports():
        assert_equal_bit_for_bit(rank["parameters"], replayed)


BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize(
    ("names", "wire"),
    [
        pytest.param(("bf16", "fp32"), (BF16, torch.float32), marks=pytest.mark.soak),
        pytest.param(("fp16", "fp32"), (FP16, torch.float32), marks=pytest.mark.soak),
        (("bf16", "bf16"), (BF16, BF16)),
        (("fp16", "fp16"), (FP16, FP16)),
    ],
    ids=["bf16-gradients", "fp16-gradients", "bf16", "fp16"],
)
def test_a_replay_that_rounds_what_a_network_carries_gives_the_same_bits(
    tmp_path: Path, names: tuple[str, str], wire: Wire, overlap: bool
) -> None:
    gradients, parameters = names
    options = {
        "transport": "tcp",
        "max_staleness": 5,
        "wire_dtype": gradients,
        "parameter_wire_dtype": parameters,
        "overlap": overlap,
    }

    run = launch(lambda folder: train_and_replay(folder, options, wire=wire), tmp_path)

    assert run.returncode == 0, run.output
    assert len({update["worker"] for update in torch.load(tmp_path / "updates.pt")}) == 3
    # Where the ranks meet, nothing is rounded.
    for rank in run.reports():
        assert_equal_bit_for_bit(rank["parameters"], torch.load(tmp_path / "replayed.pt"))


def test_a_replay_with_a_byte_for_each_value_gives_the_same_bits(tmp_path: Path) -> None:
    """What rounding has lost, and what each worker has, is part of what is replayed."""
    options = {"transport": "tcp", "max_staleness": 5, "wire_dtype": "int8", "parameter_wire_dtype": "int8"}

    run = launch(lambda folder: train_and_replay(folder, options, int8=True), tmp_path)

    assert run.returncode == 0, run.output
    updates = torch.load(tmp_path / "updates.pt")
    assert len({update["worker"] for update in updates}) == 3
    assert max(update["staleness"] for update in updates) <= 5
    for rank in run.reports():
        assert_equal_bit_for_bit(rank["parameters"], torch.load(tmp_path / "replayed.pt"))


CHURNED: dict[str, Any] = {"on_worker_failure": "continue", "max_restarts": 2, "transport": "shm"}


class WaitsForReturn(Callback):
    """Lets rank 0 train on only when the ranks are back that were lost, however slow the machine is."""

    def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
        stats = trainer.strategy.stats
        assert eventually(lambda: len(stats.joined) == len(stats.evicted) or not trainer.is_global_zero, 30.0)


@pytest.mark.parametrize(
    "options",
    [
        {"max_staleness": 2},
        *(
            pytest.param(options, marks=pytest.mark.soak)
            for options in (
                {"max_staleness": 2, "gradients_per_update": 3},
                {"max_staleness": 0, "gradients_per_update": 3},
                {"max_staleness": 3, "batches": "sharded", "holder": "process"},
                {"max_staleness": 5, "overlap": True},
            )
        ),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_run_with_a_death_and_a_return_replays_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    callbacks = [FaultInjector([Fault(1, 4, "kill"), Fault(2, 9, "kill")]), WaitsForReturn()]

    def script(folder: Path) -> None:
        train_and_replay(folder, {**CHURNED, **options}, {"callbacks": callbacks}, sleep_s=(0.03,) * 3)

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    evicted, joined = torch.load(tmp_path / "churn.pt")
    assert sorted(evicted) == sorted(joined) == [1, 2]
    # More than their first incarnations have lived to push.
    updates = torch.load(tmp_path / "updates.pt")
    assert sum(update["worker"] > 0 for update in updates) > 4 + 9
    replayed = torch.load(tmp_path / "replayed.pt")
    ranks = run.reports()
    assert len(ranks) == 3
    for rank in ranks:
        assert_equal_bit_for_bit(rank["parameters"], replayed)
