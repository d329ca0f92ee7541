"""How checkpoints come to the disk: as whole files.

Lightning writes one into the folder of temporary files first. Where that is on another file system it copies it from
there to its place: a process that is killed meanwhile, or a full disk, leaves a part of a checkpoint under its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lightning_async.runtime.whole_file import WholeFile

__all__ = ["WholeFileIO"]


class WholeFileIO(TorchCheckpointIO):
    """Lightning's, but a file of this host's file systems is written beside its place and renamed."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        system, where = fsspec.core.url_to_fs(str(path))
        if storage_options is not None or not isinstance(system, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = WholeFile(Path(where))
        file.remove_leftovers()
        try:
            file.write(checkpoint)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}; the checkpoint was not saved, and a file of that name that was there before is as "
                "it was",
                where,
            ) from error
