"""What sentences and findings of all pages share: lists and intervals in words, the head of findings, leading sites."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from IPython.display import Markdown, display
from matplotlib.figure import Figure

from lib import effects
from lib.effects import reported
from lib.stats import MINIMUM_CLUSTERS
from pipeline.params import Shared
from pipeline.step import Step
from report import plots
from report.site_tables import picked

ONE_HALF = (
    " The pairs form a single half here: what is said of discovery and confirmation is about the same pairs, so the "
    "leading sites are picked and reported on the same data."
)


OVER_QUADS = "confirmation half, studentised bootstrap intervals over quads"


KINDS = {"head": "head", "MLP": "mlp", "attention module": "attn"}

# Whether sites are specific to what is asked, against an attribute: verdicts as pages print them.
SPECIFICITY = {"specific": "specific", "general": "not specific", "open": "not decided"}
TOO_FEW = "too few quads to test"


def listed(words: Iterable[object]) -> str:
    """Words as a sentence lists them: "a", "a and b", "a, b and c"; "none" for nothing."""
    words = [str(word) for word in words]
    return " and ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:]) or "none"


def literal(text: str) -> str:
    """A text for MyST, in which its own marks, such as those of HTML, stand for themselves."""
    return re.sub(r"([\\`*_{}\[\]<>&|~^$])", r"\\\1", text)


def counted(number: int, thing: str) -> str:
    """A number of things: 1 head, 2 heads, 1,200 pairs."""
    return f"{number:,} {thing}{'s' * int(number != 1)}"


def is_are(number: int) -> str:
    """The verb of so many things."""
    return "is" if number == 1 else "are"


def have(number: int) -> str:
    """What so many things do that have something."""
    return "has" if number == 1 else "have"


def capital(text: str) -> str:
    """A text as a sentence begins: its first letter large, the others as they are; a site keeps its own name."""
    return text if re.match(r"(mlp|attn|resid|neuron) \d", text) else text[:1].upper() + text[1:]


def sites(names: Iterable[str], most: int | None = None) -> str:
    """Sites as a sentence names them, in their order: a head's number never stands bare, lest it be read as an effect.

    "head 21.6", "heads 21.6 and 7.0", "mlp 8 and head 21.6"; "no site" for nothing; beyond `most`, how many more.
    """
    names = list(names)
    shown, heads = names[:most], [name for name in names if name[:1].isdigit()]
    more = [f"{len(names) - len(shown)} more"] * (len(names) > len(shown))
    if not names:
        return "no site"
    if len(shown) > 1 and len(heads) == len(names):
        return f"heads {listed(shown + more)}"
    return listed([f"head {name}" if name in heads else name for name in shown] + more)


def extremes(rows: pd.DataFrame, name: str) -> str:
    """The lowest and the highest estimate of some rows: "0.60 [0.50, 0.70] (one) to 0.90 [0.80, 1.00] (other)"."""
    known = rows.dropna(subset="estimate").sort_values("estimate", kind="stable")
    each = [f"{of_row(row)} ({getattr(row, name)})" for row in known.iloc[[0, -1][: len(known)]].itertuples()]
    return " to ".join(each) or "not measured"


def tabled(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A small table in Markdown, for three numbers or more; it stands among sentences as a paragraph of its own."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def number_word(number: int) -> str:
    """A small number as a word, a large one in figures."""
    small = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return small[number] if number < len(small) else str(number)


def interval(estimate: float, low: float | None, high: float | None, digits: int = 2) -> str:
    """An estimate with its interval, "0.33 [0.28, 0.38]", or alone where there is none; with up to two more digits
    where an end beside zero would else look like zero, though the estimate does not."""
    if estimate is None or np.isnan(estimate):
        return "not defined"
    bare = low is None or high is None or np.isnan(low) or np.isnan(high)
    if not bare and (low > 0 or high < 0) and float(f"{estimate:.{digits}f}"):
        near = min(abs(low), abs(high))
        digits = next((n for n in range(digits, digits + 3) if float(f"{near:.{n}f}")), digits)
    texts = [f"{value:.{digits}f}" for value in ((estimate,) if bare else (estimate, low, high))]
    texts = [text.lstrip("-") if float(text) == 0 else text for text in texts]
    return texts[0] + ("" if bare else f" [{texts[1]}, {texts[2]}]")


def with_ends(row: Mapping[str, Any] | None, digits: int = 2, prefix: str = "") -> str:
    """The estimate of a mapping with its interval; `prefix` of its three keys ("placebo_")."""
    if row is None:
        return "not measured"
    return interval(*(row[f"{prefix}{end}"] for end in ("estimate", "low", "high")), digits)


def in_logits(rows: pd.DataFrame, kind: str) -> str:
    """What stands in brackets after effects: "logits, familywise intervals", or that there are none."""
    return (
        f"logits, {kind}" if rows["low"].notna().any() else f"logits; fewer than {MINIMUM_CLUSTERS} quads: no intervals"
    )


def of_row(row: Any) -> str:
    """The estimate of a table's row with its interval; "not measured" where there is none."""
    return "not measured" if pd.isna(row.estimate) else interval(row.estimate, row.low, row.high)


