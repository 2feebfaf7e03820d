"""The claims ledger: what the plan claims, and the verdict that each claim's numbers earn.

1. data/claims.yaml lists every claim of the plan (`CLAIMS`): the step it rests on, where its numbers stand in that
   step's findings, the rule by which they and the threshold decide, and the figure and the rows under it.
2. `at` follows a claim's path into findings. A path that a step that ran does not have is an error.
3. `thresholds` takes each threshold from the profile (`claims` of section `story`), or from the parameter that already
   holds it, as the step that used it recorded it.
4. `judge` gives one claim's entry, decided alone; `ledger` all of them, decided under Holm's correction over every
   claim that was tested. Checks (claims whose outcome says little here) are judged alone and count for nothing.
5. `fingerprint` is the hash of thresholds and rules. A profile that holds it, as `frozen`, set them before its results.
6. `Ledger` is the model of claims.json; its JSON schema is committed as data/claims.schema.json.

Words for verdicts: supported, not supported, not testable here, not tested. No number of a model stands in this file.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import norm

from lib.questions import Question
from lib.stats import MINIMUM_CLUSTERS, holm, p_of_interval
from pipeline import keys
from pipeline.declaration import Plan
from pipeline.params import ROOT, ParameterError, Shared, read_yaml
from pipeline.units import read_json
from report.words import interval
from steps.story.measure import Story

FILE = ROOT / "data" / "claims.yaml"
SUPPORTED, NOT_SUPPORTED, NOT_TESTABLE, NOT_TESTED = "supported", "not supported", "not testable here", "not tested"
VERDICTS = (SUPPORTED, NOT_SUPPORTED, NOT_TESTABLE, NOT_TESTED)
CORRECTION = (
    "Verdicts hold for all claims together that the same people decide: by Holm's correction of their p values. Each "
    "interval holds on its own; its claim's p value is one minus the highest level at which it would still lie beyond "
    "the threshold, the interval being stretched by the tails of Student's t of 7 degrees of freedom. How small a "
    "small one is rests on that assumption."
)
FRESH, HALF, EXPLORATORY = "fresh people", "confirmation half", "exploratory"
TIERS = {
    FRESH: "measured on people who were kept aside until the claim was set",
    HALF: "set before results were seen, measured on the half that had no say in what was picked",
    EXPLORATORY: "set when results on the same people, or others' on the same model, had been seen",
}
DECIDING = ("at", "leaves", "numbers_of", "decided", "p_value", "equivalence", "ledger")
ATTRIBUTE = "region"  # the placebo attribute that data/claims.yaml speaks of
GROUPS = ("group", "superset", "class_name", "added", "site")  # columns that say of what a row is, one of several
POWER = 0.8  # that a number of quads is worked out for
COARSE = "could give no p small enough"  # said of ranks among other heads


class ClaimError(ParameterError):
    """A claim without a threshold, a threshold without a claim, or numbers that are not where they should be."""


class Numbers(NamedTuple):
    """What a claim's path leads to."""

    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    met: bool | None = None  # whether the step's own test meets what was expected
    verdict: str | None = None  # in that test's words
    why: str | None = None  # why there is nothing to judge
    power: float | None = None  # of the step's own test, were the claim true
    of: int = 1  # rows that this is the largest of
    least: float = 0.0  # smallest p value that its tests can give
    quads: int | None = None  # that it rests on, where the step says so


class Rule(NamedTuple):
    """How numbers and a threshold t (and a centre c) give a verdict."""

    asked: str  # what must hold, in words
    needs: tuple[str, ...]  # numbers without which it cannot be asked
    holds: Callable[[Numbers, float, float], bool]


RULES = {
    "above": Rule("lower end of the interval above {t}", ("low",), lambda n, t, c: n.low > t),
    "below": Rule("upper end of the interval below {t}", ("high",), lambda n, t, c: n.high < t),
    "within": Rule(
        "whole interval within {t} of {c:g}", ("low", "high"), lambda n, t, c: c - t < n.low and n.high < c + t
    ),
    "p": Rule("p below {t}", ("p",), lambda n, t, c: n.p < t),
    "count": Rule("at least {t}, with p below {p:g}", ("estimate", "p"), lambda n, t, c: n.estimate >= t),
    "most": Rule("at most {t}", ("estimate",), lambda n, t, c: n.estimate <= t),
    "own": Rule("the step's own test, with a margin of {t}, meets what was expected", ("met",), lambda n, t, c: n.met),
}


