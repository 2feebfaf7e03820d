"""Checks of a built book: missing local files, addresses outside it, and what a real browser asks for.

The first two read the files; `requests_made` opens a page in headless Chromium and reads the browser's own network
log, so that scripts count too. Plain links (`<a href>`) to the outside are a reader's choice and are allowed.

`python tests/book_checks.py build/<profile>/book/_build/html [--axe axe.min.js]` prints a table of the pages: what each
weighs with all it loads, how long it takes to load, what it asks of the network, errors in the console, and by how much
it is wider than screens of 390, 768 and 1440 pixels. With axe-core's script (npm pack axe-core), its violations, too.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import websocket

# Attributes whose address a browser fetches without being asked. Of links, those whose `rel` it acts upon.
LOADED = {"src", "poster", "data", "background", "srcset", "imagesrcset", "xlink:href"}
FETCHED_RELATIONS = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "preconnect", "dns-prefetch",
                     "manifest", "apple-touch-icon", "mask-icon", "prerender"}  # fmt: skip
HREF_LOADS = {"image", "use", "feimage"}  # svg elements whose href is loaded; `base` moves every other address
CSS_ADDRESS = re.compile(r"""url\(\s*(['"]?)(?P<url>.*?)\1\s*\)|@import\s+(['"])(?P<imported>.*?)\3""", re.S)
SCRIPT_FETCH = re.compile(
    r"""(?:fetch|import|importScripts|sendBeacon|Worker|EventSource|WebSocket|getScript|require)\s*\(\s*['"`](?P<a>(?:\w+:)?//[^'"`]+)"""
    r"""|\.open\(\s*['"]\w+['"]\s*,\s*['"`](?P<b>(?:\w+:)?//[^'"`]+)"""
    r"""|\.(?:src|href)\s*=\s*['"`](?P<c>(?:\w+:)?//[^'"`]+)"""
    r"""|(?:from|import)\s+['"](?P<d>(?:\w+:)?//[^'"]+)"""
)
CHROMIUM = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--virtual-time-budget=5000", "--host-resolver-rules=MAP * ~NOTFOUND")  # fmt: skip


class _Page(HTMLParser):
    """Collects what a page loads, what it links to, and its inline scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.styles: list[str] = []
        self.scripts: list[str] = []
        self.inside: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        for name in LOADED & set(given):
            if name.endswith("srcset"):
                self.loaded += [part.split()[0] for part in given[name].split(",") if part.split()]
            elif not (name == "data" and tag != "object"):
                self.loaded.append(given[name])
        if "href" in given:
            relations = set(given.get("rel", "").lower().split())
            loads = tag in HREF_LOADS or tag == "base" or (tag == "link" and relations & FETCHED_RELATIONS)
            (self.loaded if loads else self.linked).append(given["href"])
        if tag == "meta" and given.get("http-equiv", "").lower() == "refresh":
            self.loaded += re.findall(r"url=\s*['\"]?([^'\";]+)", given.get("content", ""), re.I)
        if "style" in given:
            self.styles.append(given["style"])
        self.scripts += [value for name, value in given.items() if name.startswith("on")]
        self.inside = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside:
            (self.scripts if self.inside == "script" else self.styles).append(data)


def _css_addresses(text: str) -> list[str]:
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    return [
        match["url"] or match["imported"] for match in CSS_ADDRESS.finditer(text) if match["url"] or match["imported"]
    ]


def _script_addresses(text: str) -> list[str]:
    return [next(filter(None, match.groups())) for match in SCRIPT_FETCH.finditer(text)]


def _files(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """(file, addresses it loads, addresses it links to) for each page, style sheet and script under `root`."""
    found = [path for path in sorted(root.rglob("*")) if path.is_file()]
    if not any(path.suffix == ".html" for path in found):
        raise ValueError(f"{root} holds no HTML page, so there is nothing to check: build the book first")
    for path in found:
        if path.suffix not in (".html", ".css", ".js", ".svg"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".css":
            yield path, _css_addresses(text), []
        elif path.suffix == ".js":
            yield path, _script_addresses(text), []
        else:
            page = _Page(text)
            inline = [url for style in page.styles for url in _css_addresses(style)]
            fetched = [url for script in page.scripts for url in _script_addresses(script)]
            yield path, page.loaded + inline + fetched, page.linked


def _is_outside(url: str) -> bool:
    parts = urlsplit(url.strip())
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ws", "wss", "ftp")


def outside_urls(html_root: Path) -> list[str]:
    """`page: address` for each address outside the book that a browser would load by itself; links do not count."""
    return [
        f"{path.relative_to(html_root)}: {url}"
        for path, loaded, _ in _files(html_root)
        for url in loaded
        if _is_outside(url)
    ]


def missing_local_files(html_root: Path) -> list[str]:
    """`page: address` for each local address, loaded or linked, whose file is not in the book."""
    missing, root = [], html_root.resolve()
    for path, loaded, linked in _files(html_root):
        for url in [*loaded, *linked] if path.suffix != ".js" else []:
            parts = urlsplit(url.strip())
            if parts.scheme not in ("", "file") or parts.netloc or not parts.path:
                continue  # outside, data:, mailto:, or a place on the same page
            local = unquote(parts.path)
            target = (root / local.lstrip("/") if local.startswith("/") else path.resolve().parent / local).resolve()
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or not target.is_relative_to(root):
                missing.append(f"{path.relative_to(html_root)}: {url}")
    return missing


def weight(page: Path) -> int:
    """Bytes of a page and of every local file that a browser loads with it: scripts, style sheets and their fonts,
    figures."""
    counted: dict[Path, int] = {}

    def add(path: Path) -> None:
        if path in counted or not path.is_file():
            return
        counted[path] = path.stat().st_size
        text = path.read_text(encoding="utf-8", errors="replace") if path.suffix in (".html", ".css") else ""
        loaded = _css_addresses(text) if path.suffix == ".css" else _Page(text).loaded if text else []
        for url in loaded:
            parts = urlsplit(url)
            fallback = parts.path.endswith(".ttf")  # of a font that is there in a smaller format, which comes first
            if parts.path and not fallback and not parts.scheme and not parts.netloc:
                add((path.parent / unquote(parts.path)).resolve())

    add(page.resolve())
    return sum(counted.values())


def machine_paths(html_root: Path, *needles: str | Path) -> list[str]:
    """Files of the book (pages, scripts, notebooks) that hold one of the texts, such as the repository's path."""
    wanted = [str(needle).encode() for needle in needles]
    return [
        f"{path.relative_to(html_root)}: {text.decode()}"
        for path in sorted(html_root.rglob("*")) if path.is_file()
        for text in wanted if text in path.read_bytes()
    ]  # fmt: skip


def requests_made(html_file: Path) -> list[str]:
    """Addresses outside the book that headless Chromium asked for while it showed the page, in order."""
    return opened(html_file)[0]


def opened(html_file: Path) -> tuple[list[str], list[str]]:
    """Addresses outside the book that headless Chromium asked for while it showed the page, and errors of its console.

    Taken from the browser's network log: requests with an initiator are the page's, those without ("not an origin") are
    the browser's own. No name is resolved, so nothing leaves the machine; the requests are logged all the same.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        log, shown = Path(folder) / "net.json", Path(folder) / "shown.png"
        said: list[str] = []
        options = (f"--log-net-log={log}", f"--screenshot={shown}", "--enable-logging=stderr")
        _chromium(html_file, folder, *options, said=said)
        if not shown.is_file():
            raise RuntimeError(f"Chromium did not show {html_file}")
        recorded = json.loads(log.read_text(encoding="utf-8"))
    started = recorded["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = [
        event["params"] for event in recorded["events"] if event["type"] == started and "url" in event.get("params", {})
    ]
    urls = [params["url"] for params in asked if params.get("initiator", "not an origin") != "not an origin"]
    errors = re.findall(r'CONSOLE[^"]*"((?:Uncaught|[^"]*(?i:error|failed))[^"]*)"', "".join(said))
    return list(dict.fromkeys(url for url in urls if _is_outside(url))), errors


def looked_at(html_root: Path, pages: Sequence[str], look: str, width: int = 1280, dark: bool = False) -> dict:
    """What a JavaScript function `look(window)` makes of each page of a book, shown `width` pixels wide in Chromium.

    The pages stand in frames of one page beside the book, so that one start of the browser serves for all of them.
    `dark` is the dark theme. Raises RuntimeError for an error in `look`, or a page that is not shown in 20 s.
    """
    script = """<pre id="seen"></pre><script>(async () => {
      const seen = {}, look = LOOK;
      for (const page of PAGES) {
        const frame = document.createElement("iframe");
        frame.width = WIDTH; frame.height = 900;
        frame.src = page;
        document.body.append(frame);
        try {
          await new Promise(resolve => frame.onload = resolve);
          if (DARK) frame.contentDocument.documentElement.dataset.theme = "dark";
          seen[page] = await look(frame.contentWindow);
        } catch (error) { seen[page] = {error: String(error)}; }
        frame.remove();
      }
      document.getElementById("seen").textContent = JSON.stringify(seen);
    })()</script>"""
    for name, value in {
        "PAGES": json.dumps(list(pages)),
        "WIDTH": width,
        "DARK": json.dumps(dark),
        "LOOK": look,
    }.items():
        script = script.replace(name, str(value))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        harness = html_root / "_looked_at.html"
        harness.write_text(f"<!doctype html><html><body>{script}</body></html>", encoding="utf-8")
        try:
            options = ("--allow-file-access-from-files", "--virtual-time-budget=20000", "--dump-dom")
            shown = _chromium(harness, folder, *options, f"--window-size={width + 40},1000")
        finally:
            harness.unlink()
    seen = json.loads(unescape(re.search(r'<pre id="seen">(.*?)</pre>', shown, re.S)[1] or "{}"))
    failed = {page: seen.get(page, "not shown") for page in pages if "error" in (seen.get(page) or {"error": 0})}
    if failed:
        raise RuntimeError(f"Chromium could not look at {failed}")
    return seen


# What is wrong with a page as it is shown with all that is folded unfolded: by how many pixels it is wider than the
# screen; texts of the article with less contrast to what lies under them than WCAG's 4.5; buttons whose name for a
# screen reader does not hold the words that they show; icons without a letter of the icon font.
FAULTS = """window => {
  const all = what => [...window.document.querySelectorAll(what)];
  all("details").forEach(part => part.open = true);
  const parsed = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0])  // color() counts to 1, rgb() to 255
    .map((part, at) => part * (at < 3 && text.startsWith("color(") ? 255 : 1));
  const faint = [];
  const luminance = colour => colour.slice(0, 3).map(c => c / 255)
    .map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const under = part => {  // what is seen through is mixed with what lies below, in the end white
    const layers = [];
    for (; part; part = part.parentElement) {
      const [red, green, blue, alpha = 1] = parsed(window.getComputedStyle(part).backgroundColor);
      layers.push([[red, green, blue], alpha]);
      if (alpha === 1) break;
    }
    const mixed = (below, [colour, alpha]) => colour.map((part, at) => alpha * part + (1 - alpha) * below[at]);
    return luminance(layers.reduceRight(mixed, [255, 255, 255]));
  };
  const texts = window.document.createTreeWalker(all(".bd-article-container")[0], NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const part = texts.currentNode.parentElement, said = texts.currentNode.textContent.trim();
    if (!said || !part.getClientRects().length || part.closest("script, style, .headerlink")) continue;
    const [low, high] = [luminance(parsed(window.getComputedStyle(part).color)), under(part)].sort((a, b) => a - b);
    if ((high + .05) / (low + .05) < 4.5) faint.push(said.slice(0, 40));
  }
  const wider = Math.max(0, window.document.documentElement.scrollWidth - window.innerWidth);
  const misnamed = all("button, summary, [role=button]")
    .map(part => [(part.innerText ?? part.textContent).split("\\n")[0].trim(), part.getAttribute("aria-label")])
    .filter(([shown, name]) => shown && name && !name.toLowerCase().includes(shown.toLowerCase()));
  const undrawn = all("i.fa-solid").filter(i => window.getComputedStyle(i, ":before").content.length != 3).length;
  return {wider, faint, misnamed, undrawn};
}"""


def printed_pages(html_file: Path) -> int:
    """How many sheets a page takes when the browser prints it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        pdf = Path(folder) / "page.pdf"
        _chromium(html_file, folder, f"--print-to-pdf={pdf}")
        return len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))


