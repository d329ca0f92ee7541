"""Claims about the recipes' models and the classifier around them."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

import lightning_async
from recipes.classifier import Classifier
from recipes.datasets import SyntheticImagesDataModule, SyntheticSparseDataModule
from recipes.datasets.sparse import SparseRows
from recipes.models import AllCNN, AllCNNC, Factorization, LeNet5, ResNet18, SmallGPT, SparseLinear, WideResNet


@pytest.mark.parametrize(
    ("model", "parameters", "classes"),
    [
        (AllCNN, 1_681_268, 10),
        (AllCNNC, 1_369_738, 10),
        (ResNet18, 11_173_962, 10),
        (WideResNet, 9_450_424, 1000),
    ],
)
def test_an_image_model_has_the_papers_number_of_parameters(
    model: type[nn.Module], parameters: int, classes: int
) -> None:
    net = model()

    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert f"{parameters:,} parameters" in (model.__doc__ or "")
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, classes)


def test_a_character_is_predicted_from_those_before_it_alone() -> None:
    net = SmallGPT(vocabulary=5, block=6, width=8, layers=2, heads=2).eval()
    first, second = torch.tensor([[0, 1, 2, 3, 4, 0]]), torch.tensor([[0, 1, 2, 4, 0, 1]])

    one, other = net(first), net(second)

    assert one.shape == (1, 5, 6)
    assert torch.allclose(one[..., :3], other[..., :3], atol=1e-6)
    assert not torch.allclose(one[..., 3:], other[..., 3:], atol=1e-6)


def test_a_factorization_is_the_product_of_two_vectors_and_two_biases() -> None:
    net = Factorization(users=3, items=4, factors=2)
    nn.init.constant_(net.user_bias.weight, 0.5)

    (logit,) = net(torch.tensor([[2, 1]]))

    assert torch.isclose(logit, net.users.weight[2] @ net.items.weight[1] + 0.5)


@pytest.mark.parametrize("model", [partial(AllCNN, width=8), partial(ResNet18, width=8), partial(WideResNet, 10, 1)])
def test_the_maps_of_an_image_model_are_an_eighth_as_wide_at_the_end(model: Any) -> None:
    net = model().eval()
    sizes: list[int] = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))

    net(torch.zeros(1, 3, 32, 32))

    # AllCNN's unpadded layer takes one pixel off each side; ResNet18 has a fourth stage.
    assert sizes[0] == 32
    assert sizes[-1] == {AllCNN: 6, ResNet18: 4, WideResNet: 8}[type(net)]


def test_a_wide_network_needs_a_depth_of_6n_plus_4() -> None:
    with pytest.raises(ValueError, match="6n \\+ 4"):
        WideResNet(depth=27)


def test_a_residual_network_with_silent_residuals_is_its_shortcuts() -> None:
    net = WideResNet(depth=10, width=1, num_classes=3).eval()
    for stage in net.stages:
        nn.init.zeros_(stage.residual[-1].weight)
    images = torch.randn(2, 3, 32, 32)

    maps = net.stem(images)
    for stage in net.stages:
        maps = maps if stage.shortcut is None else stage.shortcut(torch.relu(stage.norm(maps)))

    assert torch.allclose(net(images), net.head(torch.relu(net.norm(maps)).mean((2, 3))), atol=1e-5)


def test_sparse_linear_is_the_product_with_its_weights_and_so_is_its_gradient() -> None:
    rows = torch.tensor([[0.0, 2.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.5]])
    sparse = SparseRows(
        torch.tensor([1, 3, 0, 3], dtype=torch.int32),
        torch.tensor([2.0, -1.0, 3.0, 0.5]),
        torch.tensor([0, 2, 2], dtype=torch.int32),
    )
    net = SparseLinear(num_features=4, init_std=1.0)
    labels = torch.tensor([1.0, 0.0, 1.0])

    logits = net(sparse)
    binary_cross_entropy_with_logits(logits, labels).backward()

    weight = net.weight.detach().squeeze(1)
    assert torch.allclose(logits, rows @ weight)
    assert net.weight.grad is not None
    expected = rows.T @ (torch.sigmoid(rows @ weight) - labels) / 3
    assert torch.allclose(net.weight.grad.squeeze(1), expected, atol=1e-6)


def test_sparse_linear_has_a_weight_for_each_column_of_rcv1_and_starts_at_zero() -> None:
    net = SparseLinear()

    assert [parameter.numel() for parameter in net.parameters()] == [47_236]
    assert net.weight.abs().max() == 0


# --- the classifier --------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """Returns its input as logits, with a parameter so that there is something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.bias


