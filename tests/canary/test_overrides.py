"""What the package overrides or does in its own way of Lightning and torch is still what it takes it for.

A failure here says which file relies on what has changed; look there before anything else.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from typing import Any

import pytest

from lightning_async.loops import epoch_loop, fetcher, fit_loop, optimization
from lightning_async.strategies import amsgrad, collectives, process_launcher, script_launcher, strategy
from tests.canary.lookup import fail, resolve

EPOCH_LOOP = "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop"
FIT_LOOP = "lightning.pytorch.loops.fit_loop._FitLoop"
FETCHER = "lightning.pytorch.loops.fetchers._DataFetcher"
SCRIPT = "lightning.pytorch.strategies.launchers.subprocess_script._SubprocessScriptLauncher"
MULTI = "lightning.pytorch.strategies.launchers.multiprocessing._MultiProcessingLauncher"
DDP = "lightning.pytorch.strategies.ddp.DDPStrategy"
AUTOMATIC = "lightning.pytorch.loops.optimization.automatic._AutomaticOptimization"
RESUMING = "lightning.pytorch.trainer.connectors.checkpoint_connector._CheckpointConnector"
AVERAGING = "lightning.pytorch.callbacks.weight_averaging.WeightAveraging"

# What is overridden or called, and its parameters.
SIGNATURES = {
    "loops/fetcher.py": {
        f"{FETCHER}.setup": "self, combined_loader",
        f"{FETCHER}.reset": "self",
        f"{FETCHER}.teardown": "self",
        f"{FETCHER}.__iter__": "self",
        f"{FETCHER}.__next__": "self",
        "lightning.pytorch.utilities.combined_loader._MinSize.__init__": "self, iterables, limits",
    },
    "loops/epoch_loop.py": {
        f"{EPOCH_LOOP}.on_run_start": "self, data_fetcher",
        f"{EPOCH_LOOP}.state_dict": "self, destination, prefix",
        f"{EPOCH_LOOP}.reset": "self",
        f"{EPOCH_LOOP}.advance": "self, data_fetcher",
        f"{EPOCH_LOOP}.on_advance_end": "self, data_fetcher",
        f"{EPOCH_LOOP}.update_lr_schedulers": "self, interval, update_plateau_schedulers",
        f"{EPOCH_LOOP}._update_learning_rates": "self, interval, update_plateau_schedulers",
        f"{EPOCH_LOOP}._broadcast_sigterm_tensor": "self",
        f"{EPOCH_LOOP}._num_ready_batches_reached": "self",
        f"{EPOCH_LOOP}._should_check_val_fx": "self, data_fetcher",
        f"{EPOCH_LOOP}._should_check_val_epoch": "self",
        f"{EPOCH_LOOP}._save_loggers_on_train_batch_end": "self",
        "lightning.pytorch.trainer.call._call_lightning_module_hook": "trainer, hook_name, *args, pl_module, **kwargs",
    },
    "loops/fit_loop.py": {
        f"{FIT_LOOP}.setup_data": "self",
        f"{FIT_LOOP}.on_advance_end": "self",
        f"{FIT_LOOP}.on_save_checkpoint": "self",
        f"{FIT_LOOP}._load_combined_loader_states": "self",
        "lightning.pytorch.loops.utilities._select_data_fetcher": "trainer, stage",
        "lightning.pytorch.trainer.connectors.data_connector._request_dataloader": "data_source",
        "lightning.pytorch.trainer.connectors.signal_connector._SignalConnector._sigterm_notifier_fn": (
            "self, signum, _"
        ),
        "lightning.pytorch.trainer.connectors.signal_connector._SignalConnector._slurm_sigusr_handler_fn": (
            "self, signum, _"
        ),
    },
    "loops/optimization.py": {
        f"{AUTOMATIC}._training_step": "self, kwargs",
        f"{AUTOMATIC}._optimizer_step": "self, batch_idx, train_step_and_backward_closure",
        "lightning.pytorch.trainer.call._call_strategy_hook": "trainer, hook_name, *args, **kwargs",
    },
    "loops/step_counter.py": {
        "lightning.pytorch.loops.optimization.manual._ManualOptimization._on_after_step": "self",
    },
    "strategies/module_wrapper.py": {
        "lightning.pytorch.strategies.strategy._ForwardRedirection.__call__": (
            "self, wrapper_module, original_module, method_name, *args, **kwargs"
        ),
    },
    "loops/weight_averaging.py": {
        f"{AVERAGING}.on_train_batch_end": "self, trainer, pl_module, outputs, batch, batch_idx",
        f"{AVERAGING}.should_update": "self, step_idx, epoch_idx",
    },
    "loops/progress_bar.py": {
        "lightning.pytorch.callbacks.TQDMProgressBar.on_train_batch_end": (
            "self, trainer, pl_module, outputs, batch, batch_idx"
        ),
        "lightning.pytorch.callbacks.RichProgressBar.on_train_batch_end": (
            "self, trainer, pl_module, outputs, batch, batch_idx"
        ),
        "lightning.pytorch.callbacks.ProgressBar.get_metrics": "self, trainer, pl_module",
    },
    "loops/results.py": {
        "lightning.pytorch.trainer.connectors.logger_connector.result._ResultMetric.__init__": (
            "self, metadata, is_tensor"
        ),
        "lightning.pytorch.trainer.connectors.logger_connector.result._ResultCollection.valid_items": "self",
    },
    "strategies/script_launcher.py": {
        f"{SCRIPT}.__init__": "self, cluster_environment, num_processes, num_nodes",
        f"{SCRIPT}.launch": "self, function, *args, trainer, **kwargs",
        f"{SCRIPT}._call_children_scripts": "self",
        f"{SCRIPT}.kill": "self, signum",
        "lightning.fabric.utilities.distributed._set_num_threads_if_needed": "num_processes",
    },
    "strategies/process_launcher.py": {
        f"{MULTI}.__init__": "self, strategy, start_method",
        f"{MULTI}.launch": "self, function, *args, trainer, **kwargs",
        f"{MULTI}._wrapping_function": (
            "self, process_idx, trainer, function, args, kwargs, return_queue, global_states"
        ),
        f"{MULTI}._recover_results_in_main_process": "self, worker_output, trainer",
        f"{MULTI}.get_extra_results": "self, trainer",
        f"{MULTI}.update_main_process_results": "self, trainer, extra",
        f"{MULTI}.kill": "self, signum",
        "lightning.pytorch.strategies.launchers.multiprocessing._GlobalStateSnapshot.capture": "cls",
        "lightning.fabric.strategies.launchers.multiprocessing._check_bad_cuda_fork": "",
        "lightning.fabric.strategies.launchers.multiprocessing._check_missing_main_guard": "",
        "torch.multiprocessing.spawn.start_processes": "fn, args, nprocs, join, daemon, start_method",
    },
    "strategies/collectives.py": {
        f"{DDP}.barrier": "self, *args, **kwargs",
        f"{DDP}.broadcast": "self, obj, src",
        f"{DDP}.reduce": "self, tensor, group, reduce_op",
        f"{DDP}.reduce_boolean_decision": "self, decision, all",
        f"{DDP}.all_gather": "self, tensor, group, sync_grads",
    },
    "loops/restarts.py": {f"{RESUMING}.resume_start": "self, checkpoint_path, weights_only"},
    "strategies/strategy.py": {
        f"{DDP}._configure_launcher": "self",
        f"{DDP}.configure_ddp": "self",
        f"{DDP}.setup": "self, trainer",
        f"{DDP}.setup_environment": "self",
        f"{DDP}.setup_distributed": "self",
        f"{DDP}.setup_optimizers": "self, trainer",
        f"{DDP}.set_world_ranks": "self",
        f"{DDP}._get_process_group_backend": "self",
        f"{DDP}.connect": "self, model",
        f"{DDP}.process_dataloader": "self, dataloader",
        f"{DDP}.pre_backward": "self, closure_loss",
        f"{DDP}.backward": "self, closure_loss, optimizer, *args, **kwargs",
        f"{DDP}.optimizer_step": "self, optimizer, closure, model, **kwargs",
        f"{DDP}.lightning_module_state_dict": "self",
        f"{DDP}.optimizer_state": "self, optimizer",
        f"{DDP}.save_checkpoint": "self, checkpoint, filepath, storage_options",
        f"{DDP}.load_optimizer_state_dict": "self, checkpoint",
        f"{DDP}.on_exception": "self, exception",
        f"{DDP}.teardown": "self",
        f"{DDP}.register_strategies": "cls, strategy_registry",
    },
    "strategies/checkpoint_io.py": {
        "lightning.pytorch.plugins.io.TorchCheckpointIO.save_checkpoint": "self, checkpoint, path, storage_options",
    },
    "holder/amsgrad.py": {
        "torch.optim.adam.Adam._init_group": (
            "self, group, params_with_grad, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps"
        ),
    },
}


def parameters_of(function: Any) -> str:
    function = getattr(function, "__func__", function)
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(stars.get(parameter.kind, "") + parameter.name for parameter in parameters)


@pytest.mark.parametrize(
    ("file", "path", "parameters"),
    [(file, path, parameters) for file, paths in SIGNATURES.items() for path, parameters in paths.items()],
)
def test_what_is_overridden_or_called_has_the_same_parameters(file: str, path: str, parameters: str) -> None:
    found = parameters_of(resolve(path, file))

    if found != parameters:
        fail(file, f"{path}({parameters}), which is now ({found})")


@pytest.mark.parametrize(
    "kind",
    [
        fetcher.TicketFetcher,
        epoch_loop.AsyncEpochLoop,
        fit_loop.AsyncFitLoop,
        optimization.AsyncAutomaticOptimization,
        script_launcher.ScriptLauncher,
        process_launcher.ProcessLauncher,
        collectives.PhasedCollectives,
        strategy.AsyncStrategy,
        amsgrad.AsyncAMSGradStrategy,
    ],
)
def test_every_override_overrides_something(kind: type) -> None:
    source = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(source, ast.ClassDef)
    for method in source.body:
        if isinstance(method, ast.FunctionDef) and any(
            isinstance(mark, ast.Name) and mark.id == "override" for mark in method.decorator_list
        ):
            bases = [base for base in kind.__mro__[1:] if method.name in vars(base)]
            if not bases:
                fail(
                    f"{kind.__module__.partition('.')[2].replace('.', '/')}.py",
                    f"{kind.__name__}.{method.name} being an override",
                )


@pytest.mark.parametrize("name", ["global_step", "batch_idx", "done"])
def test_the_epoch_loops_counters_are_properties(name: str) -> None:
    if not isinstance(resolve(f"{EPOCH_LOOP}.{name}", "loops/epoch_loop.py"), property):
        fail("loops/epoch_loop.py", f"{EPOCH_LOOP}.{name} being a property")


# What this package does in its own way instead. When Lightning changes it, there may be something to take over.
REPLACED = {
    ("strategies/process_launcher.py", f"{MULTI}.launch"): "21465cc91554",
    ("strategies/script_launcher.py", f"{SCRIPT}.launch"): "c11da3d0bdf3",
    ("loops/epoch_loop.py", f"{EPOCH_LOOP}._should_check_val_fx"): "dde13ed45d1b",
    ("loops/epoch_loop.py", f"{EPOCH_LOOP}.on_advance_end"): "089c2705013f",
    ("loops/epoch_loop.py", f"{EPOCH_LOOP}.advance"): "34b71467397b",
    ("loops/optimization.py", f"{AUTOMATIC}._training_step"): "4965798b456b",
    ("loops/weight_averaging.py", f"{AVERAGING}.on_train_batch_end"): "06a61d0a079d",
    (
        "loops/fit_loop.py",
        "lightning.pytorch.trainer.connectors.signal_connector._SignalConnector._sigterm_notifier_fn",
    ): "f8d590061334",
}


def digest(function: Any) -> str:
    """Of the code alone: neither comments nor docstrings nor layout count, nor which Python reads it."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(body, ast.FunctionDef)
    if ast.get_docstring(body) is not None:
        body.body = body.body[1:]
    return hashlib.sha256(outline(body).encode()).hexdigest()[:12]


def outline(node: Any) -> str:
    """A syntax tree without its empty fields, which are not the same in every Python."""
    if isinstance(node, ast.AST):
        fields = [f"{name}={outline(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
        return f"{type(node).__name__}({', '.join(fields)})"
    return f"[{', '.join(map(outline, node))}]" if isinstance(node, list) else repr(node)


@pytest.mark.parametrize(("file", "path"), REPLACED)
def test_what_is_done_in_another_way_here_has_not_changed_there(file: str, path: str) -> None:
    found = digest(resolve(path, file))

    if found != REPLACED[file, path]:
        fail(file, f"the body of {path}, whose digest is now {found}")
