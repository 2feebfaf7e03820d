"""The page on cost and scale: tables, figures and sentences from the committed results of `bench/`. No model, no torch.

1. `fields` hands each result to the function that writes its section of `book/scale.md`.
2. A section is a sentence on where it was measured, a table, a figure, and what follows from the numbers; bounds that
   were aimed at are named whether they were reached or not.
3. A result that is not there gives the command that makes it, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from pipeline import keys
from report import plots
from report.words import counted

PLAN = "python -m steps.plan --profile"
COMMANDS = {
    "peers": "make bench-peers",
    "growth": "python -m bench.growth",
    "scale_70b": "python -m bench.scale_70b",
    "offload": "python -m bench.offload",
    "plan_70b": f"{PLAN} llama-3.3-70b --device 'NVIDIA H100 80GB' --json bench/results/plan_70b.json",
    "sweep": "python -m bench.sweep",
    "profile": "python -m bench.profile_steps",
    "plan_smollm2": f"{PLAN} smollm2-135m --json bench/results/plan_smollm2.json",
}
SECONDS, GIGABYTES, TIMES = 10, 75, 100
"""What was aimed at for the 70B shape on one card, at `last`: time, memory, times as fast as one by one."""
WITHIN = 0.3
"""How far a planned time may be from the measured one, as a share."""
AIMS = {"TransformerLens": 60, "nnsight, batched": 20}
"""How many times as fast as these the sweep of all heads at `last` was meant to be."""
LIMITS = {"last": 1.3, "name_a": 1.4}
"""How many times the arithmetic limit the sweep of all heads was meant to take at most, by role."""
BATCHED = "plain hooks, batched"

Found = Mapping[str, Any]


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


# --- words -----------------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    """A time that is easily read."""
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"


def times(value: float) -> str:
    """A ratio without false precision."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def small(value: float) -> str:
    """A difference of logits in plain digits: 0.00004."""
    return np.format_float_positional(value, precision=2, fractional=False, trim="-")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A MyST table; every column but the first is numbers."""
    lines = [head, ["---", *(["---:"] * (len(head) - 1))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def joined(*parts: str) -> str:
    """Paragraphs, tables and figures one below the other."""
    return "\n\n".join(part for part in parts if part)


def paragraph(text: str) -> str:
    return " ".join(text.split())


def measured_on(found: Found) -> str:
    """Where a result was measured."""
    where, versions = found["machine"], found["versions"]
    cards = "".join(f", {card}" for card in where["gpus"])
    threads = f", {counted(found['threads'], 'thread')}" if "threads" in found else ""
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    return f"Measured on {counted(where['cores'], 'core')} ({where['cpu']}{cards}){threads}, with {libraries}."


def stale(found: Found, command: str) -> str:
    """A warning for a result whose `code` (`pipeline.keys.code`) has changed since; nothing where it has not."""
    now = keys.code(*found["code"])
    changed = [f"`{room}`" for room, made in found["code"].items() if now[room] != made]
    if not changed:
        return ""
    text = f"""Measured at commit `{found["commit"][:7]}`; the code of {", ".join(changed)} has changed since. To
        measure again: `{command}`."""
    return f":::{{warning}}\n{paragraph(text)}\n:::"


def aimed(value: float, aim: float) -> str:
    """Whether a bound was reached: "60 was aimed at, and reached"."""
    return f"{aim} was aimed at, and {'reached' if value >= aim else 'missed'}"


def figure(drawn: plots.Figure, to: Path, name: str, caption: str, page: str = "scale") -> str:
    """A MyST figure of the page."""
    file, caption = plots.save(drawn, to, page, name), paragraph(caption)
    return f"```{{figure}} {file}\n:name: fig-{page}-{name}\n:alt: {caption.replace('`', '')}\n\n{caption}\n```"


def logarithmic(axes: Axes, *which: str) -> None:
    """Logarithmic axes with plain numbers."""
    for name in which:
        getattr(axes, f"set_{name}scale")("log")
        own = getattr(axes, f"{name}axis")
        own.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        own.set_minor_locator(NullLocator())


# --- other tools -----------------------------------------------------------------------------------------------------


def peers(found: Found, to: Path) -> str:
    """The same work by other tools."""
    rows = {(row["task"], row["tool"]): row for row in found["measured"]}
    tasks = list(dict.fromkeys(task for task, _ in rows))
    ours = found["tools"][0]["tool"]
    lines = [
        [version(tool), *(cell(rows.get((task, tool["tool"])), ours) for task in tasks)] for tool in found["tools"]
    ]
    ratios = {tool: rows["heads at last", tool]["times_ours"] for tool in AIMS}
    said = ", ".join(
        f"{tool} took {times(ratios[tool])} times as long as the sweep ({aimed(ratios[tool], aim)})"
        for tool, aim in AIMS.items()
    )
    hand = ", ".join(
        f"{times(rows[task, BATCHED]['times_ours'])} times as long for {coded(task)}"
        for task in tasks
        if (task, BATCHED) in rows
    )
    trial = f"Only every {found['every']}th site was taken: this is a trial." if found["every"] > 1 else ""
    notes = "\n".join(f"- **{version(tool)}**: {tool['note']}." for tool in found["tools"])
    return joined(
        paragraph(f"""{measured_on(found)} One process, one pair of prompts of {found["tokens"]} tokens, the same
            weights in fp32; the tools took turns, and the median of {found["repeats"]} counts. Every tool starts from
            token ids, is charged for its own plain runs, and ends with the full-vocabulary logits of the last token for
            every site. At every site they equal this library's within
            {small(max(row["largest_logit_difference"] for row in found["measured"]))}. {trial}"""),
        table(
            ["tool", *(f"{coded(task)} ({counted(rows[task, ours]['sites'], 'site')})" for task in tasks)],
            lines,
        ),
        paragraph(f"""For all heads at `last`, {said}. The best that hooks written by hand do, one batch behind a cached
            prefix, takes {hand}; in the sweep, rows join at their own layer besides."""),
        figure(
            peers_figure(found, tasks),
            to,
            "peers",
            """Time for every site of a task, by tool (logarithmic): the median, with whiskers from the fastest to the
            slowest of the repeats.""",
        ),
        f"How each was used:\n\n{notes}",
    )


def version(tool: Found) -> str:
    return f"{tool['tool']} ({tool['version']})" if tool["version"] else tool["tool"]


def coded(task: str) -> str:
    """The names of roles as code."""
    return " ".join(f"`{word}`" if word in ("last", "name_a") else word for word in task.split())


def cell(row: Found | None, ours: str) -> str:
    """Seconds, and how many times ours."""
    if row is None:
        return "–"
    return seconds(row["seconds"]) + ("" if row["tool"] == ours else f" ({times(row['times_ours'])}×)")


def peers_figure(found: Found, tasks: Sequence[str]) -> plots.Figure:
    """Seconds per tool, a panel per task."""
    parts = [[row for row in found["measured"] if row["task"] == task] for task in tasks]
    with style.context(plots.STYLE):
        drawn = plots.Figure(figsize=(plots.WIDTH, 0.6 + 0.4 * len(tasks) + 0.21 * len(found["measured"])))
        panels = drawn.subplots(len(tasks), 1, sharex=True, squeeze=False, height_ratios=list(map(len, parts)))[:, 0]
        for axes, rows in zip(panels, parts, strict=True):
            for at, row in enumerate(rows):
                colour = plots.GREY if at else plots.BLUE
                axes.plot([row["least"], row["most"]], [at, at], color=colour)
                axes.plot(row["seconds"], at, "o", color=colour)
            axes.set_yticks(range(len(rows)), [row["tool"] for row in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_title(f"{rows[0]['task']}: {counted(rows[0]['sites'], 'site')}")
            logarithmic(axes, "x")
        panels[-1].set_xlabel("time (s)")
    return drawn


# --- growth ----------------------------------------------------------------------------------------------------------


def growth(found: Found, to: Path) -> str:
    """Measured curves against the arithmetic."""
    lines = []
    for curve in found["curves"]:
        first, last = curve["points"][0], curve["points"][-1]
        grown = [times(last[key] / first[key]) for key in ("seconds", "predicted")]
        off = [times(point["seconds"] / point["predicted"]) for point in (first, last)]
        lines.append(
            [curve["name"], f"{first['size']}&nbsp;to&nbsp;{last['size']}", seconds(last["seconds"]), *grown, *off]
        )
    points = [point for curve in found["curves"] for point in curve["points"]]
    rates = [point["gflop_per_s"] for point in points]
    ratios = [point["seconds"] / point["predicted"] for point in points]
    where = [
        f"{model}: {', '.join(curve['name'] for curve in found['curves'] if curve['model'] == model)}"
        for model in dict.fromkeys(curve["model"] for curve in found["curves"])
    ]
    head = ["what grows", "from, to", "time of the largest", "times the time", "times the operations"]
    return joined(
        paragraph(f"""{measured_on(found)} Each point is one sweep of heads from token ids to logits, with its plain
            runs, the median of {found["repeats"]}. Beside it stand the operations it cannot do without, at the rate
            that a matrix product reached next to it ({min(rates):.0f} to {max(rates):.0f} GFLOP/s)."""),
        table([*head, "measured / predicted, smallest", "largest"], lines),
        paragraph(f"""Over all points a sweep took {times(min(ratios))} to {times(max(ratios))} times its prediction.
            What a sweep takes beyond it is not arithmetic."""),
        figure(
            growth_figure(found),
            to,
            "growth",
            f"""Time of a sweep as one size grows, both axes logarithmic: measured (dots, whiskers from the fastest to
            the slowest of the repeats) and predicted from the operations (dashed). {"; ".join(where)}.""",
        ),
    )


def growth_figure(found: Found) -> plots.Figure:
    """A panel per curve."""
    curves, rows = found["curves"], -(-len(found["curves"]) // 3)
    with style.context(plots.STYLE):
        drawn = plots.Figure(figsize=(plots.WIDTH, 2.3 * rows + 0.3))
        panels = list(drawn.subplots(rows, 3, squeeze=False).flat)
        for axes, curve in zip(panels, curves, strict=False):
            size, measured, low, high, predicted = (
                np.array([point[key] for point in curve["points"]])
                for key in ("size", "seconds", "least", "most", "predicted")
            )
            axes.vlines(size, low, high, color=plots.BLUE)
            axes.plot(size, measured, "o", color=plots.BLUE, label="measured")
            axes.plot(size, predicted, "--", color=plots.VERMILION, label="predicted")
            axes.set(xlabel=curve["unit"], title=curve["name"])
            logarithmic(axes, "x", "y")
            axes.set_xticks(size, [str(value) for value in size])
            low, high = min(low.min(), predicted.min()), max(high.max(), predicted.max())
            ticks = [10.0**power * part for power in range(-4, 5) for part in (1, 3)]
            axes.set_yticks([tick for tick in ticks if low / 1.5 <= tick <= high * 1.5])
        for axes in panels[len(curves) :]:
            axes.remove()
        drawn.supylabel("time of a sweep (s)", fontsize=10)
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return drawn


# --- where the time goes ---------------------------------------------------------------------------------------------


def sweep(found: Found, to: Path) -> str:
    """The sweep of all heads against its arithmetic."""
    rows = found["sweeps"]
    rates = [row["matrix product, GFLOP/s"] for row in rows]
    said = " and ".join(
        f"at {coded(row['role'])} {row['times the limit']:.2f} "
        f"(at most {aim} was aimed at, and {'reached' if row['times the limit'] <= aim else 'missed'})"
        for row in rows
        if (aim := LIMITS.get(row["role"]))
    )
    lines = [
        [f"{coded(row['role'])}, {counted(row['heads'], 'head')}", str(row["tokens run again"])]
        + [seconds(row[key]) for key in ("one by one, s", "single pass, s", "arithmetic limit, s")]
        + [times(row["times faster"]), small(row["largest logit difference"])]
        for row in rows
    ]
    head = ["role", "tokens run again", "one by one", "single pass", "arithmetic limit", "times faster"]
    return joined(
        paragraph(f"""{measured_on(found)} The arithmetic limit is the operations that a sweep cannot do without, at the
            rate of a plain matrix product in the same process ({min(rates):.0f} to {max(rates):.0f} GFLOP/s). The
            single pass takes {said} times that limit. The plain runs, which both ways need, are left out on both
            sides."""),
        table([*head, "largest difference of a logit"], lines),
    )


def profile(found: Found, to: Path) -> str:
    """What the steps of a whole book spend their time on."""
    steps = found["seconds"]
    parts = ("starting", "computing", "the rest")
    lines = [
        [name.replace("_", " "), seconds(row["all"]), *(f"{row[f'{part}, share']:.0%}" for part in parts)]
        for name, row in steps.items()
    ]
    whole = steps["all steps"]
    return joined(
        paragraph(f"""The book of profile `{found["profile"]}`, step by step, from its executed notebooks and run
            records. {measured_on(found)} Starting is the kernel, the imports and the keys; computing is the work units;
            the rest is prompts, tables, statistics and figures. One kernel for all notebooks would save at most
            {whole["starting, share"]:.1%} of the whole."""),
        table(["step", "time", *parts], lines),
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
