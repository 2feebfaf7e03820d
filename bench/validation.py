"""Planted circuits, and what the steps make of them: the table of the chapter *Validation*.

    python -m bench.validation [--only GROUP ...] [--list]

1. `plan` lists the models: `SEEDS` seeds over the options (`OPTIONS`), a series of noise on some of them, and models
   without a circuit (`report.validation.NOTHING`); all of seeds that were held out (`report.validation.HELD_OUT`).
2. `run_step` runs a step as its notebook does, cell by cell up to its findings, in this process; what the notebook only
   draws is left out. Parameters are those of the profile `planted`, with `LESS`.
3. `measure` sets truth and findings side by side (`report.scores`). After every model all is written to
   bench/results/validation.json, from where a run that was stopped goes on, if the code is the same; the page says how
   many are still to run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch

from pipeline import keys, machine, params, units
from planted import build, truth
from planted.options import PREFIX
from report import scores
from report.validation import HELD_OUT, NOTHING
from steps.registry import PLAN

RESULT = Path(__file__).parent / "results" / "validation.json"
CODE = ("lib", "planted", "pipeline", "report/scores.py", *(f"steps/{name}" for name in PLAN.names))
CODE += ("bench/validation.py", "params/planted.yaml", "data/claims.yaml")
SEEDS, NOISES, SERIES = 20, (0.01, 0.03, 0.1, 0.3), ("additive", "backup by an MLP")
OPTIONS = {
    "additive": "",
    "or": "rule=or",
    "and": "rule=and",
    "between": "between=0.4",
    "backup": "backup=0.7,backup_wakes=unsaid",
    "backup by an MLP": "backup=0.7,backup_read=mlp,backup_wakes=unsaid",
    "decoys": "decoys=attends+large+negative",
    "class only": "class_only=true",
    "placebo": "placebo=true",
    "routes": "routes=v+k+q",
    "head": "aggregator=head",
    "turned": "rotated=true",
    "GPT-2": "shape=gpt2",
    "Gemma 2": "shape=gemma2",
    "unequal names": "first=0.7",
    "class only, a head": "class_only=true,class_only_by=head",
}
QUADS = 24  # in each half, of which some fall out: intervals take 20
LESS: dict[str, Any] = {
    "resamples": 500,
    "baselines": {"templates": ["know_both"], "quads_per_half": QUADS, "pairs_per_quad": 1, "accuracy_pairs": 40},
    "coarse_sweep": {"roles": ["names", "between", "last"], "pairs": 40, "name_pairs": 40, "lens_pairs": 1},
    "necessity": {"components": ["mlp", "head"], "ablations": ["resample", "counterfactual"], "name_roles": []},
    "sufficiency": {"components": ["mlp", "head"], "coupled_sites": 2},
    "hydra": {"ablations": ["resample"], "rounds": 1},
    "retrieval_heads": {"one_name_pairs": 0, "edge_pairs": 2, "probe_people": 24},
    "generality": {"templates": ["know_both", "common_both"], "control_prompts": 4, "random_sets": 1},
    "subspace": {"probe_people": 96, "permutations": 4, "ranks": [1], "dimensions": [1, 4]}
    | {"random_directions": 2, "rotation_steps": 1, "templates": ["know_both"], "steering_pairs": 20}
    | {"earlier_layers": 0, "interchange_steps": 1, "probe_questions": ["many_other"]},
    "neurons": {"sae_features": 16, "sae_active": 4, "sae_prompts": 40, "sae_epochs": 1, "sae_seeds": 2, "budgets": [1]}
    | {"pairs": 48, "top_pairs": 48, "random_sets": 1, "cards": 1},
    "story": {"search_pairs": 8, "everywhere_limit": 4, "random_sets": 2, "subsets": 2, "attribution_pairs": 2},
}
"""What is taken less of than in the profile, so that all models take half an hour."""
NAMED = {
    "routes": ("retrieval_heads",),
    "class only": ("generality", "neurons"),
    "class only, a head": ("generality", "neurons"),
}
"""Steps that are given all planted sites at the last token as their slice: step 04 stops at 80% of the answer."""


class Run(NamedTuple):
    """One model that is asked about."""

    group: str
    options: str
    seed: int
    noise: float = 0.0
    series: bool = False  # of the series of noise

    @property
    def spec(self) -> str:
        parts = [f"seed={self.seed}", self.options, f"noise={self.noise:g}" if self.noise else ""]
        return PREFIX + ",".join(filter(None, parts))


def plan() -> list[Run]:
    """All models, in order: every option has its first seed early."""
    options = list(OPTIONS.items())
    seeds = [Run(*options[index % len(options)], HELD_OUT + index) for index in range(SEEDS)]
    seeds = [run._replace(series=run.group in SERIES and index < len(options)) for index, run in enumerate(seeds)]
    noisy = [run._replace(noise=noise) for run in seeds if run.series for noise in NOISES]
    nothing = [Run(kind, how, HELD_OUT) for kind, how in NOTHING.items()]
    return seeds + nothing + noisy


def parameters(run: Run, results: str) -> dict[str, Any]:
    """The profile's parameters, with LESS, of one model."""
    given = params.load_profile("planted")
    given |= {key: given.get(key, {}) | less if isinstance(less, dict) else less for key, less in LESS.items()}
    if run.group in NAMED:
        planted = truth.read(build.folder(run.spec)).model_dump(mode="json")
        for step in NAMED[run.group]:
            given[step] |= {"slice_sites": [scores.name_of(site) for site in scores.at_last(planted)]}
    return given | {"model": run.spec, "seed": run.seed, "results_dir": results}


