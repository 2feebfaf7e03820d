"""The price of a profile before it is run: passes, operations, memory, disk and time of every step.

    python -m steps.plan --profile smollm2-135m                               # this machine, calibrated, beside a run
    python -m steps.plan --profile llama-3.3-70b --device "NVIDIA H100 80GB"  # from a data sheet; nothing is loaded

1. The model's shape comes from its config; a profile that does not fit is refused (`lib.weights`).
2. Every declared table counts its work from the parameters; `pipeline.rates` says how long that takes here or on
   a card.
3. A step's time is that of its tables; the kernel, imports, statistics and figures of its notebook stand beside it.

`--json FILE` writes {profile, device, machine, versions, commit, dirty, layers, rates, assumptions,
total_seconds, measured_total_seconds, steps: [{step, passes, operations, rows, memory_gb, disk_gb, seconds,
page_seconds, measured_seconds, ratio, tables: [{table, passes, operations, rows, disk_gb, seconds,
measured_seconds}]}]}; what was not measured is null. Ratios are planned over measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import models, weights
from lib.weights import Shape
from pipeline import assumed, costs, keys, machine, params, rates
from pipeline.costs import Machine
from pipeline.params import Shared
from pipeline.rates import PROVING, READING, seconds
from pipeline.units import read_json
from steps.registry import PLAN

OVERHEAD = 1.0  # GB of Python and its libraries
GB = 1e9
PAGE_ROW = 4.5e-5  # seconds of a page's statistics and figures for each row, and beside them, kernel and imports too
PAGES = {"baselines": 10.4, "coarse_sweep": 10.5, "necessity": 12.0, "sufficiency": 14.5, "hydra": 13.0}
PAGES |= {"retrieval_heads": 17.0, "generality": 19.0, "subspace": 20.5, "neurons": 17.0, "story": 16.0}


def measured(step: str, p: Shared) -> dict[str, float]:
    """Seconds of each table of a finished step, by its name in the plan; {} where there is none."""
    path = keys.results_folder(p) / f"{step}.run.json"
    tables = read_json(path)["tables"] if path.is_file() else {}
    return {name.removeprefix(f"{step}."): own["seconds"] for name, own in tables.items()}


def step_plan(
    step: str, given: Mapping[str, Any], shape: Shape, place: Machine, rates: Mapping[str, float], against: bool
) -> dict:
    """One step of the plan, as the JSON has it: its declared tables, counted on stand-ins."""
    case, tables, rows, proved = assumed.case_of(PLAN, step, given, shape, place), [], 0.0, False
    p = case.params
    taken = measured(step, p) if against else {}
    for table, *chosen in PLAN[step].assumed(case):
        units = table.units(case, *chosen)
        name, work = table.name, table.cost(case, units, *chosen)
        if not proved and work.grown:  # the first table that patches makes the step's proofs
            work, proved = work + costs.proofs(shape, case.pairs[0]), True
        load = 0.0 if tables else PROVING + weights.weight_gb(shape, p.dtype) / rates.get("reading", READING)
        rows += work.rows
        own = {"table": name, "units": len(units), "passes": round(work.passes), "operations": work.operations}
        own |= {"rows": round(work.rows), "disk_gb": work.table / GB, "seconds": load + seconds(work, rates)}
        tables.append(own | {"measured_seconds": taken.get(name)})
    out: dict[str, Any] = {"step": step}
    out |= {key: sum(table[key] for table in tables) for key in ("passes", "operations", "rows")}
    held = weights.weight_gb(shape, p.dtype, p.quantisation)
    out |= {"memory_gb": held + place.memory + OVERHEAD, "disk_gb": sum(table["disk_gb"] for table in tables)}
    out |= {"seconds": sum(table["seconds"] for table in tables), "page_seconds": PAGES[step] + PAGE_ROW * rows}
    whole = sum(taken.values()) if taken else None
    return out | {"measured_seconds": whole, "ratio": out["seconds"] / whole if whole else None, "tables": tables}


def plan(profile: str, device: str | None = None, results_dir: str | None = None) -> dict:
    """The plan of a profile as the JSON has it. ParameterError or ModelError where there can be none."""
    given = params.load_profile(profile) | ({"results_dir": results_dir} if results_dir else {})
    p = params.validate(PLAN.sections, PLAN.names[0], given)
    config = weights.config_of(p.model)
    if config is None:
        raise params.ParameterError(
            f"model {p.model!r} has no config here: download it, or put its published sizes into lib/shapes.json"
        )
    shape, assumptions = weights.shape_of(config), [*assumed.ASSUMED]
    held = weights.weight_gb(shape, p.dtype, p.quantisation)
    if device:
        own, said = rates.of_device(device, shape, p.dtype, p.quantisation)
        room = json.loads(rates.DEVICES.read_text(encoding="utf-8"))["devices"][device]["memory_gb"]
        weights.check(p.model, p.dtype, device, p.quantisation, room=room)
        memory = float(p.memory) if p.memory != "auto" else machine.card_memory([room * GB], held * GB)
        assumptions += said
    else:
        placed = models.pick_device(p.device)
        weights.check(p.model, p.dtype, p.device_map or placed, p.quantisation, p.max_memory, p.offload_folder)
        memory = float(p.memory) if p.memory != "auto" else machine.pass_memory(None)
        own = rates.calibrate(PLAN, config, p.dtype, placed, memory)
        assumptions.append(
            "seconds of records, value vectors and areas under curves are those of 2 cores of an AMD EPYC"
        )
    assumptions.append(f"weights are read at {rates.READING:g} GB/s, once a step")
    facts = machine.facts()
    steps = [step_plan(step, given, shape, Machine(memory, p.dtype), own, device is None) for step in PLAN.names]
    whole = [step["measured_seconds"] for step in steps]
    return {
        "profile": p.profile,
        "device": device or f"{facts['cores']} cores of {facts['cpu']}",
        "machine": facts,
        "versions": machine.versions(),
        **machine.commit(),
        "layers": shape.n_layers,
        "rates": dict(own),
        "assumptions": assumptions,
        "total_seconds": sum(step["seconds"] + step["page_seconds"] for step in steps),
        "measured_total_seconds": sum(whole) if all(whole) else None,
        "steps": steps,
    }


def duration(seconds: float | None) -> str:
    """Seconds as a reader says them."""
    if seconds is None:
        return "-"
    hours, minutes = seconds / 3600, seconds / 60
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.1f} min" if minutes >= 1.5 else f"{seconds:.0f} s"


def line(own: Mapping[str, Any]) -> str:
    """A step or a table of the plan as a line of the report."""
    name = own["step"] if "step" in own else f"  {own['table']}"
    memory = f"{own['memory_gb']:.1f}" if "memory_gb" in own else ""
    page = duration(own["page_seconds"]) if "page_seconds" in own else ""
    taken = own["measured_seconds"]
    ratio = f"{own['seconds'] / taken:.2f}" if taken else "-"
    counts = f"{own['passes']:>9}{own['operations'] / 1e12:>11.1f}{memory:>7}{own['disk_gb'] * 1e3:>9.1f}"
    return f"{name:22}{counts}{duration(own['seconds']):>10}{page:>9}{duration(taken):>10}{ratio:>7}"


def report(made: Mapping[str, Any], tables: bool) -> str:
    """The plan as a table, with what it assumes."""
    lines = [f"{made['profile']} on {made['device']}"]
    names = f"{'passes':>9}{'TFLOP':>11}{'GB':>7}{'disk MB':>9}{'time':>10}{'page':>9}{'measured':>10}{'ratio':>7}"
    lines.append(" " * 22 + names)
    for step in made["steps"]:
        lines += [line(step), *(line(table) for table in step["tables"] if tables)]
    lines += [f"all steps and their pages: {duration(made['total_seconds'])}", "Assumed:"]
    return "\n".join([*lines, *(f"- {text}" for text in made["assumptions"])])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a plan asks nothing of the network
    parser = argparse.ArgumentParser(prog="python -m steps.plan", description=__doc__.splitlines()[0])
    default = os.environ.get("PROFILE", Shared.model_fields["profile"].default)
    parser.add_argument("--profile", default=default, help="name in params/, or a YAML")
    default = os.environ.get("DEVICE") or None
    parser.add_argument("--device", default=default, help="a card of data/devices.json instead of this machine")
    parser.add_argument("--results", help="folder of that run; default: the profile's")
    parser.add_argument("--tables", action="store_true", help="each table of each step, too")
    parser.add_argument("--json", type=Path, help="write the plan here as well")
    options = parser.parse_args(arguments)
    try:
        made = plan(options.profile, options.device, options.results)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(report(made, options.tables))
    if options.json:
        options.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
