"""Every private name of Lightning, torch and torchmetrics that the package uses is listed, and is still there."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from tests.canary import test_behaviour, test_overrides
from tests.canary.lookup import PACKAGE, fail, private_imports, private_uses, resolve, sources

# Where private Lightning may be imported.
HOME = ("loops/", "strategies/script_launcher.py", "strategies/process_launcher.py")

EPOCH_LOOP = "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop"
CONNECTORS = "lightning.pytorch.trainer.connectors"
RESULT = f"{CONNECTORS}.logger_connector.result"
MULTI = "lightning.fabric.strategies.launchers.multiprocessing._MultiProcessingLauncher"
SCHEDULER = "torch.optim.lr_scheduler.LRScheduler"

# Private attributes that are used, and what has them: something of a Trainer, a module or a class.
USES = {
    "_actions": ["argparse.ArgumentParser"],
    "_average_model": ["lightning.pytorch.callbacks.weight_averaging.WeightAveraging"],
    "_batches_that_stepped": ["trainer.fit_loop.epoch_loop"],
    "_call_children_scripts": ["lightning.pytorch.strategies.launchers._SubprocessScriptLauncher"],
    "_call_callbacks_load_state_dict": ["lightning.pytorch.trainer.call"],
    "_call_callbacks_state_dict": ["lightning.pytorch.trainer.call"],
    "_call_lightning_module_hook": ["lightning.pytorch.trainer.call"],
    "_call_strategy_hook": ["lightning.pytorch.trainer.call"],
    "_can_stop_early": ["lightning.pytorch.loops.fit_loop._FitLoop"],
    "_checkpoint_connector": ["trainer"],
    "_combined_loader": ["trainer.fit_loop"],
    "_computed": ["torchmetrics.Metric", f"{RESULT}._ResultMetric"],
    "_copy_state_dict": ["torchmetrics.Metric"],
    "_data_fetcher": ["trainer.fit_loop"],
    "_destroy": ["torch.library.Library"],
    "_device_types": ["torch.distributed.ProcessGroup"],
    "_dispatch_get_all_op_names": ["torch._C"],
    "_dispatch_keyset_full_after": ["torch._C"],
    "_every_n_train_steps": ["lightning.pytorch.callbacks.ModelCheckpoint"],
    "_first_loop_iter": ["trainer._logger_connector"],
    "_foreach_add_": ["torch"],
    "_foreach_addcdiv_": ["torch"],
    "_foreach_copy_": ["torch"],
    "_foreach_div": ["torch"],
    "_foreach_div_": ["torch"],
    "_foreach_mul_": ["torch"],
    "_foreach_sqrt": ["torch"],
    "_foreach_sub_": ["torch"],
    "_fused_adam_": ["torch"],
    "_fused_adamw_": ["torch"],
    "_get": ["lightning.pytorch.cli.LightningCLI"],
    "_get_backend": ["torch.distributed.ProcessGroup"],
    "_get_iterator": ["torch.utils.data.DataLoader"],
    "_hpc_resume_path": ["trainer._checkpoint_connector"],
    "_is_synced": ["torchmetrics.Metric"],
    "_is_training_done": [EPOCH_LOOP],
    "_iterator": ["lightning.pytorch.utilities.combined_loader.CombinedLoader", "torch.utils.data.DataLoader"],
    "_last_train_dl_reload_epoch": ["trainer.fit_loop"],
    "_last_val_time": ["lightning.pytorch.loops.evaluation_loop._EvaluationLoop"],
    "_module_mode": ["lightning.pytorch.loops.evaluation_loop._EvaluationLoop"],
    "_on_evaluation_model_train": ["lightning.pytorch.loops.evaluation_loop._EvaluationLoop"],
    "_set_default_timeout": ["torch._C._distributed_c10d.ProcessGroupGloo"],
    "_latest_update_step": ["lightning.pytorch.callbacks.weight_averaging.WeightAveraging"],
    "_layer_sync": ["trainer.strategy"],
    "_lightning_optimizers": ["trainer.strategy"],
    "_limits": ["lightning.pytorch.utilities.combined_loader.CombinedLoader"],
    "_logger_connector": ["trainer"],
    "_mode": ["lightning.pytorch.utilities.combined_loader.CombinedLoader"],
    "_new_group_with_tag": ["torch.distributed.distributed_c10d"],
    "_world": ["torch.distributed.distributed_c10d"],
    "_on_after_step": ["lightning.pytorch.core.optimizer.LightningOptimizer"],
    "_opt_called": [SCHEDULER],
    "_option_string_actions": ["argparse.ArgumentParser"],
    "_optimizer_step": ["lightning.pytorch.loops.optimization.automatic._AutomaticOptimization"],
    "_prefix": ["lightning.pytorch.loggers.WandbLogger", "lightning.pytorch.loggers.CSVLogger"],
    "_process_group_backend": ["trainer.strategy"],
    "_recover_results_in_main_process": ["lightning.pytorch.strategies.launchers._MultiProcessingLauncher"],
    "_reset": ["torch.utils.data.dataloader._BaseDataLoaderIter"],
    "_results": [EPOCH_LOOP],
    "_save_loggers_on_train_batch_end": [EPOCH_LOOP],
    "_schema": ["torch._ops.OpOverload"],
    "_should_check_val_epoch": [EPOCH_LOOP],
    "_signal_connector": ["trainer"],
    "_sigterm_notifier_fn": ["trainer._signal_connector"],
    "_skip_backward": ["trainer.fit_loop.epoch_loop.automatic_optimization"],
    "_slurm_sigusr_handler_fn": ["trainer._signal_connector"],
    "_start_method": ["trainer.strategy", "lightning.pytorch.strategies.launchers._MultiProcessingLauncher"],
    "_swap_models": ["lightning.pytorch.callbacks.weight_averaging.WeightAveraging"],
    "_step_supports_amp_scaling": ["lightning.fabric.plugins.precision.amp"],
    "_timeout": ["trainer.strategy"],
    "_trainer": ["lightning.pytorch.LightningModule"],
    "_typehint": ["jsonargparse._typehints.ActionTypeHint"],
    "_update_count": ["torchmetrics.Metric"],
    "_update_learning_rates": [EPOCH_LOOP],
    "_val_check_time_interval": ["trainer"],
    "_wrapped_by_lr_sched": [SCHEDULER],
}

# What is not theirs: of the standard library and of torch's bindings; of this package, where an object uses another's.
NOT_THEIRS = {"_C", "_asdict", "_current_frames", "_exit", "_getframe", "_replace"}
OWN = {
    "chaos/injector.py": {"_connection", "_reform"},
    "data/loader_proxy.py": {"_proxy_iterate", "_proxy_length", "_proxy_real", "_proxy_shown"},
    "exchange/engine.py": {"_owned"},
    "exchange/local_service.py": {"_server"},
    "exchange/server.py": {"_expected"},
    "holder/barrier.py": {"_readers", "_reads"},
    "holder/changes.py": {"_condition"},
    "loops/checkpoint_interval.py": {"_ticks"},
    "loops/fit_loop.py": {"_fit_coordinator"},
    "loops/installation.py": {"_epoch", "_fit_coordinator"},
    "loops/joining.py": {"_epoch"},
    "monitoring/record.py": {"_check"},
    "transport/fake.py": {"_closed", "_inbox"},
}


@pytest.mark.parametrize(("file", "path"), list(private_imports()))
def test_a_private_name_can_still_be_imported(file: str, path: str) -> None:
    resolve(path, file)


def test_private_lightning_is_imported_by_the_loops_and_the_launchers_alone() -> None:
    elsewhere = [
        f"{file}: {path}"
        for file, path in private_imports()
        if path.startswith("lightning") and not file.startswith(HOME)
    ]

    assert elsewhere == []


def test_the_imports_are_found() -> None:
    assert {"loops/epoch_loop.py", "loops/results.py", *HOME[1:]} <= {f for f, _ in private_imports()}


@pytest.mark.parametrize(("file", "name"), list(private_uses()))
def test_a_private_name_that_is_used_is_listed_and_is_there(file: str, name: str, tmp_path: Path) -> None:
    if name in NOT_THEIRS | OWN.get(file, set()):
        return
    assert name in USES, f"lightning_async/{file} uses {name}, which is private: list where it comes from"
    for owner in USES[name]:
        if not has(owner, name, file, tmp_path):
            fail(file, f"{owner}.{name}, which is gone")


def has(owner: str, name: str, file: str, folder: Path) -> bool:
    """Whether an owner has the attribute, or a method of its class sets it or looks for it."""
    if owner.split(".")[0] == "trainer":
        arguments = {"logger": False, "enable_progress_bar": False, "default_root_dir": folder}
        found: Any = Trainer(accelerator="cpu", devices=1, strategy="ddp", **arguments)
        for part in owner.split(".")[1:]:
            found = getattr(found, part)
    else:
        found = resolve(owner, file)
    if hasattr(found, name):
        return True
    kind = found if isinstance(found, type) or inspect.ismodule(found) else type(found)
    parents = [each for each in kind.__mro__ if each is not object] if isinstance(kind, type) else [kind]
    return any(re.search(rf"\b{name}\b", source) for source in map(inspect.getsource, parents))


def test_what_is_listed_is_used() -> None:
    text = "\n".join((PACKAGE / file).read_text() for file in sources())

    assert [name for name in USES if name not in text] == []
    assert {file: names - {name for where, name in private_uses() if where == file} for file, names in OWN.items()} == {
        file: set() for file in OWN
    }


def test_every_file_that_the_canary_names_exists_and_its_room_has_the_name() -> None:
    tables = (test_overrides.SIGNATURES, test_behaviour.TRAINER_ATTRIBUTES)
    named = {(file, path.rpartition(".")[2]) for table in tables for file, paths in table.items() for path in paths}
    named |= {(file, path.rpartition(".")[2]) for file, path in test_overrides.REPLACED}

    # What Python calls itself has no caller to find, and an override may be one of a mixin in the same room.
    named = {(file, name) for file, name in named if not name.startswith("__")}
    wrong = [(file, name) for file, name in sorted(named) if file not in sources() or name not in text_of_room(file)]

    assert wrong == []


def test_every_file_that_a_failure_names_exists() -> None:
    # fail(file, what) and resolve(path, file).
    place = {"fail": 0, "resolve": 1}
    told = set()
    for module in (test_overrides, test_behaviour):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in place:
                argument = node.args[place[node.func.id]]
                told |= {argument.value} if isinstance(argument, ast.Constant) else set()

    assert told - set(sources()) == set()
    assert len(told) > 10


def text_of_room(file: str) -> str:
    return "\n".join(path.read_text() for path in (PACKAGE / file).parent.glob("*.py"))
