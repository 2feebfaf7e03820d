"""Truth against findings: what a planted circuit is, beside what the steps say of it. JSON alone, no model.

1. `METHODS` names each method with two readers: what the truth (`planted/truth.py`) has it find, and what its step's
   findings say it found: sets of items (sites, layers, classes, verdicts), or a number.
2. `score` sets the two side by side: precision and recall of sets, the error of numbers.
3. `picked` is what the steps say of a model that has nothing to find: there everything is a false positive.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib import records
from lib.errors import Refusal
from pipeline.units import read_json

SHARE = 0.02
"""Share of the gap from which a site's effect is one to be found, and one that counts as found."""
READ = 0.99
"""Balanced accuracy from which a probe reads what it was asked without error."""
TOLERANCE, TOLERANCES = 1e-3, {"direction, effect": 0.05, "direction, cosine": 0.01, "patching": 0.03}
"""How far a number may be from the planted one; those of the directions are of means over the people asked."""
LEVEL = 0.05
RULES = {"additive": "additive", "or": "OR", "and": "AND"}
ONE_NAME, STEP = (0.05, 0.2), (0.1, 0.3)
"""Shares of the other name that surely count for nothing, and surely count; and how far the step of a second name may
be from a rule's (times that of one name) to be surely of it, and not to be. What lies between is left open."""
LEFT = (0.1, 0.3)
"""Shares of the answer that sites outside a circuit may do where it is surely complete, and where surely not."""
ARRIVED, REPAIR = 0.8, 0.1
"""As in the profile: of the critical layers, and of the claims about repair."""
ROUTES = {"k": "names", "v": "names", "q": "last"}
"""Inputs of heads, and where they are read."""
ALWAYS = ("task_done", "critical_layers", "slice_sufficient")
ALWAYS += ("profession_at_names", "superset_at_last", "few_directions", "beats_random", "steering")
UNBACKED = ("slice_necessary", "general_templates")
UNBACKED += ("circuit_faithful", "circuit_necessary", "circuit_complete", "circuit_beats_random")
"""Claims that hold of every planted circuit, and those that hold where nothing stands in for it."""

Truth = Mapping[str, Any]
Found = Mapping[str, Mapping[str, Any]]  # findings by step; claims.json as "claims"
Finding = Mapping[str, Any]  # the findings of one step


class Score(NamedTuple):
    """One method on one model."""

    method: str
    step: str
    wanted: list[str] | float
    found: list[str] | float | None
    precision: float | None  # share of what was found that is there; 1 where nothing was found
    recall: float | None  # share of what is there that was found; 1 where nothing is
    error: float | None  # of a number: found less wanted

    @property
    def right(self) -> bool:
        """Whether the method found the whole truth and nothing but the truth."""
        if self.precision is None:
            return self.error is not None and abs(self.error) <= TOLERANCES.get(self.method, TOLERANCE)
        return self.precision == self.recall == 1


class Wanted(NamedTuple):
    """What a method must find, and what it may find or leave out without being wrong."""

    must: set[str]
    may: set[str] = frozenset()


def compared(method: str, step: str, wanted: Wanted | float, found: set[str] | float | None) -> Score:
    """A method's score. A number that was not found has no error, and is not right."""
    if isinstance(wanted, float):
        return Score(method, step, wanted, found, None, None, None if found is None else found - wanted)
    counted = (found or set()) - (wanted.may - wanted.must)
    both = len(wanted.must & counted)
    precision, recall = both / len(counted) if counted else 1.0, both / len(wanted.must) if wanted.must else 1.0
    return Score(method, step, sorted(wanted.must), sorted(counted), precision, recall, None)


# --- what is true ----------------------------------------------------------------------------------------------------


def name_of(site: Finding) -> str:
    """A planted site as the findings call it."""
    return f"mlp {site['layer']}" if site["component"] == "mlp" else f"{site['layer']}.{site['head']}"


def at_last(truth: Truth) -> list[Finding]:
    """The planted sites at the last token."""
    return [site for site in truth["sites"] if site["position"] == "last"]


