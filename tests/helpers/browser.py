"""A headless Chromium, spoken to by its DevTools protocol over two pipes: https://chromedevtools.github.io."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--no-first-run"),
)


def browser() -> str:
    """A Chromium; tests that need one fail without it, so that nobody takes their silence for success."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and "VISPROMPT_NO_BROWSER" in os.environ:
        pytest.skip("VISPROMPT_NO_BROWSER is set")
    assert found, (
        "no Chromium: install it (on Debian and Ubuntu: apt-get install chromium) or set "
        "VISPROMPT_NO_BROWSER=1"
    )
    return found


class Tab:
    """A page in the browser."""

    def __init__(self, to: Any, back: Any) -> None:
        self._to, self._back = to, back
        self._number, self._session = 0, ""
        self.logged: list[str] = []  # what the page wrote to the console, and what its policy blocked
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """Sends a command and returns its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": given}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            heard = self._hear()
            if heard.get("id") == self._number:
                assert "error" not in heard, (method, heard)
                return heard["result"]

    def _hear(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self._back.read(1)) != b"\0":
            assert byte, "the browser has ended"
            content += byte
        heard = json.loads(content)
        about = heard.get("params", {})
        if heard.get("method") == "Runtime.consoleAPICalled":
            self.logged.append(" ".join(str(each.get("value")) for each in about["args"]))
        elif heard.get("method") == "Runtime.exceptionThrown":
            self.logged.append(json.dumps(about["exceptionDetails"]))
        elif heard.get("method") == "Log.entryAdded":
            self.logged.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
        return heard

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Opens an address on a screen of a size, in light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """The value of an expression, a promise's included."""
        given = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", **given)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 60) -> None:
        """Waits until an expression is true, with a deadline."""
        end = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < end, f"not true after {seconds} seconds: {expression}"
            time.sleep(0.05)

    def choose(self, selector: str, *files: Path) -> None:
        """Chooses files in an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def press(self, key: str) -> None:
        """Presses Tab, Enter or the space bar."""
        code, text = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " ")}[key]
        about = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def shot(self, file: Path, whole: bool = True) -> Path:
        """Writes a picture of the page as a PNG."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(taken["data"]))
        return file


@contextmanager
def tab() -> Iterator[Tab]:
    """Starts a browser with one page, and ends it."""
    (read, to), (back, write) = os.pipe(), os.pipe()
    # the browser reads from 3 and writes to 4: copies with large numbers cannot be either
    read_there, write_there = (fcntl.fcntl(each, fcntl.F_DUPFD, 100) for each in (read, write))
    os.close(read)
    os.close(write)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser(), *OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        redirect = f'exec "$@" 3<&{read_there} 4>&{write_there}'
        process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", *command],
            pass_fds=(read_there, write_there),
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        try:
            with os.fdopen(to, "wb") as sender, os.fdopen(back, "rb") as receiver:
                page = Tab(sender, receiver)
                yield page
                page._session = ""
                page.call("Browser.close")
        finally:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
