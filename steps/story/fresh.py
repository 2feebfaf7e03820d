"""Fresh people: kept aside until thresholds and rules were set, opened once, and what they then decide.

1. `open_once` lets a profile look at them under one set of thresholds and rules; another set is refused, for ever.
2. `write` makes the file that is committed (`python -m steps fresh`): every claim's verdict and numbers on these
   people, with the hash of thresholds and rules, and by which commit, when and on which machine they were measured.
3. `confirm` has that file decide the claims that were set when results on other people had been seen. Where thresholds
   or rules are others by now, it decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline import keys, units
from pipeline.params import ROOT
from steps.story.claims import (
    FRESH,
    NOT_SUPPORTED,
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

OPENED = "fresh.json"  # in the results folder: under what these people have been opened


class Record(Strict):
    """What fresh people said, and under what they were asked; the profile's `fresh_claims` names the file."""

    profile: str
    model: str
    model_sha256: str | None
    task: str
    people_file: str
    people_sha256: str
    fingerprint: str  # of thresholds and rules
    left_out: tuple[str, ...]  # claims that were not asked
    commit: str | None
    dirty: bool | None  # whether tracked files differed from the commit
    started: str
    machine: dict[str, Any]
    claims: dict[str, Confirmed]


def subject(params: Story) -> dict[str, Any]:
    """Who is asked, of which model, and under which thresholds and rules."""
    about = params.model_dump(include={"profile", "model", "model_sha256", "task", "people_file"})
    about["people_sha256"] = keys.hash_file(keys.input_file(params.people_file))
    return about | {"fingerprint": fingerprint(thresholds(params), params), "left_out": list(params.left_out)}


def committed(params: Story) -> Path:
    """Where the record is, or will be."""
    return ROOT / params.fresh_claims


def open_once(params: Story, rules: str | None = None) -> None:
    """Note beside the results under what these people are looked at; `rules` is the hash of thresholds and rules where
    the steps that hold some of them have not run yet.

    ClaimError where thresholds and rules are not frozen, and where they are others than they were the first time, by
    that note or by the committed record: what has been seen once is no longer fresh.
    """
    own = subject(params) | ({"fingerprint": rules} if rules else {})
    if params.frozen != own["fingerprint"]:
        raise ClaimError(
            f"fresh people are opened under frozen rules alone: give frozen = {own['fingerprint']!r} (it is "
            f"{params.frozen!r})"
        )
    note = keys.results_folder(params) / OPENED
    for path in (note, committed(params)):
        first = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else own
        same = all(first[key] == own[key] for key in ("people_sha256", "model", "model_sha256", "task"))
        if same and first["fingerprint"] != own["fingerprint"]:
            shown = ", ".join(f"{key} {value}" for key, value in first.items() if isinstance(value, str))
            raise ClaimError(
                f"these people were opened under the thresholds and rules {first['fingerprint']!r} "
                f"({keys.shown(path)}: {shown}); under {own['fingerprint']!r} they are not fresh: judge the claims "
                "with fresh = false, or keep other people aside"
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
    ledger = Ledger.model_validate_json(path.read_text(encoding="utf-8"))
    if ledger.fingerprint != params.frozen:
        raise ClaimError(f"{keys.shown(path)} was judged by other rules ({ledger.fingerprint}): run step 10 again")
    made = json.loads(run.read_text(encoding="utf-8"))
    about = subject(params) | {key: made.get(key) for key in ("commit", "dirty", "started", "machine")}
    said = {entry.id: confirmed(entry) for entry in ledger.claims}
    units.write_json(committed(params), Record(**about, claims=said).model_dump(mode="json"))
    return committed(params)


def confirmed(entry: Entry) -> Confirmed:
    """What an entry of a ledger of fresh people says."""
    return Confirmed(**entry.model_dump(include=set(Confirmed.model_fields)))


def confirm(entries: Sequence[Entry], params: Story, asked: Collection[str] = ()) -> str:
    """Give the entries what fresh people said, and let it be the verdict of claims that were set after, where it is
    one; returns how that stands, in words ("" for a profile that names no such file, or asks fresh people itself).

    `asked` are the people in this report's own pairs: nobody should be both, and where someone is, that is said.
    """
    path = committed(params)
    if params.fresh or not params.fresh_claims:
        return ""
    if not path.is_file():
        return "No fresh people have been asked yet: verdicts by what was set after results were seen stay exploratory."
    record = Record.model_validate_json(path.read_text(encoding="utf-8"))
    if not keys.same_subject(record.model_dump() | {"quantisation": params.quantisation}, params):
        return f"The fresh people of `{params.fresh_claims}` were asked about another model or task."
    own = fingerprint(thresholds(params), params.model_copy(update={"left_out": record.left_out}))
    if own != record.fingerprint:
        return (
            f"Fresh people were asked ({record.started[:10]}, commit {(record.commit or 'unknown')[:7]}) under other "
            f"thresholds and rules than these (hash `{record.fingerprint}`, not `{own}`): what they said decides "
            "nothing here, and is not shown."
        )
    after = [entry for entry in entries if entry.check is None and entry.came == "after"]
    for entry in entries:
        entry.fresh = record.claims[entry.id]
    decided = [entry for entry in after if entry.fresh.verdict in (SUPPORTED, NOT_SUPPORTED)]
    for entry in decided:
        entry.verdict, entry.tier = entry.fresh.verdict, FRESH
    people = set(pd.read_csv(keys.input_file(record.people_file), dtype=str, keep_default_na=False)["name"])
    both = f"{len(people & set(asked)) or 'none'} of their {len(people)} is in a pair of this report"
    return told(record, len(after), [entry.verdict for entry in decided], both)


def told(record: Record, after: int, verdicts: Sequence[str], both: str) -> str:
    """What fresh people decided, and when they were asked."""
    count = {verdict: verdicts.count(verdict) for verdict in (SUPPORTED, NOT_SUPPORTED)}
    return (
        f"Of the {after} claims that were set after results had been seen, {len(verdicts)} are decided by *fresh "
        f"people* alone, people in no quad of other profiles ({both}): {count[SUPPORTED]} are supported there, "
        f"{count[NOT_SUPPORTED]} are not; the others could not be tested on them, and stay exploratory. They were "
        f"asked once, under these thresholds and rules (hash `{record.fingerprint}`; profile `{record.profile}`, "
        f"commit {(record.commit or 'unknown')[:7]}, {record.started[:10]}, {machine(record.machine)})."
    )


def machine(facts: Mapping[str, Any]) -> str:
    """A machine in words."""
    return ", ".join(filter(None, (f"{facts.get('cores')} cores of {facts.get('cpu')}", *facts.get("gpus", ()))))
