"""Step 10 on its page: the plan's claims judged, the plan's sentence as far as it holds, and what is handed on.

1. `gather` reads every step's findings. `MEASURED` are numbers that no step's findings hold, each taken from that
   step's table, with an interval over quads: fame, rises of single layers, answers that flip when a path is ablated.
2. `overlap` sets the circuit's heads against those published for the same model (hypergeometric).
3. `judge` has the ledger (`steps.story.claims`) judged from these, writes claims.json, and has the circuit and the
   plan's sentence put into words by the verdicts (`steps.story.sentences`).
4. `table`, `refutations` and `forest` show the ledger; `findings` joins it with the circuit (`circuits_page`).

Sites, layers and numbers are read from findings: none of a model stands in this file.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from scipy.stats import hypergeom

from lib import questions, records, stats
from lib.effects import CONSTANT, SITE, by_half, confirmed, in_halves, named, quad_matrix, reported, tested
from pipeline import keys
from pipeline.params import Shared, load_profile
from pipeline.step import Step, plain
from report import plots
from report.words import is_are, joined, listed, not_done, sites
from steps.story import circuits_page, claims, everywhere_page, fresh, front
from steps.story.claims import CLAIMS, EXPLORATORY, NOT_SUPPORTED, SUPPORTED, VERDICTS, Entry
from steps.story.measure import Measured, Story
from steps.story.sentences import GIVEN, answer, basis, not_so, outline, sentence, standing

PUBLISHED = "data/filter_heads_llama-3.3-70b.csv"
COLOURS = dict(zip(VERDICTS, ("#cfe8dc", "#f6d5c6", "#e6e6e6", "#ffffff"), strict=True))
CAPTIONS = {
    "claims": "Every claim that an interval decides, by its name in the tables, as its distance from the threshold in "
    "units of the threshold (where that is 0, in the claim's own unit), with its interval; hollow: a bound by "
    "itself. A claim whose whole interval lies right of zero is supported by itself. The colour is its verdict on "
    "this book's own people, for which all claims are corrected together and further conditions hold (the table says "
    "which, and where fresh people decide otherwise). Linear up to 1, logarithmic beyond."
}
LOGIT_DIFFS = [f"logit_diff_{run}" for run in ("before", "after", "clean", "corrupt")]


class Judged(NamedTuple):
    """The ledger, and what it was judged from."""

    found: dict[str, dict[str, Any] | None]  # findings by step
    entries: list[Entry]
    outline: list[str]  # the circuit, in three sentences
    sentence: list[str]  # the plan's, part by part
    answer: str  # what leads the report
    not_so: str  # links of the plan's chain that do not hold, or could not be tested
    circuit: dict[str, Any] | None  # what `circuits_page` hands on; None where the model does not do the task
    everywhere: dict[str, Any] | None  # what `everywhere_page` does
    fresh: str = ""  # what fresh people decided

    @property
    def claims(self) -> list[Entry]:
        """What is counted."""
        return [entry for entry in self.entries if entry.check is None]

    @property
    def checks(self) -> list[Entry]:
        """What is shown, and not counted."""
        return [entry for entry in self.entries if entry.check is not None]


def judge(step: Step, m: Measured | None) -> Judged:
    """Judge every claim, and write claims.json."""
    if step.params.fresh:
        fresh.open_once(step.params)
    claims.thresholds(step.params)  # a claim without one is said first of all
    parts = [None] * 2 if m is None else [one.part(step, m) for one in (circuits_page, everywhere_page)]
    found = gather(step, *parts)
    entries = claims.ledger(found, step.plan, step.params)
    sides = [f"{side}_{slot}" for side in ("clean", "corrupt") for slot in "abc"]
    asked = () if m is None else step.pairs()[sides].to_numpy().ravel()
    confirmed = fresh.confirm(entries, step.params, asked)
    for entry in entries:  # its verdict may be another now, by the correction or by fresh people
        entry.refuted_by = claims.turned(entry.verdict, entry.asked)
        entry.check = GIVEN.get(entry.id, entry.check) if step.params.pairs_file else entry.check
        entry.reason += claims.coarse(entry, entries, found.get(entry.step), step.params)
        entry.reason += f"; {basis(entry.id, found)}" if entry.estimate is not None and basis(entry.id, found) else ""
        entry.reason += f"; {standing(entry)}" if entry.here != entry.verdict else ""
    said = [outline(entries, found), sentence(entries, found), [answer(entries, found)], [not_so(entries, found)]]
    said = [[claims.of_question(text, step.params.topic) for text in texts] for texts in said]
    step.write_extra("claims.json", document(entries, said[1], step.params, confirmed))
    return Judged(found, entries, *said[:2], said[2][0], said[3][0], *parts, confirmed)


# --- what is read -------------------------------------------------------------------------------------------------


def gather(
    step: Step, circuit: Mapping[str, Any] | None, everywhere: Mapping[str, Any] | None
) -> dict[str, dict[str, Any] | None]:
    """Findings by step, None where it has not run; what `MEASURED` computes is added under `measured`."""
    found = {name: step.beside(name) for name in step.plan.before(step.name)}
    for name, compute in MEASURED.items():
        if found[name] and found[name].get("able") is not False:
            found[name] |= {"measured": plain(compute(step, found[name]))}
    if circuit is None:
        return found | {step.name: not_done(step)}
    parts = {key: circuit[key] for key in ("circuit", "attribution")} | {"everywhere": everywhere["everywhere"]}
    return found | {step.name: plain(parts | {"overlap": overlap(parts["circuit"], found["sufficiency"], step.params)})}


def stored(step: Step, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
    """Columns (default: all) of an earlier step's table; None if neither results_dir nor results/<profile> has it."""
    of = keys.PAIRS if name == "pairs" else name.split(".")[0]
    paths = (keys.left(folder, of, f"{name}.parquet") for folder in keys.sources(step.params))
    return next((records.read(path, columns) for path in paths if path is not None), None)


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
    p, columns = step.params, ["half", "direction", "position", "layer", "quad_id", *LOGIT_DIFFS]
    names, frame = ("critical_layers", "one_layer", "middle_layers"), stored(step, "coarse_sweep", columns)
    last = None if frame is None else frame[(frame["direction"] == "denoise") & (frame["position"] == "last")]
    if last is None or last.empty:
        return dict.fromkeys(names, {"why": "step 02's table is not there"})
    matrix = quad_matrix(reported(last), "effect", ["layer"], reduce="sum")
    curve = pd.DataFrame(matrix.values, columns=matrix.sites["layer"])
    whole = curve.iloc[:, -1]
    if whole.sum() <= 0:
        return dict.fromkeys(names, {"why": "patching the last layer brings nothing back"})
    rises = curve.diff(axis=1).fillna(curve.iloc[:, [0]])
    largest = found["critical_layers"][int(np.argmax(found["critical_rises"]))]
    one = largest if p.aggregator_layer == "auto" else p.aggregator_layer
    middle = [layer for layer in curve if layer < 2 * found["model"].get("n_layers", curve.columns[-1] + 1) / 3]
    parts = (rises[found["critical_layers"]].sum(axis=1), rises.get(one), curve[middle[-1]] if middle else None)
    missing = {"why": "the layer was not swept"}
    out = {
        name: missing if part is None else stats.ratio_intervals(part, whole, p)[0]
        for name, part in zip(names, parts, strict=True)
    }
    return out | {"layer": one}


