"""The page on cost and scale: tables, figures and sentences from the committed results of `bench/`. No model, no torch.

1. `fields` hands each result to the function that writes its section of `book/scale.md`, four of them in
   `report.speed`.
2. A section is a sentence on where it was measured, a table, a figure, and what follows from the numbers; bounds that
   were aimed at are named whether they were reached or not.
3. A result that is not there gives the command that makes it, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from report.speed import (  # fmt: skip
    Found,
    counted,
    growth,
    joined,
    measured_on,
    paragraph,
    peers,
    profile,
    seconds,
    small,
    sweep,
    table,
    times,
)

PLAN = "python -m steps.plan --profile"
COMMANDS = {
    "peers": "make bench-peers",
    "growth": "python -m bench.growth",
    "scale_70b": "python -m bench.scale_70b",
    "offload": "python -m bench.offload",
    "plan_70b": f"{PLAN} llama-3.3-70b --device 'NVIDIA H100 80GB' --json bench/results/plan_70b.json",
    "sweep": "python -m bench.sweep",
    "profile": "python -m bench.profile_steps",
    "plan_smollm2": f"{PLAN} smollm2-135m --against --json bench/results/plan_smollm2.json",
}
SECONDS, GIGABYTES, TIMES = 10, 75, 100
"""What was aimed at for the 70B shape on one card, at `last`: time, memory, times as fast as one by one."""
WITHIN = 0.3
"""How far a planned time may be from the measured one, as a share."""


def fields(results: Path, to: Path) -> dict[str, str]:
    """Every section of the page as MyST; figures are written to `to/figures/`."""
    out = {}
    for name, section in SECTIONS.items():
        path = results / f"{name}.json"
        if path.is_file():
            out[name] = section(json.loads(path.read_text(encoding="utf-8")), to)
        else:
            out[name] = f"Not measured yet: run `{COMMANDS[name]}`."
    return out


# --- seventy billion -------------------------------------------------------------------------------------------------

SHAPE = {
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "key-value heads",
    "hidden_size": "hidden",
    "intermediate_size": "in the MLP",
    "vocab_size": "tokens in the vocabulary",
}


def scale_70b(found: Found, to: Path) -> str:
    """The 70B shape, or the smaller one that was run in its place."""
    limits, memory, less, path = found["limits"], found["memory_gb"], found["scaled_down"], found["paths"]
    size = ", ".join(f"{found['shape'][key]:,} {word}" for key, word in SHAPE.items())
    device = "the CPU" if found["device"] == "cpu" else found["device"]
    shown = (
        f"**These are figures of a smaller shape, on {device}, not of the 70B shape**"
        if less
        else f"**These are figures of the shape of Llama-3.3-70B, on one {device}**"
    )
    first = found["sweeps"][0]
    reached = first["seconds"] <= SECONDS and memory["peak"] <= GIGABYTES and first["times_faster"] >= TIMES
    aims = f"""Aimed at on one H100 or H200, for all sites at `last`: at most {SECONDS} s and {GIGABYTES} GB, at least
        {TIMES} times one by one. Measured: {seconds(first["seconds"])}, {memory["peak"]:.3g} GB,
        {times(first["times_faster"])} times; {"reached" if reached else "missed"}."""
    head = ["position", "sites", "sweep", "one by one (estimated)", "times faster", "times the arithmetic limit"]
    lines = [
        [f"`{row['role']}`", f"{row['sites']:,}", seconds(row["seconds"]), seconds(row["one_by_one_s_estimated"])]
        + [times(row[key]) for key in ("times_faster", "times_arithmetic_limit", "times_bandwidth_limit")]
        for row in found["sweeps"]
    ]
    return joined(
        paragraph(f"""{shown} ({size}). The weights are random, made on the device, in
            {kind(found)}; one pair of prompts of {found["tokens"]} tokens. {measured_on(found)} The weights take
            {memory["weights"]:.3g} GB, everything together at most {memory["peak"]:.3g} GB; a plain forward pass takes
            {seconds(found["plain_forward_s"])}."""),
        table([*head, "times the bandwidth limit"], lines),
        paragraph(f"""One by one was timed on {first["one_by_one_sampled"]} sites and multiplied. The limits, measured
            in the same run: the operations at {limits["matrix_product_tflops"]:.3g} TFLOP/s (logits, in fp32, at
            {limits["fp32_matrix_product_tflops"]:.3g}), and one reading of {limits["weights_gb"]:.3g} GB of weights per
            pass at {limits["bandwidth_gb_s"]:.4g} GB/s. {"" if less else aims}"""),
        paragraph(f"""Path patching of all {path["senders"]:,} senders into {path["receivers"]} takes
            {seconds(path["seconds"])}, {times(path["times_faster"])} times as fast as one by one (estimated from
            {path["one_by_one_sampled"]} senders)."""),
        paragraph("""How far the logits of sampled sites lie from those one by one, and the noise: how far the base
            prompt's own logits move in batches of other sizes."""),
        table(
            ["weights", "shape", "sites", "largest difference", "noise", "largest effect"],
            [exactness(own) for own in (found, *found["others"])],
        ),
    )