def of_rows(rows: pd.DataFrame, name: str) -> str:
    """Every row's name with its estimate."""
    return listed(f"{getattr(row, name)} {of_row(row)}" for row in rows.itertuples())


def about_model(step: Step) -> dict:
    """What a findings file says of the model."""
    record = step.record.get("model", {})
    return {"name": step.params.model, **{key: value for key, value in record.items() if key != "name"}}


def not_done(step: Step) -> dict:
    """The findings of a step whose task the model cannot do."""
    sentence = f"Nothing was computed for the task `{step.params.task}`: {step.able().why}"
    subject = {"model": {"name": step.params.model}, "task": step.params.task}
    return {**subject, "able": False, "sentences": [sentence], "figures": []}


def ends_here(found: Mapping[str, Any]) -> NoReturn:
    """Show the findings, and end the notebook without an error (papermill takes `SystemExit(0)` for the end)."""
    display(statement(found))
    raise SystemExit(0)


def finished(
    step: Step, found: Mapping[str, Any], figures: Mapping[str, Figure], captions: Mapping[str, str]
) -> dict[str, Any]:
    """Findings with their figures saved, written for the steps that follow and for the landing page."""
    saved = [
        {"file": plots.save(figure, step.results, step.name, name), "caption": captions[name]}
        for name, figure in figures.items()
    ]
    return step.write_findings({**found, "figures": saved})


def answer(found: Mapping[str, Any]) -> Markdown:
    """The answer at the head of a page: what the headline of the findings, else their first sentence, begins with, and
    what else is in it as a list."""
    first, *others = found.get("headline") or found["sentences"][:1]
    return Markdown("\n\n".join([first, *(f"- {text}" for text in others)]))


def shown(table: pd.DataFrame | None, digits: int, otherwise: str | None = None) -> pd.DataFrame | Markdown | None:
    """A table for the page, rounded; where it has no rows, what to say instead, or nothing."""
    if table is None or table.empty:
        return None if otherwise is None else Markdown(otherwise)
    return table.round(digits)


def statement(found: Mapping[str, Any]) -> Markdown:
    """Every sentence of the findings."""
    return Markdown("\n\n".join(found["sentences"]))


