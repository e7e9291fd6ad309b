"""The console page in a browser, with a service that runs.

FLUSHLAB_RECORD=1 writes the picture of the guide anew.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import pytest

from tests.metrics.test_endpoint import query, running_prometheus

_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_PICTURE = "guide/console.png"
_SIZE = (1100, 900)
_SERVICE = ["serve", "main", "--seed", "1", "--metrics"]


@contextmanager
def service() -> Iterator[str]:
    """Run `flushlab serve`; give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "emulator", *_SERVICE, address]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=60)


def screenshot(url: str, path: Path, home: Path) -> None:
    """Let the browser draw the page."""
    assert _BROWSER is not None
    size = ",".join(map(str, _SIZE))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={home}"]
    subprocess.run(
        [_BROWSER, *flags, f"--window-size={size}", f"--screenshot={path}", url],
        capture_output=True,
        timeout=90,
        check=True,
    )


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def figures(page: str) -> int:
    """Return the number of cells with a number."""
    cells = page.split('<td class="n">')[1:]
    return sum(cell[:1].isdigit() for cell in cells)


def dom(url: str) -> str:
    """Return the page as the browser has it."""
    return subprocess.run(
        [_BROWSER or "", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    ).stdout


def shows(page: str, address: str) -> bool:
    """Return whether the page has the instance and its verdict."""
    return f">{address}</a>" in page and "no violation" in page


@pytest.mark.stress
@pytest.mark.prometheus
@pytest.mark.skipif(_BROWSER is None, reason="chromium is not installed (apt-get install chromium)")
def test_a_browser_draws_the_page_of_a_running_service(tmp_path: Path) -> None:
    with service() as address, running_prometheus(tmp_path, address, "2s") as api:
        until = time.monotonic() + 100
        while not query(api, "sum(rate(flushlab_averted_uses_total[1m])) > 0") and time.monotonic() < until:
            time.sleep(0.5)
        url, path = f"{api}/consoles/flushlab.html", tmp_path / "console.png"
        # On a busy machine a scrape may fail, and the page says so for a moment.
        while True:
            text = dom(url)
            screenshot(url, path, tmp_path / "profile")
            if all(shows(page, address) for page in (text, dom(url))) or time.monotonic() > until:
                break
    assert shows(text, address), text
    assert figures(text) >= 20, text
    assert size_of(path.read_bytes()) == _SIZE
    # A page with tables is larger than an empty one, which compresses to a few kilobytes.
    assert path.stat().st_size > 20_000
    if os.environ.get("FLUSHLAB_RECORD"):
        shutil.copy(path, str(resources.files("emulator").joinpath(_PICTURE)))


def test_the_picture_of_the_guide_is_shipped() -> None:
    picture = resources.files("emulator").joinpath(_PICTURE).read_bytes()
    assert size_of(picture) == _SIZE
    page = resources.files("emulator").joinpath("guide/metrics.md").read_text()
    assert "](console.png)" in page
