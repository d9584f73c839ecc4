"""A page in headless Chromium, driven over its debugging pipe; no other package is needed."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
OPTIONS = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"


class Tab:
    """One page: its size, scripts run in it, keys pressed, what a screen reader reads out."""

    def __init__(self, reads: int, writes: int, url: str) -> None:
        self.reads, self.writes, self.rest, self.count = reads, writes, b"", 0
        self.complaints: list[str] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        until = time.monotonic() + 60
        while self.run("document.readyState + location.href") != f"complete{url}":
            assert time.monotonic() < until, "the page does not load"
            time.sleep(0.05)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the browser and wait for its answer; complaints on the way are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self.count:
                assert "error" not in told, told["error"]
                return told["result"]
            if told.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown") or (
                told.get("method") == "Runtime.consoleAPICalled"
            ):
                self.complaints.append(json.dumps(told["params"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.reads, 1 << 16)
            assert part, "the browser has gone"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def run(self, script: str) -> Any:
        """The value of an expression."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get(
            "value"
        )

    def resize(self, width: int, dark: bool = False) -> None:
        """A window of this width, in the light or dark setting."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """The whole page at the present size, as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def press_tab(self) -> str:
        """Press Tab; a selector-like word for what has the focus then."""
        key = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **key)
        return self.run("document.activeElement.tagName + '.' + document.activeElement.className")

    def spoken(self) -> list[tuple[str, str]]:
        """Role and name of everything in the accessibility tree."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]


@contextmanager
def opened(page: Path, profile: Path) -> Iterator[Tab]:
    """The page in a browser of its own, which ends with the block."""
    there, here = os.pipe(), os.pipe()
    command = f'exec "{CHROMIUM}" {OPTIONS} --user-data-dir="{profile}" --remote-debugging-pipe'
    process = subprocess.Popen(
        ["bash", "-c", f"{command} 3<&{there[0]} 4>&{here[1]}"],
        pass_fds=(there[0], here[1]),
        stderr=subprocess.DEVNULL,
    )
    os.close(there[0])
    os.close(here[1])
    try:
        yield Tab(here[0], there[1], page.as_uri())
    finally:
        process.terminate()
        process.wait(20)
        os.close(there[1])
        os.close(here[0])
