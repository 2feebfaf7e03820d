"""The rule by which two names boost a class: additive, OR, AND or neither; or one name alone, whatever the other.

y is the logit of class c after a prompt of two names, relative to the classes of neither name. What each name says of c
is a number: 1 if the person is in c, else 0 (`number`), or the name's own logit of c in a one-name prompt (`evidence`).

1. Each rule combines the two numbers x_a and x_b: their sum (additive), the larger (OR), the smaller (AND). `free` has
   the sum and the larger, and so contains all three; `additive by slot`, `OR by slot` and `free by slot` give each name
   a weight of its own; `none` has neither.
2. y = class prior + slope x combination, by least squares; priors and combinations are centred, like y, on the prompt's
   classes of neither name.
3. Rules are compared by their squared error on prompts of people that the fit has not seen.
4. Whether both names count is asked first (`names`): by what each adds to its class, alone and beside the other. Where
   one surely counts for less than `LEAST` of the other, the answer is read off one name, and there is no rule of two;
   where that is open, there is no verdict.
5. Else the verdict is the rule of smallest error among those not significantly worse than `free`, by more than the
   model's noise (squared) or `SLIGHT`; where one name surely adds more than the other alone, of the rules by slot.
6. `figure`, `touched`, `sentences` and `numbers` show and say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import HTML
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lib import stats
from lib.effects import columns
from lib.stats import DEFAULTS, Interval, Settings
from report import interactive, plots
from report.words import interval, listed, of_row

COLUMNS = ("prompt", "name_a", "name_b", "superset_class", "y", "n_a", "n_b")
RULES = ("additive", "OR", "AND")
LEAST = 0.1  # of what one name does, what the other does at least where two names are said to follow a rule
SLIGHT = 1e-4  # of the error that class priors leave: a rule that is worse than free by less is not refuted
SLOTS = ("first", "second")
BASES = {"number": ("n_a", "n_b"), "evidence": ("evidence_a", "evidence_b")}
SAID = {"number": "the number of names", "evidence": "what each name says alone"}
AT = {"first slot": 1, "second slot": 1, "two names": 2}  # terms that are shown, at so many names


@dataclass(frozen=True)
class Names:
    """Whether both names count, and alike."""

    lesser: str  # the slot of the name that does less, "first" or "second"
    share: Interval | None  # what it does over what the other does; None where neither surely does anything
    uneven: bool  # whether one alone surely adds more than the other alone

    @property
    def other(self) -> str:
        return SLOTS[1 - SLOTS.index(self.lesser)]

    @property
    def count(self) -> str | None:
        """How many count, "both" or "one", or None where that is not decided."""
        if self.share is None or self.share.low is None or self.share.low <= LEAST <= self.share.high:
            return None
        return "both" if self.share.low > LEAST else "one"

    @property
    def rules(self) -> dict[str, str]:
        """Of the rules that are compared, each with the name of its verdict."""
        return {f"{rule}{' by slot' * (self.uneven and rule != 'AND')}": rule for rule in RULES}


@dataclass(frozen=True)
class RuleResult:
    """Which rule fits, and the numbers behind it."""

    errors: pd.DataFrame  # basis, rule, error, explained (share of `none`'s error), worse (than free), low, high
    # basis -> a rule, "neither", "none", "first name" or "second name" (alone); None if not decided (`reason`)
    verdict: Mapping[str, str | None]
    fitting: Mapping[str, tuple[str, ...]]  # basis -> the rules not significantly worse than free, best first
    fitted: pd.DataFrame  # term, estimate, low, high: `free by slot`, logits above the classes of neither name
    ratio: Interval | None  # the second name's step over the first's: 1 additive, 0 OR, infinite AND
    names: Names
    noise: float  # of `ratio`: the model's own, over one name's step
    prompts: int
    groups: int  # sets of prompts that share no person with any other: the unit of folds and intervals
    folds: int
    reason: str | None = None


def compare(frame: pd.DataFrame, settings: Settings = DEFAULTS, folds: int = 10) -> RuleResult:
    """Compare the rules by cross-validation over people.

    `frame` has a row for each prompt and class, with `prompt`, `name_a`, `name_b` and `superset_class`, `y` in logits,
    `n_a` and `n_b` 1 where that name is in the class, else 0; and perhaps `evidence_a` and `evidence_b` (logits of the
    class after each name alone, centred: OR and AND depend on the zero). Prompts that share a person, directly or
    through others, form one group, which one fold holds whole. An error is the mean over prompts of the mean squared
    error over classes; `worse` is its difference to `free`'s, a ratio of sums over groups with a bootstrap-t interval
    (of these fits: that folds share training prompts is not part of it).

    The verdict is "none" if free is not significantly better than class priors alone; one name, if the other surely
    does less than `LEAST` of what it does; and "neither" if each of the three rules is significantly worse than free.
    Free is `free by slot`, and the rules are those by slot, where the names are surely uneven. "Not significantly
    worse" is weak with few prompts: `fitting` lists every rule that passes. With fewer than stats.MINIMUM_CLUSTERS
    groups there is no verdict, nor where it is open whether both names count.

    `fitted`, `names` and `ratio` come from `free by slot` and `free` on all prompts, with bootstrap-t intervals over
    groups on the coefficients' influence values (Efron and Tibshirani 1993, chapter 21). `ratio` is None where no
    prompt has two names of one class, not both names surely count, or the first step is not significantly above 0.

    ValueError for missing columns, values that are not finite, numbers other than 0 and 1, a prompt without a class of
    neither name, two rows of one prompt and class, and people that link all prompts to one group.
    """
    _validate(frame)
    prompt, _ = pd.factorize(frame["prompt"])
    group = _groups(frame, prompt)
    groups = int(group.max()) + 1
    if groups < 2 or folds < 2:
        raise ValueError(f"{groups} group(s) of prompts that share no person and {folds} folds: need 2 of each")
    folds = min(folds, groups)
    fold = (np.random.default_rng(settings.seed).permutation(groups) % folds)[group[prompt]]
    y = _centred(frame["y"].to_numpy(float)[:, None], frame, prompt)[:, 0]
    numbers = _designs(frame, prompt, *frame[["n_a", "n_b"]].to_numpy(float).T)
    spans, ratio, names = _fitted(numbers, y, group[prompt], settings)
    tables, verdict, fitting = [], {}, {}
    n = frame["n_a"] + frame["n_b"]
    reason = stats.too_few(groups, "groups of prompts")
    if not ((n == 1).any() and (n == 2).any()):
        reason = "no rule: the prompts need classes of one of the names and classes of both"
    free = "free by slot" if names.uneven else "free"
    for basis, given in BASES.items():
        if not set(given) <= set(frame.columns):
            continue
        designs = _designs(frame, prompt, *(frame[column].to_numpy(float) for column in given), _weights(spans))
        losses = np.stack([_out_of_fold(design, y, fold) for design in designs.values()], axis=1)
        losses = np.stack([np.bincount(prompt, column) / np.bincount(prompt) for column in losses.T], axis=1)
        table = _errors(list(designs), losses, group, settings, free)  # losses per prompt
        tables.append(table.assign(basis=basis))
        own = (None, ()) if reason else _decided(table.set_index("rule"), names, settings.floor**2)
        verdict[basis], fitting[basis] = own
    reason = reason or (no_rule(names) if None in verdict.values() else None)
    table, noise = pd.concat(tables, ignore_index=True), settings.floor / max(abs(spans["estimate"][0]), stats.ZERO)
    return RuleResult(table, verdict, fitting, spans, ratio, names, noise, len(group), groups, folds, reason)


def _decided(errors: pd.DataFrame, names: Names, noise: float) -> tuple[str | None, tuple[str, ...]]:
    """The verdict by one basis, and the rules not significantly worse than free, best first."""
    noise = max(noise, SLIGHT * errors.loc["none", "error"])
    order = errors["error"].loc[list(names.rules)].sort_values().index
    passing = tuple(names.rules[rule] for rule in order if errors.loc[rule, "low"] <= noise)
    if not errors.loc["none", "low"] > noise:
        return "none", passing
    if names.count != "both":
        return f"{names.other} name" if names.count == "one" else None, ()
    return passing[0] if passing else "neither", passing


def _validate(frame: pd.DataFrame) -> None:
    """ValueError where the rows are not what `compare` asks for."""
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing or frame.empty:
        raise ValueError(f"the rule needs rows with the columns {', '.join(COLUMNS)}; missing: {missing or 'rows'}")
    numbers = [column for column in ("y", *sum(BASES.values(), ())) if column in frame.columns]
    bad = ~np.isfinite(frame[numbers].to_numpy(float)).all(1)
    if bad.any():
        raise ValueError(f"NaN or infinite values in prompts {frame['prompt'][bad].unique()[:10].tolist()}")
    if not frame[["n_a", "n_b"]].isin([0, 1]).all(axis=None):
        raise ValueError("n_a and n_b must be 1 (the name is in the class) or 0")
    if frame.duplicated(["prompt", "superset_class"]).any():
        raise ValueError("a prompt has two rows of one class")
    absent = (frame["n_a"] + frame["n_b"] == 0).groupby(frame["prompt"]).any()
    if not absent.all():
        raise ValueError(f"prompts {absent.index[~absent][:10].tolist()} have no class of neither name to centre on")


def _groups(frame: pd.DataFrame, prompt: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " prompts"]:
    """The group of each prompt: connected components of prompts that share people."""
    first = frame.groupby(prompt)[["name_a", "name_b"]].first()
    person, people = pd.factorize(first.to_numpy().ravel())
    edges = (np.ones(len(first)), (person[0::2], person[1::2]))
    _, component = connected_components(coo_array(edges, shape=(len(people), len(people))), directed=False)
    return pd.factorize(component[person[0::2]])[0]


def _centred(values: Float[np.ndarray, "rows columns"], frame: pd.DataFrame, prompt: np.ndarray) -> np.ndarray:
    """Values minus their mean over the prompt's classes of neither name."""
    absent = (frame["n_a"] + frame["n_b"] == 0).to_numpy(float)
    count = np.bincount(prompt, absent)
    means = np.stack([np.bincount(prompt, absent * column) / count for column in values.T], axis=1)
    return values - means[prompt]


