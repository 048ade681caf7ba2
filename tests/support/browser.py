"""A Chromium that is already installed, driven over its DevTools protocol by a websocket."""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find() -> str | None:
    """The command of an installed browser."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab."""

    def __init__(self, socket):
        self._socket, self._numbers, self.messages = socket, itertools.count(1), []

    def send(self, method: str, **parameters):
        """A command's result; events that come before it are kept in `messages`."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            reply = json.loads(self._socket.recv(timeout=30))
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return reply["result"]
            self.messages.append(reply)

    def run(self, script: str):
        """The value of an expression, promises awaited."""
        result = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str, seconds: float = 60):
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def key(self, key: str, text: str = ""):
        """Presses a key."""
        for kind in ("keyDown", "keyUp"):
            code = {"Enter": 13}.get(key, 0)
            self.send("Input.dispatchKeyEvent", type=kind, key=key, text=text, windowsVirtualKeyCode=code)

    def type(self, text: str):
        """Writes into what has the focus."""
        self.send("Input.insertText", text=text)

    def size(self, width: int, height: int):
        """The window."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def dark(self, dark: bool):
        """The colour scheme."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path):
        """A PNG of the window."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def open_page(url: str, folder: Path) -> Iterator[Page]:
    """A tab of a new headless browser that shows `url`."""
    browser = subprocess.Popen(
        [find(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--remote-debugging-port=0", f"--user-data-dir={folder}", url],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        port, end = folder / "DevToolsActivePort", time.monotonic() + 60
        while not (port.exists() and port.read_text()):
            assert browser.poll() is None and time.monotonic() < end, "the browser didn't start"
            time.sleep(0.1)
        tabs = httpx.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json", timeout=30).json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with connect(address, max_size=None) as socket:
            page = Page(socket)
            for domain in ("Runtime", "Log", "Network", "Page"):
                page.send(f"{domain}.enable")
            page.send("Page.navigate", url=url)
            yield page
    finally:
        browser.terminate()
        browser.wait(30)
