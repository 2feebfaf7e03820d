"""What a built book does without: what its theme brings and no reader needs.

1. Templates, which are no pages; maps for who debugs scripts; a script that draws the icons which a font draws as well.
2. Of the icon fonts everything but the icons that are shown (`icons`).
3. Rules of style sheets for classes that no page and no script names (`pruned`).
4. The search's scripts and index on pages that do not search.
5. Figures keep every pixel, in a smaller format (lossless WebP).

Buttons are called what they show, for who hears them, and one that shows an icon alone what it does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont
from PIL import Image

UNNEEDED = ("*webpack-macros.html", "**/*.map", "**/*.LICENSE.txt", "scripts/fontawesome.js*")
WEBFONTS, ICONS = "vendor/fontawesome/webfonts", "fa-solid-900"
WORD = re.compile(r"[A-Za-z_][\w-]*")
NUMBERED = re.compile(r"([A-Za-z_][\w-]*)\$\{")  # how scripts call what they count: `line${index}`
SEARCH = re.compile(r'\s*<script src="[^"]*(?:searchtools|language_data|searchindex)\.js[^"]*"></script>')
# What it replaces, and by what, on every page.
REPLACED = (
    (r"<script [^>]*fontawesome\.js[^>]*></script>", ""),
    (r'(<(?:summary|button)[^>]*) aria-label="(?:Toggle hidden content|Search)"', r"\1"),
    (r'<div role="list" class="citation-list">', '<div class="citation-list">'),  # it has no items
    (r'<summary(?=><span class="toctree-toggle")', '<summary aria-label="Pages under this one"'),
)


def shed(html: Path) -> None:
    """Take all that out of the book whose HTML lies in a folder."""
    static = html / "_static"
    for path in (path for unneeded in UNNEEDED for path in static.glob(unneeded)):
        path.unlink()
    smaller = [lossless(path) for path in sorted((html / "_images").glob("*.png"))]
    figures = re.compile("|".join(re.escape(f"_images/{path.stem}.png") for path in smaller)) if smaller else None
    for page in html.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for found, instead in REPLACED:
            text = re.sub(found, instead, text)
        text = text if page.name == "search.html" else SEARCH.sub("", text)
        if figures:
            text = figures.sub(lambda found: found[0].removesuffix("png") + "webp", text)
        page.write_text(text, encoding="utf-8")
    told = [page.read_text(encoding="utf-8") for page in (*html.rglob("*.html"), *static.rglob("*.js"))]
    used = set().union(*map(words, told))
    sheets = {path: pruned(path.read_text(encoding="utf-8"), used) for path in static.rglob("*.css")}
    codes = re.findall(r'content:\s*"\\([ef][0-9a-f]{3})"', "".join(sheets.values()))
    fonts = [icons(font, [int(code, 16) for code in codes]) for font in static.glob(f"{WEBFONTS}/{ICONS}.ttf")]
    for path, text in sheets.items():
        path.write_text(of_icons(text) if fonts else text, encoding="utf-8")


def words(text: str) -> set[str]:
    """All that a page or script may call a class or name: its words, and those that it puts a number behind."""
    return {*WORD.findall(text), *(f"{stem}{number}" for stem in NUMBERED.findall(text) for number in range(10))}


def lossless(png: Path) -> Path:
    """A PNG as WebP of the same pixels, in its place."""
    path = png.with_suffix(".webp")
    with Image.open(png) as image:
        image.save(path, lossless=True, method=4)
    png.unlink()
    return path


def rules(css: str) -> Iterable[tuple[str, str | None]]:
    """The parts of a style sheet: what stands before a block, and the block; None where a statement has no block."""
    css, start = re.sub(r"/\*.*?\*/", "", css, flags=re.S), 0
    while found := re.compile(r"[{;]").search(css, start):
        head, end = css[start : found.start()].strip(), found.end()
        if found[0] == ";":
            yield head, None
        else:
            depth = 1
            while depth:  # braces in quoted texts would be counted; the theme's sheets have none
                brace = re.compile(r"[{}]").search(css, end)
                depth, end = depth + (1 if brace[0] == "{" else -1), brace.end()
            yield head, css[found.end() : end - 1]
        start = end


def pruned(css: str, used: set[str]) -> str:
    """A style sheet without the selectors that ask for a class or name which is not among the words `used`."""
    out = []
    for head, block in rules(css):
        if block is None:
            out.append(f"{head};")
        elif head.startswith(("@media", "@supports")):
            inside = pruned(block, used)
            out += [f"{head}{{{inside}}}"] * bool(inside)
        elif head.startswith("@"):
            out.append(f"{head}{{{block}}}")
        else:
            kept = [part for part in re.split(r",(?![^(]*\))", head) if asked(part) <= used]
            out += [f"{','.join(kept)}{{{block}}}"] * bool(kept)
    return "\n".join(out)


def asked(selector: str) -> set[str]:
    """The classes and names that an element must have; what it must not have, or may, is not asked for."""
    bare = re.sub(r":(?:not|is|where|has)\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\]", "", selector)
    return set(re.findall(r"[.#]([A-Za-z_][\w-]*)", bare))


def icons(font: Path, wanted: Sequence[int]) -> Path:
    """A font of the icons of these numbers, in the place of all fonts of its folder."""
    cut = TTFont(font)
    cutter = subset.Subsetter(subset.Options(notdef_outline=True, layout_features=[]))
    cutter.populate(unicodes=wanted)
    cutter.subset(cut)
    cut.flavor = "woff"
    for path in font.parent.iterdir():
        path.unlink()
    cut.save(font.with_suffix(".woff"))
    return font.with_suffix(".woff")


def of_icons(css: str) -> str:
    """A style sheet that names that font alone."""
    css = re.sub(r"@font-face\s*\{[^}]*fa-(?:regular|brands|v4compat)[^}]*\}", "", css)
    return re.sub(
        rf"src:url\([^)]*{ICONS}\.woff2[^}}]*\}}", f'src:url(../{WEBFONTS}/{ICONS}.woff) format("woff")}}', css
    )