def _weights(fitted: pd.DataFrame) -> tuple[float, float]:
    """What each name adds alone, as a share of the one that adds more; none is negative."""
    alone = fitted.set_index("term")["estimate"][[f"{slot} slot" for slot in SLOTS]].clip(lower=0).to_numpy()
    return tuple(alone / alone.max()) if alone.max() > 0 else (1.0, 1.0)


def _designs(
    frame: pd.DataFrame, prompt: np.ndarray, a: np.ndarray, b: np.ndarray, weights: tuple[float, float] = (1.0, 1.0)
) -> dict[str, np.ndarray]:
    """The design matrix of each rule: class priors, then the rule's combinations, all centred as y is. `weights`: of
    the names, in `OR by slot`."""
    priors = pd.get_dummies(frame["superset_class"]).to_numpy(float)[:, 1:]  # centred, they add up to 0: one is spare
    larger = np.maximum(a, b)
    combinations = {
        "none": [],
        "additive": [a + b],
        "OR": [larger],
        "AND": [np.minimum(a, b)],
        "free": [a + b, larger],
        "additive by slot": [a, b],
        "OR by slot": [np.maximum(weights[0] * a, weights[1] * b)],
        "free by slot": [a, b, larger],
    }
    return {rule: _centred(np.column_stack([priors, *own]), frame, prompt) for rule, own in combinations.items()}