def at_the_names(step: Step, found: Mapping[str, Any]) -> dict[str, Any]:
    """`flips`; of which heads the path is ablated there; and which senders at the names `lead`."""
    tests = found.get("tests", ())
    heads = [row["site"] for row in tests if row["role"] == "names" and not row["inside"]]
    return flips(step, found) | {"ablated": list(dict.fromkeys(heads)), "leading": lead(step)}


def lead(step: Step) -> dict[str, Any]:
    """Heads and MLPs at the names whose path effect into the slice is above zero, familywise, in every half there is,
    largest on the discovery half first; whether the embedding's is; the number of halves; whether quads are too few."""
    columns = [*SITE, *CONSTANT, "half", "receivers", "sender", "pair_id", "quad_id", *LOGIT_DIFFS]
    frames = [stored(step, name, columns) for name in ("retrieval_heads", "retrieval_heads.confirmed")]
    frames = [frame[frame["receivers"] == "slice at names"] for frame in frames if frame is not None]
    rows = pd.concat(frames).assign(component=lambda rows: rows["sender"]) if frames else pd.DataFrame()
    if rows.empty:
        return {"why": "no sender at the names was followed into the slice"}
    table = by_half(rows, lambda half: tested(half, step.params)).assign(site=named)
    first, sure = table[table["half"] == table["half"].iloc[0]], set(confirmed(table, step.params)["site"])
    order = first[first["site"].isin(sure)].sort_values("estimate", ascending=False)
    kinds = {kind: order.loc[order["component"] == kind, "site"].tolist() for kind in ("head", "mlp")}
    about = {"embedding": bool((order["component"] == "embed").any()), "halves": table["half"].nunique()}
    return kinds | about | {"few": bool(table["low"].isna().any())}