def cells(step: str) -> Iterator[str]:
    """A notebook's code up to the cell that has its findings."""
    for cell in json.loads(PLAN.notebook(step).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", ()):
            yield source
            if "found = " in source:
                return


def run_step(step: str, given: Mapping[str, Any]) -> float:
    """Run a step; its seconds. SystemExit is how a notebook ends where the model does not do the task."""
    namespace, begun = dict(given), time.process_time()
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), contextlib.suppress(SystemExit):
        for source in cells(step):
            exec(compile(source, step, "exec"), namespace)
    return round(time.process_time() - begun, 2)


def measure(run: Run) -> dict[str, Any]:
    """Every step on one model, and its scores; none where the model of a circuit does not do its task."""
    with tempfile.TemporaryDirectory() as results:
        given = parameters(run, results)
        taken = {step: run_step(step, given) for step in PLAN.names}
        known, found = scores.load(Path(results))
        asked = found["baselines"]["able"][given["task"]]
        scored = scores.score(known, found) if asked["able"] or run.group in NOTHING else []
    rows = [score._asdict() | {"right": score.right} for score in scored]
    return run._asdict() | {
        "spec": run.spec,
        "seconds": taken,
        "able": asked["able"],
        "why": asked["why"],
        "scores": rows,
    }


def main() -> None:
    """Measure what is missing, and write after every model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="groups of models, such as backup or random")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    mpl.use("Agg")
    runs, code = plan(), keys.code(*CODE)
    asked = [run for run in runs if only is None or run.group in only]
    stored = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    done = {run["spec"]: run for run in stored.get("runs", ())} if stored.get("code") == code else {}
    facts = {"machine": machine.facts(), "threads": 1, "versions": machine.versions(), **machine.commit(), "code": code}
    todo = [run for run in asked if run.spec not in done]
    for number, run in enumerate(todo, start=1):
        done[run.spec] = measure(run)
        kept = [done[one.spec] for one in runs if one.spec in done]
        seconds = [sum(one["seconds"].values()) for one in kept]
        whole = {"planned": len(runs), "seconds": round(sum(seconds)), "runs": kept}
        units.write_json(RESULT, facts | whole)
        wrong = [score["method"] for score in done[run.spec]["scores"] if not score["right"]]
        told = f"{number} of {len(todo)}: {run.spec}, {sum(done[run.spec]['seconds'].values()):.0f} s"
        left = statistics.mean(seconds) * (len(todo) - number) / 60
        print(f"{told}; wrong: {', '.join(wrong) or 'nothing'}; about {left:.0f} min left", flush=True)


if __name__ == "__main__":
    main()
