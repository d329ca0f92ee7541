"""Digits that are drawn: a data set for where there is none, about as hard as handwritten ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

__all__ = ["affine", "draw_digits", "random_affine"]

# Two ways to write each digit, in cells of 5 by 7.
_FONTS = (
    """
    .###. ..#.. .###. .###. ...#. ##### .###. ##### .###. .###.
    #...# .##.. #...# #...# ..##. #.... #.... ....# #...# #...#
    #...# ..#.. ....# ....# .#.#. ####. ####. ...#. #...# #...#
    #...# ..#.. ...#. ..##. #..#. ....# #...# ..#.. .###. .####
    #...# ..#.. ..#.. ....# ##### ....# #...# ..#.. #...# ....#
    #...# ..#.. .#... #...# ...#. #...# #...# ..#.. #...# ....#
    .###. .###. ##### .###. ...#. .###. .###. ..#.. .###. .###.
    """,
    """
    .##.. ...#. ####. ##### #...# ##### ...#. ##### .##.. .###.
    #..#. ..##. ....# ...#. #...# #.... ..#.. #...# #..#. #...#
    #..#. .#.#. ....# ..#.. #...# #.... .#... ...#. #..#. #...#
    #..#. ...#. ..##. .###. ##### ####. ####. .#### .##.. .####
    #..#. ...#. .#... ....# ....# ....# #...# ..#.. #..#. ...#.
    #..#. ...#. #.... ....# ....# ....# #...# ..#.. #..#. ..#..
    .##.. ...#. ##### ####. ....# ####. .###. .#... .##.. .#...
    """,
)
_SIDE = 28


def affine(images: Tensor, angles: Tensor, scales: Tensor, shifts: Tensor) -> Tensor:
    """Rotates, scales and shifts images, each by its own amount.

    Args:
        images: shape (batch, channels, height, width).
        angles: radians, shape (batch,).
        scales: of the grid that reads the image, shape (batch,): above 1 the image becomes smaller.
        shifts: in halves of the image's side, shape (2, batch).

    Returns:
        Images of the same shape; what moves in from outside is zero.
    """
    cosines, sines = torch.cos(angles) * scales, torch.sin(angles) * scales
    rows = (torch.stack([cosines, -sines, shifts[0]], dim=1), torch.stack([sines, cosines, shifts[1]], dim=1))
    grid = affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def random_affine(images: Tensor, angle_rad: float = 0.15, scale: float = 0.1, shift: float = 0.1) -> Tensor:
    """Rotate, scale and shift each image by its own random amount.

    Args:
        images: shape (batch, channels, height, width).
        angle_rad: largest rotation, in radians, either way.
        scale: largest relative change of size, either way.
        shift: largest shift, either way, as a part of half the image's side.

    Returns:
        Images of the same shape; what moves in from outside is zero.

    Examples:
        >>> random_affine(torch.ones(2, 1, 28, 28)).shape
        torch.Size([2, 1, 28, 28])
    """
    draws = torch.rand(4, len(images), device=images.device, dtype=images.dtype) * 2 - 1
    return affine(images, draws[0] * angle_rad, 1 + draws[1] * scale, draws[2:] * shift)


def draw_digits(labels: Tensor, seed: int) -> Tensor:
    """Draws a digit for each label: one of two glyphs, turned, moved, thinner or thicker, with smears and noise.

    Args:
        labels: the digits, shape (samples,).
        seed: fixes the images.

    Returns:
        Images of shape (samples, 1, 28, 28) with values in [0, 1].

    Examples:
        >>> draw_digits(torch.tensor([3, 1, 4]), seed=0).shape
        torch.Size([3, 1, 28, 28])
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, count, generator=generator)

    # 1. The glyph in the middle of the image, with soft edges.
    glyphs = torch.stack([_glyphs(font) for font in _FONTS])
    fonts = torch.randint(len(_FONTS), (count,), generator=generator)
    images = torch.zeros(count, 1, _SIDE, _SIDE)
    images[:, :, 4:24, 6:22] = interpolate(glyphs[fonts, labels].unsqueeze(1), (20, 16), mode="bilinear")
    # 2. Turned, scaled, moved.
    images = affine(images, uniform(-0.35, 0.35), uniform(0.85, 1.3), uniform(-0.2, 0.2, 2))
    # 3. Thinner or thicker: where the soft edge is cut.
    cut = uniform(0.3, 0.65).view(-1, 1, 1, 1)
    images = torch.sigmoid((images - cut) * 9) * uniform(0.6, 1.0).view(-1, 1, 1, 1)
    # 4. Smears as wide as a stroke, and noise.
    smears = torch.rand(count, 1, 7, 7, generator=generator)
    images = images + 0.55 * (interpolate(smears, (_SIDE, _SIDE), mode="bilinear") - 0.5)
    images = images + 0.15 * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1)


def _glyphs(font: str) -> Tensor:
    """The ten glyphs of a font, shape (10, 7, 5)."""
    rows = [line.split() for line in font.split("\n") if line.strip()]
    return torch.tensor([[[float(cell == "#") for cell in row[digit]] for row in rows] for digit in range(10)])