def shortlist(step: Step, found: Mapping[str, Any]) -> dict[str, Any]:
    """How many neurons were asked, of how many, and in how many quads those were picked."""
    own, frame = found.get("neurons", {}), stored(step, "neurons", ["half", "quad_id"])
    if frame is None or not {"top", "neurons"} <= own.keys():
        return {}
    quads = in_halves(frame)[0][1]["quad_id"].nunique()
    return {"asked": {"top": len(own["top"]), "neurons": own["neurons"], "quads": quads}}


def flips(step: Step, found: Mapping[str, Any]) -> dict[str, Any]:
    """Share of right answers that flip when the path of the leading heads at the names is ablated; confirmation half.

    They are the first set of step 06's ablations at the names, wherever there are candidates at all.
    """
    columns = ["half", "position", "site_set", "quad_id", "metric_before", "metric_after"]
    frame = stored(step, "retrieval_heads.ablation", columns)
    names = None if frame is None else frame[(frame["position"] == "names") & (frame["site_set"] == 0)]
    if names is None or names.empty:
        return {"path_ablation": {"why": "no head at the names has a path into the slice that could be ablated"}}
    names = reported(names)
    names = names[names["metric_before"] > 0]  # the others have no answer to flip
    if names.empty:
        return {"path_ablation": {"why": "no pair of the confirmation half is answered rightly"}}
    counts = (names["metric_after"] < 0).groupby(names["quad_id"]).agg(["sum", "count"])
    return {"path_ablation": stats.proportion_interval(counts["sum"], counts["count"], step.params)}


