"""The circuit and the plan's sentence in words, by the verdicts of the claims: nothing here outlives its number.

1. `answer` is what leads the report; `not_so` says which links of the plan's chain do not hold.
2. `outline` says in three sentences what the circuit is: each clause stands on a claim, and says so where that claim is
   not supported, or cannot be tested.
3. `sentence` is the plan's chain, link by link, with what there is instead of a link that does not hold.

Clauses and links stand in data/claims.yaml; `site_names` are the sites that they name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from report.words import SPECIFICITY, capital, counted, listed, number_word, sites, with_ends
from steps.story import claims
from steps.story.claims import (
    ANSWERS,
    COARSE,
    EXPLORATORY,
    FRESH,
    LINKS,
    NOT_SUPPORTED,
    NOT_TESTABLE,
    NOT_TESTED,
    OUTLINE,
    SUPPORTED,
    Confirmed,
    Entry,
)

ROLES = {"names": "the names", "rest": "the tokens between the names", "between": "the tokens after the names"}
ROLES |= {"last": "the last token"}
ITEM = ";\n- "  # between the clauses of a sentence of the outline
LEADING = 4  # senders at the names that are named, at most
SHORT = 16  # words of a reason that still stand in brackets; longer ones are a clause of their own

# Why some checks are none of the claims, where pairs were given (`pairs_file`) and not made by step 01.
GIVEN = {
    "fame_matched": "only pairs that step 01 makes are matched in fame; these were given",
    "superset_at_last": "the answer is read off this very token by a linear map",
}


def site_names(found: Mapping[str, Any]) -> dict[str, str]:
    """The sites of this model, by the names that data/claims.yaml calls them by."""
    step = {name: findings or {} for name, findings in found.items()}
    retrieval, coarse = step["retrieval_heads"], step["coarse_sweep"]
    verdicts, members = retrieval.get("verdicts", {}), step["sufficiency"].get("critical_slice", ())
    circuit, over_all = (step["story"].get(name) or {} for name in ("circuit", "everywhere"))
    names = [site["site"] for site in members]
    lists = {
        "outside": [*claims.leaves(verdicts.get("retrieval_heads"))],
        "retrievers": verdicts.get("slice_heads_that_retrieve", ()),
        "slice": names,
        "slice_heads": [name for name in names if name[0].isdigit()],
        "circuit": circuit.get("sites", ()),
    }
    roles = listed(f"{number_word(row['nodes'])} at {ROLES[row['role']]}" for row in over_all.get("roles", ()))
    nodes = f"{over_all.get('size', 0)} of {over_all.get('nodes', 0)} heads and MLPs ({roles})"
    largest, fills = str(coarse.get("measured", {}).get("layer", "")), coarse.get("between", {}).get("fills", ())
    laid_down = f", laid down in layer{'s' * (len(fills) > 1)} {listed(fills)}" if fills else ""
    own = {"largest": largest, "fills": laid_down, "everywhere": nodes}
    own |= {"parts": of_kinds(names), "bring": "brings" if len(names) == 1 else "bring"}
    own |= {f"name_{kind}s": leading(retrieval.get("measured", {}).get("leading"), kind) for kind in ("head", "mlp")}
    own |= {"by_parts": by_parts(step["sufficiency"].get("specific_parts", ())), "unpruned": unpruned(over_all)}
    own |= {"directions_layer": str(step["subspace"].get("directions", {}).get("layer", ""))}
    own |= {"circuit_size": counted(circuit.get("size", 0), "site")}
    own |= {"circuit_region": of_region(circuit.get("placebo", ()))}
    own |= {"by_directions": by_directions(step["subspace"])}
    rows = [row for row in step["sufficiency"].get("specific", ()) if kept_denoised(row) and "why" not in row]
    own |= {"others": beside_the_first(rows), "moved": of_its_gap(rows)}
    own |= {"alone": ", the one other attribute asked about," * (len({row["attribute"] for row in rows}) == 1)}
    own["layers"] = listed(coarse.get("critical_layers", ()))
    return {name: sites(each) for name, each in lists.items()} | own


def of_kinds(names: Sequence[str]) -> str:
    """How many heads and MLPs there are among sites: "two heads and one MLP"."""
    heads = sum(name[0].isdigit() for name in names)
    counts = {"head": heads, "MLP": len(names) - heads}
    return listed(f"{number_word(count)} {kind}{'s' * (count != 1)}" for kind, count in counts.items() if count)


def by_parts(parts: Sequence[Mapping[str, Any]]) -> str:
    """How much of the placebo gap the slice's heads move, its MLPs, and, of single sites that are not specific, that
    which moves most; "" where it was not asked."""
    rows = [row for row in parts if row["attribute"] == parts[0]["attribute"] and row["verdict"] in SPECIFICITY]
    groups = [row for row in rows if row["site"] in ("its heads", "its MLPs")]
    single = [row for row in rows if row not in groups and row["verdict"] == "general"]
    single = sorted(single, key=lambda row: -row["placebo_estimate"])[:1]
    return "".join(
        f"{ITEM}{sites([row['site']])} {'alone moves' if row in single else 'by themselves move'} "
        f"{with_ends(row, prefix='placebo_')} of the {row['attribute']} gap, along paths that were not measured, and "
        f"{with_ends(row)} of the superset gap: {SPECIFICITY[row['verdict']]}"
        for row in groups + single
    )


def kept_denoised(row: Mapping[str, Any]) -> bool:
    """Whether what the placebo says is of the pairs that were kept, put into the other prompt's run."""
    return (row["choice"], row["direction"]) == ("kept", "denoise")


