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
from itertools import groupby
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

OPEN = "[a link that is open]"
ROLES = {"names": "the names", "rest": "the tokens between the names", "between": "the tokens after the names"}
ROLES |= {"last": "the last token"}
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
    laid_down = f" (laid down in layer{'s' * (len(fills) > 1)} {listed(fills)})" if fills else ""
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
        f"the slice's {row['site'].removeprefix('its ')} by themselves are {words[row['verdict']]}"
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
    return f"; {listed(said)}" if said else ""


def of_region(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much the circuit keeps of each attribute's gap, over what it keeps of the superset gap, all else having the
    corrupt prompt's values; "" where nobody asked."""
    each = [f"{with_ends(row, prefix='quotient_')} times as much of the {row['attribute']} gap" for row in rows]
    return f", and, with the corrupt prompt's values there instead, {listed(each)}" if each else ""


def by_directions(subspace: Mapping[str, Any]) -> str:
    """That class and the first attribute travel in directions of their own, where step 08 shows the class difference
    to be specific; else ""."""
    placebo, layer = subspace.get("confounds", {}).get("placebo", ()), subspace.get("directions", {}).get("layer")
    own = [row for row in placebo if row["method"] == "class difference"][:1]
    return "".join(
        f", but in another direction: after layer {layer} that between two supersets carries {with_ends(row)} of the "
        f"superset gap and {with_ends(row, prefix='placebo_')} of the {row['attribute']} gap"
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
    by_claim, alone = {entry.id: entry for entry in entries}, "Supported by themselves, but not among all claims"
    words = {NOT_SUPPORTED: "Not supported", NOT_TESTABLE: "Not testable here", NOT_TESTED: "Not tested"}
    links: dict[str, list[str]] = {name: [] for name in (words[NOT_SUPPORTED], alone, *words.values())}
    for link in LINKS:
        entry = by_claim[link.claim]
        if entry.verdict != SUPPORTED:
            nearly = entry.verdict == NOT_SUPPORTED and deciding(entry).alone == SUPPORTED
            links[alone if nearly else words[entry.verdict]].append(link.plan)
    said = [f"{name}: {'; '.join(own)}." for name, own in links.items() if own]
    return " ".join([*kept_alone(found), *said])


def kept_alone(found: Mapping[str, Any]) -> list[str]:
    """What the slice keeps of logit_diff where all else takes other prompts' values; nothing where nobody asked."""
    kept = ((found.get("story") or {}).get("everywhere") or {}).get("sets", {}).get("slice")
    if not kept or not kept["there"] or not kept["alone"]:
        return []
    return [
        f"With all else at the last token resampled the slice keeps {with_ends(kept['there'])} of logit_diff; with "
        "all else at every token, and so with what the names' tokens would have given it, "
        f"{with_ends(kept['alone'])}."
    ]


def outline(entries: Sequence[Entry], found: Mapping[str, Any]) -> list[str]:
    """What the circuit is, in three sentences: who writes at the names, who carries it on, what follows and what else
    travels the same road. Of claims that answer one question, those that are supported speak, else all."""
    sites, by_claim = site_names(found), {entry.id: entry for entry in entries}
    out = []
    for part in OUTLINE:
        clauses = []
        for texts in part.clauses:
            held = [claim for claim in texts if by_claim[claim].verdict == SUPPORTED]
            clauses += [clause(by_claim[claim], texts[claim].format(**sites)) for claim in held or texts]
        out.append(f"**{part.about}**: {'; '.join(clauses)}.")
    return out


def deciding(entry: Entry) -> Entry | Confirmed:
    """What gave an entry its verdict: the entry itself, or what fresh people say of it."""
    return entry.fresh if entry.fresh and entry.tier == FRESH else entry


def clause(entry: Entry, text: str) -> str:
    """One clause with its number, worded by the verdict."""
    if entry.verdict == SUPPORTED:
        return f"{text} ({value(entry)})"
    if entry.verdict == NOT_SUPPORTED and deciding(entry).alone == SUPPORTED:
        return f"supported by itself, but not when all claims are corrected together: {text} ({value(entry)})"
    if entry.verdict == NOT_SUPPORTED:
        return f"it is not supported that {text} ({value(entry)}; asked for: {entry.asked})"
    if entry.verdict == NOT_TESTABLE and entry.estimate is not None:
        why = entry.reason.partition("; ")[2]  # behind its numbers
        return f"not testable here: {text} ({'; '.join(filter(None, (value(entry), why)))})"
    return f"{entry.verdict} is whether {text} ({entry.reason})"


def sentence(entries: Sequence[Entry], found: Mapping[str, Any]) -> list[str]:
    """The plan's sentence for this model: first the chain of what is supported, then what is not, link by link."""
    sites = site_names(found)
    by_claim = {entry.id: entry for entry in entries}
    words = {
        NOT_SUPPORTED: "The evidence does not support",
        NOT_TESTABLE: "Not testable here is",
        NOT_TESTED: "Not tested is",
    }
    chain, open_links = [], {verdict: [] for verdict in words}
    for link in LINKS:
        entry = by_claim[link.claim]
        if entry.verdict == SUPPORTED:
            chain.append(f"{link.here.format(**sites)} ({value(entry)})")
            continue
        others = {
            name: text.format(**sites) for name, text in link.instead.items() if by_claim[name].verdict == SUPPORTED
        }
        chain.append(" and ".join(f"{text} ({value(by_claim[name])})" for name, text in others.items()) or OPEN)
        instead = f"; instead {listed(others.values())}" if others else ""
        why = entry.reason if deciding(entry) is entry else f"on fresh people {entry.fresh.reason}"
        open_links[entry.verdict].append(f"{words[entry.verdict]} that {link.plan} ({why}){instead}.")
    linked = [text for text, _ in groupby(chain)]  # a gap of several open links is said once
    whole = f"The names → {' → '.join(linked)} → the answer."
    if linked == [OPEN]:
        whole = "No link of the plan's chain from the names to the answer is supported here."
    return [whole, *(text for each in open_links.values() for text in each)]


def value(entry: Entry) -> str:
    """What an entry measured, for a sentence, and what fresh people gave where they decide."""
    unit = re.search(r"\(([^()]*)\)$", entry.quantity)
    unit = f" {unit[1]}" if unit and not unit[1].startswith(("share", "ratio")) else ""

    def number(of: Entry | Confirmed) -> str:
        if of.estimate is None:
            return of.reason
        return claims.estimated(of) + unit if of.high is not None else f"{of.estimate:.3g}"

    decided = deciding(entry)
    if decided is entry:
        return number(entry)
    return f"{number(entry)}; on fresh people {number(decided)}"