def probes(step: Step, found: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy of two probes beyond the better baseline, and whether it is also above all permuted labels;
    the rank that the map to supersets needs as a share of its cap. At the slice's first layer, from step 08's findings.
    """
    read, rank = found["probes"], found["rank"]
    people = {"kind": "one-name", "target": "profession", "position": "names"}
    pairs = {"kind": "pair", "target": "superset", "position": "last"}
    out: dict[str, Any] = {}
    for name, key in (("profession_at_names", people), ("superset_at_last", pairs)):
        row, top = first(read["accuracy"], key | {"layer": rank["layer"]}), first(read["thresholds"], key)
        if row is None or top is None:
            out[name] = {"why": "there was no such probe: too few classes or people"}
        else:
            out[name] = {"estimate": row["beyond"], "low": row["beyond_low"], "high": row["beyond_high"]}
            out[name]["above_permuted"] = row["low"] is not None and row["low"] > top["threshold"]
    verdict = first(rank["verdicts"], pairs | {"layer": rank["layer"]})
    if verdict and verdict["cap"] < 2:
        return out | {"low_rank": {"why": "of two classes every map has rank one"}}
    if verdict is None or verdict["low rank"] is None:
        return out | {"low_rank": {"why": "the probe is not above permuted labels, so its rank says nothing"}}
    below = verdict["effective rank"] < verdict["permuted effective rank"]
    return out | {"low_rank": {"estimate": verdict["rank needed"] / verdict["cap"], "below_permuted": below}}


def first(rows: Sequence[Mapping[str, Any]], key: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first row that has these values."""
    return next((row for row in rows if row.items() >= key.items()), None)


def beyond_random(step: Step, found: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the slice's share of the placebo gap is surely above that of random sites of its own kinds (which
    `beside` says), by step 07; None where that was not measured or has no interval."""
    there = (step.beside("generality") or {}).get("specific", ())
    key = {"template": step.params.template, "group": "all pairs", "attribute": step.params.topic.placebo}
    own = first(there, key | {"set": "the slice"})
    rows = {
        name: first(there, key | {"set": name}) for name in ("random heads and MLPs", "random MLPs", "random heads")
    }
    beside = next((name for name, row in rows.items() if row is not None), "random heads")
    random = rows[beside]
    known = all(row and row["placebo_low"] is not None for row in (own, random))
    return {"beyond_random": bool(own["placebo_low"] > random["placebo_high"]) if known else None, "beside": beside}


MEASURED = {
    "baselines": fame,
    "coarse_sweep": layers,
    "sufficiency": beyond_random,
    "retrieval_heads": at_the_names,
    "subspace": probes,
    "neurons": shortlist,
}


def overlap(circuit: Mapping[str, Any], slice_found: Mapping[str, Any] | None, params: Shared) -> dict[str, Any]:
    """How many heads of the circuit are among those published for this model, against chance (hypergeometric).

    `p` is that of as many or more among heads drawn at random from all the model has.
    """
    published = pd.read_csv(keys.input_file(PUBLISHED), comment="#")
    model_heads = published[published["model"] == params.model]
    if model_heads.empty:
        return {"why": f"the published heads are of {listed(published['model'].unique())}, not of `{params.model}`"}
    shape = (slice_found or {}).get("model", {})
    heads = {site for site in circuit.get("sites", ()) if re.fullmatch(r"\d+\.\d+", site)}
    if not heads or not {"n_layers", "n_heads"} <= set(shape):
        return {"why": "the circuit has no heads" if not heads else "step 04 does not say how many heads there are"}
    both = sorted(heads & set(model_heads["layer"].astype(str) + "." + model_heads["head"].astype(str)))
    counts = {"heads": len(heads), "published": len(model_heads), "total": shape["n_layers"] * shape["n_heads"]}
    expected = len(heads) * len(model_heads) / counts["total"]
    p = float(hypergeom.sf(len(both) - 1, counts["total"], len(model_heads), len(heads)))
    return counts | {"estimate": len(both), "expected": expected, "p": p, "shared": both}


# --- the ledger ---------------------------------------------------------------------------------------------------


def document(entries: Sequence[Entry], parts: Sequence[str], params: Story, confirmed: str = "") -> dict[str, Any]:
    """claims.json, by its model."""
    about = {key: getattr(params, key) for key in ("profile", "model", "task", "level")}
    print_of = claims.fingerprint(claims.thresholds(params), params)
    about |= {"correction": claims.CORRECTION, "fingerprint": print_of, "frozen": print_of == params.frozen}
    return plain(claims.Ledger(**about, fresh=confirmed, sentence=parts, claims=entries).model_dump())


def table(entries: Sequence[Entry]) -> Styler:
    """Entries as a table: verdict in words (and colour), why, when it was set, links to what is under it."""

    def evidence(entry: Entry) -> str:
        page, _, name = (entry.figure or "").partition("#")
        page = page.removeprefix("executed/").removesuffix(".ipynb")
        link = f'<a href="{page}.html#{name}">{page[:2]}, {name}</a><br>' if entry.figure else ""
        rows = "" if entry.rows is None else f"{entry.rows.file}: <code>{html.escape(entry.rows.filter)}</code>"
        return link + rows

    def why(entry: Entry) -> str:
        text = f"{entry.quantity}: {entry.reason} ({entry.threshold_from})"
        if entry.check:
            text += f"; no claim, because {entry.check}"
        return html.escape(text.replace("`", ""))  # the table is HTML, not MyST

    def tested(entry: Entry) -> str:
        parts = [] if entry.p is None else [f"p {p_in_words(entry.p)}"]
        parts += [] if entry.p_holm is None else [f"corrected {p_in_words(entry.p_holm)}", f"alone {entry.alone}"]
        parts += [] if entry.power is None else [f"power {entry.power:.2f}"]
        return "<br>".join([", ".join(parts), when(entry)])

    def on_fresh(entry: Entry) -> str:
        there = entry.fresh
        corrected = "" if there.p_holm is None else f"<br>corrected p {p_in_words(there.p_holm)}"
        return f"{there.verdict}<br>{html.escape(there.reason.partition(';')[0].replace('`', ''))}{corrected}"

    columns = {
        "claim (section of the plan)": [
            f"<em>{name_of(entry)}</em>: {html.escape(f'{entry.claim} ({entry.section})')}" for entry in entries
        ],
        "verdict": [entry.verdict for entry in entries],
        "why (where the threshold stands)": [why(entry) for entry in entries],
        "test, and when it was set": [tested(entry) for entry in entries],
        "under it": [evidence(entry) for entry in entries],
    }
    widths = ["23%", "12%", "28%", "19%", "18%"]
    if any(entry.fresh for entry in entries):
        columns["on fresh people"], widths = (
            [on_fresh(entry) for entry in entries],
            ["19%", "11%", "23%", "15%", "16%", "16%"],
        )
    name = "checks" if entries and entries[0].check else "claims"  # two tables on a page are styled by their names
    look = laid_out(pd.DataFrame(columns), name, widths)
    return look.map(lambda word: f"background-color: {COLOURS[word]}; color: black", subset=["verdict"])


def name_of(entry: Entry) -> str:
    """A claim's name, in tables and in the figure."""
    return entry.id.replace("_", " ")


def p_in_words(p: float) -> str:
    """A p value; what lies far in the assumed tail of an interval is only said to be small."""
    return "under 0.0001" if p < 1e-4 else f"{p:.2g}"


def when(entry: Entry) -> str:
    """Before or after results were seen, by commits, and the tier of the verdict."""
    seen = f", results of {entry.seen} seen" if entry.came == "after" and entry.seen else ""
    text = f"set {entry.came} results" + (f" ({entry.set}{seen})" if entry.set else "")
    return text if entry.tier is None else f"{text}: {entry.tier}"


def refutations(entries: Sequence[Entry]) -> Styler:
    """What would turn each verdict, as a table."""
    rows = [
        {"claim": entry.claim, "verdict": entry.verdict, "what would turn it": entry.refuted_by} for entry in entries
    ]
    return laid_out(pd.DataFrame(rows), "refutations", ("40%", "15%", "45%"))


def laid_out(frame: pd.DataFrame, name: str, widths: Sequence[str]) -> Styler:
    """A table that keeps to the page: columns of these widths, small type."""
    attributes = 'class="sortable" style="table-layout: fixed; width: 100%; font-size: 0.8rem"'
    cells = [("text-align", "left"), ("vertical-align", "top"), ("overflow-wrap", "break-word")]
    columns = [{"selector": f"th.col{index}", "props": [("width", width)]} for index, width in enumerate(widths)]
    look = frame.style.hide(axis="index").set_uuid(name).set_table_attributes(attributes)
    return look.set_table_styles([{"selector": "th, td", "props": cells}, *columns])


def forest(entries: Sequence[Entry]) -> Figure | None:
    """`CAPTIONS["claims"]`; None where nothing was decided by an interval."""
    rows = [distances(entry) for entry in entries if entry.here in (SUPPORTED, NOT_SUPPORTED)]
    rows = [row for row in rows if row]
    if not rows:
        return None
    figure = plots.ranked_sites(
        pd.DataFrame(rows), "distance from the threshold (in thresholds; from 0: in its own unit)", by="verdict"
    )
    axes = figure.axes[0]
    axes.set_xscale("symlog", linthresh=1)
    ends = axes.get_xlim()
    far = [step * power for power in (1, 10, 100, 1000) for step in (1, 2, 5)]
    ticks = [tick for tick in (*(-tick for tick in far), -0.5, 0, 0.5, *far) if ends[0] <= tick <= ends[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    figure.set_figheight(1 + 0.22 * len(rows))
    return figure


def distances(entry: Entry) -> dict[str, Any] | None:
    """Estimate and interval of an entry as distances from its threshold, positive where the claim holds; a bound, which
    is all that decides where the other end is not known, in the place of the estimate."""
    if entry.low is None and entry.high is None:
        return None
    claim = next(claim for claim in CLAIMS if claim.id == entry.id)
    x = np.array([entry.estimate, entry.low, entry.high], dtype=float)  # None is NaN
    if claim.rule == "above":
        x = x - entry.threshold
    elif claim.rule == "below":
        x = (entry.threshold - x)[[0, 2, 1]]
    elif claim.rule == "within":
        off = np.abs(x - claim.centre)
        nearest = 0.0 if x[1] <= claim.centre <= x[2] else off[1:].min()
        x = entry.threshold - np.array([off[0], off[1:].max(), nearest])
    else:
        return None
    ends = dict(zip(("estimate", "low", "high"), x / (abs(entry.threshold) or 1.0), strict=True))
    if np.isnan(x[1:]).any():
        ends["estimate"] = ends["high"] if np.isnan(x[1]) else ends["low"]
    return {"site": name_of(entry), "verdict": entry.here} | ends  # of the interval that is drawn


def tally(entries: Sequence[Entry]) -> str:
    """How many claims have which verdict, corrected and alone, and what kind of evidence the supported ones have."""
    own, checks = ([entry for entry in entries if (entry.check is None) == claim] for claim in (True, False))

    def of(verdicts: Sequence[str]) -> list[int]:
        return [verdicts.count(verdict) for verdict in VERDICTS]

    kinds = [entry.tier for entry in own if entry.verdict == SUPPORTED]
    confirmed, half, after = (kinds.count(kind) for kind in (claims.FRESH, claims.HALF, EXPLORATORY))
    supported, against, untestable, untested = of([entry.verdict for entry in own])
    overruled = sum(entry.here != entry.verdict for entry in own)
    here, alone = ([getattr(entry, name) for entry in own].count(SUPPORTED) for name in ("here", "alone"))
    return (
        f"{supported} of the {len(own)} claims of the plan {is_are(supported)} supported, and {against} "
        f"{is_are(against)} not. {untestable} {is_are(untestable)} not testable here, and {untested} "
        f"{'was' if untested == 1 else 'were'} not tested. Of those supported, {confirmed or 'no claim'} "
        f"{is_are(confirmed or 1)} confirmed on fresh people, and {half or 'no claim'} on the confirmation half by a "
        f"threshold set before. The others ({after}) are exploratory. On this book's own people {here} {is_are(here)} "
        f"supported once corrected for each other, and {alone} each by itself. Fresh people, corrected by themselves, "
        f"overrule {overruled or 'no verdict'} of these. {len(checks)} checks are not counted, because little is "
        "learned from them either way (the table says why)."
    )


def short_tally(entries: Sequence[Entry]) -> str:
    """How many claims have which verdict."""
    words = [entry.verdict for entry in entries]
    kinds = [entry.tier for entry in entries if entry.verdict == SUPPORTED]
    after = f" ({kinds.count(EXPLORATORY)} of them exploratory)" if EXPLORATORY in kinds else ""
    parts = [f"{words.count(kind)} are {kind}{after * (kind == SUPPORTED)}" for kind in VERDICTS if kind in words]
    return f"Of the {len(words)} claims of the plan {listed(parts)}."


def kinds_of_evidence(params: Story) -> dict[str, str]:
    """`claims.TIERS`; where what had been seen was of another model, question or pairs, *exploratory* says that."""
    default = load_profile(Shared.model_fields["profile"].default)
    others = ["another model"] * (params.model != default["model"])
    others += ["another question"] * (params.question != default.get("question", questions.DEFAULT))
    others += ["other pairs"] * (params.pairs_file is not None)
    exploratory = (
        f"set when results of profile `{default['profile']}` had been seen, those of the commits named, of "
        f"{listed(others)} than here, and not shown to be older than this report's own results (a hash frozen before "
        "them shows that: `python -m steps freeze`)"
    )
    return claims.TIERS | ({EXPLORATORY: exploratory} if others else {})


def fingerprint_sentence(params: Story) -> str:
    """The hash of thresholds and rules, and whether it was set before the results."""
    own = claims.fingerprint(claims.thresholds(params), params)
    if own == params.frozen:
        return f"Thresholds and rules were frozen before results of this profile were seen: their hash is `{own}`."
    other = f", which holds `{params.frozen}`: a threshold or rule is another now" if params.frozen else ""
    return f"Thresholds and rules have the hash `{own}`; it was not frozen by this profile{other}."


def overlap_sentence(found: Mapping[str, Any] | None) -> str:
    """What `overlap` found."""
    if found is None or "why" in found:
        return f"Overlap with published heads: not applicable, {(found or {'why': 'no circuit was searched'})['why']}."
    return (
        f"{found['estimate']} of the {found['heads']} heads of the circuit at the last token "
        f"{is_are(found['estimate'])} among the {found['published']} published filter heads: {sites(found['shared'])}. "
        f"By chance {found['expected']:.2f} would be, among {found['total']} heads (hypergeometric, p = "
        f"{found['p']:.2g})."
    )


# --- what the notebook shows and hands on -------------------------------------------------------------------------


def how_many(step: Step, judged: Judged) -> Markdown:
    """The tally, what verdicts and intervals hold for, and the hash of the rules."""
    tiers = "; ".join(f"*{name}*: {meaning}" for name, meaning in kinds_of_evidence(step.params).items())
    said = [tally(judged.entries), judged.fresh, claims.CORRECTION, f"Kinds of evidence: {tiers}."]
    return Markdown("\n\n".join(filter(None, [*said, fingerprint_sentence(step.params)])))


def in_three_sentences(judged: Judged) -> Markdown:
    """What the circuit is, led by what is to be said of it, and followed by what it is not."""
    return Markdown("\n\n".join([f"**{judged.answer}**", *judged.outline, f"**What it is not**: {judged.not_so}"]))


def plan_sentence(judged: Judged) -> Markdown:
    """The plan's sentence, part by part."""
    return Markdown("\n\n".join(judged.sentence))


def published_heads(judged: Judged) -> Markdown:
    """The published heads, in one sentence."""
    return Markdown(overlap_sentence(judged.found["story"].get("overlap")))


def findings(step: Step, judged: Judged) -> dict[str, Any]:
    """The findings of step 10: the ledger first, then the circuit."""
    if judged.circuit is None:
        return step.write_findings(not_done(step))
    found, figure = judged.found, forest(judged.claims)
    first = front.figure(step, found, partial(stored, step))
    figures = {"first": first["figure"]} if first else {}
    rows = front.rows(judged.entries, found, partial(stored, step))
    leads = {
        "answer": judged.answer,
        "spoken": front.spoken(found["baselines"]),
        "rows": [row | {"words": claims.of_question(row["words"], step.params.topic)} for row in rows],
        "tally": short_tally(judged.claims),
        "sentences": judged.outline,
        "not": judged.not_so,
    }
    ledger = {
        "sentences": [
            judged.answer,
            *judged.outline,
            *judged.sentence,
            tally(judged.entries),
            overlap_sentence(found[step.name]["overlap"]),
        ],
        "headline": [*judged.sentence[:1], tally(judged.entries)],
        "outline": leads,
        "figures": figures | ({"claims": figure} if figure else {}),
        "captions": CAPTIONS | ({"first": first["caption"]} if first else {}),
        "verdicts": {entry.id: entry.verdict for entry in judged.entries},
        "measured": {name: found[name]["measured"] for name in MEASURED if "measured" in (found[name] or {})},
    }
    return step.write_findings(joined(step, [ledger, judged.circuit, judged.everywhere]))