class Strict(BaseModel):
    """A model that takes no other fields."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Came(Strict):
    """When threshold and rule were set, by commits (see data/claims.yaml)."""

    word: Literal["before", "after"]
    set: str
    seen: str | None


class Claim(Strict):
    """One claim of the plan and how it is decided; data/claims.yaml says what each field means."""

    id: str
    section: str
    text: str
    step: str
    quantity: str
    rule: Literal[*RULES]
    path: str
    figure: str
    rows: tuple[str, str] | None
    threshold_from: str | None = None
    pick: Literal["first", "largest", "weakest"] = "first"
    columns: tuple[str | None, str | None, str | None] = ("estimate", "low", "high")
    p: str | None = None
    centre: float = 0.0
    requires: tuple[str, str] | None = None
    excludes: tuple[str, str] | None = None
    companion: str | None = None
    came: str | None = None
    unit: str = "quads"
    check: str | None = None


class Link(Strict):
    """One link of the plan's sentence (see data/claims.yaml)."""

    claim: str
    plan: str
    here: str
    instead: dict[str, str] = {}


class Answer(Strict):
    """What leads the report, where all of these claims are supported."""

    claims: tuple[str, ...]
    words: str


class Part(Strict):
    """One sentence of the three that say what the circuit is: what it is about, and its clauses, each on a claim or on
    several that answer one question."""

    about: str
    clauses: list[dict[str, str]]


class Row(Strict):
    """A row of the first page: words by claim, for the first that is supported, and for one that is not."""

    about: str
    supported: dict[str, str]
    otherwise: dict[str, str]


_READ = read_yaml(FILE)
CAME = {name: Came.model_validate(came) for name, came in _READ["came"].items()}
CLAIMS = tuple(Claim.model_validate(claim) for claim in _READ["claims"])
ANSWERS = tuple(Answer.model_validate(answer) for answer in _READ["answer"])
OUTLINE = tuple(Part.model_validate(part) for part in _READ["outline"])
FIRST = tuple(Row.model_validate(row) for row in _READ["first"])
LINKS = tuple(Link.model_validate(link) for link in _READ["sentence"])


class Rows(Strict):
    """The rows under a claim."""

    file: str = Field(description="Parquet file in the results folder")
    filter: str = Field(description="of the rows that its numbers are made of, as pandas' DataFrame.query takes it")


class Confirmed(Strict):
    """What fresh people say of a claim (`steps.story.fresh`)."""

    estimate: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None = Field(description="corrected over all claims tested on them")
    alone: Literal[VERDICTS]
    verdict: Literal[VERDICTS]
    reason: str


class Entry(Strict):
    """One claim with its verdict."""

    id: str
    section: str = Field(description="section of the plan")
    claim: str
    step: str
    numbers: str = Field(description="path in the step's findings; `measured`: in those of step 10")
    quantity: str = Field(description="what is estimated, with its unit")
    estimate: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None = Field(description="corrected over all tested claims; null for checks")
    p_from: str = Field(description="the step's own test, or the interval")
    power: float | None = Field(description="of an equivalence test, were there nothing")
    check: str | None = Field(description="why its outcome says little here: outside the tally; null for claims")
    came: Literal["before", "after"] = Field(description="set before or after results were seen")
    set: str | None = Field(description="commit that set threshold and rule last; null if frozen by the profile")
    seen: str | None = Field(description="commit whose results had been seen, or by which they could first be had")
    tier: Literal[tuple(TIERS)] | None = Field(description="what kind of evidence the verdict is; null if undecided")
    asked: str = Field(description="what must hold for the claim to be supported")
    threshold: float | None
    threshold_from: str = Field(description="the parameter that holds the threshold")
    alone: Literal[VERDICTS] = Field(description="verdict of this claim by itself, uncorrected")
    here: Literal[VERDICTS] = Field(description="on this report's people, under the correction; of checks: alone")
    verdict: Literal[VERDICTS] = Field(description="`here`, or that of fresh people where they decide")
    fresh: Confirmed | None = Field(None, description="on fresh people, if they were asked under these rules")
    reason: str
    refuted_by: str = Field(description="what would turn the verdict")
    figure: str | None = Field(description="page and figure, from the root of the book")
    rows: Rows | None