def joined(step: Step, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The findings of a step of several parts, their figures saved.

    A part has `sentences`, `figures` by name, `captions` of those that are saved, perhaps a `headline`, and its numbers
    as mappings under names of its own.
    """
    own = {"figures", "captions"}
    numbers = {
        key: value for part in parts for key, value in part.items() if isinstance(value, Mapping) and key not in own
    }
    return {
        "model": about_model(step),
        "task": step.params.task,
        "able": True,
        **numbers,
        "sentences": [sentence for part in parts for sentence in part["sentences"]],
        "headline": [sentence for part in parts for sentence in part.get("headline", part["sentences"][:1])],
        "figures": [
            {"file": plots.save(figure, step.results, step.name, name), "caption": part["captions"][name]}
            for part in parts
            for name, figure in part["figures"].items()
            if name in part["captions"]
        ],
    }


def top_sites(table: pd.DataFrame, count: int) -> str:
    """The site that leads, picked on discovery, with its confirmation effect in logits, and the next in their order."""
    first, *others = reported(picked(table, count)).itertuples()
    next_ones = f", before {sites(row.site for row in others)}" * bool(others)
    return f"{sites([first.site])} ({of_row(first)}){next_ones}"


def top_sites_sentence(table: pd.DataFrame, params: Shared, count: int, what: str) -> str:
    """The leading sites, picked on discovery, with their confirmation effects: falls of logit_diff where `what` is a
    damage, else rises."""
    top, sure = reported(picked(table, count)), effects.confirmed(table, params)["site"]
    found, others = len(sure), top.loc[~top["site"].isin(sure), "site"]
    change = "fall" if "damage" in what else "rise"
    many = (
        f"{found} of {counted(table['site'].nunique(), 'site')} {is_are(found)} significant familywise in both halves, "
        f"with a {change} above the model's noise ({params.floor:g} logits)."
    )
    least = ""
    if len(others):
        least = " Not significant of these: " + ("all." if len(others) == len(top) else f"{sites(others)}.")
    if table["low"].isna().any():
        many = f"There are too few quads to say of any of the {table['site'].nunique()} sites that it is significant."
        least = ""
    unit = in_logits(top, f"familywise {params.level:.0%} intervals")
    return (
        f"{many} Of largest {what} on the discovery half is {top_sites(table, count)}; in brackets the {change} of "
        f"logit_diff on the confirmation half ({unit}).{least}" + ONE_HALF * (table["half"].nunique() == 1)
    )


def heads_or_mlps(table: pd.DataFrame, params: Shared, what: str) -> str:
    """How the confirmed sites divide into heads, MLPs and whole attention modules, and the largest head and MLP of them
    on the discovery half; of all sites where there are too few quads to confirm any."""
    sure, few = effects.confirmed(table, params), table["low"].isna().any()
    counts = {name: int((sure["component"] == component).sum()) for name, component in KINDS.items()}
    asked = table if few else table[table["site"].isin(sure["site"])]
    best = []
    for name in ("head", "MLP"):
        if (asked["component"] == KINDS[name]).any():
            row = reported(picked(asked[asked["component"] == KINDS[name]], 1)).iloc[0]
            share = interval(row["ratio"], row["ratio_low"], row["ratio_high"])
            best.append(f"{sites([row['site']])} among {name}s ({share} of the gap)")
    each = [f"{number_word(count)} {name}{'s' * (count != 1)}" for name, count in counts.items()]
    lead = f"Significant in both halves are {listed(each)}"
    if not best:
        return f"{lead}."
    numbers = "in brackets what the confirmation half gives"
    largest = f"largest {what} on the discovery half is that of {listed(best)}; {numbers}."
    return f"The {largest}" if few else f"{lead}. Of these, the {largest}"


def site_rows(table: pd.DataFrame) -> list[dict]:
    """The confirmation rows of a table, for steps that follow, beside the discovery half's estimate if there is one."""
    keep = ["site", "layer", "component", "head", "estimate", "low", "high", "p", "ratio", "ratio_low", "ratio_high"]
    own, first = reported(table)[keep], table[table["half"] == "discovery"].set_index("site")["estimate"]
    return own.assign(discovery=own["site"].map(first) if table["half"].nunique() > 1 else None).to_dict("records")
