"""Checks of a built book: missing local files, addresses outside it, and what a real browser asks for.

The first two read the files; `requests_made` opens a page in headless Chromium and reads the browser's own network
log, so that scripts count too. Plain links (`<a href>`) to the outside are a reader's choice and are allowed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

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


def machine_paths(html_root: Path, *needles: str | Path) -> list[str]:
    """Files of the book (pages, scripts, notebooks) that hold one of the texts, such as the repository's path."""
    wanted = [str(needle).encode() for needle in needles]
    return [
        f"{path.relative_to(html_root)}: {text.decode()}"
        for path in sorted(html_root.rglob("*")) if path.is_file()
        for text in wanted if text in path.read_bytes()
    ]  # fmt: skip


def requests_made(html_file: Path) -> list[str]:
    """Addresses outside the book that headless Chromium asked for while it showed the page, in order.

    Taken from the browser's network log: requests with an initiator are the page's, those without ("not an origin") are
    the browser's own. No name is resolved, so nothing leaves the machine; the requests are logged all the same.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        log, shown = Path(folder) / "net.json", Path(folder) / "shown.png"
        _chromium(html_file, folder, f"--log-net-log={log}", f"--screenshot={shown}")
        if not shown.is_file():
            raise RuntimeError(f"Chromium did not show {html_file}")
        recorded = json.loads(log.read_text(encoding="utf-8"))
    started = recorded["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = [
        event["params"] for event in recorded["events"] if event["type"] == started and "url" in event.get("params", {})
    ]
    urls = [params["url"] for params in asked if params.get("initiator", "not an origin") != "not an origin"]
    return list(dict.fromkeys(url for url in urls if _is_outside(url)))


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
  const parsed = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number), faint = [];
  const luminance = colour => colour.slice(0, 3).map(c => c / 255)
    .map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const under = part => {
    for (; part; part = part.parentElement) {
      const colour = parsed(window.getComputedStyle(part).backgroundColor);
      if (colour.length < 4 || colour[3] > .5) return luminance(colour);
    }
    return 1;
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
    .map(part => [part.innerText.split("\\n")[0].trim(), part.getAttribute("aria-label")])
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


def _chromium(html_file: Path, folder: str, *options: str) -> str:
    if browser() is None:
        raise RuntimeError("Chromium is missing: run `make browser`")
    command = [browser(), *CHROMIUM, f"--user-data-dir={folder}/profile", *options, html_file.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"Chromium left with {done.returncode} on {html_file}: {done.stderr[-500:]}")
    return done.stdout