class Ledger(Strict):
    """claims.json."""

    profile: str
    model: str
    task: str
    level: float
    correction: str
    fingerprint: str = Field(description="hash of all thresholds and rules")
    frozen: bool = Field(description="whether the profile holds this hash, set before its results")
    fresh: str = Field(description="what fresh people decided; empty for a profile that has none")
    sentence: list[str] = Field(description="the plan's sentence, part by part, worded by the verdicts")
    claims: list[Entry]


def schema() -> str:
    """The JSON schema of claims.json, as committed."""
    return json.dumps(Ledger.model_json_schema(), indent=1) + "\n"


# --- numbers and thresholds ---------------------------------------------------------------------------------------


def at(found: Mapping[str, Any], path: str, params: Shared) -> Any:
    """What stands at a path such as `joint[quantity=recovery]` or `sites[component=head|mlp]` in findings.

    A condition takes the rows of a list whose column has one of the values (`!=`: none of them); `{task}` in it is a
    parameter. None, and a mapping that says `why` it has no numbers, end the way. KeyError names what is not there.
    """
    value: Any = found
    for key, where in re.findall(r"(\w+)(?:\[([^\]]*)\])?", path):
        if value is None or (isinstance(value, Mapping) and value.get("why") and key not in value):
            return value
        if not isinstance(value, Mapping) or key not in value:
            raise KeyError(f"{key!r} of {path!r}")
        value = value[key]
        for condition in filter(None, where.split(",")):
            column, sign, words = re.split("(!?=)", condition.strip(), maxsplit=1)
            wanted = [word.format(**params.model_dump()) for word in words.split("|")]
            if any(column not in row for row in value or ()):
                raise KeyError(f"column {column!r} of {path!r}")
            value = [row for row in value or () if (str(row[column]) in wanted) == (sign == "=")]
    return value


def leaves(value: Any) -> Iterator[Any]:
    """What a list, or a mapping, of lists holds."""
    for item in value.values() if isinstance(value, Mapping) else value or ():
        yield from leaves(item) if isinstance(item, (list, tuple)) else (item,)


def numbers_of(claim: Claim, found: Mapping[str, Any], params: Shared) -> Numbers:
    """The numbers under a claim, from the findings of its step; `why` where there are none to judge."""
    try:
        value = at(found, claim.path, params)
        rows = [row for row in (value if isinstance(value, list) else [value]) if row is not None]
        if not rows:
            return Numbers(why="the step has no such numbers here")
        if rows[0].get("why"):
            return Numbers(why=rows[0]["why"])
        columns = dict(zip(("estimate", "low", "high"), claim.columns, strict=True)) | {"p": claim.p}
        columns |= {"met": "met", "verdict": "verdict", "power": "power"} if claim.rule == "own" else {}
        columns |= {"least": "smallest"} if claim.rule == "count" else {}
        read = [Numbers(**{name: row[column] for name, column in columns.items() if column}) for row in rows]
        read = [
            n._replace(quads=row["n"]) if {"n", "level"} <= row.keys() else n for n, row in zip(read, rows, strict=True)
        ]
    except KeyError as error:
        raise ClaimError(
            f"claim {claim.id}: the findings of step {claim.step} have no {error.args[0]}: run the step again, or "
            "correct the claim's path in data/claims.yaml"
        ) from None
    if claim.columns[0]:  # a number that is not defined is null
        read = [n for n in read if n.estimate is not None] or [Numbers(why="its numbers are not defined here")]
    if claim.pick == "largest":
        return max(read, key=lambda n: n.estimate or 0)._replace(of=len(read))
    if claim.pick == "weakest":
        if claim.rule == "below":  # a bound may have no lower end
            bounds = [n for n in read if n.high is not None]
            return max(bounds, key=lambda n: n.high) if bounds else max(read, key=lambda n: n.estimate)
        certain = [n for n in read if n.low is not None]
        return min(certain, key=lambda n: n.low) if certain else min(read, key=lambda n: n.estimate)
    return read[0]


