"""A page in headless Chromium, driven from Python: opened, asked, hovered, keyed, photographed. Needs no package.

    with Browser() as browser:
        page = browser.open(Path("report.html"))
        page.value("document.title"); page.hover("canvas"); page.key("ArrowDown"); page.screenshot(Path("report.png"))

Chromium is told what to do by JSON through two pipes (its DevTools protocol with --remote-debugging-pipe). The program is
/usr/bin/chromium, or what the environment variable CHROMIUM names.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

PROGRAM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
_SWITCHES = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--remote-debugging-pipe",
        "--disable-dev-shm-usage",
    ),
    *("--disable-features=IsolateSandboxedIframes",),  # so that frames can be looked into from here
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--force-device-scale-factor=1", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost"),
)
_KEYS = {  # name -> Windows's code
    **{"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36},
    **{"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40},
}


class Browser:
    """Chromium with a profile of its own, which ends with the ``with`` block.

    Args:
        patience: Seconds that one answer may take.
    """

    def __init__(self, patience: float = 60.0) -> None:
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        told, self._write = os.pipe()
        self._read, answers = os.pipe()
        command = f'exec "$0" "$@" 3<&{told} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, PROGRAM, *_SWITCHES, f"--user-data-dir={self._profile}", "about:blank"],
            pass_fds=(told, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(told)
        os.close(answers)
        self._patience, self._buffer, self._last = patience, b"", 0
        self.events: list[dict[str, object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The id of its first process, which starts the others."""
        return self._process.pid

    def close(self) -> None:
        """Ends the browser and removes its profile."""
        try:
            self.send("Browser.close")
            self._process.wait(10)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method: str, session: str | None = None, **parameters: object) -> dict[str, object]:
        """Asks for something and waits for the answer; events that come meanwhile are kept.

        Raises:
            RuntimeError: The browser said no, ended, or gave no answer in time.
        """
        self._last += 1
        asked = self._last
        message = {"id": asked, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + self._patience
        while True:
            answer = self._next(until, method)
            if answer.get("id") != asked:
                self.events.append(answer)
                continue
            if "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            return answer["result"]  # type: ignore[return-value]

    def wait_for(self, method: str, session: str) -> dict[str, object]:
        """The next event of a name, of those kept or to come."""
        until = time.monotonic() + self._patience
        while True:
            for at, event in enumerate(self.events):
                if event.get("method") == method and event.get("sessionId") == session:
                    return self.events.pop(at)
            self.events.append(self._next(until, method))

    def _next(self, until: float, what: str) -> dict[str, object]:
        """The next message of the browser."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            part = os.read(self._read, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError(f"{PROGRAM}: no answer to {what} in {self._patience:.0f} s, or it ended.")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, object] = json.loads(message)
        return found

    def open(self, page: Path | str, *, width: int = 1200, height: int = 900, dark: bool = False) -> Page:
        """Opens a file or an address, and waits until it is loaded.

        Args:
            page: The file, or an address.
            width: Of the window, in pixels.
            height: Of the window.
            dark: Whether the reader prefers dark pages.
        """
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        found = Page(self, str(session), str(target))
        for domain in ("Page", "Runtime", "Log", "Network"):
            found.send(f"{domain}.enable")
        found.size(width, height)
        found.prefer(dark)
        found.go(page)
        return found


class Page:
    """One page of a browser."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def send(self, method: str, **parameters: object) -> dict[str, object]:
        """A command of the protocol."""
        return self._browser.send(method, self._session, **parameters)

    def go(self, page: Path | str) -> None:
        """Loads a file or an address."""
        address = page.resolve().as_uri() if isinstance(page, Path) else page
        self.send("Page.navigate", url=address)
        self._browser.wait_for("Page.loadEventFired", self._session)

    def close(self) -> None:
        """Closes it."""
        self._browser.send("Target.closeTarget", targetId=self._target)

    def size(self, width: int, height: int) -> None:
        """Makes the window so large."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, dark: bool) -> None:
        """Says whether the reader prefers dark pages."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def value(self, expression: str) -> object:
        """What a JavaScript expression gives, as JSON; a promise is waited for.

        Raises:
            RuntimeError: It threw.
        """
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression[:200]}: {json.dumps(answer['exceptionDetails'])[:2000]}")
        return answer["result"].get("value")  # type: ignore[attr-defined]

    Inside = Callable[[str], object]

    def frames(self) -> list[Inside]:
        """A function for each frame in the page, also inside others, in order, that gives what an expression is in it."""
        found: list[Callable[[str], object]] = []
        waiting = list(self.send("Page.getFrameTree")["frameTree"].get("childFrames", []))  # type: ignore[attr-defined]
        while waiting:
            child = waiting.pop(0)
            waiting = [*child.get("childFrames", []), *waiting]
            world = self.send("Page.createIsolatedWorld", frameId=child["frame"]["id"], worldName="look")
            found.append(functools.partial(self._inside, world["executionContextId"]))
        return found

    def _inside(self, world: object, expression: str) -> object:
        """What an expression gives in a frame."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, contextId=world)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression[:200]}: {json.dumps(answer['exceptionDetails'])[:2000]}")
        return answer["result"].get("value")  # type: ignore[attr-defined]

    def until(self, expression: str, seconds: float = 30.0) -> object:
        """Waits until an expression is true, and gives its value.

        Raises:
            TimeoutError: It never was.
        """
        end = time.monotonic() + seconds
        while not (found := self.value(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"not in {seconds:.0f} s: {expression}")
            time.sleep(0.05)
        return found

    def hover(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Moves the mouse onto an element, at a share of its width and height."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **self._at(selector, x, y))

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Clicks an element."""
        at = self._at(selector, x, y)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **at)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def _at(self, selector: str, x: float, y: float) -> dict[str, float]:
        """A place in an element, which is scrolled into the window."""
        named = json.dumps(selector)
        box = self.value(
            f"(() => {{ const e = document.querySelector({named}); e.scrollIntoView({{block: 'center', inline: 'center'}}); "
            "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
        )
        left, top, width, height = box  # type: ignore[misc]
        return {"x": left + x * width, "y": top + y * height}

    def key(self, name: str) -> None:
        """Presses a key: "Tab", "ArrowDown", "Enter"."""
        text = {"Enter": "\r", " ": " "}.get(name, "")
        pressed = {"key": name, "code": "Space" if name == " " else name, "windowsVirtualKeyCode": _KEYS[name]}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **pressed)
        self.send("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def choose(self, label: str, value: object) -> None:
        """Sets the select or range whose label begins with a text, as a reader would."""
        done = self.value(
            f"""(() => {{
              const labels = [...document.querySelectorAll("label")];
              const label = labels.find((each) => each.textContent.trim().startsWith({json.dumps(label)}));
              if (!label) return null;
              const control = document.getElementById(label.htmlFor) ?? label.querySelector("select, input");
              control.value = {json.dumps(str(value))};
              control.dispatchEvent(new Event(control.tagName === "SELECT" ? "change" : "input", {{bubbles: true}}));
              return control.value;
            }})()"""
        )
        if done != str(value):
            raise RuntimeError(f"{label!r} could not be set to {value!r}: it is {done!r}.")

    def faults(self) -> list[str]:
        """What went wrong so far: exceptions, and what the console or the page's policy says."""
        self.value("0")  # so that what was on its way has come
        found = []
        for event in self._browser.events:
            if event.get("sessionId") == self._session:
                method, parameters = event.get("method"), event["params"]
                if method == "Runtime.exceptionThrown" or (
                    method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning")  # type: ignore[index]
                ):
                    found.append(json.dumps(parameters))
        return found

    def requests(self) -> list[str]:
        """The addresses that it asked for, but for files of this machine and data in addresses."""
        self.value("0")
        asked = [
            str(event["params"]["request"]["url"])  # type: ignore[index]
            for event in self._browser.events
            if event.get("sessionId") == self._session and event.get("method") == "Network.requestWillBeSent"
        ]
        return [address for address in asked if not address.startswith(("file:", "data:", "blob:"))]

    def screenshot(self, target: Path, *, selector: str | None = None, whole: bool = False) -> Path:
        """Writes a PNG.

        Args:
            target: The file.
            selector: An element to show alone.
            whole: Whether to show all of the page and not the window alone.
        """
        parameters: dict[str, object] = {"format": "png", "captureBeyondViewport": True}
        if selector is not None:
            box = self.value(
                f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); "
                "return [b.left + scrollX, b.top + scrollY, b.width, b.height]; })()"
            )
            parameters["clip"] = dict(zip(("x", "y", "width", "height"), box, strict=True), scale=1)  # type: ignore[arg-type]
        elif whole:
            size = self.value("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
            parameters["clip"] = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}  # type: ignore[index]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(base64.b64decode(str(self.send("Page.captureScreenshot", **parameters)["data"])))
        return target
