"""The page on robustness: how far the effects of heads depend on how they are measured. No model, no torch.

1. `fields` fills `book/robustness.md` from what `bench/robustness.py` has measured.
2. `agreements`: rank agreement and shared leading heads of every choice; `agreement_figure` draws them.
3. `flips` names what leaves, enters and turns; `templates` is the random effect of the wording, `random` what random
   weights give.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style

from report import plots
from report.scale import figure, joined, measured_on, paragraph, seconds, stale, table
from report.words import counted, interval, listed, with_ends

COMMAND = "python -m bench.robustness"
ALIKE = 0.9  # rank agreement, above which a choice is said to keep the order of heads
SURE = 0.95  # share of the quads drawn anew, from which a head is surely among the leading, or is not
NO_CHOICE = ("half", "random weights")  # groups that are no choice of how to measure
LABEL = 46  # letters of a template in the figure
CAPTION = """Left: rank agreement of the heads' effects with the reference, noise taken out (dots; 95% intervals over
    quads, drawn up to 1.1), and the plain correlation of the mean effects (hollow). Right: how many of the leading
    heads are the same, with the middle 95% when quads are drawn anew."""

Found = Mapping[str, Any]


def fields(results: Path, to: Path) -> dict[str, str]:
    """Every section of the page as MyST."""
    path = results / "robustness.json"
    if not path.is_file():
        empty = dict.fromkeys(("agreements", "flips", "templates", "random"), "")
        return {"summary": f"Not measured yet: run `{COMMAND}`."} | empty
    found = json.loads(path.read_text(encoding="utf-8"))
    sections = {"summary": summary, "flips": flips, "templates": templates, "random": random}
    out = {name: section(found) for name, section in sections.items()}
    drawn = figure(agreement_figure(found), to, "agreement", CAPTION, "robustness")
    return out | {"agreements": joined(agreements(found), drawn)}


def choices(found: Found) -> list[Found]:
    """The comparisons of the reference with another way of measuring."""
    return [row for row in found["comparisons"] if row["group"] not in NO_CHOICE and "beside" not in row["name"]]


def named(row: Found) -> str:
    """A comparison in words; of a template, its text."""
    return f'"{worded(row["name"])}"' if row["group"] == "template" else row["name"]


def worded(template: str) -> str:
    """A template with A and B for its names."""
    return template.replace("{a}", "A").replace("{b}", "B")


def together(rows: Iterable[Found]) -> str:
    """Comparisons in a sentence, templates by their number."""
    rows = list(rows)
    wordings = sum(row["group"] == "template" for row in rows)
    others = [named(row) for row in rows if row["group"] != "template"]
    return listed([*others, *[counted(wordings, "other template")] * bool(wordings)])


def one_by_one(items: Iterable[str], otherwise: str) -> str:
    """A list in a sentence, or what is said where there is nothing to list."""
    items = list(items)
    return listed(items) if items else otherwise


def coded(sites: Iterable[str]) -> str:
    """Heads in a sentence."""
    return one_by_one((f"`{site}`" for site in sites), "none")


def summary(found: Found) -> str:
    """What was measured and where, the reference, and what holds under every choice."""
    tops = [row["site"] for row in found["leading"]]
    gone = {flip["site"] for row in choices(found) for flip in row["left"]}
    stay, leave = ([site for site in tops if (site in gone) == out] for out in (False, True))
    lines = [[f"`{row['site']}`", with_ends(row)] for row in found["leading"]]
    template = worded(next(iter(found["templates"]["gaps"])))
    return joined(
        stale(found, COMMAND),
        paragraph(f"""Model `{found["model"]}`: {counted(found["heads"], "head")} at the last token,
            {found["quads"]} quads ({found["all quads"]} for the two halves), in {seconds(found["seconds"])} at commit
            `{(found["commit"] or "none")[:7]}`{" with changes" * bool(found["dirty"])}. {measured_on(found)}"""),
        paragraph(f"""The reference is {found["reference"]}, in the template "{template}"; the gap is {found["gap"]:.2f}
            logits. Its {found["top"]} leading heads, mean effects in logits with 95% intervals:"""),
        table(["head", "effect"], lines),
        paragraph(f"""Among the {found["top"]} leading heads under every choice below: {coded(stay)}. Not under at least
            one of the {len(choices(found))}: {coded(leave)}."""),
    )


def agreements(found: Found) -> str:
    """Rank agreement and the leading heads that are shared, choice by choice."""
    lines = [
        [row["group"], named(row), shown(row["rank"]), f"{row['rank']['plain']:.2f}", of_top(row["shared"])]
        + [" and ".join(map(str, dict.fromkeys(row["quads"])))]
        for row in found["comparisons"]
    ]
    made = choices(found)
    known = [row for row in made if row["rank"]["low"] is not None]
    alike = [row for row in known if row["rank"]["low"] > ALIKE]
    other = [row for row in known if row["rank"]["high"] < ALIKE]
    rest = [row for row in made if row not in alike and row not in other]
    least = min(made, key=lambda row: row["shared"]["estimate"])
    said = f"""The heads keep their order (agreement surely above {ALIKE}) under {together(alike)}; they surely do not
        (below it) under {together(other)}; it is open under {together(rest)}. The fewest of the leading heads are the
        same under {named(least)}: {least["shared"]["estimate"]} of {found["top"]}. Each interval stands by itself: they
        are not corrected for their number."""
    head = ["what is changed", "to", "rank agreement", "plain", f"of the {found['top']} leading, the same", "quads"]
    return joined(paragraph(said), table(head, lines))


def shown(rank: Found) -> str:
    """An agreement with its interval; without a value where a table's own halves do not agree."""
    return "cannot be said" if rank["estimate"] is None else interval(rank["estimate"], rank["low"], rank["high"])


