"""Print a built book to one PDF: `python -m report.pdf build/<profile>/book build/<profile>/book.pdf`.

1. The pages of the table of contents become one (`together`): their articles, with names and links of the whole.
   The library's module pages are left out; they are for who reads code.
2. Chromium prints it. Figures are those for paper; what is folded is unfolded, but for the code above them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import unquote

from lib.errors import Refusal
from lib.safe_yaml import read_yaml

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-pdf-header-footer",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=20000",
)
LONGEST = 600  # seconds that printing may take
HEAD = """<!doctype html><html lang="en" data-theme="light" data-mode="light"><head><meta charset="utf-8">
<title>{title}</title>{sheets}
<style>@page {{ size: A4; margin: 18mm 16mm }} article + article {{ break-before: page }}</style></head>
<body class="bd-content bd-main"><div class="bd-article-container"><div class="bd-article">
"""


class PdfError(Refusal):
    """The book cannot be printed; the message says what is missing."""


def chapters(book: Path) -> list[str]:
    """The pages of the table of contents in their order, without ending: "index", "executed/01_baselines"."""
    toc = read_yaml(book / "_toc.yml")
    return [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]


def together(book: Path) -> str:
    """All pages as one HTML page, whose files are named in full. PdfError where the book is not built."""
    html = (book / "_build" / "html").resolve()
    names = chapters(book) if (book / "_toc.yml").is_file() else []
    lacking = [name for name in names if not (html / f"{name}.html").is_file()]
    if lacking or not names:
        raise PdfError(
            f"{book} holds no built book ({', '.join(lacking) or 'no table of contents'}): run make book first"
        )
    pages = {name: (html / f"{name}.html").read_text(encoding="utf-8") for name in names}
    first = pages[names[0]]
    sheets = [found for found in re.findall(r"<link[^>]*>", first) if "stylesheet" in found]
    articles = [article(name, text, html, set(names)) for name, text in pages.items()]
    title = re.search(r"<title>(.*?)</title>", first, re.S)
    head = HEAD.format(title=title[1].strip() if title else "", sheets="".join(absolute(one, html) for one in sheets))
    return f"{head}{''.join(articles)}</div></div></body></html>\n"


def absolute(text: str, folder: Path) -> str:
    """HTML whose local files are named in full, from the folder of its page."""

    def full(found: re.Match) -> str:
        path = unquote(found[2].split("?")[0])
        here = not re.match(r"[a-z]+:|#|//", path) and path
        return f'{found[1]}="{escape((folder / path).resolve().as_uri())}"' if here else found[0]

    return re.sub(r'\b(src|href)="([^"]*)"', full, text)


def article(name: str, page: str, html: Path, names: set[str]) -> str:
    """A page's article for the whole: its names begin with the page's, and links to other pages lead there.

    What else lies beside the book, such as the library's pages, is no link: it would be one to this machine's folders.
    """
    found = re.search(r"<article[^>]*>(.*?)</article>", page, re.S)
    body = re.sub(r"<script\b.*?</script>", "", found[1] if found else "", flags=re.S)
    body = re.sub(r'<details class="[^"]*\bhide\b.*?</details>', "", body, flags=re.S)  # the code above a figure
    folder = (html / name).parent

    def place(of: str, anchor: str) -> str:
        return f"{of}.{anchor}" if anchor else of

    def link(match: re.Match) -> str:
        path, _, anchor = match[1].partition("#")
        target = (folder / unquote(path)).resolve() if path else html / f"{name}.html"
        local = not re.match(r"[a-z]+:", path)
        of = str(target.relative_to(html).with_suffix("")) if local and target.is_relative_to(html) else ""
        if of in names:
            return f'href="#{place(of, "" if "=" in anchor else anchor)}"'
        return "" if local else match[0]  # a file of this machine

    body = re.sub(r'\bid="([^"]*)"', lambda match: f'id="{place(name, match[1])}"', body)
    body = re.sub(r'\bhref="([^"]*)"', link, body)
    body = re.sub(r"<img\b", '<img loading="eager"', body.replace(' loading="lazy"', ""))
    return f'<article id="{name}">{absolute(body, folder)}</article>\n'


def browser() -> str:
    """Chromium's program. PdfError where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise PdfError(
            "the PDF is printed by Chromium, and there is none on the PATH; install one, on Debian: "
            "sudo apt-get install chromium"
        )
    return found


def printed(book: Path, to: Path) -> Path:
    """Print the book that is built in a folder; returns the PDF's path."""
    program, page = browser(), together(book)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        whole, made = Path(folder) / "book.html", Path(folder) / "book.pdf"
        whole.write_text(page, encoding="utf-8")
        command = [program, *OPTIONS, f"--user-data-dir={folder}/profile", f"--print-to-pdf={made}", whole.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
        if done.returncode or not made.is_file():
            raise PdfError(f"{program} printed nothing: {done.stderr.strip()[-300:] or 'it said no word'}")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made, to)
    return to


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m report.pdf", description=__doc__.splitlines()[0])
    parser.add_argument("book", type=Path, help="the folder of a built book, such as build/smoke/book")
    parser.add_argument("to", type=Path, help="the PDF to write")
    options = parser.parse_args(arguments)
    try:
        print(printed(options.book, options.to))
    except (Refusal, OSError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