def _out_of_fold(design: np.ndarray, y: np.ndarray, fold: np.ndarray) -> Float[np.ndarray, " rows"]:
    """Squared errors of each row under the fit to the other folds."""
    errors = np.empty_like(y)
    for held in range(fold.max() + 1):
        out = fold == held
        coefficients = np.linalg.lstsq(design[~out], y[~out])[0]
        errors[out] = (y[out] - design[out] @ coefficients) ** 2
    return errors


def _errors(
    rules: list[str], losses: Float[np.ndarray, "prompts rules"], group: np.ndarray, settings: Settings, free: str
) -> pd.DataFrame:
    """Each rule's error, and by how much it is worse than that of the rule `free`, with an interval over groups."""
    worse, error = losses - losses[:, [rules.index(free)]], losses.mean(0)
    sums = np.stack([np.bincount(group, column) for column in worse.T], axis=1)
    spans = columns(stats.ratio_intervals(sums, np.bincount(group).astype(float), settings))
    table = pd.DataFrame({"rule": rules, "error": error, "explained": 1 - error / error[rules.index("none")]})
    return table.join(pd.DataFrame(spans, dtype=float).rename(columns={"estimate": "worse"}))


def _fitted(
    designs: Mapping[str, np.ndarray], y: np.ndarray, group: np.ndarray, settings: Settings
) -> tuple[pd.DataFrame, Interval | None, Names]:
    """What one name, either slot's, and two names add in logits; the second step over the first; and whether both
    names count."""

    def values(rule: str) -> Float[np.ndarray, "groups coefficients"]:
        """Coefficients plus each group's influence on them: their means are the coefficients."""
        design = designs[rule]
        inverse = np.linalg.pinv(design.T @ design)
        coefficients = inverse @ (design.T @ y)
        scores = design * (y - design @ coefficients)[:, None]
        per_group = np.stack([np.bincount(group, column) for column in scores.T], axis=1)
        return coefficients + len(per_group) * per_group @ inverse

    total, larger = values("free").T[-2:]
    a, b, either = values("free by slot").T[-3:]
    first, second = total + larger, total
    terms = {
        "one name": first,
        "first slot": a + either,
        "second slot": b + either,
        "second slot - first": b - a,
        "two names": first + second,
        "second step": second,
    }
    spans = columns(stats.mean_intervals(np.column_stack(list(terms.values())), settings))
    table = pd.DataFrame({"term": list(terms)}).join(pd.DataFrame(spans, dtype=float))
    names = _names(a + either / 2, b + either / 2, table.set_index("term").loc["second slot - first"], settings)
    low = table["low"].fillna(table["estimate"])[0]  # of one name
    known = np.linalg.matrix_rank(designs["free"]) == designs["free"].shape[1] and low > settings.floor
    alone = names.share is not None and names.share.low is not None and names.count != "both"
    if not known or alone:
        return table, None, names
    return table, stats.ratio_intervals(second, first, settings)[0], names