def of_top(shared: Found) -> str:
    return f"{shared['estimate']} [{shared['low']}, {shared['high']}]"


def agreement_figure(found: Found) -> plots.Figure:
    """Two panels: agreement, and shared leading heads, a line per comparison."""
    rows = found["comparisons"]
    names = [brief(row) for row in rows]
    with style.context(plots.STYLE):
        drawn = plots.Figure(figsize=(plots.WIDTH, 0.8 + 0.24 * len(rows)))
        left, right = drawn.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for at, row in enumerate(rows):
            rank, shared = row["rank"], row["shared"]
            left.plot(rank["plain"], at, "o", color=plots.GREY, markerfacecolor="none")
            if rank["low"] is not None:
                left.plot([max(rank["low"], -1.1), min(rank["high"], 1.1)], [at, at], color=plots.BLUE)
            if rank["estimate"] is not None:
                left.plot(np.clip(rank["estimate"], -1.1, 1.1), at, "o", color=plots.BLUE)
            right.plot([shared["low"], shared["high"]], [at, at], color=plots.BLUE)
            right.plot(shared["estimate"], at, "o", color=plots.BLUE)
        left.set_yticks(range(len(rows)), names, fontsize=7)
        left.set_ylim(len(rows) - 0.5, -0.5)
        left.axvline(1, color=plots.GREY, lw=0.8)
        left.set_xlabel("rank agreement (Spearman)")
        right.set(xlabel=f"shared (of {found['top']})", xlim=(-0.3, found["top"] + 0.3))
        right.set_xticks(range(0, found["top"] + 1, 3))
    return drawn


def brief(row: Found) -> str:
    """A comparison as a label."""
    text = worded(row["name"])
    return text if len(text) <= LABEL else f"{text[: LABEL - 1]}…"


def flips(found: Found) -> str:
    """What leaves and enters the leading heads, and whose sign is another, choice by choice."""
    lines = [
        [named(row), *(one_by_one(map(flip, row[kind]), "–") for kind in ("left", "entered", "signs"))]
        for row in found["comparisons"]
        if row["group"] != "random weights" and (row["left"] or row["signs"])
    ]
    if not lines:
        return f"Nothing: the {found['top']} leading heads are the same everywhere, and no head's sign is another."
    turned = sorted({flip["site"] for row in choices(found) for flip in row["signs"]})
    said = f"""An effect that is positive under one choice and negative under another, both familywise and above the
        model's noise: {coded(turned)}."""
    sure = [
        f"`{flip['site']}` under {named(row)}"
        for row in choices(found)
        for flip in (*row["left"], *row["entered"])
        if min(flip["top"]) <= 1 - SURE and max(flip["top"]) >= SURE
    ]
    clear = f"""Surely another (among the leading in at least {SURE:.0%} of the quads drawn anew of one, and at most
        {1 - SURE:.0%} of the other): {one_by_one(sure, "none")}."""
    body = table(["changed to", "leaves", "enters", "turns"], lines).replace("---:", "---")
    return joined(paragraph(clear), paragraph(said), body)


def flip(row: Found) -> str:
    """A head with its effect before and after, and how often it is among the leading ones when quads are drawn anew."""
    before, after = row["effects"]
    return f"`{row['site']}` ({before:.2f} → {after:.2f}; {row['top'][0]:.0%} → {row['top'][1]:.0%})"


def templates(found: Found) -> str:
    """The wording as a random effect."""
    own = found["templates"]
    shares, gaps = own["shares"], own["gaps"]
    said = f"""In {counted(len(gaps), "template")}, whose gaps are {min(gaps.values()):.2f} to {max(gaps.values()):.2f}
        logits, effects are taken as shares of the template's gap. Of the variance of single measurements,
        {shares["head"]:.0%} lie between heads, {shares["template"]:.0%} in how a template changes them,
        {shares["quad"]:.0%} in how a quad does, and {shares["rest"]:.0%} in what is left. So of the heads' differences
        in one template, another of this kind would show a share of {with_ends(own["consistency"])} (interval over quads
        and templates)."""
    lost = f"Without a gap surely above the noise, and left out: {one_by_one(map(worded, own['no gap']), 'none')}."
    lines = [
        [f"`{row['site']}`", f"{row['mean']:.3f}", f"{row['spread']:.3f}", f"{row['top']} of {len(gaps)}"]
        + [f'{row["least"]:.3f} in "{worded(row["where"])}"']
        for row in own["sites"]
    ]
    head = ["head", "mean over templates", "standard deviation between templates", "among the leading in", "least"]
    return joined(paragraph(said), paragraph(lost * bool(own["no gap"])), table(head, lines))


def random(found: Found) -> str:
    """What random weights of the same shape give."""
    (row,) = (row for row in found["comparisons"] if row["group"] == "random weights")
    largest = found["leading"][0]["estimate"]
    return paragraph(f"""The largest mean effect of a head is {row["largest"]:.3f} logits on a gap of {row["gap"]:.3f}
        (the trained weights': {largest:.2f} on {found["gap"]:.2f}). {row["shared"]["estimate"]} of the {found["top"]}
        leading heads are the same; {chance(found)} would be by chance. The plain rank correlation is
        {row["rank"]["plain"]:.2f}; with noise taken out: {shown(row["rank"])}.""")


def chance(found: Found) -> str:
    """How many leading heads two orders at random share, in the mean."""
    return f"{found['top'] ** 2 / found['heads']:.1f}"
