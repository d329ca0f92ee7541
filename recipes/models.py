"""Models of the recipes: those of the paper's experiments, a small language model and a factorization."""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, relu

from lightning_async.cli.demo.model import LeNet5
from recipes.datasets.sparse import SparseRows

__all__ = ["AllCNN", "AllCNNC", "Factorization", "LeNet5", "ResNet18", "SmallGPT", "SparseLinear", "WideResNet"]


class SparseLinear(nn.Module):
    """One weight for each feature of sparse rows and no bias: logistic regression's logit.

    Args:
        num_features: number of columns; 47,236 for rcv1.
        init_std: standard deviation of the weights at the start; 0 starts from zero, 1 is the paper's.
    """

    def __init__(self, num_features: int = 47_236, init_std: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_features, 1) * init_std)

    def forward(self, rows: SparseRows) -> Tensor:
        """Map a batch of sparse rows to logits of shape (batch,)."""
        weights = rows.values.to(self.weight.dtype)
        logits = embedding_bag(rows.columns, self.weight, rows.starts, mode="sum", per_sample_weights=weights)
        return logits.squeeze(1)


class Factorization(nn.Module):
    """A factorization of ratings: the product of a user's and an item's vector, and a bias of each.

    Args:
        users: number of users.
        items: number of items.
        factors: length of a vector.
    """

    def __init__(self, users: int = 2_000, items: int = 1_000, factors: int = 8) -> None:
        super().__init__()
        self.users = nn.Embedding(users, factors)
        self.items = nn.Embedding(items, factors)
        self.user_bias = nn.Embedding(users, 1)
        self.item_bias = nn.Embedding(items, 1)
        for vectors in (self.users, self.items):
            nn.init.normal_(vectors.weight, std=0.1)
        for bias in (self.user_bias, self.item_bias):
            nn.init.zeros_(bias.weight)

    def forward(self, pairs: Tensor) -> Tensor:
        """Map pairs of a user and an item, shape (batch, 2), to logits of shape (batch,)."""
        users, items = pairs.unbind(1)
        both = (self.users(users) * self.items(items)).sum(1)
        logits: Tensor = both + self.user_bias(users).squeeze(1) + self.item_bias(items).squeeze(1)
        return logits


class SmallGPT(nn.Module):
    """A decoder that predicts each next character; 0.8 million parameters with four layers of width 128.

    Layers normalize first, as GPT-2's do; the output shares no weights with the input.

    Args:
        vocabulary: number of characters.
        block: the most characters that it sees at once.
        width: of a character's vector.
        layers: number of layers.
        heads: of each layer's attention.
    """

    def __init__(
        self, vocabulary: int = 96, block: int = 64, width: int = 128, layers: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(block, width)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        # The layers are copies of one: each gets values of its own.
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.logits = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.logits.weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        """Map characters of shape (batch, length) to logits of shape (batch, vocabulary, length)."""
        length = characters.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=characters.device)
        places = torch.arange(length, device=characters.device)
        hidden = self.layers(self.characters(characters) + self.places(places), mask, is_causal=True)
        logits: Tensor = self.logits(hidden)
        return logits.transpose(1, 2)


class AllCNN(nn.Module):
    """AllCNN as the paper's reference code has it, for 32x32 colour images; 1,681,268 parameters for ten classes.

    Nine 3x3 convolutions without bias, each followed by batch normalization and ReLU. The third and the sixth have
    stride 2, the seventh has no padding. The averages over the last maps, times 0.125, are the logits.

    Args:
        num_classes: size of the output.
        width: maps of the first three layers; the next five have twice as many.
    """

    LOGIT_SCALE = 0.125

    def __init__(self, num_classes: int = 10, width: int = 96) -> None:
        super().__init__()
        wide = 2 * width
        layers: list[nn.Module] = []
        maps = 3
        # (maps, stride, padding) of each convolution
        for out_maps, stride, padding in (
            (width, 1, 1),
            (width, 1, 1),
            (width, 2, 1),
            (wide, 1, 1),
            (wide, 1, 1),
            (wide, 2, 1),
            (wide, 1, 0),
            (wide, 1, 1),
            (num_classes, 1, 1),
        ):
            layers += [
                nn.Conv2d(maps, out_maps, kernel_size=3, stride=stride, padding=padding, bias=False),
                nn.BatchNorm2d(out_maps),
                nn.ReLU(),
            ]
            maps = out_maps
        self.features = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (batch, 3, 32, 32) to logits of shape (batch, num_classes)."""
        maps: Tensor = self.features(images)
        return self.LOGIT_SCALE * maps.mean(dim=(2, 3))


class AllCNNC(nn.Module):
    """All-CNN-C of Springenberg et al. with dropout, for 32x32 colour images; 1,369,738 parameters for ten classes.

    Nine convolutions with bias and ReLU and without batch normalization; the last two are 1x1.

    Args:
        num_classes: size of the output.
        width: maps of the first three layers; the next five have twice as many.
        dropout: probability with which a value is dropped after each of the two layers of stride 2.
        input_dropout: probability with which an input value is dropped.
    """

    def __init__(
        self, num_classes: int = 10, width: int = 96, dropout: float = 0.5, input_dropout: float = 0.2
    ) -> None:
        super().__init__()
        wide = 2 * width
        layers: list[nn.Module] = [nn.Dropout(input_dropout)]
        maps = 3
        # (maps, kernel, stride, padding) of each convolution
        for out_maps, kernel, stride, padding in (
            (width, 3, 1, 1),
            (width, 3, 1, 1),
            (width, 3, 2, 1),
            (wide, 3, 1, 1),
            (wide, 3, 1, 1),
            (wide, 3, 2, 1),
            (wide, 3, 1, 0),
            (wide, 1, 1, 0),
            (num_classes, 1, 1, 0),
        ):
            layers += [nn.Conv2d(maps, out_maps, kernel_size=kernel, stride=stride, padding=padding), nn.ReLU()]
            if stride == 2:
                layers.append(nn.Dropout(dropout))
            maps = out_maps
        self.features = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (batch, 3, 32, 32) to logits of shape (batch, num_classes)."""
        maps: Tensor = self.features(images)
        return maps.mean(dim=(2, 3))