def _names(
    first: Float[np.ndarray, " groups"], second: Float[np.ndarray, " groups"], contrast: pd.Series, settings: Settings
) -> Names:
    """Whether both names count, by what each adds on average over alone and beside the other (each group's influence
    values), and by the second's step alone less the first's."""
    uneven = contrast["low"] > settings.floor or contrast["high"] < -settings.floor
    lesser = SLOTS[int(second.mean() < first.mean())]
    less, more = (first, second) if lesser == "first" else (second, first)
    sure = stats.mean_interval(more, settings)
    if not (sure.estimate if sure.low is None else sure.low) > settings.floor:
        return Names(lesser, None, bool(uneven))
    return Names(lesser, stats.ratio_intervals(less, more, settings)[0], bool(uneven))


def lines(fit: RuleResult, people: pd.DataFrame) -> dict[str, list[float]]:
    """What each rule makes of no, one and two names: its least-squares fit to the free fit's two steps; none where one
    of the names does not count."""
    if fit.names.count == "one":
        return {}
    terms = fit.fitted.set_index("term")["estimate"]
    one, two = terms["one name"], terms["two names"]
    first, second = ((people["n_a"] + people["n_b"] == count).sum() for count in (1, 2))
    slope = (first * one + 2 * second * two) / (first + 4 * second)
    level = (first * one + second * two) / (first + second)
    return {"additive": [0, slope, 2 * slope], "OR": [0, level, level], "AND": [0, 0, two]}


def figure(fit: RuleResult | None, people: pd.DataFrame) -> Figure | None:
    """What one name in either slot, and two names, add, and what each rule would make of it."""
    if fit is None:
        return None
    return plots.rule_points(fit.fitted, lines(fit, people), "logit above the classes of neither name")


def touched(fit: RuleResult | None, people: pd.DataFrame) -> HTML | None:
    """`figure` to be read point by point, and by how much each rule predicts worse than a free fit, for both bases."""
    if fit is None:
        return None
    steps = fit.fitted[fit.fitted["term"].isin(AT)]
    steps = steps.assign(line=steps["term"], x=steps["term"].map(AT))
    worse = fit.errors[fit.errors["rule"].isin(fit.names.rules)]
    at = worse["rule"].map(list(fit.names.rules).index)
    worse = worse.assign(line=worse["basis"].map(SAID), x=at, estimate=worse["worse"])
    panels = [
        interactive.Panel(
            steps,
            "names in the class",
            "logit above the classes of neither name",
            "logits",
            ticks=("none", "one", "two"),
            bare=lines(fit, people),
        ),
        interactive.Panel(
            worse,
            "rule",
            "squared error above that of the free fit (squared logits)",
            "squared logits more error than a free fit, on people not seen",
            "How much worse than a free fit each rule predicts, by what is known of a name",
            tuple(fit.names.rules),
        ),
    ]
    return interactive.curves("fig-generality-rule", "rule", panels)


