"""Step 10, the page of the claims: what the ledger is judged from, and how the plan's sentence comes of its verdicts.

1. `gather` reads every step's findings. `MEASURED` are numbers that no step's findings hold, each taken from that
   step's table, with an interval over quads: fame, rises of single layers, answers that flip when a path is ablated.
2. `overlap` sets the circuit's heads against those published for the same model (hypergeometric).
3. `sentence` puts the plan's sentence together from `PARTS`, each worded by the verdict of its claim.
4. `table`, `refutations` and `forest` show the ledger; `part` is what the page hands on, `document` is claims.json.

Sites, layers and numbers are read from findings: none of a model stands in this file.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler
from scipy.stats import hypergeom

from lib import records, stats
from lib.effects import in_halves, quad_matrix
from lib.records import plain
from pipeline import keys
from pipeline.params import Shared
from pipeline.step import Step
from report import plots
from report.words import interval, listed
from steps.story import claims
from steps.story.claims import NOT_SUPPORTED, NOT_TESTABLE, NOT_TESTED, SUPPORTED, VERDICTS, Entry, Ledger, leaves
from steps.story.measure import Story

PUBLISHED = "data/filter_heads_llama-3.3-70b.csv"
COLOURS = dict(zip(VERDICTS, ("#cfe8dc", "#f6d5c6", "#e6e6e6", "#ffffff"), strict=True))
CAPTIONS = {
    "claims": "Every claim that an interval decides, as its distance from the threshold in units of the threshold. "
    "Right of zero the claim holds; it is supported if the whole interval lies there. 95% intervals, each on its own."
}
OPEN = "[a link that is open]"
COARSE = ["half", "direction", "position", "layer", "quad_id", "logit_diff_before", "logit_diff_after",
          "logit_diff_clean", "logit_diff_corrupt"]  # fmt: skip


class Part(NamedTuple):
    """One link of the plan's sentence: its claim, the plan's words, ours where it is supported (`{names}` are this
    model's sites), and the claims that say what there is instead, with their words."""

    claim: str
    plan: str
    here: str
    instead: Mapping[str, str] = {}


PARTS = (
    Part("retrieval_heads", "heads outside the slice retrieve the profession of each name",
         "{outside} retrieve the profession of each name for the slice",
         {"mlps_at_names": "MLPs at the tokens of each name write what is read there",
          "one_stage": "the slice's own heads ({retrievers}) read the names and write the profession"}),
    Part("values_carry", "their value is added to the residual stream",
         "through their values this is added to the residual stream at the last token"),
    Part("slice_sufficient", "a slice of heads and MLPs there is enough to bring the answer back",
         "the slice ({slice}) turns it into the superset"),
    Part("one_layer", "one layer is the aggregator", "layer {largest} alone does most of that",
         {"critical_layers": "layers {layers} do that together"}),
    Part("one_direction", "the slice projects what it reads onto one direction ('artistness')",
         "one direction between the two supersets carries it after the first of these layers",
         {"few_directions": "the few directions that the supersets' means span carry it"}),
    Part("few_neurons", "a few MLP neurons do this", "a few MLP neurons do the work of the slice's MLPs"),
    Part("either_name", "either name alone boosts the logit of its superset",
         "either name alone boosts the logit of its superset"),
    Part("rule_or", "one name is enough, and the second adds nothing", "one name is enough",
         {"rule_additive": "the two names add up"}),
)  # fmt: skip


# --- what is read ---------------------------------------------------------------------------------------------------


def gather(step: Step, own: Mapping[str, Any] | None) -> dict[str, dict[str, Any] | None]:
    """Findings by step, None where it has not run; `own` is what this step's part on circuits hands on.

    What `MEASURED` computes is added to a step's findings under `measured`.
    """
    found = {name: step.find(name) for name in step.plan.names if name != step.name}
    for name, compute in MEASURED.items():
        if found[name] and found[name].get("able") is not False:
            found[name] |= {"measured": plain(compute(step, found[name]))}
    if own is not None and own.get("able") is not False:
        shared = overlap(own["circuit"], found["sufficiency"], step.params)
        own = plain({"circuit": own["circuit"], "attribution": own["attribution"], "overlap": shared})
    return found | {step.name: own}


def stored(step: Step, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
    """Columns (default: all) of an earlier step's table; None if neither results_dir nor results/<profile> has it."""
    paths = [folder / f"{name}.parquet" for folder in keys.sources(step.params)]
    return next((records.read(path, columns) for path in paths if path.is_file()), None)


def fame(step: Step, found: Mapping[str, Any]) -> dict[str, Any]:
    """Mean absolute difference in fame between the two sides of a pair, nats, over quads."""
    pairs = None if step.params.pairs_file else stored(step, "pairs")
    if pairs is None or pairs.empty or not {"fame_clean", "fame_corrupt"} <= set(pairs):
        return {"fame": {"why": "the fame of these pairs was not measured"}}
    gaps = (pairs["fame_clean"] - pairs["fame_corrupt"]).abs().groupby(pairs["quad_id"]).mean()
    return {"fame": stats.mean_interval(gaps, step.params)}


def layers(step: Step, found: Mapping[str, Any]) -> dict[str, Any]:
    """Shares of the recovery curve at `last`, confirmation half: the critical layers' rises, one layer's, and what is
    there after two thirds of the layers. The one layer is the profile's, else that of largest rise on discovery."""
    p, frame = step.params, stored(step, "coarse_sweep", COARSE)
    own = None if frame is None else frame[(frame["direction"] == "denoise") & (frame["position"] == "last")]
    if own is None or own.empty:
        return dict.fromkeys(("critical_layers", "one_layer", "middle_layers"), {"why": "step 02's table is not there"})
    matrix = quad_matrix(in_halves(own)[-1][1], "effect", ["layer"], reduce="sum")
    curve = pd.DataFrame(matrix.values, columns=matrix.sites["layer"])
    rises = curve.diff(axis=1).fillna(curve.iloc[:, [0]])
    largest = found["critical_layers"][int(np.argmax(found["critical_rises"]))]
    one = largest if p.aggregator_layer == "auto" else p.aggregator_layer
    middle = [layer for layer in curve if layer < 2 * found["model"].get("n_layers", curve.columns[-1] + 1) / 3]
    parts = {"critical_layers": rises[found["critical_layers"]].sum(axis=1), "one_layer": rises.get(one),
             "middle_layers": curve[middle[-1]] if middle else None}  # fmt: skip
    if curve.iloc[:, -1].sum() <= 0:
        return dict.fromkeys(parts, {"why": "patching the last layer brings nothing back"})
    out = {
        name: {"why": "the layer was not swept"} if part is None
        else stats.ratio_interval(part, curve.iloc[:, -1], p)
        for name, part in parts.items()
    }  # fmt: skip
    return out | {"layer": one}


def flips(step: Step, found: Mapping[str, Any]) -> dict[str, Any]:
    """Share of confirmation pairs whose answer flips when the path of the leading heads at the names is ablated.

    They are the first set of step 06's ablations at the names, wherever there are candidates at all.
    """
    columns = ["half", "position", "site_set", "quad_id", "metric_before", "metric_after"]
    frame = stored(step, "retrieval_heads.ablation", columns)
    own = None if frame is None else frame[(frame["position"] == "names") & (frame["site_set"] == 0)]
    if own is None or own.empty:
        return {"path_ablation": {"why": "no head at the names has a path into the slice that could be ablated"}}
    own = in_halves(own)[-1][1]
    flipped = (own["metric_before"] > 0) & (own["metric_after"] < 0)
    counts = flipped.groupby(own["quad_id"]).agg(["sum", "count"])
    return {"path_ablation": stats.proportion_interval(counts["sum"], counts["count"], step.params)}


def probes(step: Step, found: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy of two probes beyond the highest under permuted labels, and the rank that the map to supersets needs as
    a share of its cap, at the slice's first layer; from step 08's findings."""
    read, rank = found["probes"], found["rank"]
    out: dict[str, Any] = {}
    for name, kind, target, role in (("profession_at_names", "one-name", "profession", "names"),
                                     ("superset_at_last", "pair", "superset", "last")):  # fmt: skip
        key = {"kind": kind, "target": target, "position": role}
        row = next((row for row in read["accuracy"] if row.items() >= (key | {"layer": rank["layer"]}).items()), None)
        top = next((row["threshold"] for row in read["thresholds"] if row.items() >= key.items()), None)
        if row is None or top is None:
            out[name] = {"why": "there was no such probe: too few classes or people"}
        else:
            out[name] = {end: None if row[end] is None else row[end] - top for end in ("estimate", "low", "high")}
    key |= {"layer": rank["layer"]}
    own = next((row for row in rank["verdicts"] if row.items() >= key.items()), None)
    if own is None or own["low rank"] is None:
        return out | {"low_rank": {"why": "the probe is not above permuted labels, so its rank says nothing"}}
    below = own["effective rank"] < own["permuted effective rank"]
    return out | {"low_rank": {"estimate": own["rank needed"] / own["cap"], "below_permuted": below}}


MEASURED = {"baselines": fame, "coarse_sweep": layers, "retrieval_heads": flips, "subspace": probes}


def overlap(circuit: Mapping[str, Any], slice_found: Mapping[str, Any] | None, params: Shared) -> dict[str, Any]:
    """How many heads of the circuit are among those published for this model, against chance (hypergeometric).

    `p` is that of as many or more among heads drawn at random from all the model has.
    """
    published = pd.read_csv(keys.input_file(PUBLISHED), comment="#")
    own = published[published["model"] == params.model]
    if own.empty:
        return {"why": f"the published heads are of {listed(published['model'].unique())}, not of `{params.model}`"}
    shape = (slice_found or {}).get("model", {})
    heads = {site for site in circuit.get("sites", ()) if re.fullmatch(r"\d+\.\d+", site)}
    if not heads or not {"n_layers", "n_heads"} <= set(shape):
        return {"why": "the circuit has no heads" if not heads else "step 04 does not say how many heads there are"}
    both = sorted(heads & set(own["layer"].astype(str) + "." + own["head"].astype(str)))
    total = shape["n_layers"] * shape["n_heads"]
    p = float(hypergeom.sf(len(both) - 1, total, len(own), len(heads)))
    expected = len(heads) * len(own) / total
    return {"estimate": len(both), "expected": expected, "p": p, "shared": both, "heads": len(heads),
            "published": len(own), "total": total}  # fmt: skip


# --- the plan's sentence --------------------------------------------------------------------------------------------


def sites_of(found: Mapping[str, Any]) -> dict[str, str]:
    """This model's sites, by the names that `PARTS` calls them by."""
    step = {name: own or {} for name, own in found.items()}
    verdicts, coarse = step["retrieval_heads"].get("verdicts", {}), step["coarse_sweep"]
    return {
        "outside": listed(leaves(verdicts.get("retrieval_heads"))),
        "retrievers": listed(verdicts.get("slice_heads_that_retrieve", ())),
        "slice": listed(site["site"] for site in step["sufficiency"].get("critical_slice", ())),
        "layers": listed(coarse.get("critical_layers", ())),
        "largest": str(coarse.get("measured", {}).get("layer", "")),
    }


def sentence(entries: Sequence[Entry], found: Mapping[str, Any], parts: Sequence[Part] = PARTS) -> list[str]:
    """The plan's sentence for this model: first the chain of what is supported, then what is not, link by link."""
    entry, sites = {own.id: own for own in entries}, sites_of(found)
    chain, links = [], {NOT_SUPPORTED: [], NOT_TESTABLE: [], NOT_TESTED: []}
    for part in parts:
        own = entry[part.claim]
        if own.verdict == SUPPORTED:
            chain.append(f"{part.here.format(**sites)} ({value(own)})")
            continue
        others = {
            name: words.format(**sites) for name, words in part.instead.items() if entry[name].verdict == SUPPORTED
        }
        chain.append(" and ".join(f"{words} ({value(entry[name])})" for name, words in others.items()) or OPEN)
        instead = f"; instead {listed(others.values())}" if others else ""
        links[own.verdict].append(f"that {part.plan} ({own.reason}){instead}")
    words = {NOT_SUPPORTED: "The evidence does not support", NOT_TESTABLE: "Not testable here is",
             NOT_TESTED: "Not tested is"}  # fmt: skip
    if set(chain) == {OPEN}:
        said = ["No link of the plan's chain from the names to the answer is supported here."]
    else:
        linked = [link for link, _ in groupby(chain)]  # a gap of several open links is said once
        said = [f"The names → {' → '.join(linked)} → the answer."]
    return said + [f"{words[verdict]} {own}." for verdict, each in links.items() for own in each]


def value(entry: Entry) -> str:
    """What an entry measured, for a sentence."""
    if entry.estimate is None:
        return entry.reason
    unit = re.search(r"\(([^()]*)\)$", entry.quantity)
    unit = f" {unit[1]}" if unit and not unit[1].startswith(("share", "ratio")) else ""
    return interval(entry.estimate, entry.low, entry.high) + unit if entry.low is not None else f"{entry.estimate:g}"


# --- the page -------------------------------------------------------------------------------------------------------


def document(entries: Sequence[Entry], said: Sequence[str], params: Story) -> dict[str, Any]:
    """claims.json, proved against its model."""
    ledger = Ledger(
        profile=params.profile, model=params.model, task=params.task, level=params.level,
        correction=claims.CORRECTION, sentence=list(said), claims=list(entries),
    )  # fmt: skip
    return plain(Ledger.model_validate(ledger.model_dump()).model_dump())


def table(entries: Sequence[Entry]) -> Styler:
    """The ledger as a table: verdict in words (and colour), why, and links to the figure and the rows under it."""

    def evidence(entry: Entry) -> str:
        page, _, name = (entry.figure or "").partition("#")
        page = page.removeprefix("executed/").removesuffix(".ipynb")
        link = f'<a href="{page}.html#{name}">{page[:2]}, {name}</a><br>' if entry.figure else ""
        rows = "" if entry.rows is None else f"{entry.rows.file}: <code>{html.escape(entry.rows.filter)}</code>"
        return link + rows

    def why(entry: Entry) -> str:
        corrected = "" if entry.p_holm is None else f"; p after Holm's correction {entry.p_holm:.2g}"
        text = f"{entry.quantity}: {entry.reason}{corrected} ({entry.threshold_from})"
        return html.escape(text.replace("`", ""))  # the table is HTML, not MyST

    frame = pd.DataFrame([
        {"claim (section of the plan)": html.escape(f"{own.claim} ({own.section})"), "verdict": own.verdict,
         "why (where the threshold stands)": why(own), "under it": evidence(own)}
        for own in entries
    ])  # fmt: skip
    look = laid_out(frame, "claims", ("25%", "13%", "33%", "29%"))
    return look.map(lambda word: f"background-color: {COLOURS[word]}; color: black", subset=["verdict"])


def refutations(entries: Sequence[Entry]) -> Styler:
    """What would turn each verdict, as a table."""
    rows = [{"claim": own.claim, "verdict": own.verdict, "what would turn it": own.refuted_by} for own in entries]
    return laid_out(pd.DataFrame(rows), "refutations", ("40%", "15%", "45%"))


def laid_out(frame: pd.DataFrame, name: str, widths: Sequence[str]) -> Styler:
    """A table that keeps to the page: columns of these widths, small type."""
    attributes = 'style="table-layout: fixed; width: 100%; font-size: 0.8rem"'
    cells = [("text-align", "left"), ("vertical-align", "top"), ("overflow-wrap", "break-word")]
    columns = [{"selector": f"th.col{index}", "props": [("width", width)]} for index, width in enumerate(widths)]
    look = frame.style.hide(axis="index").set_uuid(name).set_table_attributes(attributes)
    return look.set_table_styles([{"selector": "th, td", "props": cells}, *columns])


def forest(entries: Sequence[Entry]) -> plots.Figure | None:
    """`CAPTIONS["claims"]`; None where nothing was decided by an interval."""
    rows = [distances(own) for own in entries if own.verdict in (SUPPORTED, NOT_SUPPORTED)]
    rows = [row for row in rows if row]
    if not rows:
        return None
    figure = plots.ranked_sites(pd.DataFrame(rows), "distance from the threshold (in thresholds)", by="verdict")
    axes = figure.axes[0]
    axes.set_xscale("symlog", linthresh=1)
    ends = axes.get_xlim()
    ticks = [tick for tick in (-100, -10, -1, -0.5, 0, 0.5, 1, 10, 100) if ends[0] <= tick <= ends[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    figure.set_figheight(1 + 0.22 * len(rows))
    return figure


def distances(entry: Entry) -> dict[str, Any] | None:
    """Estimate and interval of an entry as distances from its threshold, positive where the claim holds."""
    if entry.low is None and entry.high is None:
        return None
    rule = next(claim for claim in claims.CLAIMS if claim.id == entry.id)
    scale, ends = abs(entry.threshold) or 1.0, [entry.estimate, entry.low, entry.high]
    x = np.array([np.nan if end is None else end for end in ends], dtype=float)
    if rule.rule == "above":
        x = x - entry.threshold
    elif rule.rule == "below":
        x = (entry.threshold - x)[[0, 2, 1]]
    elif rule.rule == "within":
        off = np.abs(x - rule.centre)
        nearest = 0.0 if x[1] <= rule.centre <= x[2] else off[1:].min()
        x = entry.threshold - np.array([off[0], off[1:].max(), nearest])
    else:
        return None
    name = entry.id.replace("_", " ")
    return {"site": name, "verdict": entry.verdict} | dict(zip(("estimate", "low", "high"), x / scale, strict=True))


def tally(entries: Sequence[Entry]) -> str:
    """How many claims have which verdict."""
    count = pd.Series([own.verdict for own in entries]).value_counts()
    return f"The {len(entries)} claims of the plan: {listed(f'{count.get(word, 0)} {word}' for word in VERDICTS)}."


def overlap_sentence(found: Mapping[str, Any] | None) -> str:
    """The published heads, in one sentence."""
    if found is None or "why" in found:
        return f"Overlap with published heads: not applicable, {(found or {'why': 'no circuit was searched'})['why']}."
    return (
        f"{found['estimate']} of the circuit's {found['heads']} heads are among the {found['published']} published "
        f"filter heads ({listed(found['shared'])}); {found['expected']:.2f} would be by chance among "
        f"{found['total']} heads (hypergeometric, p = {found['p']:.2g})."
    )


def part(
    entries: Sequence[Entry], said: Sequence[str], found: Mapping[str, Any], figure: plots.Figure | None
) -> dict[str, Any]:
    """What this part of step 10 hands on."""
    return {
        "sentences": [*said, tally(entries), overlap_sentence((found["story"] or {}).get("overlap"))],
        "headline": [*said[:1], tally(entries)],
        "figures": {"claims": figure} if figure else {},
        "captions": CAPTIONS,
        "verdicts": {own.id: own.verdict for own in entries},
        "measured": {name: found[name]["measured"] for name in MEASURED if "measured" in (found[name] or {})},
    }