class ResNet18(nn.Module):
    """ResNet-18 in its form for 32x32 colour images: 3x3 stem, no pooling; 11,173,962 parameters for ten classes.

    Args:
        num_classes: size of the output.
        width: maps of the first stage; they double in each of the three others.
    """

    def __init__(self, num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages: list[nn.Module] = []
        maps = width
        for stage, stride in enumerate((1, 2, 2, 2)):
            out_maps = width * 2**stage
            stages += [_BasicBlock(maps, out_maps, stride), _BasicBlock(out_maps, out_maps, 1)]
            maps = out_maps
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(maps, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (batch, 3, 32, 32) to logits of shape (batch, num_classes)."""
        maps: Tensor = self.stages(self.stem(images))
        logits: Tensor = self.head(maps.mean(dim=(2, 3)))
        return logits


class WideResNet(nn.Module):
    """Wide residual network with pre-activation for 32x32 colour images.

    WRN-28-5 with 1,000 classes, the default, has 9,450,424 parameters.

    Args:
        depth: number of convolutions on the way from input to output, plus one; 6n + 4.
        width: how many times wider than the plain network.
        num_classes: size of the output.

    Raises:
        ValueError: if `depth` is not 6n + 4.
    """

    def __init__(self, depth: int = 28, width: int = 5, num_classes: int = 1000) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"a wide residual network has a depth of 6n + 4 (10, 16, 22, 28, ...), got {depth}")
        self.stem = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        stages: list[nn.Module] = []
        maps = 16
        for out_maps, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for block in range(blocks):
                stages.append(_PreActivationBlock(maps, out_maps, stride if block == 0 else 1))
                maps = out_maps
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(maps)
        self.head = nn.Linear(maps, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (batch, 3, 32, 32) to logits of shape (batch, num_classes)."""
        maps = relu(self.norm(self.stages(self.stem(images))))
        logits: Tensor = self.head(maps.mean(dim=(2, 3)))
        return logits


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions, each normalized, beside a shortcut; ReLU after their sum."""

    def __init__(self, maps: int, out_maps: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(maps, out_maps, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_maps),
            nn.ReLU(),
            nn.Conv2d(out_maps, out_maps, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_maps),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or maps != out_maps:
            self.shortcut = nn.Sequential(
                nn.Conv2d(maps, out_maps, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(out_maps)
            )

    def forward(self, maps: Tensor) -> Tensor:
        return relu(self.residual(maps) + self.shortcut(maps))


class _PreActivationBlock(nn.Module):
    """Normalization and ReLU before each of two 3x3 convolutions.

    Where the number of maps changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, maps: int, out_maps: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(maps)
        self.residual = nn.Sequential(
            nn.Conv2d(maps, out_maps, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_maps),
            nn.ReLU(),
            nn.Conv2d(out_maps, out_maps, kernel_size=3, padding=1, bias=False),
        )
        self.shortcut: nn.Module | None = None
        if maps != out_maps:
            self.shortcut = nn.Conv2d(maps, out_maps, kernel_size=1, stride=stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        active = relu(self.norm(maps))
        kept: Tensor = maps if self.shortcut is None else self.shortcut(active)
        residual: Tensor = self.residual(active)
        return kept + residual