def thresholds(
    params: Story, parameters: Callable[[str, Shared], Mapping[str, Any]] | None = None
) -> dict[str, tuple[float | None, str]]:
    """Threshold of each claim and the parameter that holds it; None where the step that holds it has not run.

    `parameters` gives those of another step; by default as they were when it ran. ClaimError for a claim without a
    threshold, and for a threshold that belongs to no claim.
    """
    held_by = {claim.id: claim.threshold_from for claim in CLAIMS}
    names = sorted(claim for claim, key in held_by.items() if key is None)
    for name in params.claims:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            why = f"there is no such claim{meant}; the claims are {', '.join(names)}"
            if name in held_by:
                why = f"its threshold is the parameter {held_by[name]}; change that"
            raise ClaimError(f"claims of section story: {name} = {params.claims[name]!r}: {why}")
    if unknown := set(params.left_out) - held_by.keys():
        raise ClaimError(f"left_out of section story: there is no claim {', '.join(sorted(unknown))}")
    out: dict[str, tuple[float | None, str]] = {}
    for claim in CLAIMS:
        if claim.threshold_from is not None:
            step, _, key = claim.threshold_from.rpartition(".")
            held = (parameters or recorded)(step, params).get(key) if step else getattr(params, key)
            out[claim.id] = held, claim.threshold_from
        elif claim.id in params.claims:
            out[claim.id] = params.claims[claim.id], f"story.claims.{claim.id}"
        else:
            raise ClaimError(
                f"claim {claim.id} ({claim.text}) has no threshold: add `{claim.id}: <number>` under `claims:` in "
                f"section story of the profile; it is asked of {claim.quantity}"
            )
    return out


def fingerprint(held: Mapping[str, tuple[float | None, str]], params: Story) -> str:
    """The hash of every claim's threshold and rule, and of what is left out: all that decides but for the numbers."""
    words = {"section", "text", "quantity", "figure", "rows", "came", "unit"}
    rules = {claim.id: [held[claim.id][0], claim.model_dump(mode="json", exclude=words)] for claim in CLAIMS}
    hashed = {"level": params.level, "correction": "Holm", "claims": rules, "left_out": sorted(params.left_out)}
    return keys.hash_json(hashed | {"code": deciding_code()})[:16]


@cache
def deciding_code() -> list[str]:
    """The code by which numbers and a threshold become a verdict, as it is written (so that every Python gives the same
    hash of it)."""
    source, functions = Path(__file__).read_text(encoding="utf-8"), (*map(globals().get, DECIDING), holm, p_of_interval)
    start = source.index("RULES = {")
    return [source[start : source.index("\n}\n", start)], *map(inspect.getsource, functions)]


def recorded(step: str, params: Shared) -> Mapping[str, Any]:
    """The parameters under which a step's results were made, {} where it has not run."""
    paths = (folder / f"{step}.run.json" for folder in keys.sources(params))
    path = next((path for path in paths if path.is_file()), None)
    return {} if path is None else read_json(path).get("parameters", {})


# --- verdicts -----------------------------------------------------------------------------------------------------


def of_question(text: str, topic: Question) -> str:
    """A text of data/claims.yaml about the question's own placebo attribute, in the place of `ATTRIBUTE`."""
    return re.sub(rf"\b{ATTRIBUTE}\b", topic.placebo or ATTRIBUTE, text)


