"""The demo's network and its LightningModule, which knows nothing of its strategy."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics.classification import MulticlassAccuracy

from lightning_async.holder.amsgrad import AMSGrad

__all__ = ["DigitClassifier", "LeNet5"]


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max-pooling for 28x28 single-channel images; 44,426 parameters for ten classes.

    Args:
        num_classes: size of the output.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16 * 4 * 4, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (batch, 1, 28, 28) to logits of shape (batch, num_classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits


class DigitClassifier(LightningModule):
    """LeNet-5 with AMSGrad, whose step size falls to zero over the run; logs the loss and the accuracy.

    Args:
        lr: step size at the start.
        label_smoothing: share of the training target spread evenly over all classes, from 0 to 1.
    """

    def __init__(self, lr: float = 0.002, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.label_smoothing = label_smoothing
        self.model = LeNet5()
        self.val_accuracy = MulticlassAccuracy(10, average="micro")
        self.test_accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch and log it as `train/loss`."""
        images, labels = batch
        loss = cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add one batch to `val/loss` and `val/acc`."""
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val/loss", cross_entropy(logits, labels), sync_dist=True, batch_size=len(labels))
        self.log("val/acc", self.val_accuracy, prog_bar=True, batch_size=len(labels))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add one batch to `test/acc`."""
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test/acc", self.test_accuracy, batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AMSGrad and its schedule."""
        optimizer = AMSGrad(self.parameters(), lr=self.lr)
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            return optimizer
        return [optimizer], [CosineAnnealingLR(optimizer, T_max=epochs)]
