"""The page on cost says what its JSON files say, and nothing that they do not."""

import json
import re
from pathlib import Path

from pipeline import keys
from report import scale
from report.scale import seconds, small, times

ROOT = Path(__file__).resolve().parent.parent
PLACE = {
    "machine": {"cores": 2, "cpu": "Some CPU", "memory_gb": 8.0, "gpus": [], "system": "Linux"},
    "versions": {"python": "3.11", "torch": "2.13.0", "transformers": "5.23.0"},
    "threads": 1,
}
TOOLS = {"this library": 1.0, "plain hooks, batched": 2.0, "TransformerLens": 70.0, "nnsight, batched": 19.0}


def of_peers() -> dict:
    tasks = {"heads at last": 270, "MLPs zeroed at last": 30}
    rows = [
        {
            "task": task,
            "tool": tool,
            "sites": sites,
            "seconds": 0.4 * ratio,
            "least": 0.3 * ratio,
            "most": 0.5 * ratio,
            "times_ours": ratio,
            "largest_logit_difference": 4e-5,
        }
        for task, sites in tasks.items()
        for tool, ratio in TOOLS.items()
        if (task, tool) != ("MLPs zeroed at last", "nnsight, batched")
    ]
    tools = [
        {"tool": tool, "package": None, "version": "4.3.0" if "Lens" in tool else None, "note": f"as {tool} is"}
        for tool in TOOLS
    ]
    return PLACE | {"repeats": 5, "every": 1, "tokens": 13, "tools": tools, "measured": rows}


def of_growth() -> dict:
    points = [
        {
            "size": size,
            "rows": size,
            "seconds": 0.01 * size,
            "least": 0.009 * size,
            "most": 0.02 * size,
            "predicted": 0.004 * size,
            "gflop": size,
            "gflop_per_s": 180.0,
        }
        for size in (9, 27, 270)
    ]
    names = ("sites", "layers", "width", "pairs")
    curves = [{"name": name, "unit": "units", "model": "a model", "points": points} for name in names]
    return PLACE | {"repeats": 5, "curves": curves}


def of_scale(device: str = "cpu", less: bool = True) -> dict:
    exact = {"sites": 48, "largest_difference": 0.0123, "largest_effect": 2.5, "noise_floor": 0.0311}
    row = {
        "sites": 5360,
        "tokens_run_again": 1,
        "passes": 1,
        "one_by_one_sampled": 24,
        "one_by_one_s_estimated": 912.0,
        "times_arithmetic_limit": 1.3,
        "times_bandwidth_limit": 9.9,
    }
    return PLACE | {
        "shape": dict.fromkeys(scale.SHAPE, 64),
        "device": device,
        "scaled_down": less,
        "quantisation": "nf4",
        "dtype": "bfloat16",
        "tokens": 18,
        "memory_gb": {"weights": 39.5, "peak": 61.0},
        "plain_forward_s": 0.17,
        "limits": {
            "matrix_product_tflops": 700.0,
            "fp32_matrix_product_tflops": 50.0,
            "bandwidth_gb_s": 2500.0,
            "weights_gb": 38.0,
        },
        "sweeps": [
            row | {"role": "last", "seconds": 7.6, "times_faster": 120.0},
            row | {"role": "name_a", "seconds": 95.0, "times_faster": 9.6},
        ],
        "paths": {
            "receivers": "64 queries of layer 37",
            "senders": 2300,
            "seconds": 9.0,
            "one_by_one_sampled": 6,
            "times_faster": 87.0,
        },
        "exactness": exact,
        "others": [
            {
                "shape": "small",
                "quantisation": "none",
                "dtype": "float32",
                "exactness": exact | {"largest_difference": 3e-5},
            }
        ],
    }


def of_offload() -> dict:
    one = {"pairs": 1, "groups of pairs": 1, "sites": 360, "seconds": 0.6, "layer loads": 0, "GB read from disk": 0.0}
    there = {
        "seconds": 3.3,
        "layer loads": 30,
        "GB read from disk": 0.54,
        "same rows as in memory": True,
        "times as long as in memory": 5.5,
        "times faster than one by one": 240.0,
    }
    many = one | {"pairs": 20, "groups of pairs": 4}
    disk = {
        "loads": True,
        "layers": 30,
        "one pair": one | there,
        "many pairs": many | there,
        "peak resident, GB": 0.7,
        "one by one": {"layer loads per site": 30.0},
    }
    ways = {
        "in memory": {"one pair": one, "many pairs": many},
        "in memory, limited": {"loads": False, "says": "OSError: no"},
    }
    return PLACE | {"weights, GB": 0.54, "room, GB": 0.377, "ways": ways | {"on disk, limited": disk}}


