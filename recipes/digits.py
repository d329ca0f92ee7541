"""Handwritten digits that need no download: scikit-learn's bundled set, as `lightning-async demo` has it."""

from lightning_async.cli.demo.digits import EVALUATION_SAMPLES, DigitsDataModule
from lightning_async.cli.demo.glyphs import random_affine

__all__ = ["EVALUATION_SAMPLES", "DigitsDataModule", "random_affine"]
