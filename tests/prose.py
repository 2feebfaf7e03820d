"""Which generated sentences break the style of the report: `python -m tests.prose RESULTS [BOOK]`.

1. `said` gathers what steps say: sentences, headlines, the outline and captions of `RESULTS/*.findings.json`, and, of a
   built book (a folder that holds `_build/html`), what cells show as text.
2. `sentences_of` takes a text apart into sentences; tables, code and formulas are left aside.
3. `RULES` are the rules, each a function from a sentence to what breaks it ("" where nothing does).
4. Each sentence that breaks a rule is printed, and a table of counts. Exit status: 0 none, 1 some.

An estimate with its interval, and with the quads or pairs in brackets behind it, is one number; so is "3 of 12". Names
of sites, layers, steps, pages, levels of intervals, templates and what stands in backquotes are no numbers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import NamedTuple

MOST_NUMBERS, MOST_WORDS = 2, 40
NUMBER = r"[-+−]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?%?"
SITE = r"(?:\d+\.\d+|(?:mlp|attn|resid) \d+)"
NAMED = r"(?:[Hh]eads?|neurons?|feature|mlp|attn|resid|[Ll]ayers?|steps?|pages?|rounds?|place|rank|step)"
# What holds digits and is no number of its own, from the longest pattern to the shortest.
NAMES = (
    rf"\b{NAMED} \d+(?:\.\d+)*(?:(?:, | and | or | to |, and )(?:{NAMED} )?\d+(?:\.\d+)*(?![\d.%]| \[))*",
    r"\b\d+% (?=(?:\w+ )?(?:confidence |simultaneous |familywise )?intervals?)",
    r"\(\w+ et al\.,? \d{4}\)|\bet al\.,? \d{4}",
    r"\btop-\d+|\b\d+[BM]\b|\([a-z ]+, \d+\)|\bchance (?:is |of )?\d\.\d+|\b\d+% point|\b(?:dose|budget) of -?\d+",
)
COUNTED = r"(?:\w+ )?(?:quads?|pairs?|people|names?|heads?|sites?|neurons?|prompts?|permutations|claims?)"
INTERVAL = r" ?\[" + NUMBER + r",? (?:to )?" + NUMBER + r"\]"
BARE = r"(?<![\w.])[-+−]?\d+\.\d{2,}(?![\w.%]|\.\d)"
NO_INTERVAL = re.compile(
    r"no interval|without (?:an )?intervals?|without a test|too few|chance|threshold|noise|p = |p value|floor|bound"
    r"|not testable|not tested|median|\bsums?\b|at most|more than|up to|asked for|the figure has|fewer than",
    re.IGNORECASE,
)


class Fault(NamedTuple):
    """A sentence that breaks a rule: where it stands, which rule, what in it, and the sentence."""

    place: str
    rule: str
    what: str
    sentence: str


def numbers(sentence: str) -> list[str]:
    """What counts as a number in a sentence."""
    text = sentence
    for name in NAMES:
        text = re.sub(name, "NAME", text)
    text = re.sub(rf"({NUMBER}){INTERVAL}", r"\1", text)
    text = re.sub(rf"\((?:[^()\d]*{NUMBER} {COUNTED}[^()\d]*)+\)", "", text)
    text = re.sub(rf"{NUMBER} of (?:the |all |its |their )?(?:first )?({NUMBER})", r"\1", text)
    text = re.sub(rf"{NUMBER} to ({NUMBER})", r"\1", text)
    return re.findall(rf"(?<![\w.]){NUMBER}(?![\w])", text)


def too_many_numbers(sentence: str) -> str:
    """More than two numbers."""
    found = numbers(sentence)
    return f"{len(found)} numbers: {', '.join(found[:8])}" if len(found) > MOST_NUMBERS else ""


def too_long(sentence: str) -> str:
    """More than forty words."""
    words = len([word for word in re.sub(INTERVAL, "", sentence).split() if re.search(r"\w", word)])
    return f"{words} words" if words > MOST_WORDS else ""


def wrong_number(sentence: str) -> str:
    """A plural after one, a singular after another number."""
    things = r"(head|MLP|site|pair|quad|neuron|layer|feature|profession|superset|name|claim|check|template)"
    one = re.search(rf"(?<![\d.,-])(?:1|one) (?:other |single )?{things}(?:e?s)\b", sentence)
    more = re.search(rf"(?<![\d.,])(?:0|[2-9]|[1-9]\d+) {things}\b(?![-'s]| \w+s\b)", sentence)
    verb = re.search(r"(?<![\d.,])\b1 (?:\w+ )?are\b", sentence)
    found = one or more or verb
    return found[0] if found else ""


def site_beside_number(sentence: str) -> str:
    """A site's name with a number straight behind it, or a head's number without the word "head"."""
    found = re.search(
        r"(?:(?<![\w.\[])\d{1,2}\.\d{1,2}|\b(?:mlp|MLP|attn|layer) \d+) [-+]?\d+(?:\.\d+)?(?![\w.]* of)%?",
        sentence,
    )
    return found[0] if found else ""


def none_in_prose(sentence: str) -> str:
    """The word that tables have for nothing."""
    found = re.search(r"(?:\w+ )?\bnone\b(?! of)[^,;.]{0,12}", sentence)
    return found[0] if found else ""


def exception_text(sentence: str) -> str:
    """The text of an error, or a value that was never put into words."""
    found = re.search(
        r"\bgot \w+ -?\d|\bneeds \d+ |Error\b|Traceback|\bnan\b|\bNaN\b|\binf\b|\bNone\b(?! of)|\bTrue\b|\bFalse\b",
        sentence,
    )
    return found[0] if found else ""


def left_open(sentence: str) -> str:
    """Marks of a list that was empty: doubled or lost spaces, empty brackets, doubled marks; but for a token's own."""
    sentence = re.sub(r'"[^"]*"', '"x"', sentence)
    found = re.search(r"\(\s*\)|[,;:] ?[,;:.]|\.\.(?!\.)|(?<=\w) [,;](?= )|\bof  |: ?\.$", sentence)
    return found[0] if found else ""