def logged(module: Classifier, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    loader = DataLoader(TensorDataset(*batch), batch_size=len(batch[0]))
    return {
        **trainer.validate(module, loader, verbose=False)[0],
        **trainer.test(module, loader, verbose=False)[0],
    }


def test_the_binary_task_is_logistic_regression() -> None:
    # All between 0 and 1, where a metric might take logits for probabilities.
    logits, labels = torch.tensor([0.2, 0.4, 0.1, 0.9]), torch.tensor([1, 1, 0, 0])
    module = Classifier(Given(), num_classes=2, task="binary")

    metrics = logged(module, (logits, labels))

    signs = 2 * labels - 1
    assert metrics["val/loss"] == pytest.approx(torch.log1p(torch.exp(-signs * logits)).mean().item())
    assert metrics["val/acc"] == metrics["test/acc"] == 0.5
    assert module.predict_step((torch.tensor([-0.1, 0.1]), labels), 0).tolist() == [0, 1]


def test_top_5_counts_a_class_among_the_five_likeliest() -> None:
    logits = torch.arange(8.0).repeat(4, 1)
    labels = torch.tensor([7, 3, 2, 0])

    metrics = logged(Classifier(Given(), num_classes=8, top_k=5), (logits, labels))

    assert metrics["val/acc_top5"] == metrics["test/acc_top5"] == 0.5
    assert metrics["val/acc"] == metrics["test/acc"] == 0.25


@pytest.mark.parametrize("wrong", [{"num_classes": 10}, {"top_k": 5}, {"label_smoothing": 0.1}])
def test_the_binary_task_refuses_what_is_for_several_classes(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="binary"):
        Classifier(Given(), **({"num_classes": 2, "task": "binary"} | wrong))


def test_coupled_weight_decay_is_an_l2_penalty() -> None:
    torch.manual_seed(0)
    data = SyntheticSparseDataModule(train_samples=64, num_features=30)
    batch = data.load("train").__getitems__(list(range(64)))
    decayed, penalized = (
        Classifier(SparseLinear(30, 0.0), 2, "binary", optimizer=partial(torch.optim.SGD, weight_decay=decay), lr=0.5)
        for decay in (0.1, 0.0)
    )
    for module, factor in ((decayed, 0.0), (penalized, 0.1)):
        module.log = lambda *args, **kwargs: None  # type: ignore[assignment,method-assign]
        optimizer: Any = module.configure_optimizers()
        for _ in range(5):
            optimizer.zero_grad()
            weights = module.model.weight
            (module.training_step(batch, 0) + factor / 2 * (weights**2).sum()).backward()
            optimizer.step()

    assert torch.allclose(decayed.model.weight, penalized.model.weight, atol=1e-6)
    assert decayed.model.weight.abs().max() > 0.01


def test_the_classifier_can_be_sent_to_a_spawned_process() -> None:
    module = pickle.loads(pickle.dumps(Classifier(LeNet5())))

    assert isinstance(module.configure_optimizers(), lightning_async.AMSGrad)


@pytest.mark.parametrize(
    ("net", "data", "task", "expected"),
    [
        (
            partial(SparseLinear, 500),
            partial(SyntheticSparseDataModule, 2000, 500, 500),
            {"num_classes": 2, "task": "binary"},
            0.85,
        ),
        (partial(ResNet18, width=2), partial(SyntheticImagesDataModule, 600, 200, noise=0.2), {}, 0.25),
    ],
)
def test_a_model_learns_its_generated_data(
    net: Any, data: Any, task: dict[str, Any], expected: float, tmp_path: Path
) -> None:
    seed_everything(0)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )

    trainer.fit(Classifier(net(), lr=0.01, **task), datamodule=data(batch_size=32))

    assert trainer.callback_metrics["val/acc"] > expected