def screenshot(html_file: Path, png: Path, width: int = 1400, height: int = 1600) -> Path:
    """Write what headless Chromium shows of a page as a PNG of the given size (pixels)."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        _chromium(html_file, folder, f"--screenshot={png.resolve()}", f"--window-size={width},{height}")
    if not png.is_file():
        raise RuntimeError(f"Chromium did not show {html_file}")
    return png


def browser() -> str | None:
    """The program, or None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def shown_at(address: str) -> str:
    """The HTML of a page of this machine's own server, as it is once its scripts have run."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return _chromium(address, folder, "--dump-dom", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")


def tapped(html_file: Path, selectors: Sequence[str], look: str) -> list[Any]:
    """What a JavaScript expression `look` gives on a phone's screen after a finger has tapped on each of the elements
    in turn: real touches, by the browser's own protocol. RuntimeError for an element that is not there."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = [option for option in CHROMIUM if not option.startswith("--virtual")]
        command = [browser(), *options, "--remote-debugging-port=0", f"--user-data-dir={folder}/profile", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        try:
            listening = (re.search(r"ws://\S+", line) for line in process.stderr)
            tab = _Tab(next(filter(None, listening))[0])
            return tab.tapped(html_file.resolve().as_uri(), selectors, look)
        finally:
            process.terminate()
            process.wait()


class _Tab:
    """A page of a running Chromium, told what to do over its protocol."""

    def __init__(self, address: str) -> None:
        self.socket, self.number, self.session = websocket.create_connection(address, suppress_origin=True), 0, {}
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params} | self.session))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def value(self, expression: str) -> Any:
        got = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in got:
            raise RuntimeError(got["exceptionDetails"].get("exception", {}).get("description", str(got)))
        return got["result"].get("value")

    def tapped(self, address: str, selectors: Sequence[str], look: str) -> list[Any]:
        self.ask("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        self.ask("Emulation.setTouchEmulationEnabled", enabled=True)
        self.ask("Page.enable")
        self.ask("Page.navigate", url=address)
        loaded = 'new Promise(done => document.readyState === "complete" ? done() : addEventListener("load", done))'
        while self.value("location.href") != address:
            time.sleep(0.05)
        self.value(loaded)
        seen = []
        for selector in selectors:
            part = f"document.querySelector({json.dumps(selector)})"
            self.value(f'{part}.scrollIntoView({{block: "center", behavior: "instant"}})')
            box = self.value(
                f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({part}.getBoundingClientRect())"
            )
            self.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": box[0], "y": box[1]}])
            self.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            self.value("new Promise(done => setTimeout(done, 400))")  # a tap becomes a click a little later
            seen.append(self.value(look))
        return seen


def _chromium(html_file: Path | str, folder: str, *options: str, said: list[str] | None = None) -> str:
    if browser() is None:
        raise RuntimeError("Chromium is missing: run `make browser`")
    command = [browser(), *CHROMIUM, f"--user-data-dir={folder}/profile", *options]
    command.append(html_file if isinstance(html_file, str) else html_file.resolve().as_uri())
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"Chromium left with {done.returncode} on {html_file}: {done.stderr[-500:]}")
    if said is not None:
        said.append(done.stderr)
    return done.stdout