def by_size(truth: Truth, size: Callable[[Finding], float], least: float = SHARE) -> Wanted:
    """Sites at the last token whose effect is at least `least` of the gap; those of a smaller one may be found."""
    shares = {name_of(site): size(site) / truth["gap"]["mean"] for site in at_last(truth)}
    must = {name for name, share in shares.items() if share >= least}
    some = {name_of(site) for site in at_last(truth) if largest(site) / truth["gap"]["mean"] > SHARE / 4}
    return Wanted(must, some - must)


def loss(site: Finding) -> float:
    """What ablating a site surely costs, whatever the values: of zero and of the corrupt prompt's, the smaller loss."""
    return min(site["necessity"][kind]["mean"] for kind in ("zero", "counterfactual"))


def largest(site: Finding) -> float:
    """The largest of a site's effects."""
    return max(gain(site), *(effect["mean"] for effect in site["necessity"].values()))


def gain(site: Finding) -> float:
    return site["recovery"]["mean"]


def of_roles(truth: Truth, *roles: str) -> list[Finding]:
    return [site for site in truth["sites"] if site["role"] in roles]


def arriving_layers(truth: Truth) -> Wanted:
    """The fewest layers after which what the last token's residual stream holds rises by 80% in all; a layer that tips
    the scale within `SHARE` of that may be named. (A rise is also what a backup no longer answers behind its layer.)"""
    curve = truth["arrived"]
    rises = {f"layer {layer}": value - before for layer, (before, value) in enumerate(pairwise([0.0, *curve]))}
    order = sorted(rises, key=rises.get, reverse=True)
    reached = np.cumsum([rises[layer] for layer in order]) / curve[-1]
    must, most = ({*order[: int(np.argmax(reached >= ARRIVED + by)) + 1]} for by in (-SHARE, SHARE))
    return Wanted(must, most - must)


def judging(found: Finding) -> str:
    """The ablation that decides what a backup is: the first that step 05 was given."""
    rows = found.get("compensation") or [{"ablation": "resample"}]
    return rows[0]["ablation"]


def slice_of(found: Found) -> set[str]:
    """The critical slice of step 04."""
    return {row["site"] for row in found["sufficiency"].get("critical_slice", ())}


def backup_sites(truth: Truth) -> list[str]:
    """The backup, and the MLP that reads it."""
    backup = truth["backup"] or {}
    return [name_of(truth["sites"][backup[key]]) for key in ("site", "reader") if backup.get(key) is not None]


def planted_backups(truth: Truth, found: Found) -> Wanted | None:
    """The backup, and the MLP that reads it, where it speaks under the ablation that judges. Where the slice holds one
    of them, none has to be found outside: what is ablated with the slice stands in for nothing."""
    names = set(backup_sites(truth))
    return Wanted(names) if planted_ratio(truth, found) else Wanted(set(), names)


def planted_ratio(truth: Truth, found: Found) -> float | None:
    """The share that the backup restores; None where the slice holds a part of it."""
    backup = truth["backup"]
    if slice_of(found).intersection(backup_sites(truth)):
        return None
    return float(backup["ratio"]) if backup and judging(found["hydra"]) in backup["ablations"] else 0.0


def planted_inside(truth: Truth, found: Found) -> Wanted | None:
    """Which member of the slice stands in for others: the backup, or the MLP that reads it where that alone is a member
    (beside it, one of the two is enough); None where neither is."""
    members = [name for name in backup_sites(truth) if name in slice_of(found)]
    speaks = members and judging(found["hydra"]) in truth["backup"]["ablations"]
    return Wanted({*members[: int(speaks)]}, set(members)) if members else None


def planted_routes(truth: Truth, found: Finding) -> Wanted | None:
    """The inputs (`ROUTES`) through which the slice's heads are given a share of the gap; None where the slice has no
    heads, so that nobody asked. Where an input works against the answer, as that of a backup, it may be named."""
    sums, heads = dict.fromkeys(ROUTES, 0.0), {name for name in found["slice"] if not name.startswith("mlp")}
    if not heads:
        return None
    for edge in truth["paths"]:
        receiver = None if edge["receiver"] is None else name_of(truth["sites"][edge["receiver"]])
        if receiver in heads and ROUTES.get(edge["input"]) == truth["sites"][edge["sender"]]["position"]:
            sums[edge["input"]] += edge["noise"]["mean"] / truth["gap"]["mean"]
    must = {kind for kind, share in sums.items() if share > 2 * SHARE}
    return Wanted(must, {kind for kind, share in sums.items() if share} - must)


