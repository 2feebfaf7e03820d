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

from report.words import listed, with_ends
from steps.story import claims
from steps.story.claims import (
    ANSWERS,
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
LEADING = 4  # senders at the names that are named


def site_names(found: Mapping[str, Any]) -> dict[str, str]:
    """The sites of this model, by the names that data/claims.yaml calls them by."""
    step = {name: findings or {} for name, findings in found.items()}
    retrieval, coarse = step["retrieval_heads"], step["coarse_sweep"]
    verdicts, members = retrieval.get("verdicts", {}), step["sufficiency"].get("critical_slice", ())
    circuit, over_all = (step["story"].get(name) or {} for name in ("circuit", "everywhere"))
    names = [site["site"] for site in members]
    lists = {
        "name_mlps": leading(retrieval, "mlp"),
        "name_heads": leading(retrieval, r"\d"),
        "outside": [*claims.leaves(verdicts.get("retrieval_heads"))],
        "retrievers": verdicts.get("slice_heads_that_retrieve", ()),
        "slice": names,
        "slice_heads": [name for name in names if name[0].isdigit()],
        "circuit": circuit.get("sites", ()),
        "layers": coarse.get("critical_layers", ()),
    }
    roles = listed(f"{row['nodes']} at {ROLES[row['role']]}" for row in over_all.get("roles", ()))
    nodes = f"{over_all.get('size', 0)} heads and MLPs of {over_all.get('nodes', 0)} ({roles})"
    largest, fills = str(coarse.get("measured", {}).get("layer", "")), coarse.get("between", {}).get("fills", ())
    laid_down = f", laid down in layer{'s' * (len(fills) > 1)} {listed(fills)}" if fills else ""
    own = {"largest": largest, "size": str(len(names)), "fills": laid_down, "everywhere": nodes}
    own |= {"by_parts": by_parts(step["sufficiency"].get("specific_parts", ()))}
    own |= {"directions_layer": str(step["subspace"].get("directions", {}).get("layer", ""))}
    own |= {"circuit_size": str(circuit.get("size", 0)), "circuit_region": of_region(circuit.get("placebo", ()))}
    own |= {"by_directions": by_directions(step["subspace"])}
    own |= {"others": beside_the_first(step["sufficiency"].get("specific", ()))}
    return {name: listed(sites) for name, sites in lists.items()} | own


def by_parts(parts: Sequence[Mapping[str, Any]]) -> str:
    """What the placebo says of the slice's heads and of its MLPs, in brackets; "" where it was not asked."""
    words = {"specific": "specific", "general": "not specific", "open": "not decided"}
    said = [
        f"{row['site']} by themselves are {words[row['verdict']]}"
        for row in parts
        if row["site"] in ("its heads", "its MLPs")
        and row["attribute"] == parts[0]["attribute"]
        and row["verdict"] in words
    ]
    return f" (against {parts[0]['attribute']}, {', '.join(said)})" if said else ""


def beside_the_first(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the placebo says of the slice and the attributes after the first; "" where no other was asked about."""
    words = {"specific": "is specific to supersets", "general": "is one as well", "open": "is not decided about"}
    others = [row for row in rows if (row["choice"], row["direction"]) == ("kept", "denoise")]
    said = [
        f"against {row['attribute']} it {words[row['verdict']]} ({with_ends(row, prefix='quotient_')} times its share "
        "of the superset gap)"
        for row in others
        if row["attribute"] != others[0]["attribute"] and row["verdict"] in words
    ]
    return f"{ITEM}{listed(said)}" if said else ""


def of_region(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much the circuit keeps of each attribute's gap, over what it keeps of the superset gap, all else having the
    corrupt prompt's values; "" where nobody asked."""
    each = listed(f"{with_ends(row, prefix='quotient_')} times as much of the {row['attribute']} gap" for row in rows)
    there = "with the corrupt prompt's values there instead, they keep"
    return f"; {there} {each} as of the superset gap" if rows else ""


def by_directions(subspace: Mapping[str, Any]) -> str:
    """That class and the first attribute travel in directions of their own, where step 08 shows the class difference
    to be specific; else ""."""
    placebo, layer = subspace.get("confounds", {}).get("placebo", ()), subspace.get("directions", {}).get("layer")
    own = [row for row in placebo if row["method"] == "class difference"][:1]
    return "".join(
        f"{ITEM}in another direction, though: after layer {layer} that between a pair's two supersets carries "
        f"{with_ends(row)} of the superset gap and {with_ends(row, prefix='placebo_')} of the {row['attribute']} gap"
        for row in own
        if row["verdict"] == "specific"
    )


def leading(retrieval: Mapping[str, Any], start: str) -> list[str]:
    """The senders at the names of largest path effect into the slice on the discovery half, in which order step 06 has
    them, of one kind: those above zero on the other half, if any is."""
    rows = [row for row in retrieval.get("senders", {}).get("slice at names", ()) if re.match(start, row["site"])]
    shown = [row for row in rows if row["low"] is not None and row["low"] > 0]
    return [row["site"] for row in (shown or rows)[:LEADING]]


def answer(entries: Sequence[Entry], found: Mapping[str, Any]) -> str:
    """One sentence: what the slice does, and whether it is about supersets, by the verdicts."""
    held = {entry.id for entry in entries if entry.verdict == SUPPORTED}
    words = next(one.words for one in ANSWERS if held.issuperset(one.claims)).format(**site_names(found))
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
                links.setdefault(word + nearly(entry), []).append(link.plan)
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
    travels the same road; their clauses as a list. Of claims that answer one question, those that are supported speak,
    else all."""
    sites, by_claim = site_names(found), {entry.id: entry for entry in entries}
    out = []
    for part in OUTLINE:
        clauses = []
        for texts in part.clauses:
            held = [claim for claim in texts if by_claim[claim].verdict == SUPPORTED]
            clauses += [clause(by_claim[claim], texts[claim], sites) for claim in held or texts]
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
    return f"on this book's people {here}; on fresh people, who decide, {holds(decided.alone, decided.verdict)}"


def nearly(entry: Entry) -> str:
    """In brackets, where and how a claim that is not supported holds all the same; "" where it holds nowhere."""
    holds = entry.verdict == NOT_SUPPORTED and SUPPORTED in (entry.alone, deciding(entry).alone)
    return f" ({standing(entry)})" if holds else ""


def clause(entry: Entry, text: str, sites: Mapping[str, str]) -> str:
    """One clause with its number, worded by the verdict."""
    said, before = value(entry), ""
    if entry.verdict == NOT_SUPPORTED:
        before = f"not supported{nearly(entry)}: " if nearly(entry) else "it is not supported that "
        said += "" if nearly(entry) else f"; asked for: {entry.asked}"
    elif entry.verdict == NOT_TESTABLE and entry.estimate is not None:
        why = entry.reason.partition("; ")[2]  # behind its numbers
        before, said = "not testable here: ", "; ".join(filter(None, (said, why)))
    elif entry.verdict != SUPPORTED:
        before, said = f"{entry.verdict} is whether ", entry.reason
    return before + with_number(text, said, sites)


def with_number(text: str, number: str, sites: Mapping[str, str]) -> str:
    """A text of data/claims.yaml with its sites and its number, in brackets at the end if it has no place for it."""
    return (text if "{value}" in text else text + " ({value})").format(**sites, value=number)


def sentence(entries: Sequence[Entry], found: Mapping[str, Any]) -> list[str]:
    """The plan's sentence for this model: first the chain of what is supported, with this book's numbers, and then what
    is not, link by link."""
    sites = site_names(found)
    by_claim = {entry.id: entry for entry in entries}
    words = {
        NOT_SUPPORTED: "The evidence does not support",
        NOT_TESTABLE: "Not testable here is",
        NOT_TESTED: "Not tested is",
    }
    chain, open_links, holds = [], {verdict: [] for verdict in words}, False
    for link in LINKS:
        entry = by_claim[link.claim]
        if entry.verdict == SUPPORTED:
            chain.append(with_number(link.here, number(entry, entry), sites))
            holds = True
            continue
        others = {name: text for name, text in link.instead.items() if by_claim[name].verdict == SUPPORTED}
        each = [with_number(text, number(*[by_claim[name]] * 2), sites) for name, text in others.items()]
        chain.append(" and ".join(each) or f"[{entry.verdict}: {link.plan}]")
        holds = holds or bool(others)
        instead = f"; instead {listed(each)}" if others else ""
        open_links[entry.verdict].append(f"{words[entry.verdict]} that {link.plan} ({because(entry)}){instead}.")
    whole = f"The names → {' → '.join(chain)} → the answer."
    if not holds:
        whole = "No link of the plan's chain from the names to the answer is supported here."
    return [whole, *(text for each in open_links.values() for text in each)]


def because(entry: Entry) -> str:
    """Why a link is open, its number with its unit."""
    decided = deciding(entry)
    before, asked, rest = decided.reason.partition("; asked for")
    known = asked and decided.high is not None
    said = before + unit(entry) * bool(known) + asked + rest
    return said if decided is entry else f"on fresh people {said}"


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
    decided, own = deciding(entry), number(entry, entry)
    return own if decided is entry else f"{own}; on fresh people {number(decided, entry).removesuffix(unit(entry))}"