def judge(
    claim: Claim, found: Mapping[str, Any] | None, threshold: float | None, held_by: str, plan: Plan, params: Shared
) -> Entry:
    """The entry of one claim, decided alone; `found` are the findings of its step, None if it has not run."""
    claim = Claim.model_validate_json(of_question(claim.model_dump_json(), params.topic))
    rule, page, n = RULES[claim.rule], plan.page(claim.step), Numbers()
    if claim.id in params.left_out:
        verdict, reason = NOT_TESTED, "this profile leaves it out: it has too few quads, or of each class too few"
    elif found is None:
        verdict, reason = NOT_TESTED, f"step {page[:2]} ({claim.step}) has not run"
    elif found.get("able") is False:
        verdict, reason = NOT_TESTABLE, found["sentences"][0]
    else:
        n = numbers_of(claim, found, params)
        verdict, reason = decided(claim, n, found, threshold, params)
        reason = more_of(claim, n, found, threshold, params, verdict, reason)
        if claim.requires and reason.endswith(claim.requires[1]) and at(found, claim.requires[0], params) is None:
            verdict, reason = NOT_TESTABLE, f"{reason}: that was not measured, or on too few quads"
        if beside := (found.get("measured") or {}).get("beside"):  # of a slice without heads: other sites
            reason = reason.replace("random heads", beside)
    told = {"c": claim.centre, "p": 1 - params.level}
    asked = rule.asked.format(t=held_by if threshold is None else f"{threshold:g}", **told)
    there, rows = verdict in (SUPPORTED, NOT_SUPPORTED), None
    if there and claim.rows:
        rows = Rows(
            file=f"{claim.rows[0]}.parquet", filter=claim.rows[1].format(**params.model_dump(), **picked(found))
        )
    came = CAME.get(claim.came or "", Came(word="after", set="", seen=None))
    return Entry(
        **claim.model_dump(include={"id", "section", "step", "quantity", "check"}),
        estimate=n.estimate,
        low=n.low,
        high=n.high,
        p=p_value(claim, n, threshold, params.level) if there else None,
        p_holm=None,
        p_from="the interval" if n.p is None and n.low is not None else "the step's own test",
        power=n.power if claim.rule != "within" or None in (n.low, threshold) else equivalence(n, threshold)[0],
        came=came.word,
        set=came.set or None,
        seen=came.seen,
        tier=None,
        claim=claim.text,
        numbers=claim.path,
        asked=asked,
        threshold=threshold,
        threshold_from=held_by,
        alone=verdict,
        here=verdict,
        verdict=verdict,
        reason=reason,
        refuted_by=turned(verdict, asked),
        figure=f"executed/{page}.ipynb#{claim.figure}" if there and claim.figure else None,
        rows=rows,
    )


def more_of(
    claim: Claim, n: Numbers, found: Mapping[str, Any], threshold: float | None, params: Shared, verdict: str, why: str
) -> str:
    """A reason with digits enough to tell an end of the interval from the threshold, in the claim's own unit, with how
    many groups the weakest is one of, and with the level at which more would do."""
    if n.estimate is not None:
        why = why.replace(estimated(n), estimated(n, threshold), 1)
        why = why if claim.unit == "quads" else why.replace(" of a half", "").replace("quads", claim.unit)
    why = re.sub(r"\S+e\+\d+(?= times as many)", lambda found: in_full(float(found[0])), why)
    if verdict not in (SUPPORTED, NOT_SUPPORTED):
        return why
    if claim.pick == "weakest" and claim.rule == "above":
        names = {
            next((str(row[key]) for key in GROUPS if key in row), ""): row[claim.columns[1]] is not None
            for row in at(found, claim.path, params)
        }
        known = sum(names.values())
        rest = "" if known == len(names) else f" that have an interval, of {len(names)}"
        which = f"the weakest of {known}{rest}" if known > 1 else f"the only one of {len(names)} with an interval"
        why += "" if "" in names or not known else f"; {which}"
    corrected = "; corrected with the other claims it takes more" if claim.check is None else ""
    return why + corrected * ("times as many" in why)


