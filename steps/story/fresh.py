"""Fresh people: kept aside until thresholds and rules were set, opened once, and what they then decide.

1. `open_once` lets a profile look at them under one set of thresholds and rules; another set is refused, for ever.
2. `write` makes the file that is committed (`python -m steps fresh`): every claim's verdict and numbers on these
   people, with the hash of thresholds and rules, and by which commit, when and on which machine they were measured.
3. `confirm` has that file decide the claims that were set when results on other people had been seen. Where thresholds
   or rules are others by now, it decides nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline import keys, units
from pipeline.params import ROOT
from steps.story.claims import (
    EXPLORATORY,
    FRESH,
    NOT_SUPPORTED,
    NOT_TESTED,
    SUPPORTED,
    ClaimError,
    Confirmed,
    Entry,
    Ledger,
    Strict,
    fingerprint,
    thresholds,
)
from steps.story.measure import Story

# Claims that fresh people do not decide: their prompts are of other people or words, which had been used before.
NOT_ABOUT_THEM = frozenset(
    {
        "task_done",
        "control_invented_names",
        "control_things",
        "control_two_supersets",
        "either_name",
        "rule_or",
        "rule_additive",
        "rule_and",
        "profession_at_names",
    }
)


# Changes of what a claim's number is, since fresh people were first asked: by name, what changed and whose it is.
# What a record says of these claims decides nothing until its profile is run again with the change.
MEASURED_ANEW = {
    "probes keep units": (
        "its probes' inputs keep their own units since",
        frozenset({"retrieval_heads", "profession_at_names", "superset_at_last", "low_rank"}),
    ),
    "backups by ablation": (
        "a later site's rise is that of what its ablation costs, not of its own direct effect on the logits, since",
        frozenset({"no_backup"}),
    ),
}
USED_BEFORE = "its prompts are of people or words that were used before"


class Record(Strict):
    """What fresh people said, and under what they were asked; the profile's `fresh_claims` names the file."""

    profile: str
    model: str
    model_sha256: str | None
    quantisation: str | None
    task: str
    template: str
    people_file: str
    people_sha256: str
    fingerprint: str  # of thresholds and rules
    left_out: tuple[str, ...]  # claims that were not asked
    measured: tuple[str, ...] = ()  # those of MEASURED_ANEW that it was measured with
    commit: str | None
    dirty: bool | None  # whether tracked files differed from the commit
    started: str
    machine: dict[str, Any]
    claims: dict[str, Confirmed]


def subject(params: Story) -> dict[str, Any]:
    """Who is asked, of which model, and under which thresholds and rules."""
    names = {"profile", "model", "model_sha256", "quantisation", "task", "template", "people_file"}
    about = params.model_dump(mode="json", include=names)
    about["people_sha256"] = keys.hash_file(keys.input_file(params.people_file))
    return about | {"fingerprint": fingerprint(thresholds(params), params), "left_out": list(params.left_out)}


def opened(params: Story) -> Path:
    """The note, beside the results, of under what the people in this file have been opened."""
    return keys.results_folder(params) / f"fresh.{keys.hash_file(keys.input_file(params.people_file))[:12]}.json"


def committed(params: Story) -> Path:
    """Where the record is, or will be."""
    return ROOT / params.fresh_claims


def open_once(params: Story, rules: str | None = None) -> None:
    """Note beside the results under what these people are looked at; `rules` is the hash of thresholds and rules where
    the steps that hold some of them have not run yet.

    ClaimError where thresholds and rules are not frozen, and where they, the template or the quantisation are others
    than they were the first time, by that note or by the committed record: what has been seen once is no longer fresh.
    """
    own = subject(params) | ({"fingerprint": rules} if rules else {})
    if params.frozen != own["fingerprint"]:
        raise ClaimError(
            f"fresh people are opened under frozen rules alone: give frozen = {own['fingerprint']!r} (it is "
            f"{params.frozen!r})"
        )
    note = opened(params)
    for path in (note, committed(params)):
        first = units.read_json(path) if path.is_file() else own
        same = all(first[key] == own[key] for key in ("people_sha256", "model", "model_sha256", "task"))
        if same and any(first[key] != own[key] for key in ("fingerprint", "template", "quantisation")):
            shown = ", ".join(f"{key} {value}" for key, value in first.items() if isinstance(value, str))
            raise ClaimError(
                f"these people were opened under the thresholds and rules {first['fingerprint']!r} "
                f"({keys.shown(path)}: {shown}); under {own['fingerprint']!r}, in this template, they are not fresh: "
                "judge the claims with fresh = false, or keep other people aside"
            )
    if not note.is_file():
        units.write_json(note, own)


def write(params: Story) -> Path:
    """Make the record of a run on fresh people from its results; returns its path. ClaimError where there is none."""
    if not (params.fresh and params.fresh_claims):
        raise ClaimError(f"profile {params.profile} asks no fresh people: it needs fresh = true and fresh_claims")
    open_once(params)
    path, run = (keys.results_folder(params) / name for name in ("claims.json", "story.run.json"))
    if not (path.is_file() and run.is_file()):
        raise ClaimError(f"{keys.shown(path)} is not there: run the profile {params.profile} first")
    stored = (keys.stored_ingredients(keys.results_folder(params), keys.PAIRS) or {}).get("inputs", {})
    if stored.get("people_file") != subject(params)["people_sha256"]:
        raise ClaimError(f"the pairs in {keys.shown(path.parent)} are not of the people in {params.people_file}")
    ledger = Ledger.model_validate(units.read_json(keys.left(path.parent, "story", path.name)))
    if ledger.fingerprint != params.frozen:
        raise ClaimError(f"{keys.shown(path)} was judged by other rules ({ledger.fingerprint}): run step 10 again")
    made = units.read_json(run)
    about = subject(params) | {key: made.get(key) for key in ("commit", "dirty", "started", "machine")}
    said = {entry.id: confirmed(entry) for entry in ledger.claims}
    record = Record(**about, claims=said, measured=tuple(MEASURED_ANEW))
    units.write_json(committed(params), record.model_dump(mode="json"))
    return committed(params)