def planted_probes(truth: Truth, found: Finding) -> Wanted:
    """Of the probes that were asked, those that can read without error; between their chance layers and these, with
    names of several lengths, they may."""
    must, may = set(), set()
    for row in own_probes(found):
        first = [
            r["first"] for r in truth["readable"] if (r["what"], r["position"]) == (row["target"], row["position"])
        ]
        if first and row["layer"] >= min(first):
            (must if row["layer"] >= max(first) else may).add(probe(row))
    return Wanted(must, may)


def planted_classes(truth: Truth, found: Finding) -> Wanted | None:
    """Sites of the slice whose share of a class's gap differs between the classes. Where nothing was tested, all such
    sites are missed; None where there are none."""
    spread = {}
    for site in at_last(truth):
        shares = [site["recovery"]["by_answer"][name] / gap for name, gap in truth["gap"]["by_answer"].items() if gap]
        spread[name_of(site)] = max(shares, default=0) - min(shares, default=0)
    differ = {name for name, size in spread.items() if size > 5 * SHARE}
    if not (asked := {row["site"] for row in (found["interaction"] or {}).get("sites", ())}):
        return Wanted(differ) if differ else None
    must = asked & differ
    return Wanted(must, {name for name in asked - must if spread.get(name, 0) > SHARE / 4})


def planted_between(truth: Truth) -> Wanted:
    return Wanted({"between"} if of_roles(truth, "collector", "forwarder") else set())


def planted_readers(truth: Truth) -> Wanted:
    """Heads that carry professions from the names; heads that write for some classes alone may pass the tests."""
    may = of_roles(truth, "key_routed", "query_routed", "forwarder", "gather", "lookup")
    return Wanted({name_of(site) for site in of_roles(truth, "retrieval")}, {name_of(site) for site in may})


def planted_circuit(truth: Truth) -> Wanted | None:
    """The sites without which much is lost; None where a backup can take their place: then there are two circuits."""
    return None if truth["backup"] else by_size(truth, loss, 1 - ARRIVED)


def planted_neurons(truth: Truth, found: Finding) -> Wanted | None:
    """The neurons of the aggregating MLPs, maybe those of other planted MLPs; None where a head works beside them."""
    names = {f"neuron {row['layer']}.{row['neuron']}" for row in truth["neurons"]}
    others = tuple(f"neuron {site['layer']}." for site in of_roles(truth, "class_only", "negative", "backup_reader"))
    there = neurons(found) if able(found) else set()
    return Wanted(names, {name for name in there if name.startswith(others)} - names) if names else None


def planted_effect(truth: Truth, found: Finding) -> float | None:
    """All of it (and so of its cosine), where the layer after which directions were fitted lies behind every
    aggregator. Before it, professions are there and no superset."""
    last = ("aggregator", "class_only", "negative", "backup", "backup_reader")
    written = [site["layer"] for site in of_roles(truth, *last)]
    return 1.0 if written and found["directions"]["layer"] >= max(written) else None


def planted_patch(truth: Truth, found: Finding) -> float | None:
    """What the direction that was fitted, right or wrong, must bring back (`carried`): this judges the patch alone."""
    return None if planted_effect(truth, found) is None else found["carried"]


def planted_specificity(truth: Truth) -> Wanted | None:
    """Whether the sites at the last token carry the placebo attribute; None where nothing reads it."""
    if not truth["placebo_gap"]:
        return None
    share = max((site["placebo"] / truth["placebo_gap"] for site in at_last(truth)), default=0)
    return Wanted({"general" if share > SHARE else "specific"})