def of_its_gap(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much of the first attribute's gap the slice moves, with what follows it; "" where nobody asked."""
    return "".join(f"{with_ends(row, prefix='placebo_')} of the {row['attribute']} gap, " for row in rows[:1])


def beside_the_first(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the placebo says of the slice and the attributes after the first; "" where no other was asked about."""
    words = {"specific": "is specific to supersets", "general": "is one as well", "open": "is not decided about"}
    said = [
        f"against {row['attribute']} it {words[row['verdict']]} ({with_ends(row, prefix='quotient_')} times its share "
        "of the superset gap)"
        for row in rows
        if row["attribute"] != rows[0]["attribute"] and row["verdict"] in words
    ]
    return f"{ITEM}{listed(said)}" if said else ""


def unpruned(found: Mapping[str, Any]) -> str:
    """What as many nodes as the circuit over all tokens was pruned from keep, or the first tested number above that,
    and whether pruning is seen to have fitted the half that it was done on; "" where none was pruned."""
    curve = [row for row in found.get("curve", ()) if found["grown"] <= row["nodes"] < found["nodes"]]
    if not curve or found["size"] == found["grown"]:
        return ""
    row, kept, searched = curve[0], found["faithfulness"], found["faithfulness_discovery"]
    said = f"{ITEM}the first {row['nodes']} by attribution, before pruning, keep "
    fitted = row["low"] is not None and row["low"] > kept["estimate"] and searched["estimate"] > kept["estimate"]
    more = f"{ITEM}on the discovery half it keeps {with_ends(searched)} itself: pruning seems to have fitted that half"
    return said + with_ends(row) + more * fitted


def of_region(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much the circuit keeps of each attribute's gap, over what it keeps of the superset gap, all else having the
    corrupt prompt's values; "" where nobody asked."""
    each = listed(f"{with_ends(row, prefix='quotient_')} times as much of the {row['attribute']} gap" for row in rows)
    there = "with the corrupt prompt's values there instead, it keeps"
    return f"{ITEM}{there} {each} as of the superset gap" if rows else ""


def by_directions(subspace: Mapping[str, Any]) -> str:
    """That class and the first attribute travel in directions of their own, where step 08 shows the class difference
    to be specific; else ""."""
    placebo, layer = subspace.get("confounds", {}).get("placebo", ()), subspace.get("directions", {}).get("layer")
    own = [row for row in placebo if row["method"] == "class difference"][:1]
    return "".join(
        f"{ITEM}the superset's direction is not the {row['attribute']}'s: after layer {layer} that between a pair's "
        f"two supersets carries {with_ends(row)} of the superset gap and {with_ends(row, prefix='placebo_')} of the "
        f"{row['attribute']} gap"
        for row in own
        if row["verdict"] == "specific"
    )


def leading(found: Mapping[str, Any] | None, kind: str) -> str:
    """Which heads or MLPs at the names ("head", "mlp") lead into the slice by themselves: those of a path effect above
    zero in both halves, and whether the embedding is such a sender; "" where that is not known."""
    if not found or "why" in found:
        return ""
    if found["few"]:
        return "; which of them lead cannot be tested, of too few quads"
    names, halves = found[kind], " in both halves" * (found["halves"] > 1)
    if not names:
        return f"; by itself no such sender is significant{halves}" + ", but the embedding is" * found["embedding"]
    are, own = ("are", "themselves") if len(names) > 1 else ("is", "itself")
    also = ", and so is the embedding" * found["embedding"]
    return f"; all paths counted, {sites(names, LEADING)} {are} significant by {own}{halves}{also}"


def rank(entry: Entry) -> str:
    """What is to be said of the evidence where a verdict is exploratory: "" where it is not."""
    if entry.tier != EXPLORATORY:
        return ""
    asked = {NOT_TESTABLE: ", not testable on fresh people", NOT_TESTED: ", not tested on fresh people"}
    return "exploratory" + (asked.get(entry.fresh.verdict, "") if entry.fresh else "")


def basis(name: str, found: Mapping[str, Any]) -> str:
    """What a claim's number rests on, of what its words leave open; "" where they leave nothing open."""
    measured = {step: (of or {}).get("measured", {}) for step, of in found.items()}
    asked, heads = measured.get("neurons", {}).get("asked"), measured.get("retrieval_heads", {}).get("ablated")
    if name == "few_neurons" and asked:
        return (
            f"of {asked['neurons']:,} neurons the {asked['top']} of largest single effect in "
            f"{counted(asked['quads'], 'quad')} were asked"
        )
    return f"the path of {listed(heads)}" if name == "path_ablation" and heads else ""


def asides(entry: Entry, found: Mapping[str, Any]) -> list[str]:
    """What is to be said beside a claim that is not supported: that it could not have been, what it rests on, and
    what kind of evidence it is."""
    barred = f"found here: {entry.estimate:g}, by ranks that {COARSE} once corrected" if COARSE in entry.reason else ""
    return list(filter(None, (barred, basis(entry.id, found), rank(entry) if entry.fresh else "")))


def answer(entries: Sequence[Entry], found: Mapping[str, Any]) -> str:
    """One sentence: what the slice does, and whether it is about supersets, by the verdicts, and which of them are
    exploratory."""
    held = {entry.id for entry in entries if entry.verdict == SUPPORTED}
    (slice_brings,) = (entry.verdict for entry in entries if entry.id == "slice_sufficient")
    if slice_brings in (NOT_TESTABLE, NOT_TESTED):
        return f"Whether a few heads and MLPs at the last token bring the answer over is {slice_brings}."
    ranks = {entry.id: f" ({rank(entry)})" if rank(entry) else "" for entry in entries}
    words = next(one.words for one in ANSWERS if held.issuperset(one.claims)).format(**site_names(found), rank=ranks)
    return f"{words[0].upper()}{words[1:]}."


def not_so(entries: Sequence[Entry], found: Mapping[str, Any]) -> str:
    """What the slice does not do by itself, and which links of the plan's chain do not hold, which could not be tested,
    and which were not."""
    by_claim = {entry.id: entry for entry in entries}
    words = {NOT_SUPPORTED: "Not supported", NOT_TESTABLE: "Not testable here", NOT_TESTED: "Not tested"}
    said = kept_alone(found)
    for verdict, word in words.items():
        links: dict[str, list[str]] = {}
        for link in LINKS:
            entry = by_claim[link.claim]
            if entry.verdict == verdict:
                said_beside = asides(entry, found) if verdict == NOT_SUPPORTED else []
                if COARSE in entry.reason and deciding(entry) is not entry:
                    said_beside.insert(1, f"on fresh people, who decide: {entry.fresh.estimate:g}")
                aside = "; ".join(said_beside)
                links.setdefault(word + nearly(entry), []).append(link.plan + f" ({aside})" * bool(aside))
        said += [f"{name}: {'; '.join(own)}." for name, own in links.items()]
    return " ".join(said)


def kept_alone(found: Mapping[str, Any]) -> list[str]:
    """What the slice keeps of what the model has where all else takes other prompts' values; nothing where nobody
    asked."""
    kept = ((found.get("story") or {}).get("everywhere") or {}).get("sets", {}).get("slice")
    if not kept or not kept["there"] or not kept["alone"]:
        return []
    return [
        f"With all else at the last token resampled, the slice keeps {with_ends(kept['there'])} of what the model has; "
        "with all else at every token resampled, and so what the names' tokens would have given it, "
        f"{by_construction(kept['alone'])}."
    ]


def by_construction(row: Mapping[str, Any] | None) -> str:
    """What sites keep where nothing carries the answer on to the last token, or on from there: no result if none."""
    kept = with_ends(row)
    return "nothing, by construction" if kept in ("0.00", "0.00 [0.00, 0.00]") else kept


def outline(entries: Sequence[Entry], found: Mapping[str, Any]) -> list[str]:
    """What the circuit is, in three sentences: who writes at the names, who carries it on, what follows and what else
    the slice carries; their clauses as a list. Of claims that answer one question, those that are supported speak,
    else all."""
    own, by_claim = site_names(found), {entry.id: entry for entry in entries}
    out = []
    for part in OUTLINE:
        clauses = []
        for texts in part.clauses:
            held = [claim for claim in texts if by_claim[claim].verdict == SUPPORTED]
            clauses += [clause(by_claim[claim], texts[claim], own) for claim in held or texts]
        start = "\n\n- " if len(clauses) > 1 else " "
        out.append(f"**{part.about}**:{start}" + ITEM.join(clauses) + ".")
    return out


def deciding(entry: Entry) -> Entry | Confirmed:
    """What gave an entry its verdict: the entry itself, or what fresh people say of it."""
    return entry.fresh if entry.fresh and entry.tier == FRESH else entry


def standing(entry: Entry) -> str:
    """How a claim holds alone and when all claims are corrected together, on this book's people and on those who
    decide."""

    def holds(alone: str, corrected: str) -> str:
        if alone != SUPPORTED:
            return "it does not hold" if alone == NOT_SUPPORTED else f"it is {alone}"
        return "it holds, also corrected" if corrected == SUPPORTED else "it holds alone, not corrected"

    here, decided = holds(entry.alone, entry.here), deciding(entry)
    if decided is entry:
        return here
    there = holds(decided.alone, decided.verdict)
    if there == here:
        return f"on this book's people and on fresh people, who decide, {here}"
    return f"on this book's people {here}; on fresh people, who decide, {there}"


def nearly(entry: Entry) -> str:
    """In brackets, where and how a claim that is not supported holds all the same; "" where it holds nowhere."""
    holds = entry.verdict == NOT_SUPPORTED and SUPPORTED in (entry.alone, deciding(entry).alone)
    return f" ({standing(entry)})" if holds else ""


def clause(entry: Entry, text: str, own: Mapping[str, str]) -> str:
    """One clause with its number, worded by the verdict."""
    said, before = value(entry), ""
    if entry.verdict == NOT_SUPPORTED:
        before = f"it is not supported{nearly(entry)} that "
        if (entry.alone, entry.here, deciding(entry).alone) == (SUPPORTED, NOT_SUPPORTED, SUPPORTED):
            both = " (here, and on fresh people, who decide)" * (deciding(entry) is not entry)
            before = f"it is shown alone, but not once all claims are corrected together{both}, that "
        said += "" if nearly(entry) else f"; asked for: {entry.asked}"
    elif entry.verdict != SUPPORTED:
        before = f"{entry.verdict} is whether "
        _, _, why = entry.reason.partition("; ")
        known = entry.verdict == NOT_TESTABLE and entry.estimate is not None
        if known and len(why.split()) > SHORT:
            return f"{before}{with_number(text, said, own)}{ITEM}why this is not testable: {why}"
        said = "; ".join(filter(None, (said, why))) if known else entry.reason.removesuffix(".")
    return before + with_number(text, said, own)


def with_number(text: str, number: str, own: Mapping[str, str]) -> str:
    """A text of data/claims.yaml with its sites and its number, in brackets at the end if it has no place for it."""
    return (text if "{value}" in text else text + " ({value})").format(**own, value=number)


def sentence(entries: Sequence[Entry], found: Mapping[str, Any]) -> list[str]:
    """The plan's sentence for this model: first the chain of what is supported, with this book's numbers, and then what
    is not, link by link."""
    own = site_names(found)
    by_claim = {entry.id: entry for entry in entries}
    words = {
        NOT_SUPPORTED: "The evidence does not support that",
        NOT_TESTABLE: "Not testable here is whether",
        NOT_TESTED: "Not tested is whether",
    }
    chain, open_links, holds = [], {verdict: [] for verdict in words}, False
    for link in LINKS:
        entry = by_claim[link.claim]
        if entry.verdict == SUPPORTED:
            chain.append(with_number(link.here, ranked(entry), own))
            holds = True
            continue
        others = {name: text for name, text in link.instead.items() if by_claim[name].verdict == SUPPORTED}
        each = [with_number(text, ranked(by_claim[name]), own) for name, text in others.items()]
        chain.append(" and ".join(each) or f"[{entry.verdict}: {link.plan}]")
        holds = holds or bool(others)
        instead = "".join(f" Instead, {text}." for text in each)
        number, asked, rest = because(entry, found).partition("; asked for")
        rest = "".join(f" {capital(part)}." for part in (asked + rest).removeprefix("; ").split("; ") if part)
        open_links[entry.verdict].append(f"{words[entry.verdict]} {link.plan} ({number}).{rest}{instead}")
    whole = f"The names → {' → '.join(chain)} → the answer."
    if not holds:
        whole = "No link of the plan's chain from the names to the answer is supported here."
    return [whole, *(text for each in open_links.values() for text in each)]


def because(entry: Entry, found: Mapping[str, Any]) -> str:
    """Why a link is open, its number with its unit, and what is to be said beside it."""
    decided = deciding(entry)
    before, asked, rest = decided.reason.removesuffix(".").partition("; asked for")
    known = asked and decided.high is not None
    said = before + unit(entry) * bool(known) + asked + rest
    if entry.verdict != NOT_SUPPORTED:
        return said if decided is entry else f"on fresh people {said}"
    if decided is entry:  # its reason says what it rests on
        return "; ".join([said, *filter(None, [rank(entry) if entry.fresh else ""])])
    return "; ".join([f"on fresh people {said}", *asides(entry, found)])


def unit(entry: Entry) -> str:
    """What stands behind a claim's number, by the brackets at the end of its quantity: " logits", " of the gap"."""
    said = re.search(r"\((?:share )?([^()]*)\)$", entry.quantity)
    return f" {said[1]}" if said and said[1] not in ("share", "number") else ""


def number(of: Entry | Confirmed, entry: Entry) -> str:
    """The number of an entry with its unit, or of what fresh people say of it."""
    if of.estimate is None:
        return of.reason
    return claims.estimated(of, entry.threshold) + unit(entry) if of.high is not None else f"{of.estimate:.3g}"


def value(entry: Entry) -> str:
    """What an entry measured, for a sentence, and what fresh people gave where they decide."""
    decided = deciding(entry)
    fresh = "" if decided is entry else f"; on fresh people {number(decided, entry).removesuffix(unit(entry))}"
    return ranked(entry) + fresh


def ranked(entry: Entry) -> str:
    """An entry's number, and that it is exploratory where fresh people were asked about others."""
    return "; ".join(filter(None, (number(entry, entry), rank(entry) if entry.fresh else "")))
