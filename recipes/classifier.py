"""The classifier of the recipes: an ordinary LightningModule that knows nothing of its strategy."""

from collections.abc import Iterable
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

import lightning_async

__all__ = ["Batch", "Classifier", "amsgrad"]

# What the model takes, and the labels.
Batch = tuple[Any, Tensor]


def amsgrad(params: Iterable[Any], lr: float = 1e-3) -> lightning_async.AMSGrad:
    """Return the classifier's default optimizer.

    Args:
        params: parameters or param groups.
        lr: step size.
    """
    return lightning_async.AMSGrad(params, lr=lr)


class Classifier(LightningModule):
    """Classify with cross-entropy, or with the logistic loss where there are two classes; log loss and accuracy.

    Args:
        model: maps a batch to logits: (batch, num_classes), or (batch,) if `task` is "binary".
        num_classes: number of classes.
        task: "multiclass", or "binary" for labels 0 and 1 and one logit per sample.
        top_k: also log the share of samples whose class is among the `top_k` likeliest, as `val/acc_top5` and
            `test/acc_top5` with 5; 1 logs no more than the accuracy.
        optimizer: makes the optimizer from the parameters. The default is `lightning_async.AMSGrad` with step size
            1e-3. A coupled weight decay λ is an L2 penalty λ/2·‖x‖², which the logged loss leaves out.
        lr: step size, in place of the optimizer's own.
        lr_schedule: "constant", or "cosine" to let the step size fall to zero over `max_epochs`.
        label_smoothing: share of the training target spread evenly over all classes, from 0 to 1.

    Raises:
        ValueError: if `task` is "binary" and `num_classes`, `top_k` or `label_smoothing` do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int = 10,
        task: Literal["multiclass", "binary"] = "multiclass",
        top_k: int = 1,
        optimizer: OptimizerCallable = amsgrad,
        lr: float | None = None,
        lr_schedule: Literal["constant", "cosine"] = "constant",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if task == "binary" and (num_classes, top_k, label_smoothing) != (2, 1, 0.0):
            raise ValueError(
                'task="binary" goes with num_classes=2, top_k=1 and label_smoothing=0, '
                f"got {num_classes}, {top_k} and {label_smoothing}"
            )
        self.model = model
        self.task = task
        self.optimizer = optimizer
        self.lr = lr
        self.lr_schedule = lr_schedule
        self.label_smoothing = label_smoothing
        self.val_accuracy = self._accuracy(num_classes)
        self.test_accuracy = self._accuracy(num_classes)
        self.top_k = top_k
        if top_k > 1:
            self.val_top_k = self._accuracy(num_classes, top_k)
            self.test_top_k = self._accuracy(num_classes, top_k)

    def forward(self, inputs: Any) -> Tensor:
        """Map a batch to logits."""
        logits: Tensor = self.model(inputs)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch and log it as `train/loss`."""
        inputs, labels = batch
        loss = self._loss(self(inputs), labels, self.label_smoothing)
        self.log("train/loss", loss, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to `val/loss` and `val/acc`, which are logged once per validation."""
        inputs, labels = batch
        logits, samples = self(inputs), len(labels)
        self.val_accuracy(self._scores(logits), labels)
        self.log("val/loss", self._loss(logits, labels), on_epoch=True, sync_dist=True, batch_size=samples)
        self.log("val/acc", self.val_accuracy, on_epoch=True, prog_bar=True, batch_size=samples)
        if self.top_k > 1:
            self.val_top_k(logits, labels)
            self.log(f"val/acc_top{self.top_k}", self.val_top_k, on_epoch=True, batch_size=samples)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to `test/acc`."""
        inputs, labels = batch
        logits, samples = self(inputs), len(labels)
        self.test_accuracy(self._scores(logits), labels)
        self.log("test/acc", self.test_accuracy, on_epoch=True, batch_size=samples)
        if self.top_k > 1:
            self.test_top_k(logits, labels)
            self.log(f"test/acc_top{self.top_k}", self.test_top_k, on_epoch=True, batch_size=samples)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the predicted class of each sample."""
        inputs, _ = batch
        scores = self._scores(self(inputs))
        return scores if self.task == "binary" else scores.argmax(dim=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer over all parameters, with its schedule if there is one.

        Raises:
            MisconfigurationException: if the cosine has no end because the Trainer has no `max_epochs`.
        """
        given = {} if self.lr is None else {"lr": self.lr}
        optimizer = self.optimizer(self.parameters(), **given)
        if self.lr_schedule == "constant":
            return optimizer
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise MisconfigurationException(
                f'lr_schedule="cosine" ends with the last epoch, but the Trainer has max_epochs={epochs}. '
                'Set max_epochs, or use lr_schedule="constant".'
            )
        return [optimizer], [CosineAnnealingLR(optimizer, T_max=epochs)]

    def _loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        if self.task == "binary":
            return binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return cross_entropy(logits, labels, label_smoothing=label_smoothing)

    def _scores(self, logits: Tensor) -> Tensor:
        # The metric would take logits that all lie between 0 and 1 for probabilities, so it gets the classes.
        return (logits > 0).long() if self.task == "binary" else logits

    def _accuracy(self, num_classes: int, top_k: int = 1) -> Metric:
        if self.task == "binary":
            return BinaryAccuracy()
        return MulticlassAccuracy(num_classes, top_k=top_k, average="micro")