class NameSteps(NamedTuple):
    """What two names do, by the truth."""

    read: str  # the name that does more
    share: float  # what the other does, alone and beside it, over what that one does
    one: float  # logits that one name adds on average
    ratio: float | None  # the second name's step over the first's; None where one adds nothing

    @property
    def one_alone(self) -> bool | None:
        """Whether the answer is read off one name; None where the other does little."""
        return None if ONE_NAME[0] <= self.share < ONE_NAME[1] else self.share < ONE_NAME[0]

    def follows(self, step: float) -> bool | None:
        """Whether a second name's step is the rule's: 1 additive, 0 OR."""
        if self.ratio is None or self.one_alone is not False:
            return None
        away = abs(self.ratio - step)
        return None if STEP[0] <= away <= STEP[1] else away < STEP[0]


def name_steps(truth: Truth) -> NameSteps:
    """Read from the logits that one name in either slot, and two, add to their class."""
    first, second, both = (truth["rule_logits"][key] for key in ("first", "second", "both"))
    sizes = {"first": (first + both - second) / 2, "second": (second + both - first) / 2}
    read, less = sorted(sizes, key=sizes.get, reverse=True)
    one = (first + second) / 2
    ratio = (both - one) / one if one > SHARE * both else None
    return NameSteps(read, sizes[less] / sizes[read], one, ratio)


def planted_rule(truth: Truth) -> Wanted | None:
    """The rule that the model follows, noise included; what one name alone gives away is no rule. None where it lies
    between two answers."""
    names = name_steps(truth)
    if names.one_alone is not False:
        return Wanted({f"{names.read} name"}) if names.one_alone else None
    if names.ratio is None:
        return Wanted({RULES["and"]})
    near, step = ("additive", 1.0) if names.ratio > 0.5 else ("OR", 0.0)
    said = names.follows(step)
    if said and not truth["options"].get("noise"):  # exact numbers: a cap on logits, too, makes a sum less than a sum
        said = abs(names.ratio - step) <= TOLERANCE
    return None if said is None else Wanted({near if said else "neither"})


def rule_claims(truth: Truth) -> tuple[dict[str, bool | None], set[str]]:
    """What is true of the claims on two names, and verdicts beside: none is supported where one name alone is read."""
    names, claims = name_steps(truth), ("either_name", "rule_or", "rule_additive", "rule_and")
    if names.one_alone is not False:
        return dict.fromkeys(claims), {f"{name}: not supported" for name in claims}
    alone = names.ratio is not None
    return dict(zip(claims, (alone, names.follows(0), names.follows(1), not alone), strict=True)), set()


def planted_complete(truth: Truth, found: Finding) -> bool | None:
    """Whether the circuit that was found leaves nothing behind. None of a single site, which has no parts to go
    without; and where planted sites outside it do something (`LEFT`): the search stops at a share of the answer, and in
    the model these go on when others are gone. Where they do much, it is not complete."""
    members = {row["site"] for row in (found.get("circuit") or {}).get("members", ())}
    outside = [site for site in at_last(truth) if name_of(site) not in members]
    left = sum(abs(site["necessity"]["counterfactual"]["mean"]) for site in outside) / truth["gap"]["mean"]
    return None if len(members) < 2 or LEFT[0] <= left <= LEFT[1] else left < LEFT[0]


def planted_claims(truth: Truth, found: Found) -> Wanted:
    """The verdicts of the claims that the construction decides."""
    shares, backed = {name_of(site): gain(site) / truth["gap"]["mean"] for site in at_last(truth)}, truth["backup"]
    slice_sites = slice_of(found)
    readers = {name_of(site) for site in of_roles(truth, "retrieval", "key_routed")}
    whole = {name_of(site) for site in of_roles(truth, "aggregator")}
    classes = planted_classes(truth, found["generality"])
    best, general = max(shares.values(), default=0), planted_specificity(truth)
    of_names, beside = rule_claims(truth)
    ratio = planted_ratio(truth, found)
    true: dict[str, bool | None] = dict.fromkeys(ALWAYS, True)
    true |= {
        "single_suffices": None if abs(best - 0.5) < 0.1 else best > 0.5,
        "between_carries": bool(of_roles(truth, "collector", "forwarder")),
        "slice_specific": general and general.must == {"specific"},
        "slice_general": general and general.must == {"general"},
        "retrieval_heads": None if readers - slice_sites else False,
        # an MLP that takes a share of the answer away takes less of what is left: that is repair, too
        "no_repair": None if ratio is None or of_roles(truth, "negative") else ratio <= REPAIR,
        "no_backup": None if ratio is None else ratio <= REPAIR,
        "class_specific": classes and bool(classes.must),
        **of_names,
        **dict.fromkeys(("values_carry", "mlps_at_names"), True if readers & slice_sites else None),
        "one_direction": True if whole & slice_sites else None,
    }
    if backed is None:
        true |= dict.fromkeys(UNBACKED, True) | {"circuit_complete": planted_complete(truth, found["story"])}
    words = {True: "supported", False: "not supported"}
    must = {f"{name}: {words[said]}" for name, said in true.items() if said is not None}
    decided = {name for name, said in true.items() if said is not None} | {said.partition(":")[0] for said in beside}
    left = {said for said in verdicts(found["claims"]) if said.partition(":")[0] not in decided}
    return Wanted(must, left | beside)