def kind(found: Found) -> str:
    """The format of the weights."""
    return found["dtype"] if found["quantisation"] == "none" else f"{found['quantisation']} ({found['dtype']} between)"


def exactness(found: Found) -> list[str]:
    """A line of the table of exactness."""
    exact, shape = found["exactness"], found["shape"] if isinstance(found["shape"], str) else "as above"
    numbers = (exact[key] for key in ("largest_difference", "noise_floor", "largest_effect"))
    return [kind(found), shape, str(exact["sites"]), *map(small, numbers)]


def offload(found: Found, to: Path) -> str:
    """Weights on disk and a memory too small for them."""
    plain, limited, disk = (found["ways"][way] for way in ("in memory", "in memory, limited", "on disk, limited"))
    said = limited.get("says", "").replace("`", "'")
    room = f"""{measured_on(found)} The weights take {found["weights, GB"]:.3g} GB; a process that may add
        {found["room, GB"]:.3g} GB to its data {"loads them none the less" if limited["loads"] else "cannot load them"}
        {f"(`{said}`)" if said else ""}."""
    if not disk["loads"]:
        return paragraph(f"{room} With its weights on disk it failed, too: `{disk['says']}`.")
    lines = []
    for name in ("one pair", "many pairs"):
        here, there = plain[name], disk[name]
        lines.append(
            [f"{counted(there['pairs'], 'pair')}, {there['sites']} sites", seconds(here["seconds"])]
            + [seconds(there["seconds"]), times(there["times as long as in memory"]), str(there["layer loads"])]
            + [f"{there['GB read from disk']:.3g}", times(there["times faster than one by one"])]
        )
    once, layers, many = disk["one pair"]["layer loads"], disk["layers"], disk["many pairs"]
    same = all(disk[name]["same rows as in memory"] for name in ("one pair", "many pairs"))
    return joined(
        paragraph(f"""{room} With all its modules on disk it sweeps with at most {disk["peak resident, GB"]:.3g} GB
            resident, libraries included. A sweep of one pair makes {once} loads of {layers} layers:
            {"each layer is loaded once" if once == layers else "**not once each**"}, whatever the number of sites. One
            by one, a site takes {times(disk["one by one"]["layer loads per site"])} loads."""),
        table(
            [
                "at `last`",
                "in memory",
                "on disk",
                "times as long",
                "layer loads",
                "GB read",
                "times as fast as one by one",
            ],
            lines,
        ),
        paragraph(f"""{counted(many["layer loads"], "load")} served all of the {many["pairs"]} pairs, whose prompts have
            {counted(many["groups of pairs"], "length")}. The rows are
            {"the same to the bit" if same else "**not the same**"} in memory and on disk."""),
    )


# --- the plan --------------------------------------------------------------------------------------------------------


def plan_70b(found: Found, to: Path) -> str:
    """What every step of the profile would take."""
    lines = [
        [
            step["step"].replace("_", " "),
            f"{step['passes']:,}",
            f"{step['operations'] / 1e15:,.3g}",
            f"{step['memory_gb']:.3g}",
            f"{step['disk_gb'] * 1e3:,.0f}",
            seconds(step["seconds"] + step["page_seconds"]),
        ]
        for step in found["steps"]
    ]
    assumed = "\n".join(f"- {line}" for line in found["assumptions"])
    return joined(
        paragraph(f"""Profile `{found["profile"]}` on {found["device"]}, planned and not measured: all steps and their
            pages in **{seconds(found["total_seconds"])}**."""),
        table(["step", "passes", "operations (PFLOP)", "memory (GB)", "disk (MB)", "time, with its page"], lines),
        f"Assumed:\n\n{assumed}",
    )


def plan_smollm2(found: Found, to: Path) -> str:
    """The plan beside what was measured."""
    known = [step for step in found["steps"] if step["ratio"] is not None]
    if not known:
        return f"Planned, but not yet beside a run: run the book, then `{COMMANDS['plan_smollm2']}`."
    off = [step["step"].replace("_", " ") for step in known if abs(step["ratio"] - 1) > WITHIN]
    lines = [
        [
            step["step"].replace("_", " "),
            seconds(step["seconds"]),
            seconds(step["measured_seconds"]),
            times(step["ratio"]),
        ]
        for step in known
    ]
    whole = [sum(step[key] for step in known) for key in ("seconds", "measured_seconds")]
    lines.append(["together", *map(seconds, whole), times(whole[0] / whole[1])])
    return joined(
        paragraph(f"""Profile `{found["profile"]}` on {found["device"]}, from a calibration of some seconds, beside the
            seconds in the run records. Within {WITHIN:.0%} was aimed at, step by step:
            {f"missed by {', '.join(off)}" if off else "reached by all steps"}."""),
        table(["step", "planned", "measured", "planned / measured"], lines),
    )


SECTIONS: dict[str, Callable[[Found, Path], str]] = {
    "peers": peers,
    "growth": growth,
    "scale_70b": scale_70b,
    "offload": offload,
    "plan_70b": plan_70b,
    "plan_smollm2": plan_smollm2,
    "sweep": sweep,
    "profile": profile,
}
