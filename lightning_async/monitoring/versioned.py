"""JSON files that name their format and its version, and are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Format", "RecordError"]


class RecordError(ValueError):
    """A file that its reader cannot use; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of file.

    Args:
        name: what the files call it.
        version: of what is in them; another version is refused.
        noun: what messages call such a file.
        remedy: how to get a file of this version; a sentence.
    """

    name: str
    version: int
    noun: str
    remedy: str

    def write(self, path: Path, content: Mapping[str, Any], indent: int | None = None) -> None:
        """Writes a file and the folders that it needs; a reader sees the old file or the new one.

        Args:
            path: the file.
            content: its names and values.
            indent: of a file for readers; None for one without line breaks.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        whole = {"format": self.name, "format_version": self.version, **content}
        partial.write_text(json.dumps(whole, indent=indent) + "\n", encoding="utf-8")
        os.replace(partial, path)

    def read(self, path: Path, unnamed: bool = False) -> dict[str, Any]:
        """Reads a file.

        Args:
            path: the file.
            unnamed: whether a file that names no format is read too, as one of this version.

        Returns:
            The content, without the format.

        Raises:
            RecordError: if it is no JSON, or of another format or version.
            OSError: if there is none.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordError(f"{path} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise RecordError(f"{path} is not {self.noun}")
        if unnamed and "format" not in content:
            return content
        if content.pop("format", None) != self.name:
            raise RecordError(f"{path} is not {self.noun} in format version {self.version}. {self.remedy}")
        if (version := content.pop("format_version", None)) != self.version:
            raise RecordError(
                f"{path} has format version {version}; this lightning_async reads {self.version}. {self.remedy}"
            )
        return content