# --- what the steps found --------------------------------------------------------------------------------------------


def sites_found(found: Finding) -> set[str]:
    """Heads and MLPs of steps 03 and 04 whose effect is above zero, familywise, and at least `SHARE` of the gap."""
    return {
        row["site"]
        for row in found["sites"]
        if row["component"] in ("head", "mlp")
        and row["low"] is not None
        and row["low"] > 0
        and row["p"] <= LEVEL
        and row["ratio"] >= SHARE
    }


def critical_layers(found: Finding) -> set[str]:
    return {f"layer {layer}" for layer in found["critical_layers"]}


def between(found: Finding) -> set[str]:
    """Whether the tokens between hold a part of the answer by themselves."""
    parts = (found["between"] or {}).get("parts", ())
    rows = [row for row in parts if row["position"] == "between" and row["half"] == "confirmation"]
    return {row["position"] for row in rows if row["low"] is not None and row["low"] > 0 and row["estimate"] >= SHARE}


def backups(found: Finding) -> set[str]:
    return {row["site"] for row in found["backups"] if row["stands_in"]}


def inside(found: Finding) -> set[str]:
    """Members of the slice that stand in for others."""
    return {row["site"] for row in found["inside"] if row["backup"] and row["stands_in"]}


def retrieval_heads(found: Finding) -> set[str]:
    """Heads that pass all four tests, of the slice or before it."""
    verdicts = found["verdicts"]
    return {
        *verdicts["slice_heads_that_retrieve"],
        *(site for own in verdicts["retrieval_heads"].values() for site in own),
    }


def routes(found: Finding) -> set[str]:
    """By which inputs of its heads (`ROUTES`) the slice is given what it reads."""
    rows = [row for row in found["carried"] if row["senders"] == "everything" and row["mlps"] == "recomputed"]
    low = {row["receivers"]: row["low"] for row in rows}
    return {kind for kind, role in ROUTES.items() if (low.get(f"{kind} at {role}") or 0) > SHARE}


def direction_effect(found: Finding) -> float | None:
    """What the direction between the two classes of a pair brings back, as a share of the gap."""
    rows = [row for row in found["directions"]["by_number"] if (row["method"], row["k"]) == ("class difference", 1)]
    return rows[0]["estimate"] if rows else None


def own_probes(found: Finding) -> list[Finding]:
    """Accuracies of probes in the prompts that they were fitted to: supersets at the last token of pairs, professions
    at the names of one-name prompts."""
    asked = {("pair", "superset", "last"), ("one-name", "profession", "names")}
    return [
        row
        for row in found["probes"]["accuracy"]
        if row["template"] == row["trained"] and (row["kind"], row["target"], row["position"]) in asked
    ]


def probe(row: Finding) -> str:
    return f"{row['target']} at {row['position']} after layer {row['layer']}"


def probes_read(found: Finding) -> set[str]:
    """Layers after which a probe reads without error."""
    return {probe(row) for row in own_probes(found) if row["estimate"] >= READ}


