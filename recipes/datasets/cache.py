"""Image sets that are slow to decode or too large for every rank's memory: decoded once, then mapped into memory."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from recipes.datasets.images import ImageSet

__all__ = ["Chunk", "cached_images", "fingerprint"]

# Images, dtype uint8, shape (samples, channels, height, width), and their labels, dtype int64.
Chunk = tuple["np.ndarray[Any, np.dtype[np.uint8]]", "np.ndarray[Any, np.dtype[np.int64]]"]

FORMAT = 1


def fingerprint(paths: Sequence[Path]) -> str:
    """Return a value that changes with any file's path, size or time of change.

    Args:
        paths: the files.
    """
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def cached_images(
    folder: Path, name: str, source: str, shape: Sequence[int], decode: Callable[[], Iterable[Chunk]]
) -> ImageSet:
    """Return images from a cache, which is written first if there is none of the same source.

    The pages of the file are shared by all processes that map it, and read when they are needed.

    Args:
        folder: where the cache is; created if missing.
        name: name of the cached part.
        source: fingerprint of what the images are decoded from.
        shape: channels, height and width.
        decode: decodes the images, chunk by chunk.

    Raises:
        OSError: if the folder cannot be written.
    """
    about = folder / f"{name}.json"
    images, labels = folder / f"{name}.images", folder / f"{name}.labels"
    expected = {"format": FORMAT, "source": source, "shape": list(shape)}
    if not _is_current(about, images, labels, expected):
        rank_zero_info(f"decoding the {name} images into {folder}, once")
        _write(about, images, labels, expected, decode())
    samples = labels.stat().st_size // 8
    # Copy on write: torch wants memory that can be written, and the file stays as it is.
    pixels = np.memmap(images, dtype=np.uint8, mode="c", shape=(samples, *shape))
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(np.fromfile(labels, dtype=np.int64)))


def _is_current(about: Path, images: Path, labels: Path, expected: dict[str, Any]) -> bool:
    try:
        known = json.loads(about.read_text())
        sizes = {"image_bytes": images.stat().st_size, "label_bytes": labels.stat().st_size}
    except (OSError, ValueError):
        return False
    return bool(known == expected | sizes)


def _write(about: Path, images: Path, labels: Path, expected: dict[str, Any], chunks: Iterable[Chunk]) -> None:
    folder = about.parent
    folder.mkdir(parents=True, exist_ok=True)
    # What is there of an older source must not be believed while it is being replaced.
    about.unlink(missing_ok=True)
    parts = [folder / f"{path.name}.{os.getpid()}.part" for path in (images, labels, about)]
    try:
        with parts[0].open("wb") as image_file, parts[1].open("wb") as label_file:
            for pixels, classes in chunks:
                image_file.write(np.ascontiguousarray(pixels).data)
                label_file.write(np.ascontiguousarray(classes).data)
        sizes = {"image_bytes": parts[0].stat().st_size, "label_bytes": parts[1].stat().st_size}
        parts[2].write_text(json.dumps(expected | sizes))
        for part, path in zip(parts, (images, labels, about), strict=True):
            part.replace(path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
