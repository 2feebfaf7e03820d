"""The words that need explaining (`book/glossary.yaml`): a list, and on each page what they mean at first use.

A word shows its meaning while the pointer is over it or it has the focus, by keyboard or finger: by style alone, so
that it works without scripts. Screen readers read the meaning as the word's description.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import NamedTuple

from lib.safe_yaml import read_yaml

# Where nothing is explained: links, code, headings, what is drawn, and what has a control of its own.
BESIDE = {
    "a",
    "table",
    "code",
    "pre",
    "h1",
    "h2",
    "h3",
    "h4",
    "button",
    "summary",
    "script",
    "style",
    "svg",
    "label",
    "dfn",
}
BESIDE |= {"select", "figcaption", "dt", "math"}
VOID = {"br", "img", "hr", "input", "col", "wbr", "source", "link", "meta"}


class Term(NamedTuple):
    """A word, every form that it is found by, and what it means."""

    name: str
    forms: tuple[str, ...]
    meaning: str


def load(path: Path) -> list[Term]:
    """The glossary. ValueError for a term without a meaning."""
    terms = []
    for name, about in read_yaml(path).items():
        if not isinstance(about, Mapping) or not about.get("meaning") or about.keys() - {"forms", "meaning"}:
            raise ValueError(f"{path.name}: {name} wants a meaning, and besides at most other forms")
        terms.append(Term(name, (name, *about.get("forms", ())), about["meaning"]))
    return terms


def listing(terms: list[Term]) -> str:
    """All of them as a MyST definition list, in the order of the alphabet."""
    return "\n\n".join(f"{term.name}\n: {term.meaning}" for term in sorted(terms, key=lambda term: term.name.lower()))


def explained(page: str, terms: list[Term]) -> str:
    """A page's HTML whose article explains each term where its prose first has it."""
    found = re.search(r"<article.*?</article>", page, re.S)
    if not found or not terms:
        return page
    by_form = {form: term for term in terms for form in term.forms}
    longest = sorted(by_form, key=len, reverse=True)
    wanted = re.compile(rf"(?<![\w.-])(?:{'|'.join(map(re.escape, longest))})(?![\w-])")
    open_tags: list[str] = []
    done: set[str] = set()

    def one(match: re.Match) -> str:
        term = by_form[match[0]]
        if term.name in done:
            return match[0]
        done.add(term.name)
        return marked(match[0], term)

    out = []
    for part in re.split(r"(<!--.*?-->|<[^>]*>)", found[0], flags=re.S):
        tag = re.match(r"<(/?)([a-zA-Z][\w-]*)", part)
        if tag is None:
            prose = "p" in open_tags or "li" in open_tags
            out.append(wanted.sub(one, part) if prose and not BESIDE.intersection(open_tags) else part)
            continue
        out.append(part)
        name = tag[2].lower()
        if tag[1]:
            while open_tags and open_tags.pop() != name:  # what a browser closes by itself
                pass
        elif name not in VOID and not part.endswith("/>"):
            open_tags.append(name)
    return page[: found.start()] + "".join(out) + page[found.end() :]


def marked(word: str, term: Term) -> str:
    """A word with its meaning, as HTML."""
    name = f"term-{re.sub(r'[^a-z]+', '-', term.name.lower())}"
    tip = f'<span role="tooltip" id="{name}">{escape(term.meaning, quote=False)}</span>'
    return f'<span class="term"><dfn tabindex="0" aria-describedby="{name}">{word}</dfn>{tip}</span>'