def probes_above_chance(found: Finding) -> set[str]:
    """Layers after which a probe is surely better than the best under permuted labels."""
    by = ("kind", "target", "position")
    chance = {tuple(row[key] for key in by): row["threshold"] for row in found["probes"]["thresholds"]}
    rows = [row for row in own_probes(found) if row["low"] is not None]
    return {probe(row) for row in rows if row["low"] > chance[tuple(row[key] for key in by)]}


def neurons(found: Finding) -> set[str]:
    """Neurons that help or oppose, significantly in both halves under the mean ablation."""
    return set(found["neurons"]["significant"]["mean"])


def rule(found: Finding) -> set[str]:
    """The rule by which two names add up, by the number of names."""
    return {found["rule"]["verdict"]["number"]} if found.get("rule") and found["rule"].get("verdict") else set()


def class_specific(found: Finding) -> set[str]:
    """Sites whose share of the work differs between the classes."""
    return {row["site"] for row in (found["interaction"] or {}).get("sites", ()) if row["sure"]}


def specificity(found: Finding) -> set[str]:
    """Whether the slice carries the placebo attribute as well ("general") or not ("specific")."""
    rows = [row for row in found.get("specific") or () if (row["choice"], row["direction"]) == ("kept", "denoise")]
    return {row["verdict"] for row in rows if row["verdict"] in ("specific", "general")}


def circuit(found: Finding) -> set[str]:
    """Members of the circuit at the last token that matter."""
    return {row["site"] for row in (found.get("circuit") or {}).get("members", ()) if row["matters"]}


def verdicts(found: Finding) -> set[str]:
    """Claims that were decided, with their verdict."""
    decided = {"supported", "not supported"}
    return {f"{row['id']}: {row['verdict']}" for row in found["claims"] if row["verdict"] in decided}


# --- side by side ----------------------------------------------------------------------------------------------------


def backup_ratio(found: Finding) -> float:
    """The share of the slice's loss that a site which stands in for it makes up for; 0 where none does."""
    return max((row["ratio_estimate"] or 0.0 for row in found["backups"] if row["stands_in"]), default=0.0)


METHODS: dict[str, tuple[str, Callable[[Truth, Found], Wanted | float | None], Callable[[Finding], Any]]] = {
    "critical layers": ("coarse_sweep", lambda t, f: arriving_layers(t), critical_layers),
    "tokens between": ("coarse_sweep", lambda t, f: planted_between(t), between),
    "necessity": ("necessity", lambda t, f: by_size(t, loss), sites_found),
    "sufficiency": ("sufficiency", lambda t, f: by_size(t, gain), sites_found),
    "specificity": ("sufficiency", lambda t, f: planted_specificity(t), specificity),
    "backups": ("hydra", planted_backups, backups),
    "backups, ratio": ("hydra", planted_ratio, backup_ratio),
    "backups in the slice": ("hydra", planted_inside, inside),
    "retrieval heads": ("retrieval_heads", lambda t, f: planted_readers(t), retrieval_heads),
    "routes": ("retrieval_heads", lambda t, f: planted_routes(t, f["retrieval_heads"]), routes),
    "class-specific sites": ("generality", lambda t, f: planted_classes(t, f["generality"]), class_specific),
    "rule": ("generality", lambda t, f: planted_rule(t), rule),
    "probes, without error": ("subspace", lambda t, f: planted_probes(t, f["subspace"]), probes_read),
    "probes, above chance": ("subspace", lambda t, f: planted_probes(t, f["subspace"]), probes_above_chance),
    "direction, effect": ("subspace", lambda t, f: planted_effect(t, f["subspace"]), direction_effect),
    "patching": ("subspace", lambda t, f: planted_patch(t, f["subspace"]), direction_effect),
    "direction, cosine": ("subspace", lambda t, f: planted_effect(t, f["subspace"]), lambda found: found["cosine"]),
    "neurons": ("neurons", lambda t, f: planted_neurons(t, f["neurons"]), neurons),
    "circuit": ("story", lambda t, f: planted_circuit(t), circuit),
    "claims": ("claims", planted_claims, verdicts),
}