# How long a page took to load, and how much wider than its window it is with all unfolded.
MEASURED = """async window => {
  const load = window.performance.getEntriesByType("navigation")[0];
  for (const part of window.document.querySelectorAll("details")) part.open = true;
  const wider = Math.max(0, window.document.documentElement.scrollWidth - window.innerWidth);
  return {ms: Math.round(load.duration), wider};
}"""
# What axe-core finds, rule by rule, with how many places and of what impact.
AXE = """async window => {
  window.eval(SOURCE);
  const found = await window.axe.run(window.document, {resultTypes: ["violations"]});
  return {found: found.violations.map(one => [one.impact, one.id, one.nodes.length])};
}"""
WIDTHS = (390, 768, 1440)
TOGETHER = 4  # pages that one start of the browser looks at


def in_turn(html_root: Path, pages: Sequence[str], look: str, width: int, dark: bool = False) -> dict:
    """`looked_at`, a few pages at a time."""
    parts = [pages[at : at + TOGETHER] for at in range(0, len(pages), TOGETHER)]
    return {page: seen for part in parts for page, seen in looked_at(html_root, part, look, width, dark).items()}


def table(html_root: Path, axe: Path | None = None) -> str:
    """What the browser says of every page but those of single modules, as a Markdown table."""
    found = (str(path.relative_to(html_root)) for path in sorted(html_root.rglob("*.html")))
    pages = [page for page in found if not page.startswith(("api/", "_", "genindex"))]
    seen = {width: in_turn(html_root, pages, MEASURED, width) for width in WIDTHS}
    source = json.dumps(axe.read_text(encoding="utf-8")).replace("</", "<\\/") if axe else ""
    looks = ((1280, False), (390, True)) if axe else ()
    axed = [in_turn(html_root, pages, AXE.replace("SOURCE", source), *look) for look in looks]
    head = ["page", "kB", "ms", "asked outside", "console", *(f"wider at {width}" for width in WIDTHS)]
    lines = [[*head, *(["axe: serious or worse", "axe: less"] if axe else [])]]
    lines.append(["---"] * len(lines[0]))
    for page in pages:
        outside, errors = opened(html_root / page)
        wide = [seen[width][page]["wider"] for width in WIDTHS]
        row = [page, weight(html_root / page) // 1000, seen[WIDTHS[-1]][page]["ms"], len(outside), len(errors), *wide]
        rules = {(impact, name) for one in axed for impact, name, _ in one[page]["found"]}
        grave = sorted(name for impact, name in rules if impact in ("serious", "critical"))
        mild = sorted(name for impact, name in rules if impact not in ("serious", "critical"))
        lines.append([*row, *([", ".join(grave) or 0, ", ".join(mild) or 0] if axe else [])])
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("html", type=Path, help="the folder of a built book's pages")
    parser.add_argument("--axe", type=Path, help="axe-core's script, axe.min.js")
    options = parser.parse_args()
    print(table(options.html, options.axe))