def sentences(rule: RuleResult | None) -> dict[str, str]:
    """What one and two names add, whether a rule is exact, and which predicts best, by what each sentence is about."""
    if rule is None:
        return {"steps": "The rule was not read: too few known people."}
    shown = {row.term: of_row(row) for row in rule.fitted.itertuples()}
    out = {
        "steps": f"On {rule.prompts} prompts of two known people, one name in a class raises its logit by "
        f"{shown['one name']} above the classes of neither name, two names by {shown['two names']}.",
        "ratio": exact_sentence(rule),
        "slots": f"Told apart, one name adds {shown['first slot']} in the first slot, {shown['second slot']} in the "
        f"second{': they count unequally' * rule.names.uneven}.",
    }
    if rule.names.count == "one" and set(rule.verdict.values()) & {"first name", "second name"}:
        return {name: out[name] for name in ("ratio", "slots")}
    for basis, verdict in rule.verdict.items():
        what = SAID[basis]
        if verdict is None:
            out[basis] = f"By {what}, no rule is decided: {rule.reason}."
            continue
        own, by_slot = rule.errors[rule.errors["basis"] == basis].set_index("rule")["explained"], rule.names.uneven
        passing = [name for name in rule.fitting[basis] if name != verdict]
        words = {"neither": "each of the three rules is worse than free", "none": "nothing beats class priors"}
        best = {name: row for row, name in rule.names.rules.items()}.get(verdict, verdict)
        free = "free by slot" if by_slot else "free"
        lead = words.get(verdict) or (
            f"{verdict} predicts best{', with a weight for each name' * (best != verdict)}: of the error that class "
            f"priors leave it explains {own[best]:.1%}, and a free fit {own[free]:.1%}"
        )
        out[basis] = f"By {what}, cross-validated over people, {lead}" + (
            f"; not significantly worse than free either: {listed(passing)}." if passing else "."
        )
    return out


def no_rule(names: Names) -> str | None:
    """Why two names follow no rule here: one of them does not surely count. None where both do, or too few prompts are
    there to say."""
    if names.share is None:
        return "neither name is shown to count"
    if names.share.low is None or names.count == "both":
        return None
    less = f"what the {names.lesser} does is {of_row(names.share)} of it"
    if names.count == "one":
        return f"the answer is read off the {names.other} name alone: {less}"
    return f"whether both names count is open: beside the {names.other} name, {less}"


def exact_sentence(rule: RuleResult) -> str:
    """Which of additive and OR the two steps allow: to predict best is not to be exact."""
    if why := no_rule(rule.names):
        return f"By no rule do two names add up: {why}." if rule.names.count else f"No rule is told: {why}."
    if rule.ratio is None:
        return (
            "Whether a second name adds as much as the first cannot be said: one name's step is not surely above zero."
        )
    low, high = rule.ratio.low, rule.ratio.high
    said = f"The second name's step is {interval(rule.ratio.estimate, low, high)} of the first's"
    if low is None:
        return f"{said}; whether that is additive (1) or OR (0) is not testable here ({rule.reason})."
    rules = {"additive (1)": 1.0, "OR (0)": 0.0}
    if allowed := [name for name, value in rules.items() if low - rule.noise <= value <= high + rule.noise]:
        return f"{said}: this leaves room for {listed(allowed)}."
    beyond = {name: max(low - value, value - high) for name, value in rules.items()}
    nearest = min(beyond, key=beyond.get)
    alike = [name for name in rule.fitting.get("number", ()) if name in ("additive", "OR")]
    error = f"; in predicting people not seen, a free fit is not shown to be better than {listed(alike)}" * bool(alike)
    return (
        f"{said}: by this interval, which holds by itself, neither additive (1) nor OR (0) is exact; {nearest} lies "
        f"{beyond[nearest]:.2g} outside it{error}."
    )


def numbers(rule: RuleResult) -> dict[str, Any]:
    """The result as findings take it: `why` stands where a rule of two names has no number, with what one name adds on
    average where but one of the two counts."""
    why, fitted = no_rule(rule.names), rule.fitted.to_dict("records")
    if rule.names.count == "one":
        fitted = [row | ({"why": why} if row["term"] == "one name" else {}) for row in fitted]
    names = {key: getattr(rule.names, key) for key in ("lesser", "share", "uneven", "count")}
    tables = {"errors": rule.errors.to_dict("records"), "fitted": fitted, "names": names}
    tables["ratio"] = {"why": why} if why else rule.ratio
    return tables | {key: getattr(rule, key) for key in ("verdict", "fitting", "prompts", "reason")}
