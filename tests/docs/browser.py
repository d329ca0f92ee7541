"""Loads every page of the built documentation in a real browser, on a desk and on a phone.

    mkdocs build && python -m tests.docs.browser site        # or: make docs-check

It fails where a page has something that is wider than its column, a broken link or image, a formula that is not
rendered, or a need for the network. Closed details are opened first. At 1280 px nothing may scroll sideways; at 390 px
only code may, in a box of its own. Links to other sites are not followed.

`measure.html` shows the pages in a frame of exactly the width (Chromium's window cannot be so narrow) and sends back
what it finds. Nothing is needed but Chromium or Chrome.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["WIDTHS", "Finding", "NoBrowserError", "check_site", "find_browser", "main"]

WIDTHS = (1280, 390)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_MEASURE = Path(__file__).with_name("measure.html")
_DEADLINE_S, _POLL_S = 300.0, 0.5
_USAGE_ERROR = 2


class NoBrowserError(RuntimeError):
    """There is no Chromium."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with a page.

    Args:
        page: the page's address.
        width: the width at which it is wrong, in pixels; None where the width does not matter.
        problem: what is wrong.
    """

    page: str
    width: int | None
    problem: str

    def __str__(self) -> str:
        return f"{self.page}{f' at {self.width} px' if self.width else ''}: {self.problem}"


def find_browser() -> str:
    """The command of Chromium: what the environment variable CHROMIUM names, or the first of the usual names.

    Raises:
        NoBrowserError: if there is none; says what to install.
    """
    named = os.environ.get("CHROMIUM")
    for name in (named,) if named else _NAMES:
        found = shutil.which(name)
        if found:
            return found
    raise NoBrowserError(
        f"no browser to check the pages with: there is no {named or ', '.join(_NAMES)}. Install Chromium (Debian and "
        "Ubuntu: apt-get install chromium) or Chrome, or name its program in the environment variable CHROMIUM"
    )


def check_site(site: Path, widths: Sequence[int] = WIDTHS, deadline_s: float = _DEADLINE_S) -> list[Finding]:
    """What is wrong with the pages of a site.

    Args:
        site: the folder that mkdocs has built.
        widths: the widths to show each page at, in pixels.
        deadline_s: how long the browser may take for all of it.

    Raises:
        NoBrowserError: if there is no Chromium, or if it ends at once.
        TimeoutError: if the browser has not finished by then.
        FileNotFoundError: if the site has no page.
    """
    browser = find_browser()
    # 404.html is written for the root of a server.
    pages = sorted(f"/{page.relative_to(site).as_posix()}" for page in site.rglob("*.html") if page.name != "404.html")
    if not pages:
        raise FileNotFoundError(f"{site} has no page: run `mkdocs build` first")
    plan = json.dumps({"pages": pages, "widths": list(widths)}).encode()
    answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    handler = functools.partial(_Handler, plan, answers, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, _profile() as profile:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/_measure/"
        process = subprocess.Popen(
            [
                browser,
                "--headless",
                "--no-sandbox",  # the pages are this project's own, and root has no sandbox
                "--disable-gpu",
                "--hide-scrollbars",  # as on a phone
                "--disable-dev-shm-usage",
                f"--user-data-dir={profile}",
                f"--window-size={max(widths)},900",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                "--remote-debugging-port=0",  # without it, or --dump-dom, a headless browser ends at once
                address,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            answer = _wait(answers, process, deadline_s)
        finally:
            _end(process)
            server.shutdown()
    return [Finding(**finding) for finding in json.loads(answer)]


def _wait(answers: queue.SimpleQueue[bytes], process: subprocess.Popen[bytes], deadline_s: float) -> bytes:
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            return answers.get(timeout=_POLL_S)
        if process.poll() is not None:
            raise NoBrowserError(f"the browser ended with code {process.returncode} before it had shown the pages")
    raise TimeoutError(f"the browser has not shown all pages within {deadline_s:.0f} s")


def _profile() -> tempfile.TemporaryDirectory[str]:
    # What the browser still writes while it ends is no reason to fail.
    return tempfile.TemporaryDirectory(prefix="docs-check-", ignore_cleanup_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    # And what it has started.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the site, the measuring page and its plan; takes what it has found."""

    def __init__(self, plan: bytes, answers: queue.SimpleQueue[bytes], *args: object, directory: str) -> None:
        self._plan, self._answers = plan, answers
        super().__init__(*args, directory=directory)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        if self.path == "/_measure/":
            self._reply(_MEASURE.read_bytes(), "text/html")
        elif self.path == "/_measure/plan":
            self._reply(self._plan, "application/json")
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self._answers.put(self.rfile.read(int(self.headers["Content-Length"])))
        self._reply(b"", "text/plain")

    def _reply(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing of each request."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 if something is wrong with a page, 2 if nothing could be checked."""
    parser = argparse.ArgumentParser(prog="python -m tests.docs.browser", description=__doc__.split("\n")[0])
    parser.add_argument("site", type=Path, help="the folder that mkdocs has built")
    try:
        findings = check_site(parser.parse_args(arguments).site)
    except (NoBrowserError, FileNotFoundError, TimeoutError) as error:
        print(error, file=sys.stderr)
        return _USAGE_ERROR
    for finding in findings:
        print(finding)
    print(f"{len(findings)} faults" if findings else "every page fits its column, and every link leads somewhere")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
