"""What the package reads, writes and calls of Lightning, torch and torchmetrics still behaves as it takes it to.

A failure here says which file relies on what has changed; look there before anything else.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader

from lightning_async.loops import counters, fetcher, results, trainer_state
from lightning_async.loops import fit_loop as loops
from tests.canary.lookup import fail, resolve

EPOCH_LOOP = "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop"

TRAINER_ATTRIBUTES = {
    "loops/epoch_loop.py": [
        "fit_loop._can_stop_early",
        "fit_loop._data_fetcher",
        "fit_loop.epoch_loop._batches_that_stepped",
        "fit_loop.epoch_loop._is_training_done",
        "fit_loop.epoch_loop._results.valid_items",
        "fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.current.ready",
        "fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.current.completed",
        "fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.ready",
        "fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed",
        "fit_loop.epoch_loop.manual_optimization.optim_step_progress.current.completed",
        "fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed",
        "fit_loop.epoch_loop.batch_progress.current.ready",
        "fit_loop.epoch_loop.batch_progress.current.started",
        "fit_loop.epoch_loop.batch_progress.current.processed",
        "fit_loop.epoch_loop.batch_progress.current.completed",
        "fit_loop.epoch_loop.batch_progress.total.ready",
        "fit_loop.epoch_loop.batch_progress.is_last_batch",
        "fit_loop.epoch_loop.max_steps",
        "fit_loop.epoch_loop.val_loop.run",
        "_val_check_time_interval",
        "_logger_connector._first_loop_iter",
        "received_sigterm",
        "should_stop",
        "strategy._lightning_optimizers",
    ],
    "loops/fit_loop.py": [
        "fit_loop._combined_loader",
        "fit_loop._combined_loader_states_to_load",
        "fit_loop._data_fetcher",
    ],
    "loops/installation.py": [
        "fit_loop.epoch_loop.automatic_optimization",
        "_signal_connector._sigterm_notifier_fn",
        "_signal_connector._slurm_sigusr_handler_fn",
    ],
    "loops/epoch_size.py": ["fit_loop.max_batches", "fit_loop._last_train_dl_reload_epoch", "val_check_batch"],
    "loops/optimization.py": [
        "fit_loop.epoch_loop.automatic_optimization._skip_backward",
        "fit_loop.epoch_loop.automatic_optimization.output_result_cls.from_training_step_output",
    ],
    "loops/trainer_state.py": ["_signal_connector.received_sigterm", "checkpoint_callbacks"],
    "strategies/supervisor.py": [
        "strategy._layer_sync",
        "strategy._launcher",
        "strategy._start_method",
        "strategy.num_processes",
    ],
}


@pytest.mark.parametrize(
    ("file", "path"), [(file, path) for file, paths in TRAINER_ATTRIBUTES.items() for path in paths]
)
def test_the_trainer_has_what_is_read_and_written(file: str, path: str, tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy="ddp", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    found: Any = trainer
    for name in path.split("."):
        # A subclass of the loops sees the property; its value may need a running fit.
        if not hasattr(type(found), name) and not hasattr(found, name):
            fail(file, f"trainer.{path}, and there is no {name}")
        if isinstance(inspect.getattr_static(type(found), name, None), property) and name == "_can_stop_early":
            return
        found = getattr(found, name)


def test_the_checkpoint_callback_keeps_its_notes_under_the_same_names() -> None:
    notes = vars(ModelCheckpoint())
    for name in trainer_state._CHECKPOINT_FIELDS:
        if name not in notes:
            fail("loops/trainer_state.py", f"ModelCheckpoint.{name}")


def test_the_averaging_callback_keeps_its_model_and_step_under_the_same_names() -> None:
    notes = vars(WeightAveraging())
    for name in ("_average_model", "_latest_update_step"):
        if name not in notes:
            fail("loops/weight_averaging.py", f"WeightAveraging.{name}")


def test_a_logger_keeps_its_prefix_under_the_same_names() -> None:
    if WandbLogger(offline=True, prefix="p")._prefix != "p" or WandbLogger.LOGGER_JOIN_CHAR != "-":
        fail("loops/trainer_state.py", "WandbLogger._prefix and .LOGGER_JOIN_CHAR")


def test_a_logged_entry_has_the_same_fields() -> None:
    fields = {field.name for field in dataclasses.fields(results._Metadata)}
    for name in set(results._PLAIN_FIELDS) - fields:
        fail("loops/results.py", f"_Metadata.{name}")
    # A new field would be lost on the way between ranks.
    for name in fields - set(results._PLAIN_FIELDS) - {"_sync"}:
        fail("loops/results.py", f"_Metadata without {name}")
    if not {"_should", "fn", "rank_zero_only"} <= {field.name for field in dataclasses.fields(results._Sync)}:
        fail("loops/results.py", "_Sync(_should, fn, rank_zero_only)")
    metric = results._ResultMetric(results._Metadata("training_step", "loss", on_epoch=True), is_tensor=True)
    for name in ("has_reset", "_computed", "_update_count", "meta", "is_tensor", "value", "cumulated_batch_size"):
        if not hasattr(metric, name):
            fail("loops/results.py", f"_ResultMetric.{name}")


def test_the_combined_loader_makes_its_iterator_as_before() -> None:
    loader = fetcher.CombinedLoader([[1, 2]], "min_size")
    for name in ("_iterator", "_mode", "_limits", "flattened"):
        if not hasattr(loader, name):
            fail("loops/fetcher.py", f"CombinedLoader.{name}")
    loader._iterator = fetcher._SUPPORTED_MODES[loader._mode]["iterator"](loader.flattened, loader._limits)
    if len(loader) != 2:
        fail("loops/fetcher.py", "a CombinedLoader that answers len() by its iterator's loaders")


def test_a_time_based_interval_is_counted_from_the_same_moment() -> None:
    # Set when the data is set up, where there is such an interval; then after every validation.
    if "trainer._last_val_time = trainer._train_start_time" not in inspect.getsource(loops._fit_loop_module):
        fail("loops/epoch_loop.py", "the fit loop setting trainer._last_val_time")


def test_the_fit_loop_selects_its_fetcher_by_the_name_in_its_module() -> None:
    if "_select_data_fetcher(trainer, " not in inspect.getsource(loops._FitLoop.setup_data):
        fail("loops/fit_loop.py", "_FitLoop.setup_data calling the global _select_data_fetcher(trainer, stage)")


def test_the_fit_loop_asks_for_its_loaders_by_the_name_in_its_module() -> None:
    if "_request_dataloader(source)" not in inspect.getsource(loops._FitLoop.setup_data):
        fail("loops/fit_loop.py", "_FitLoop.setup_data calling the global _request_dataloader(source)")


def test_an_epoch_loops_counters_are_saved_under_the_same_names(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    state = trainer.fit_loop.epoch_loop.state_dict(None, "loop.")
    counters.rewrite_as_ddp(state, "loop.", batches=3, batches_before=10, clock=7)
    copy = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path)

    loop = copy.fit_loop.epoch_loop
    loop.load_state_dict(state, "loop.")

    counts = (loop.batch_progress.current.ready, loop.batch_progress.total.completed, loop.batch_idx)
    steps = (loop.automatic_optimization.optim_progress, loop.manual_optimization.optim_step_progress.total)
    if (*counts, steps[0].optimizer_steps, steps[1].completed) != (3, 12, 2, 7, 7):
        fail("loops/counters.py", "the names of the counters in an epoch loop's state_dict")


def test_lightning_counts_a_manual_step_in_the_hooks_of_its_optimizer(tmp_path: Path) -> None:
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.loops.optimization.manual import _ManualOptimization

    source = inspect.getsource(_ManualOptimization)
    for line in (
        "lightning_optimizer._on_after_step = self._on_after_step",
        "self.optim_step_progress.increment_completed()",
        "self.trainer.strategy._lightning_optimizers",
    ):
        if line not in source:
            fail("loops/step_counter.py", f"_ManualOptimization having {line}")
    if "self._on_after_step()" not in inspect.getsource(LightningOptimizer.step):
        fail("loops/step_counter.py", "LightningOptimizer.step calling self._on_after_step after the strategy's step")
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    if not isinstance(trainer.fit_loop.epoch_loop._batches_that_stepped, int):
        fail("loops/step_counter.py", "the epoch loop's _batches_that_stepped")


def test_a_strategy_calls_the_steps_of_a_wrapped_module_by_one_object() -> None:
    from lightning.pytorch.strategies import Strategy

    if "self._forward_redirection(self.model, self.lightning_module" not in inspect.getsource(Strategy.training_step):
        fail(
            "strategies/module_wrapper.py",
            "Strategy.training_step calling _forward_redirection(model, lightning_module, ...)",
        )


def test_going_on_in_mid_epoch_is_warned_of_in_the_same_words() -> None:
    if "You're resuming from a checkpoint that ended before the epoch ended" not in inspect.getsource(
        resolve(f"{EPOCH_LOOP}.reset", "loops/epoch_loop.py")
    ):
        fail("loops/epoch_loop.py", "the warning of a checkpoint that ended before the epoch ended")


def test_a_stop_iteration_may_be_temporary() -> None:
    kind: Any = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    source = " ".join(inspect.getsource(kind._try_put_index).split())
    if "index = self._next_index() except StopIteration: return" not in source:
        fail("data/ticket_feed.py", "DataLoader workers' _try_put_index taking StopIteration for 'nothing to put now'")


def test_a_loaders_batch_sampler_can_be_replaced() -> None:
    loader: DataLoader[Any] = DataLoader([1, 2, 3], batch_size=2)
    object.__setattr__(loader, "batch_sampler", [[2], [1]])
    if [batch.tolist() for batch in loader] != [[3], [2]]:
        fail("data/loader_proxy.py", "a DataLoader that reads its attribute batch_sampler when it is iterated")


@pytest.mark.parametrize("arguments", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}], ids=str)
def test_a_loader_gets_its_iterator_by_one_method_and_workers_are_driven_by_the_same_ones(arguments: Any) -> None:
    loader: Any = DataLoader([1, 2, 3], batch_size=2, **arguments)
    made: list[Any] = []
    vars(loader)["_get_iterator"] = lambda: made.append(DataLoader._get_iterator(loader)) or made[-1]
    if [batch.tolist() for batch in loader] != [[1, 2], [3]] or not made:
        fail("data/shared_loader.py", "DataLoader.__iter__ asking self._get_iterator() for its iterator")
    if not arguments:
        return
    (iterator,) = made
    for name in ("_try_put_index", "_shutdown_workers", "_persistent_workers"):
        if not hasattr(iterator, name):
            fail("data/shared_loader.py", f"the iterator over loader workers having {name}")
    if list(inspect.signature(iterator._reset).parameters) != ["loader", "first_iter"]:
        fail("data/shared_loader.py", "the iterator over loader workers having _reset(loader, first_iter)")
    if arguments.get("persistent_workers") and loader._iterator is not iterator:
        fail("data/shared_loader.py", "a loader with persistent workers keeping its iterator in _iterator")
    iterator._shutdown_workers()


def test_loaders_have_the_attributes_that_are_read() -> None:
    loader = vars(DataLoader([1, 2, 3], batch_size=2))
    for name in ("batch_sampler", "sampler", "_iterator", "in_order", "num_workers", "prefetch_factor"):
        if name not in loader:
            fail("data/shared_loader.py", f"a DataLoader that keeps {name} among its attributes")


def test_lightnings_sampler_of_samplers_keeps_what_it_has_drawn_in_its_data_set() -> None:
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper

    sampler: Any = DistributedSamplerWrapper([5, 6, 7], num_replicas=1, rank=0, shuffle=False)
    drawing = iter(sampler)
    if next(drawing) != 5 or sampler.dataset._sampler_list != [5, 6, 7]:
        fail("data/loader_proxy.py", "DistributedSamplerWrapper keeping the drawn list in its dataset")


def test_a_copy_of_a_combined_loader_takes_other_loaders() -> None:
    loader = fetcher.CombinedLoader([[1, 2]], "max_size_cycle")
    other = copy.copy(loader)
    other.flattened = [[3, 4]]
    if ([batch for batch, *_ in loader], [batch for batch, *_ in other]) != ([[1], [2]], [[3], [4]]):
        fail("loops/fetcher.py", "a copy of a CombinedLoader with other loaders in it")


def test_loaders_states_are_saved_under_the_same_name() -> None:
    source = inspect.getsource(loops._FitLoop.on_save_checkpoint)
    if 'state_dict["combined_loader"]' not in source:
        fail("loops/fit_loop.py", "the fit loop saving the loaders' states as combined_loader")


def test_a_fit_without_a_checkpoint_asks_for_one_to_begin_from_too() -> None:
    connector = "lightning.pytorch.trainer.connectors.checkpoint_connector._CheckpointConnector"
    source = inspect.getsource(resolve(f"{connector}._restore_modules_and_callbacks", "loops/restarts.py"))
    if "self.resume_start(checkpoint_path, weights_only=weights_only)" not in source:
        fail("loops/restarts.py", "resume_start being called whether or not there is a checkpoint")


def test_a_process_group_that_is_there_is_taken() -> None:
    form = resolve("lightning.fabric.utilities.distributed._init_dist_connection", "strategies/strategy.py")
    before, _, after = inspect.getsource(form).partition("    if torch.distributed.is_initialized():\n")
    if "return\n" not in after.partition("init_process_group(")[0] or "init_process_group(" in before:
        fail("strategies/strategy.py", "setup_distributed leaving a process group alone that is there")


def test_a_hook_that_skips_the_epoch_marks_the_last_batch() -> None:
    source = inspect.getsource(resolve(f"{EPOCH_LOOP}.advance", "loops/epoch_loop.py"))
    if "self.batch_progress.increment_by(0, is_last_batch=True)" not in source:
        fail("loops/epoch_loop.py", "a batch whose hook has returned -1 being marked as the last one")


def test_schedulers_know_a_wrapped_step_by_the_same_marks() -> None:
    source = inspect.getsource(torch.optim.lr_scheduler.LRScheduler)
    for mark in ("_wrapped_by_lr_sched", "_opt_called"):
        if mark not in source:
            fail("strategies/optimizer_proxy.py", f"torch's schedulers looking for {mark}")


def test_an_optimizer_says_that_it_unscales_by_the_same_mark() -> None:
    from lightning.fabric.plugins.precision import amp

    if "_step_supports_amp_scaling" not in inspect.getsource(amp):
        fail("strategies/optimizer_proxy.py", "Lightning's mixed precision looking for _step_supports_amp_scaling")


def test_torchmetrics_synchronise_by_one_method() -> None:
    from torchmetrics import Metric, SumMetric

    if "self.sync_context(" not in inspect.getsource(Metric._wrap_compute):
        fail("loops/phase.py", "Metric.compute in Metric.sync_context")
    if "self.sync(" not in inspect.getsource(Metric.sync_context):
        fail("loops/phase.py", "Metric.sync_context calling Metric.sync")
    if not hasattr(SumMetric(), "_computed"):
        fail("loops/phase.py", "Metric._computed")


def _raise(index: int) -> None:
    raise ValueError(f"in process {index}")


def test_torch_leaves_a_failed_processs_traceback_in_a_file() -> None:
    context: Any = torch.multiprocessing.start_processes(_raise, nprocs=1, join=False, start_method="fork")
    (process,) = context.processes
    process.join(20.0)
    path = Path(context.error_files[0])
    try:
        if process.exitcode != 1 or "ValueError: in process 0" not in pickle.loads(path.read_bytes()):
            fail(
                "strategies/process_launcher.py",
                "torch.multiprocessing writing a traceback to ProcessContext.error_files",
            )
    finally:
        path.unlink(missing_ok=True)


def test_torch_describes_the_nccl_group_as_it_is_used() -> None:
    # Without CUDA there is no such class; its description comes with every build.
    stub = ast.parse((Path(torch.__file__).parent / "_C" / "_distributed_c10d.pyi").read_text())
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    known = {
        name: {member.name for member in classes[name].body if isinstance(member, (ast.FunctionDef, ast.ClassDef))}
        for name in ("Backend", "ProcessGroupNCCL")
    }

    missing = {"Options", "abort"} - known["ProcessGroupNCCL"] | {"eager_connect_single_device"} - known["Backend"]
    if missing:
        fail("transport/nccl.py", f"ProcessGroupNCCL having {missing}")


def test_torchs_dispatcher_and_groups_can_be_guarded_in_the_same_way() -> None:
    names = torch._C._dispatch_get_all_op_names()
    for operator in ("c10d::allreduce_", "c10d::barrier", "c10d::send"):
        if operator not in names:
            fail("loops/collective_guard.py", f"torch's dispatcher having the operator {operator}")
    schema = str(torch.ops.c10d.allreduce_.default._schema)
    if "c10d.ProcessGroup process_group" not in schema:
        fail("loops/collective_guard.py", "c10d's operators taking their group as c10d.ProcessGroup")
    paths = [
        *("torch.library.Library._destroy", "torch._C._dispatch_keyset_full_after", "torch._C.DispatchKey"),
        *("torch.distributed.ProcessGroup.unbox", "torch.distributed.distributed_c10d._new_group_with_tag"),
    ]
    for path in paths:
        resolve(path, "loops/collective_guard.py")
    from torch.distributed import distributed_c10d

    if "_new_group_with_tag(" not in inspect.getsource(distributed_c10d.new_group):
        fail("loops/collective_guard.py", "torch.distributed.new_group calling _new_group_with_tag")


def test_ddp_reads_what_to_ignore_from_the_same_attribute() -> None:
    from torch.nn.parallel import DistributedDataParallel

    if "module._ddp_params_and_buffers_to_ignore" not in inspect.getsource(DistributedDataParallel.__init__):
        fail("loops/buffer_sync.py", "DistributedDataParallel reading _ddp_params_and_buffers_to_ignore of its module")


def test_lightning_counts_a_batch_as_started_once_its_hooks_let_it_be() -> None:
    source = inspect.getsource(resolve(f"{EPOCH_LOOP}.advance", "loops/epoch_loop.py"))

    if "self.batch_progress.increment_started()" not in source:
        fail("loops/epoch_loop.py", "batch_progress.current.started counting the batches that are computed")


def test_no_package_can_add_a_strategys_name_by_being_installed() -> None:
    """Else no script need import this package, as docs/cluster.md and docs/troubleshooting.md say."""
    texts = [path.read_text() for path in Path(inspect.getfile(Trainer)).parents[2].rglob("*.py")]

    assert sum("importlib.metadata import entry_points" in text for text in texts) == 1
    assert {found for text in texts for found in re.findall(r'_load_external_callbacks\("([\w.]+)"\)', text)} == {
        "lightning.pytorch.callbacks_factory",
        "lightning.fabric.callbacks_factory",
    }
    with pytest.raises(ValueError, match="You selected an invalid strategy name"):
        Trainer(strategy="async_unknown")
