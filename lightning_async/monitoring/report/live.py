"""The report of a run that goes on, for a browser on this machine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from typing_extensions import override

__all__ = ["LivePage", "LiveServer"]

# The record is written every five seconds.
_REFRESH_S = 5


class LivePage:
    """A page that is made anew when the record behind it has changed, and someone asks.

    Args:
        record: the record's file.
        render: makes the page, which is to refresh itself after the given seconds; a ValueError, RuntimeError or
            OSError says why there is none.
    """

    def __init__(self, record: Path, render: Callable[[int], str]) -> None:
        self._record = record
        self._render = render
        self._lock = threading.Lock()
        self._made_of: tuple[int, int] | None = None
        self._text = ""

    def text(self) -> str:
        """The page of the record as it is now."""
        with self._lock:
            try:
                found = self._record.stat()
                state = (found.st_mtime_ns, found.st_size)
                if state != self._made_of:
                    self._text, self._made_of = self._render(_REFRESH_S), state
            except (ValueError, RuntimeError, OSError) as error:
                # The run may be about to write it.
                self._made_of = None
                return _waiting(str(error))
            return self._text


class LiveServer(ThreadingHTTPServer):
    """Shows a page at ``/``, to this machine only.

    Args:
        page: what to show.
        port: where; 0 for a free port.

    Raises:
        OSError: if the port is taken.
    """

    daemon_threads = True

    def __init__(self, page: LivePage, port: int = 0) -> None:
        self.page = page
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/":
            self.send_error(404)
            return
        body = self.server.page.text().encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    @override
    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line for every refresh would bury the address."""


def _waiting(reason: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{_REFRESH_S}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>No report yet</title></head>
<body><p>No report yet: {escape(reason)}.</p></body></html>
"""