def of_plan() -> dict:
    step = {"passes": 1200, "operations": 2e15, "memory_gb": 60.5, "disk_gb": 0.012, "page_seconds": 10.0}
    steps = [
        step | {"step": "baselines", "seconds": 110.0, "measured_seconds": 100.0, "ratio": 1.1},
        step | {"step": "coarse_sweep", "seconds": 150.0, "measured_seconds": 100.0, "ratio": 1.5},
        step | {"step": "story", "seconds": 5.0, "measured_seconds": None, "ratio": None},
    ]
    return PLACE | {"profile": "p", "device": "some card", "assumptions": ["a"], "total_seconds": 295.0, "steps": steps}


def of_sweep() -> dict:
    row = {"heads": 270, "one by one, s": 16.5, "times faster": 50.6, "largest logit difference": 3.8e-5}
    row |= {"single pass, s": 0.33, "arithmetic limit, s": 0.22, "matrix product, GFLOP/s": 201.0}
    rows = [
        row | {"role": "last", "tokens run again": 1, "times the limit": 1.45},
        row | {"role": "name_a", "tokens run again": 10, "times the limit": 1.22},
    ]
    return PLACE | {"sweeps": rows}


def of_profile() -> dict:
    row = {"all": 240.0, "starting, share": 0.029, "computing, share": 0.9, "the rest, share": 0.071}
    return PLACE | {"profile": "p", "seconds": {"03_necessity": row, "all steps": row | {"all": 2400.0}}}


MADE = {
    "peers": of_peers,
    "growth": of_growth,
    "scale_70b": of_scale,
    "offload": of_offload,
    "plan_70b": of_plan,
    "plan_smollm2": of_plan,
    "sweep": of_sweep,
    "profile": of_profile,
}


def told(folder: Path, name: str, found: dict | None = None) -> str:
    """The section made of a file."""
    (folder / f"{name}.json").write_text(json.dumps(found or MADE[name]()))
    return scale.fields(folder, folder)[name]


