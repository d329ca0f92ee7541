"""The image classifier of the recipes: an ordinary LightningModule that knows nothing of its strategy."""

from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics.classification import MulticlassAccuracy

import lightning_async

__all__ = ["Batch", "Classifier"]

Batch = tuple[Tensor, Tensor]


class Classifier(LightningModule):
    """Classify images with cross-entropy and AMSGrad; log loss and accuracy.

    Args:
        model: maps images of shape (batch, channels, height, width) to logits (batch, num_classes).
        num_classes: number of classes.
        lr: step size of AMSGrad.
        beta1: decay rate of the gradient's running mean.
        beta2: decay rate of the squared gradient's running mean.
        weight_decay: factor of the L2 penalty.
        decoupled_weight_decay: apply the decay to the parameters, as AdamW does, instead of to the gradient.
        lr_schedule: "constant", or "cosine" to let the step size fall to zero over `max_epochs`.
        label_smoothing: share of the training target spread evenly over all classes, from 0 to 1.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int = 10,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        lr_schedule: Literal["constant", "cosine"] = "constant",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self.betas = (beta1, beta2)
        self.weight_decay = weight_decay
        self.decoupled_weight_decay = decoupled_weight_decay
        self.lr_schedule = lr_schedule
        self.label_smoothing = label_smoothing
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Map a batch of images to logits."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of one batch and log it as `train/loss`."""
        images, labels = batch
        loss = cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to `val/loss` and `val/acc`, which are logged once per validation."""
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val/loss", cross_entropy(logits, labels), on_epoch=True, sync_dist=True)
        self.log("val/acc", self.val_accuracy, on_epoch=True, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to `test/acc`."""
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test/acc", self.test_accuracy, on_epoch=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the predicted class of each image."""
        images, _ = batch
        classes: Tensor = self(images).argmax(dim=1)
        return classes

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AMSGrad over all parameters, with its schedule if there is one.

        Raises:
            MisconfigurationException: if the cosine has no end because the Trainer has no `max_epochs`.
        """
        optimizer = lightning_async.AMSGrad(
            self.parameters(),
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            decoupled_weight_decay=self.decoupled_weight_decay,
        )
        if self.lr_schedule == "constant":
            return optimizer
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise MisconfigurationException(
                f'lr_schedule="cosine" ends with the last epoch, but the Trainer has max_epochs={epochs}. '
                'Set max_epochs, or use lr_schedule="constant".'
            )
        return [optimizer], [CosineAnnealingLR(optimizer, T_max=epochs)]