def confirmed(entry: Entry) -> Confirmed:
    """What an entry of a ledger of fresh people says."""
    return Confirmed(**entry.model_dump(include=set(Confirmed.model_fields)))


def confirm(entries: Sequence[Entry], params: Story, asked: Collection[str] = ()) -> str:
    """Give the entries what fresh people said, and let it be the verdict of claims that were set after, where it is
    one; returns how that stands, in words ("" for a profile that names no such file, or asks fresh people itself).

    `asked` are the people in this report's own pairs: nobody should be both, and where someone is, that is said. Claims
    that are `NOT_ABOUT_THEM` are not decided by them, nor where they are asked themselves; nor those that are
    `MEASURED_ANEW` since they were asked.
    """
    path = committed(params)
    for entry in entries:
        if entry.id in NOT_ABOUT_THEM and entry.tier == FRESH:
            entry.tier = EXPLORATORY
    if params.fresh or not params.fresh_claims:
        return ""
    if not path.is_file():
        return "No fresh people have been asked yet: verdicts by what was set after results were seen stay exploratory."
    record = Record.model_validate(units.read_json(path))
    if not (keys.same_subject(record.model_dump(), params) and record.template == params.template):
        return f"The fresh people of `{params.fresh_claims}` were asked about another model, task or template."
    own = fingerprint(thresholds(params), params.model_copy(update={"left_out": record.left_out}))
    if own != record.fingerprint:
        return (
            f"Fresh people were asked ({record.started[:10]}, commit {(record.commit or 'unknown')[:7]}) under other "
            f"thresholds and rules than these (hash `{record.fingerprint}`, not `{own}`): what they said decides "
            "nothing here, and is not shown."
        )
    after = [entry for entry in entries if entry.check is None and entry.came == "after"]
    why = withheld(record)
    for entry in entries:
        said = record.claims[entry.id]
        entry.fresh = not_shown(said, why[entry.id]) if entry.id in why else said
    decided = [entry for entry in after if entry.fresh.verdict in (SUPPORTED, NOT_SUPPORTED)]
    for entry in decided:
        entry.verdict, entry.tier = entry.fresh.verdict, FRESH
    people = set(pd.read_csv(keys.input_file(record.people_file), dtype=str, keep_default_na=False)["name"])
    both = (
        f"{len(people & set(asked)) or 'none'} of these {len(people)} came into quads of this report's task since; "
        "its placebo pairs and pairs before selection may have more"
    )
    tested = {name for name, entry in record.claims.items() if entry.p_holm is not None} & {*why}
    used = [name for name in tested if why[name] == USED_BEFORE]
    said = [f"{len(used)} of these rest on prompts used before"] * bool(used)
    said += [f"{len(tested) - len(used)} are measured in another way since"] * (len(tested) > len(used))
    where = f"; {' and '.join(said)}, and their p values are in `{params.fresh_claims}` alone" if said else ""
    family = sum(entry.p_holm is not None for entry in record.claims.values())
    said = f"The p values on fresh people are corrected for {family} claims{where}."
    return f"{told(record, len(after), [entry.verdict for entry in decided], both)} {said}"


def withheld(record: Record) -> dict[str, str]:
    """Claims of which a record is not shown, and why."""
    changed = [MEASURED_ANEW[name] for name in MEASURED_ANEW if name not in record.measured]
    anew = {claim: f"{what} fresh people were asked" for what, claims in changed for claim in claims}
    return anew | dict.fromkeys(NOT_ABOUT_THEM, USED_BEFORE)


def not_shown(said: Confirmed, reason: str) -> Confirmed:
    """A claim that is not tested has no numbers of a test either."""
    numbers = dict.fromkeys(("estimate", "low", "high", "p", "p_holm"))
    verdicts = dict.fromkeys(("alone", "verdict"), NOT_TESTED)
    return said.model_copy(update=numbers | verdicts | {"reason": reason})


def told(record: Record, after: int, verdicts: Sequence[str], both: str) -> str:
    """What fresh people decided, and when they were asked."""
    anew = ", or are measured in another way since" * any(name not in record.measured for name in MEASURED_ANEW)
    count = {verdict: verdicts.count(verdict) for verdict in (SUPPORTED, NOT_SUPPORTED)}
    return (
        f"Of the {after} claims that were set after results had been seen, {len(verdicts)} are decided by *fresh "
        f"people* alone, in no quad of other profiles when they were chosen ({both}), on whose pairs the sites are "
        "picked anew: "
        f"{count[SUPPORTED]} are supported there, {count[NOT_SUPPORTED]} are not; the others could not be tested on "
        f"them, or rest on prompts of people or words that had been used before{anew}, and stay exploratory. They were "
        f"asked once, under these thresholds and rules (hash `{record.fingerprint}`; profile `{record.profile}`, "
        f"commit {(record.commit or 'unknown')[:7]}, {record.started[:10]}, {machine(record.machine)})."
    )


def machine(facts: Mapping[str, Any]) -> str:
    """A machine in words."""
    return ", ".join(filter(None, (f"{facts.get('cores')} cores of {facts.get('cpu')}", *facts.get("gpus", ()))))