def cells(text: str) -> dict[str, list[str]]:
    """The tables of a section: rows by their first cell."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows}


def test_peers_are_told_as_measured(tmp_path):
    text = told(tmp_path, "peers")
    rows = cells(text)
    assert rows["tool"] == ["heads at `last` (270 sites)", "MLPs zeroed at `last` (30 sites)"]
    assert rows["this library"] == ["0.4 s", "0.4 s"]
    assert rows["TransformerLens (4.3.0)"] == ["28 s (70×)", "28 s (70×)"]
    assert rows["nnsight, batched"] == ["7.6 s (19×)", "–"]
    assert "TransformerLens took 70 times as long as the sweep (60 was aimed at, and reached)" in text
    assert "nnsight, batched took 19 times as long as the sweep (20 was aimed at, and missed)" in text
    assert "within 0.00004." in text and "a trial" not in text
    assert "2 cores (Some CPU), 1 thread, with torch 2.13.0" in text
    assert (tmp_path / "figures" / "scale-peers.png").is_file() and "figures/scale-peers.png" in text


def test_a_changed_figure_changes_the_sentence(tmp_path):
    found = of_peers()
    next(row for row in found["measured"] if row["tool"] == "TransformerLens")["times_ours"] = 41.0
    text = told(tmp_path, "peers", found | {"every": 30})
    assert "TransformerLens took 41 times as long as the sweep (60 was aimed at, and missed)" in text
    assert "Only every 30th site was taken: this is a trial." in text


def test_growth_is_told_as_measured(tmp_path):
    text = told(tmp_path, "growth")
    assert cells(text)["width"] == ["9&nbsp;to&nbsp;270", "2.7 s", "30", "30", "2.5", "2.5"]
    assert "2.5 to 2.5 times its prediction" in text and "(180 to 180 GFLOP/s)" in text


def test_the_page_says_which_shape_it_shows(tmp_path):
    text = told(tmp_path, "scale_70b")
    assert (
        "**These are figures of a smaller shape, on the CPU, not of the 70B shape**" in text and "Aimed at" not in text
    )
    text = told(tmp_path, "scale_70b", of_scale("NVIDIA H100 80GB HBM3", less=False))
    assert "**These are figures of the shape of Llama-3.3-70B, on one NVIDIA H100 80GB HBM3**" in text
    assert "Measured: 7.6 s, 61 GB, 120 times; reached." in text
    assert cells(text)["`last`"] == ["5,360", "7.6 s", "15.2 min", "120", "1.3", "9.9"]
    assert cells(text)["float32"] == ["small", "48", "0.00003", "0.031", "2.5"]
    slow = of_scale("NVIDIA H100 80GB HBM3", less=False)
    slow["sweeps"][0]["seconds"] = 12.0
    assert "Measured: 12 s, 61 GB, 120 times; missed." in told(tmp_path, "scale_70b", slow)


def test_offload_counts_the_loads(tmp_path):
    text = told(tmp_path, "offload")
    assert "30 loads of 30 layers: each layer is loaded once" in text and "the same to the bit" in text
    assert cells(text)["20 pairs, 360 sites"] == ["0.6 s", "3.3 s", "5.5", "30", "0.54", "240"]
    found = of_offload()
    found["ways"]["on disk, limited"]["one pair"] |= {"layer loads": 60, "same rows as in memory": False}
    text = told(tmp_path, "offload", found)
    assert "60 loads of 30 layers: **not once each**" in text and "**not the same**" in text


def test_the_plan_beside_the_run(tmp_path):
    text = told(tmp_path, "plan_70b")
    assert cells(text)["coarse sweep"] == ["1,200", "2", "60.5", "12", "2.67 min"]
    assert "all steps and their pages in **4.92 min**" in text
    text = told(tmp_path, "plan_smollm2")
    rows = cells(text)
    assert rows["baselines"] == ["110 s", "100 s", "1.1"] and rows["together"] == ["4.33 min", "3.33 min", "1.3"]
    assert "story" not in rows and "missed by coarse sweep." in text


def test_the_sweep_against_its_limit(tmp_path):
    text = told(tmp_path, "sweep")
    assert "at `last` 1.45 (at most 1.3 was aimed at, and missed)" in text
    assert "at `name_a` 1.22 (at most 1.4 was aimed at, and reached)" in text
    assert cells(text)["`last`, 270 heads"] == ["1", "16.5 s", "0.33 s", "0.22 s", "51", "0.000038"]


def test_where_a_book_spends_its_time(tmp_path):
    text = told(tmp_path, "profile")
    assert cells(text)["03 necessity"] == ["4 min", "3%", "90%", "7%"] and cells(text)["all steps"][0] == "40 min"
    assert "would save at most 2.9% of the whole" in text


def test_what_is_missing_is_said(tmp_path):
    assert set(scale.SECTIONS) == set(MADE)
    missing = {name: f"Not measured yet: run `{scale.COMMANDS[name]}`." for name in MADE}
    assert scale.fields(tmp_path, tmp_path) == missing
    assert "planned and not measured" in told(tmp_path, "plan_70b")
    out = scale.fields(tmp_path, tmp_path)
    assert all(out[name] == said for name, said in missing.items() if name != "plan_70b")


def test_the_committed_results_make_the_page(tmp_path):
    """Whatever is committed has the layout that the page reads, and the page has a place for every section."""
    out = scale.fields(ROOT / "bench" / "results", tmp_path)
    assert set(re.findall(r"\$(\w+)", (ROOT / "book" / "scale.md").read_text())) == set(out)


def test_numbers_are_short_and_whole():
    assert [seconds(value) for value in (0.4557, 27.46, 119, 150, 9000)] == [
        "0.456 s",
        "27.5 s",
        "119 s",
        "2.5 min",
        "2.5 h",
    ]
    assert [times(value) for value in (0.52, 1.26, 60.4, 5120)] == ["0.52", "1.3", "60", "5,120"]
    assert small(3.81e-05) == "0.000038"


def test_a_result_of_other_code_is_marked_stale():
    made = keys.code("lib", "report/scale.py")
    found = {"commit": "0123456789", "code": made | {"lib": "another"}}
    assert scale.stale(found | {"code": made}, "make it") == ""
    said = scale.stale(found, "make it")
    assert "`lib` has changed" in said and "`make it`" in said and "0123456`" in said and "report" not in said