def picked(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a step chose that tells the rows of a claim from others: the slice's number among the growing sets, the
    ablation that judges, and that of the search for a circuit."""
    judges = [row["ablation"] for row in found.get("needed", ()) if row.get("judges") and "ablation" in row]
    searched = (found.get("circuit") or {}).get("ablation")
    return {"slice_set": len(found.get("critical_slice", ())) - 1, "judge": "".join(judges[:1]), "searched": searched}


def turned(verdict: str, asked: str) -> str:
    """What would turn a verdict."""
    words = {
        SUPPORTED: f"Refuted, if the same measurement on new prompts does not give this: {asked}.",
        NOT_SUPPORTED: f"Supported after all, if the same measurement on new prompts gives this: {asked}.",
    }
    return words.get(verdict, f"Decided, once it can be measured, by this: {asked}.")


def decided(
    claim: Claim, n: Numbers, found: Mapping[str, Any], threshold: float | None, params: Shared
) -> tuple[str, str]:
    """Verdict and reason of a claim whose step ran, by itself."""
    rule = RULES[claim.rule]
    if claim.companion:
        able = (found.get("able") or {}).get(claim.companion, {"able": False, "why": "the model was not asked"})
        other = f"this profile is about `{params.task}`; one with `task: {claim.companion}` tests it"
        return (NOT_TESTED, f"{able['why']}; {other}") if able["able"] else (NOT_TESTABLE, able["why"])
    if n.why or threshold is None:
        return NOT_TESTABLE, n.why or "the parameter that holds its threshold is not in the run record"
    value = "" if n.estimate is None else estimated(n)
    if any(getattr(n, need) is None for need in rule.needs):
        there = "" if n.quads is None else f", and there are {n.quads}"
        few = f"too few quads: an interval needs {MINIMUM_CLUSTERS} of a half{there}"
        if claim.rule == "own":
            few = "the step's own test did not decide"
            few += "" if n.power is None else f"; were there nothing, it would find so with probability {n.power:.2f}"
        return NOT_TESTABLE, "; ".join(filter(None, (value, few)))
    if claim.rule == "own":
        value = f"found {n.verdict}"
    elif claim.rule == "p":
        value = "; ".join(filter(None, (value, f"p = {n.p:.2g}")))
    elif claim.rule == "count":
        value = f"{n.estimate:g}, p = {n.p:.2g}"
    alpha = 1 - params.level
    reason = f"{value}; asked for: {rule.asked.format(t=f'{threshold:g}', c=claim.centre, p=alpha)}"
    if not rule.holds(n, threshold, claim.centre):
        unsure = claim.rule == "within" and n.low < claim.centre + threshold and n.high > claim.centre - threshold
        if unsure and n.high - n.low > 2 * threshold:
            times = equivalence(n, threshold)[1]
            return NOT_TESTABLE, (
                f"{reason}; an interval this wide could not lie there, wherever its middle: were the truth "
                f"{claim.centre:g}, {times:.2g} times as many quads would show it, four times in five"
            )
        outside = claim.rule == "within" and not unsure
        more = "; the whole interval lies outside" if outside else shortfall(claim, n, threshold, alpha)
        return NOT_SUPPORTED, reason + more
    if claim.rule == "count" and not n.p < alpha:
        coarse = "; its ranks among other heads could give no p small enough"
        return (NOT_TESTABLE, reason + coarse) if n.least >= alpha else (NOT_SUPPORTED, reason)
    for condition, good in ((claim.requires, True), (claim.excludes, False)):
        if condition and any(leaves([at(found, condition[0], params)])) != good:
            return NOT_SUPPORTED, f"{reason}; {condition[1]}"
    return SUPPORTED, reason


def estimated(of: Numbers | Entry, threshold: float | None = None) -> str:
    """An estimate with its interval, or with its bound where there is no lower end; with more than two digits where an
    end would else look like the threshold."""
    ends, most = [end for end in (of.low, of.high) if end is not None and end != threshold], 5
    digits = next((n for n in range(2, most) if all(round(end, n) != threshold for end in ends)), 2)
    bound = "" if of.low is not None or of.high is None else f", at most {of.high:.{digits}f}"
    return interval(of.estimate, of.low, of.high, digits) + bound


def p_value(claim: Claim, n: Numbers, threshold: float | None, level: float) -> float | None:
    """The p value of the step's own test, else that of the interval; for the largest of several, times their number."""
    if n.p is not None or threshold is None or claim.rule not in ("above", "below", "within"):
        return n.p
    bottom, top, own = claim.centre - threshold, claim.centre + threshold, threshold
    p = {
        "above": lambda: min(1.0, n.of * p_of_interval(n.estimate, n.low, own, True, level)),
        "below": lambda: p_of_interval(n.estimate, n.high, own, False, level),
        "within": lambda: max(
            p_of_interval(n.estimate, n.low, bottom, True, level), p_of_interval(n.estimate, n.high, top, False, level)
        ),
    }
    return p[claim.rule]()


def shortfall(claim: Claim, n: Numbers, threshold: float, alpha: float) -> str:
    """What an interval that does not decide for its claim says: against it, or how many more quads would decide.

    So many times as many quads (or of the claim's own unit) would put the interval beyond the threshold with
    probability `POWER`, at a level of 1 - alpha, were the estimate the truth. The interval is read as a normal one of
    level 95%.
    """
    if claim.rule not in ("above", "below") or claim.pick != "first":  # of several, another may be next
        return ""
    above = claim.rule == "above"
    end, far = (n.low, n.high) if above else (n.high, n.low)
    distance = n.estimate - threshold if above else threshold - n.estimate
    if far is not None and (far < threshold) == above and far != threshold:
        return "; the whole interval lies on the other side"
    if distance <= 0:
        return "; the estimate lies on the other side"
    error = abs(n.estimate - end) / norm.isf(0.025)
    times = ((norm.isf(alpha / 2) + norm.isf(1 - POWER)) * error / distance) ** 2
    many = f"{in_full(max(times, 1.1))} times as many {claim.unit}"
    return f"; were the estimate the truth, {many} would show it, four times in five"


def in_full(times: float) -> str:
    """How many times as many, to two digits and without an exponent: 1.3, 45, 2,300."""
    rounded = float(f"{times:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def equivalence(n: Numbers, threshold: float) -> tuple[float, float]:
    """Of a claim that a value lies within the threshold of another, were it that other: the probability that an
    interval as wide as this would show it, and how many times as many quads it takes for a probability of `POWER`.

    The whole interval, read as a normal one of level 95%, must lie within (as in two one-sided tests, Schuirmann 1987).
    """
    room, z = threshold / ((n.high - n.low) / 2 / norm.isf(0.025)), norm.isf(0.025)
    return max(0.0, 2 * norm.cdf(room - z) - 1), ((z + norm.isf((1 - POWER) / 2)) / room) ** 2


def coarse(entry: Entry, entries: Sequence[Entry], found: Mapping[str, Any], params: Story) -> str:
    """That ranks among other heads could not have had a claim supported, the other claims' p values being what they
    are, where its verdict does not say so; "" otherwise. `found` are the findings of its step."""
    claim = next(claim for claim in CLAIMS if claim.id == entry.id)
    if claim.rule != "count" or entry.here != NOT_SUPPORTED or entry.p_holm is None or COARSE in entry.reason:
        return ""
    least, tested = numbers_of(claim, found, params).least, [other for other in entries if other.p_holm is not None]
    p = [least if other is entry else 1.0 if other.p is None else other.p for other in tested]
    best = float(holm(p)[[other is entry for other in tested].index(True)])
    return "" if best < 1 - params.level else f"; its ranks {COARSE}, at best {least:.2g}, corrected {best:.2g}"


def ledger(found: Mapping[str, Mapping[str, Any] | None], plan: Plan, params: Story) -> list[Entry]:
    """Every claim's entry, in the plan's order; `found` are the findings by step (`steps.story.page.gather`).

    In simulations of 40 claims at their thresholds, 24 or 100 quads each, at least one was supported in 46 to 65% of
    ledgers alone and in 0 to 0.5% corrected, with normal values or Student's t of 3; with values as skewed as lognormal
    ones, away from the claim, in 96 to 99% alone and still in 35% (24 quads) or 8% (100) corrected.
    """
    held, by_name = thresholds(params), {claim.id: claim for claim in CLAIMS}
    entries = [judge(claim, found.get(claim.step), *held[claim.id], plan, params) for claim in CLAIMS]
    tested = [entry for entry in entries if entry.check is None and entry.alone in (SUPPORTED, NOT_SUPPORTED)]
    corrected = holm([1.0 if entry.p is None else entry.p for entry in tested])
    for entry, p in zip(tested, corrected, strict=True):
        entry.p_holm = float(p)
        if entry.alone == SUPPORTED and not p < 1 - params.level:
            entry.verdict = NOT_SUPPORTED
            own, n = by_name[entry.id], Numbers(entry.estimate, entry.low, entry.high)
            entry.reason += f"; it holds alone, but not among {len(tested)} claims (p after Holm's correction {p:.2g})"
            entry.reason += shortfall(own, n, entry.threshold, (1 - params.level) / len(tested))
            if numbers_of(own, found[own.step], params).least * len(tested) >= 1 - params.level:
                entry.verdict = NOT_TESTABLE
                entry.reason += ", and its ranks among other heads could give no p small enough"
    frozen = params.frozen == fingerprint(held, params)
    for entry in entries:
        entry.here = entry.verdict
        if frozen:
            entry.came, entry.set, entry.seen = "before", None, None
        if entry.verdict in (SUPPORTED, NOT_SUPPORTED):
            entry.tier = FRESH if params.fresh else HALF if entry.came == "before" else EXPLORATORY
    return entries