def no_interval(sentence: str) -> str:
    """An estimate (a number of two decimals or more) without an interval, and no word on why there is none."""
    text = re.sub(rf"{NUMBER}{INTERVAL}", "ESTIMATE", sentence)
    for name in NAMES:
        text = re.sub(name, "NAME", text)
    found = re.findall(BARE, text)
    return ", ".join(found[:4]) if found and not NO_INTERVAL.search(sentence) else ""


RULES: dict[str, Callable[[str], str]] = {
    "more than two numbers": too_many_numbers,
    "longer than 40 words": too_long,
    "singular and plural": wrong_number,
    "site beside a number": site_beside_number,
    "none in prose": none_in_prose,
    "exception as prose": exception_text,
    "something left out": left_open,
    "estimate without interval": no_interval,
}


def sentences_of(text: str) -> list[str]:
    """The sentences of a text in Markdown: items of lists apart, rows of tables left out."""
    text = re.sub(r"`[^`]*`", "`x`", text)
    text = re.sub(r"\{[a-z:]+\}`x`|\$[^$]+\$", "", text)
    text = re.sub(r"\[([^\]]*[A-Za-z][^\]]*)\]\([^)]*\)", r"\1", text)
    text = text.replace(" → ", ".\n\n")  # a chain, whose links are read one by one
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("|")]
    blocks = re.split(r"\n\s*\n|\n(?=- )", "\n".join(lines))
    out = []
    for block in blocks:
        words = " ".join(block.replace("**", "").replace("*", "").removeprefix("- ").split())
        out += re.split(
            r"(?<=[.!?:])(?<!et al\.)(?<!e\.g\.)(?<!i\.e\.) (?=[A-Z`\"“\d]|mlp \d|neuron \d|attn \d)", words
        )
    return [sentence for sentence in out if sentence]


def of_findings(results: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of what the findings of a results folder say."""
    for path in sorted(results.glob("*.findings.json")):
        found, step = json.loads(path.read_text(encoding="utf-8")), path.name.split(".")[0]
        outline = found.get("outline") or {}
        texts = {
            "sentences": found.get("sentences", []),
            "headline": found.get("headline", []),
            "outline": [outline[key] for key in ("answer", "not") if key in outline] + outline.get("sentences", []),
            "caption": [figure["caption"] for figure in found.get("figures", [])],
        }
        seen: set[str] = set()
        for kind, each in texts.items():
            for text in each:
                if text not in seen:
                    yield f"{step}, {kind}", text
                seen.add(text)


def of_pages(book: Path) -> Iterator[tuple[str, str]]:
    """(page, text) of the paragraphs, items and captions that the cells of a built book's pages show."""
    for path in sorted(book.rglob("_build/html/executed/*.html")):
        page = path.read_text(encoding="utf-8")
        article = re.search(r"<article.*?</article>", page, re.S)
        for output in re.findall(
            r'<div class="cell_output.*?(?=<div class="cell |<section|</article>|</section>)', article[0], re.S
        ):
            for text in re.findall(r"<(?:p|li|figcaption)\b[^>]*>(.*?)</(?:p|li|figcaption)>", output, re.S):
                text = re.sub(r"<code.*?</code>", "`x`", text, flags=re.S)
                words = " ".join(unescape(re.sub(r"<[^>]+>", "", text)).split()).removesuffix("#").strip()
                if words:
                    yield path.stem, words


def faults(texts: Iterator[tuple[str, str]]) -> list[Fault]:
    """What breaks a rule, in order; a sentence that was said before is passed over."""
    out, seen = [], set()
    for place, text in texts:
        for sentence in sentences_of(text):
            if sentence in seen:
                continue
            seen.add(sentence)
            out += [Fault(place, rule, what, sentence) for rule, test in RULES.items() if (what := test(sentence))]
    return out


def counts(found: list[Fault]) -> Counter[str]:
    """How many sentences break each rule."""
    return Counter({rule: 0 for rule in RULES}) + Counter(fault.rule for fault in found)


def main() -> int:
    """Print what is wrong and how often."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("book", type=Path, nargs="?")
    parser.add_argument("--rule", choices=RULES)
    args = parser.parse_args()
    texts = [*of_findings(args.results), *(of_pages(args.book) if args.book else ())]
    found = [fault for fault in faults(iter(texts)) if args.rule in (None, fault.rule)]
    for fault in found:
        print(f"{fault.place}: {fault.rule} ({fault.what})\n    {fault.sentence}")
    total = sum(len(sentences_of(text)) for _, text in dict.fromkeys(texts))
    words = Counter()
    for place, text in dict.fromkeys(texts):
        words[place] += len(text.split())
    print(f"\n{total} sentences; by rule: {dict(counts(found)) or 'no fault'}")
    print("words:", dict(words))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
