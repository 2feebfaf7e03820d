"""Notebook 04 in JupyterLab, in a real browser: opened as `make lab` opens it, run, a parameter changed, run again."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import book_checks
import pytest
from smoke_book import copied
from test_by_hand import HEADER, TWO

from lib import records

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_spec("jupyterlab") is None, reason="JupyterLab is not installed here; `make` installs it"),
    pytest.mark.skipif(book_checks.browser() is None, reason="there is no browser here; `make browser` installs one"),
]
CHROMIUM = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--remote-debugging-port=0", "--window-size=1400,1000",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")  # fmt: skip
KEYS = {"Home": 36, "End": 35}
SHIFT = 8
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent)"
IMAGES = "[...document.querySelectorAll('.jp-OutputArea-output img')].filter(e => e.naturalWidth > 100)"
OUTPUTS = "[...document.querySelectorAll('.jp-OutputArea-output')].map(e => e.textContent)"


def until(ask: Callable[[], object], what: str, seconds: float) -> object:
    """The first answer that is true."""
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return answer


@pytest.fixture
def address(tmp_path) -> Iterator[str]:
    """The address, with its token, that `make lab` prints in a copy of the tree."""
    tree, log = copied(tmp_path / "superset"), tmp_path / "lab.log"
    own = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "DISPLAY"))}
    own |= {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    command = ["make", "lab", f"PY={sys.executable}", "WAYLAND_DISPLAY="]
    with log.open("w") as file:
        lab = subprocess.Popen(command, cwd=tree, env=own, stdout=file, stderr=file, start_new_session=True)
    try:
        pattern = r"http://127\.0\.0\.1:\d+/lab/tree/notebooks\?token=\w+"
        yield until(lambda: re.search(pattern, log.read_text()), "JupyterLab", 60).group()
    finally:
        os.killpg(lab.pid, signal.SIGTERM)
        lab.wait(timeout=60)


class Tab:
    """A page in headless Chromium, spoken to in its DevTools protocol."""

    def __init__(self, folder: Path):
        import websocket

        command = [book_checks.browser(), *CHROMIUM, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = folder / "DevToolsActivePort"
        until(lambda: port.is_file() and port.read_text().count("\n"), "Chromium", 60)
        with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json") as answer:
            (page,) = (target for target in json.load(answer) if target["type"] == "page")
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=60, suppress_origin=True)
        self.asked = 0

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=60)

    def ask(self, method: str, **how: object) -> dict:
        """The answer to a command of the protocol."""
        self.asked += 1
        self.socket.send(json.dumps({"id": self.asked, "method": method, "params": how}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.asked:
            pass  # events
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def value(self, script: str) -> object:
        """What a script gives in the page."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, selector: str, text: str, times: int = 1) -> None:
        """Click on the first element that matches and whose text begins so, once it is there."""
        found = f"[...document.querySelectorAll({selector!r})].find(e => e.textContent.startsWith({text!r}))"
        until(lambda: self.value(f"!!{found}"), text, 60)
        boxes = []
        while len(boxes) < 2 or boxes[-1] != boxes[-2]:  # what is drawn later moves it
            self.value(f"{found}.scrollIntoView({{block: 'center'}})")
            time.sleep(0.5)
            boxes.append(self.value(f"{found}.getBoundingClientRect().toJSON()"))
        box = boxes[-1]
        place = {"x": box["x"] + min(box["width"] / 2, 40), "y": box["y"] + box["height"] / 2}
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=count, **place)

    def press(self, key: str, modifiers: int = 0) -> None:
        how = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, **how)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))


@pytest.fixture
def tab(tmp_path) -> Iterator[Tab]:
    own = Tab(tmp_path / "chromium")
    yield own
    own.close()


def idle(tab: Tab) -> None:
    """Wait until the kernel is: before it is there, nothing can be run."""
    until(lambda: "| Idle" in tab.value("document.querySelector('#jp-main-statusbar').innerText"), "the kernel", 120)


def write_parameter(tab: Tab, name: str, value: object) -> None:
    """Type another value into the line of a parameter."""
    line = f"{name} = {value!r}"
    tab.click(".jp-Notebook .cm-line", f"{name} = ")
    tab.press("Home")
    tab.press("End", SHIFT)
    tab.ask("Input.insertText", text=line)
    lines = "[...document.querySelectorAll('.jp-CodeCell .cm-line')].map(e => e.textContent)"
    assert [text for text in tab.value(lines) if text.startswith(f"{name} = ")] == [line]


def run_all(tab: Tab, before: int) -> int:
    """Run all cells from the menu; the last cell's number, once all have run after number `before`."""
    tab.click(".lm-MenuBar-itemLabel", "Run")
    tab.click(".lm-Menu-itemLabel", "Run All Cells")

    def numbers() -> list[int]:
        found = [re.fullmatch(r"\[(\d+)\]:", prompt) for prompt in tab.value(PROMPTS)]
        return [int(match[1]) for match in found] if all(found) else []

    def mistakes() -> list[str]:
        return [text for text in tab.value(OUTPUTS) if re.match(r"\w+(Error|Input): |Traceback", text)]

    last = until(lambda: mistakes() or (min(numbers(), default=0) > before and max(numbers())), "the run", 900)
    assert mistakes() == []
    return last


def figures(tab: Tab, png: Path) -> list[str]:
    """The figures of the page; the first is brought into view and seen, in a picture of the screen."""
    for _ in range(2):  # what comes into view is drawn only then, and moves it
        tab.value(f"{IMAGES}[0].scrollIntoView({{block: 'center'}})")
        time.sleep(1)
    box = tab.value(f"{IMAGES}[0].getBoundingClientRect().toJSON()")
    assert box["width"] > 300 and box["height"] > 100 and 0 < box["y"] < 800
    tab.screenshot(png)
    return tab.value(f"{IMAGES}.map(e => e.src)")


def test_a_notebook_is_opened_run_changed_and_run_again(address, tab, tmp_path):
    (tmp_path / "mine.csv").write_text(HEADER + TWO)
    out = tmp_path / "out"
    tab.ask("Page.navigate", url=address)
    tab.click(".jp-DirListing-itemText", "04_sufficiency.ipynb", times=2)
    own = {"profile": "smoke", "pairs_file": str(tmp_path / "mine.csv"), "results_dir": str(out), "layers": "21,23"}
    idle(tab)
    for name, value in own.items():
        write_parameter(tab, name, value)
    last = run_all(tab, 0)
    first = figures(tab, tmp_path / "first.png")
    assert len(first) >= 5 and set(records.read(out / "sufficiency.parquet")["layer"]) == {21, 23}

    write_parameter(tab, "layers", "20,27")
    assert run_all(tab, last) == 2 * last
    second = figures(tab, tmp_path / "second.png")
    assert len(second) == len(first) and second[0] != first[0]
    assert set(records.read(out / "sufficiency.parquet")["layer"]) == {20, 27}
    assert "set aside in" in tab.value("document.querySelector('.jp-Notebook').innerText")