def score(truth: Truth, found: Found) -> list[Score]:
    """Every method's score on one model that does its task; of one that has nothing to find, see `picked`."""
    if not truth["gap"]["mean"]:
        return picked(found)
    out = []
    for method, (step, wanted, read) in METHODS.items():
        asked = wanted(truth, found)
        if asked is not None:
            out.append(compared(method, step, asked, read(found[step]) if able(found[step]) else None))
    return out


def picked(found: Found) -> list[Score]:
    """What the steps say of a model that has nothing to find: of each set, all that is in it is wrong."""
    out = []
    for method, (step, _, read) in METHODS.items():
        said = read(found[step]) if able(found[step]) else set()
        if isinstance(said, set):
            said = {one for one in said if not one.endswith(": not supported")}
            out.append(compared(method, step, Wanted(set()), said))
    return out


def able(found: Finding) -> bool:
    """Whether a step measured anything."""
    return found.get("able", True)


def load(results: Path) -> tuple[Truth, dict[str, Any]]:
    """The truth that lies beside results, and their findings by step, claims, and the `cosine` of step 08. Refusal
    where it is the truth of other weights than the results are of."""
    truth = json.loads((results / "truth.json").read_text(encoding="utf-8"))
    found = {path.name.removesuffix(".findings.json"): read_json(path) for path in results.glob("*.findings.json")}
    weights = found["baselines"]["model"]["sha256"]
    if weights != truth["sha256"]:
        raise Refusal(
            f"truth.json is of other weights ({truth['sha256'][:12]}) than the results beside it ({weights[:12]}): "
            "delete it, and run step 01 again"
        )
    if "retrieval_heads" in found:
        found["retrieval_heads"]["slice"] = sliced(found, read_json(results / "retrieval_heads.run.json"))
    if (results / "claims.json").is_file():
        found["claims"] = read_json(results / "claims.json")
    if able(found.get("subspace", {"able": False})):
        means = class_means(found["subspace"], results)
        found["subspace"] |= {"cosine": cosine(truth, means), "carried": carried(truth, means)}
    return truth, found


def sliced(found: Found, record: Finding) -> list[str]:
    """The slice that step 06 asked about: one that was named, or that of step 04."""
    own = [row["site"] for row in found["sufficiency"].get("critical_slice", ())]
    return record["parameters"].get("slice_sites") or own


def class_means(found: Finding, results: Path) -> dict[str, np.ndarray]:
    """The class means of step 08, after its layer."""
    means = records.read(results / "subspace.class_means.parquet")
    own = means[means["layer"] == found["directions"]["layer"]].drop_duplicates("class_name")
    return dict(zip(own["class_name"], own["vector"], strict=True))


def differences(vectors: Mapping[str, Any], names: Iterable[str]) -> list[np.ndarray]:
    """Between every two of these names' vectors."""
    return [np.asarray(vectors[a]) - np.asarray(vectors[b]) for a, b in combinations(names, 2)]


def cosine(truth: Truth, means: Mapping[str, np.ndarray]) -> float:
    """The lowest cosine, over pairs of classes, between the difference of two class means and that of what prompts of
    the two classes have at the last token: both within the span of the planted supersets, because the residual stream
    holds professions beside them. A head that writes for some classes makes them unequal, in the truth as well."""
    there = truth["directions"]["at last"]
    basis = np.linalg.qr(np.array([truth["directions"]["superset"][name] for name in means]).T)[0]
    both = zip(differences(means, means), differences(there, means), strict=True)
    pairs = [(a @ basis, b @ basis) for a, b in both]
    return min(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) for a, b in pairs)


def carried(truth: Truth, means: Mapping[str, np.ndarray]) -> float:
    """The share of the gap that the differences of these class means bring back, by geometry; the mean over pairs of
    classes. Between prompts that differ by d on average, what lies along a fitted direction f is f (f d) / (f f), of
    which the answers read what lies along their supersets, s. All of d would be 1; means of few prompts are blurred by
    the professions that these happen to have, and by noise, and bring less."""
    planted, there = truth["directions"]["superset"], truth["directions"]["at last"]
    each = zip(*(differences(vectors, means) for vectors in (means, planted, there)), strict=True)
    return float(np.mean([(s @ f) * (f @ d) / ((f @ f) * (s @ d)) for f, s, d in each]))
