"""What a notebook's first cell calls: parameters checked, results found, work resumed, findings handed on.

1. `Plan` and the notebook's variables make a `Step`; results that other parameters wrote are refused.
2. `Step.able` says whether the model can do the task; `Step.find` reads an earlier step's findings, `Step.pairs` pairs.
3. `Step.table` gives a finished table, or computes the work units that are missing. The model is loaded only then:
   a page that is merely redrawn does not need it.
4. `Step.write_findings` hands on what was found, and the run record says how.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import pandas as pd

from lib import locks, records
from lib.records import AGAIN
from pipeline import keys, machine, params, units
from pipeline.declaration import CRITICAL_LAYERS, EFFECTS, SLICE, Declaration, Plan, Table
from pipeline.params import ParameterError, Shared
from pipeline.units import Engine, Unit

if TYPE_CHECKING:
    from lib.hooks import Model, Site
    from lib.questions import Question
    from lib.tasks import Pair


class StepError(ParameterError):
    """A step that cannot go on; shown in a notebook as one sentence."""


@dataclass(frozen=True)
class Ability:
    """Whether there is something to ask (true as a truth value), why, and whether step 01 has asked at all."""

    able: bool
    why: str
    known: bool = True

    def __bool__(self) -> bool:
        return self.able


@dataclass(frozen=True, eq=False)
class Step:
    """One step of the plan with its parameters: where it reads, where it writes, how it computes."""

    plan: Plan
    name: str
    params: Shared
    engine: Engine | None = None  # None: this process computes

    def __reduce__(self) -> tuple:
        """A step travels to workers as its name and parameters; what it has loaded stays where it is."""
        return resident, (self.plan.module, self.name, self.params)

    @property
    def declaration(self) -> Declaration:
        return self.plan[self.name]

    @property
    def results(self) -> Path:
        """The folder that this step writes to."""
        return keys.results_folder(self.params)

    @cached_property
    def ingredients(self) -> dict[str, Any]:
        """Everything the step's data depends on (see `pipeline.keys`)."""
        return keys.ingredients(self.declaration, self.params)

    @property
    def data_key(self) -> str:
        return keys.hash_json(self.ingredients)

    @property
    def people_file(self) -> Path:
        """The table of people: from the working directory, else from the repository."""
        return keys.input_file(self.params.people_file)

    def rng(self, purpose: str = "") -> np.random.Generator:
        """A generator from the profile's seed, of its own for each purpose."""
        return np.random.default_rng([self.params.seed, crc32(f"{self.name}:{purpose}".encode())])

    # --- the model ---

    @cached_property
    def model(self) -> Model:
        """The model, loaded and proved when it is first asked for; layers in the parameters are checked against it."""
        from lib import models  # torch and transformers: only for steps that compute

        names = ("dtype", "device", "device_map", "seed", "quantisation", "max_memory", "offload_folder")
        names += ("tokenizer", "adapter")
        how = {name: getattr(self.params, name) for name in names}
        if self.params.model.startswith("config:") and self.params.tokenizer is None:
            raise StepError(models.NO_WORDS.format(self.params.model))
        try:
            model = models.load(self.params.model, sha256=self.params.model_sha256, **how)
        except ValueError as error:
            raise StepError(str(error)) from None
        params.check_layers(self.params, model.n_layers)
        return model

    @cached_property
    def tokenizer(self) -> Remembered:
        """The model's tokenizer; loaded only for texts that the step's finished results do not hold."""

        def load() -> Any:
            from lib import models

            if "model" in self.__dict__:
                return self.model.tokenizer
            p = self.params
            try:
                if p.tokenizer:
                    return models.tokenizer(p.tokenizer, reader=p.model)
                return models.tokenizer(p.model, p.model_sha256)
            except ValueError as error:
                raise StepError(str(error)) from None

        own = self.path("tokens").name
        return Remembered(load, keys.left(self.results, self.name, own) if self.fresh else None)

    @property
    def n_layers(self) -> int:
        return self.shape["n_layers"]

    @property
    def n_heads(self) -> int:
        return self.shape["n_heads"]  # of a layer

    @cached_property
    def shape(self) -> dict[str, int]:
        """From the run record where there is one, so that a redrawn page loads no model."""
        stored = self.record.get("model", {}) if self.fresh else {}
        return stored if {"n_layers", "n_heads"} <= stored.keys() else self.model_facts

    @cached_property
    def model_facts(self) -> dict[str, Any]:
        """What the model is, once it has been loaded, here or by the workers."""
        if self.engine and "model" not in self.__dict__:
            return dict(self.engine.about(self)["model"])
        own = self.model
        out = {"name": own.name, "sha256": own.sha256, "dtype": str(own.dtype).removeprefix("torch.")}
        return out | {"device": str(own.device), "n_layers": own.n_layers, "n_heads": own.n_heads, "noise": own.noise}

    @property
    def critical_layers(self) -> list[int]:
        """Those that step 02 has left; empty where it has left none."""
        return (self.find(CRITICAL_LAYERS) or {}).get("critical_layers") or []

    @property
    def layers(self) -> list[int]:
        """The layers that are swept: all, those listed, or the critical layers of step 02 (all if there are none)."""
        chosen = (self.critical_layers or "all") if self.params.layers == "auto" else self.params.layers
        return list(range(self.n_layers)) if chosen == "all" else list(chosen)

    @property
    def layers_from(self) -> str:
        """How `layers` was chosen, for the page."""
        if self.params.layers != "auto":
            return "all layers, by the profile" if self.params.layers == "all" else "the layers named in the parameters"
        left = self.critical_layers
        return "the critical layers of step 02" if left else "all layers: step 02 has left no critical layers here"

    # --- what earlier steps left ---

    def find(self, step: str) -> dict[str, Any] | None:
        """Findings of an earlier step about this model and task, from results_dir, then results/<profile>; or None."""
        return keys.find_findings(self.plan[step].name, self.params)

    def beside(self, step: str) -> dict[str, Any] | None:
        """As `find`, of findings on the very pairs of this step: what a page may set its numbers beside."""
        found = self.find(step)
        return found if found and found["about"].get("pairs_file") == keys.given_pairs(self.params) else None

    def able(self) -> Ability:
        """Whether the model does the task, by the findings of step 01, and whether there is a slice, where the step is
        about it. Where step 01 was not asked, work goes on."""
        asked = self.declaration.tasks
        if asked and self.params.task not in asked:
            return Ability(False, f"this step asks about supersets, and the answers of `{self.params.task}` are none")
        found = keys.ability(self.params)
        if (found is None or found["able"]) and getattr(self.params, "slice_sites", ()) is None:
            of_slice = self.find(SLICE) or {}
            if of_slice.get("critical_slice") == [] and "why" in of_slice:
                return Ability(False, of_slice["why"])
        if found is None:
            what = self.params.task + (" on these pairs" if self.params.pairs_file else "")
            return Ability(True, f"step 01 has not measured whether this model does {what}", known=False)
        return Ability(found["able"], found["why"])

    def pairs(self) -> pd.DataFrame:
        """The pairs table: `pairs_file`, or the pairs of step 01. StepError when there are none, and for a pairs_file
        with rows that cannot be used: it names them all.

        Every pair has the task and the template of the parameters."""
        if self.params.pairs_file is not None:
            return self.shared("given", self._given)[0].copy()
        return records.read(keys.find_pairs(self.name, self.params))

    def _given(self) -> tuple[pd.DataFrame, list[Pair]]:
        """The pairs of the `pairs_file`, and as prompts."""
        from lib import data, tables, tasks

        p, path, made, topic = self.params, keys.find_pairs(self.name, self.params), [], self.params.topic
        try:
            table, faults = data.read_pairs_file(path, p.seed, task=p.task, template=p.template, question=topic)
            data.check_halves(table)
            if p.task != "odd_one_out" and len(faults) < len(table):  # of no row, but of all: said once
                tasks.candidates(self.tokenizer, topic.find(p.template, p.task))
        except ValueError as error:
            raise StepError(str(error)) from None
        with units.progress("pairs_file", len(table), unit="pairs", delay=2) as bar:
            for place, row in zip(table.index, table.to_dict("records"), strict=True):
                try:
                    made += [self._prompts(row, topic)] if place not in faults else []
                except StepError:  # a tokenizer that cannot be had is no row's fault
                    raise
                except ValueError as error:
                    faults[place] = str(error).removeprefix(f"pair {row['pair_id']!r}: ")
                bar.update()
        if faults:
            raise StepError(tables.unusable(f"pairs_file {path.name}", table, faults))
        return table.reset_index(), made

    def _prompts(self, row: Mapping[str, Any], topic: Question) -> Pair:
        """A row of a pairs table as prompts."""
        from lib import tasks

        return tasks.make_pair(self.tokenizer, row, self.params.chat_template, self.params.attributes, topic)

    def prompts(self, table: pd.DataFrame | None = None) -> list[Pair]:
        """The pairs (default: of `pairs`) as prompts, tokenised and checked. StepError names the pair that is wrong."""
        if table is None and self.params.pairs_file is not None:
            return list(self.shared("given", self._given)[1])
        if table is None:
            return list(self.shared("prompts", self._own_prompts))
        topic = self.params.topic
        try:
            return [self._prompts(row, topic) for row in table.to_dict("records")]
        except ValueError as error:
            raise StepError(str(error)) from None

    def _own_prompts(self) -> list[Pair]:
        """The pairs of step 01 as prompts."""
        from lib import data

        table = self.pairs()
        data.check_halves(table)
        return self.prompts(table)

    def placebo_pairs(self) -> pd.DataFrame | None:
        """The placebo pairs of step 01, those of a gap that was not `kept` among them; None where there are none."""
        path = keys.find_placebo(self.params)
        return None if path is None else records.read(path)

    def placebo(self) -> list[Pair]:
        """`placebo_pairs` as prompts."""
        table = self.placebo_pairs()
        return [] if table is None else list(self.shared("placebo", lambda: self.prompts(table)))

    def shared(self, name: str, make: Callable[[], Any]) -> Any:
        """What several tables share in one sitting, such as a pool of activations; made when it is first asked for."""
        kept = self.__dict__.setdefault("kept", {})
        if name not in kept:
            kept[name] = make()
        return kept[name]

    def prove(self, pair: Pair) -> list[str]:
        """The two proofs that patching does what it says, the identity patch and the whole-residual patch: once in a
        sitting, by whichever table comes first. Their lines for the log; none where they have been made."""
        from lib import sweep

        before = "proofs" in self.__dict__.get("kept", {})
        lines = self.shared("proofs", lambda: sweep.prove(self.model, pair))
        return [] if before else lines

    def sweeper(self, pairs: Sequence[Pair], run: Callable | None = None) -> Callable[[Unit], pd.DataFrame]:
        """What computes units of `sweep_units`, or of what else `run` sweeps; means and resamples come from `pairs`."""
        pools: dict = {}

        def compute(unit: Unit) -> pd.DataFrame:
            from lib import sweep

            own = self.prove(pairs[0])
            where = {"memory": self.memory, "seed": self.params.seed, "profile": self.params.profile}
            frame = (run or sweep.run)(self.model, unit.pairs, pool=pairs, pools=pools, **where, **unit.options)
            frame.attrs["log"] = own + frame.attrs["log"]
            return frame

        return compute

    def slice(self) -> list[Site]:
        """The critical slice: `slice_sites` of the parameters, else what step 04 found. StepError when it is empty."""
        named = self.params.slice_sites
        if named is None:
            found = self.find(SLICE)
            if found is None:
                raise StepError(
                    "step 04 has left no critical slice for this model and task: run it first (make does), or name "
                    "the slice: -p slice_sites 21.6,mlp 23"
                )
            named = [site["site"] for site in found["critical_slice"]]
        if not named:
            raise StepError("the critical slice is empty: step 04 found no site; name some with slice_sites")
        return self.sites_of("slice_sites", named)

    def sites_of(self, key: str, named: Sequence[str]) -> list[Site]:
        """The sites that a parameter names. StepError for one that the model has not."""
        from lib.hooks import site_of

        sites = [site_of(name) for name in named]
        for name, site in zip(named, sites, strict=True):
            if site.layer >= self.n_layers or site.head >= self.n_heads:
                shape = f"{self.n_layers} layers of {self.n_heads} heads"
                raise StepError(f"{key}: {name} is not in {self.params.model}, which has {shape}")
        return sites

    # --- tables ---

    def path(self, name: str | None = None) -> Path:
        """The file of a table: <step>.parquet for the step's own, <step>.<name>.parquet for another."""
        return self.results / (f"{self.name}.parquet" if name in (None, self.name) else f"{self.name}.{name}.parquet")

    def table(self, table: Table, *chosen: Any) -> pd.DataFrame:
        """A table of the step: read if it is done, else its missing work units are computed and joined.

        `chosen` is what was chosen from earlier tables, as the table's declaration takes it. For `frame.attrs` see
        `pipeline.units.run_units`.
        """
        self._begin_writing()
        path, plan = self.path(table.name), table.units(self, *chosen)
        about = records.read_metadata(path) if path.exists() else {}
        if about and about.get("data_key") != self.data_key:
            other = f"seed {about.get('seed')}, data key {str(about.get('data_key'))[:8]}, not {self.data_key[:8]}"
            raise StepError(f"{keys.shown(path)} is of another run than the results beside it ({other}); {AGAIN}")
        if about.get("plan") != units.plan_id(plan):
            self._compute(path, plan, table, table.compute(self, *chosen))
        frame = records.read(path, table.columns)
        self.params.note_logits(records.read_metadata(path).get("largest_logit", 0.0))
        self.write_record(path)
        units.remove_units(path.with_suffix(".units"))  # once the table and its record are safe
        return frame

    def metadata(self, table: Table) -> dict[str, Any]:
        """What a finished table says of itself: its candidates, rows, seconds and other facts."""
        return records.read_metadata(self.path(table.name))

    def _compute(self, path: Path, plan: Sequence[Unit], table: Table, compute: Callable) -> None:
        folder, schema = path.with_suffix(".units"), table.schema
        intent = {
            "data_key": self.data_key,
            "ingredients": self.ingredients,
            "memory_gb": self.memory,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        engine = self.engine.distributed(self, self.memory) if self.engine else units.one_by_one
        how = {"label": path.stem, "schema": schema, "engine": engine, "model": self._model}
        parts = units.run_units(folder, plan, compute, plan=intent, **how)
        begun = {name: units.read_plan(folder)[name] for name in ("memory_gb", "started", "ingredients")}
        units.assemble(path, parts, self._facts() | {"plan": units.plan_id(plan)} | begun, schema)

    @cached_property
    def memory(self) -> float:
        """GB that one pass may take. `auto` is resolved once: work of this key, finished or not, keeps its value."""
        if self.params.memory != "auto":
            return float(self.params.memory)
        plans = [units.read_plan(folder) for folder in sorted(self.results.glob(f"{self.name}.*units"))]
        for stored in (*plans, self.record):
            if stored and stored.get("data_key") == self.data_key and stored.get("memory_gb"):
                return stored["memory_gb"]
        if self.engine:
            return self.engine.about(self)["memory"]
        return machine.pass_memory(None if self.params.device == "cpu" else self.model)

    @property
    def fresh(self) -> bool:
        """Whether the results in the folder are of this data key."""
        return keys.stored_key(self.results, self.name) == self.data_key

    def refuse_stale(self) -> None:
        """StepError when the folder holds results that other parameters, inputs or code made, unless `overwrite`."""
        key = self.data_key  # first of all: a step whose inputs are not there is an error in any case
        stored = keys.stored_ingredients(self.results, self.name)
        if stored is None or self.params.overwrite or keys.hash_json(stored) == key:
            return
        changed = "; ".join(keys.differences(stored, self.ingredients)) if stored else "they do not say which"
        raise StepError(
            f"{keys.shown(self.results)} holds results of {self.name} made otherwise: {changed}. "
            "Run with -p overwrite true to replace them, or with another results_dir"
        )

    def set_stale_aside(self) -> None:
        """Move results that other parameters, inputs or code made to where `pipeline.keys.bring_back` finds them."""
        key = self.data_key
        if keys.stored_key(self.results, self.name) not in (None, key) and not self.params.overwrite:
            with self._alone():
                aside = keys.set_aside(self.results, self.declaration)
            print(f"results of {self.name} made otherwise set aside in {keys.shown(aside)}")

    def bring_back(self) -> None:
        """Move results of this data key that were set aside back."""
        if keys.find_aside(self.results, self.declaration, self.data_key):
            with self._alone():
                keys.bring_back(self.results, self.declaration, self.data_key)

    def _alone(self) -> AbstractContextManager:
        """While no other process writes to the results folder."""
        return nullcontext() if self.results.resolve() in WRITING else self._lock()

    def _lock(self) -> locks.Lock:
        """The results folder's. StepError where another process writes there, or nothing can be written."""
        try:
            return locks.Lock(self.results.resolve() / ".lock")
        except locks.Locked as error:
            raise StepError(f"{error}, or give another results_dir") from None
        except OSError as error:
            raise StepError(f"{error}: make the folder writable, or give another results_dir") from None

    def _begin_writing(self) -> None:
        """Lock the results folder until the findings are written, clear what a killed run left half written, and
        results of another key. StepError as of `_lock`."""
        self.refuse_stale()
        folder = self.results.resolve()
        if folder not in WRITING:
            WRITING[folder] = self._lock()
            units.clear_leftovers(folder)
            units.clear_leftovers(folder / "figures")
        if not self.fresh:
            keys.remove(self.results, self.declaration)

    # --- what this step leaves ---

    def _facts(self) -> dict[str, Any]:
        """What every table and the run record say of how they were made."""
        p = self.params
        return {
            "step": self.name,
            "profile": p.profile,
            "data_key": self.data_key,
            "parameters": p.model_dump(mode="json", exclude=set(keys.PLACES)),
            "seed": p.seed,
            "quantisation": p.quantisation,
            "model": self._model(),
            **machine.commit(),
            "versions": machine.versions(),
            "machine": machine.facts(),
        }

    def _model(self) -> dict[str, Any]:
        """What the model is, once it is loaded; before, what was asked for."""
        if "model" in self.__dict__ or (self.engine and self.engine.actors):
            return self.model_facts
        p = self.params
        return {"name": p.model, "sha256": p.model_sha256, "dtype": p.dtype, "device": p.device}

    @property
    def record(self) -> dict[str, Any]:
        """The run record, {} where there is none."""
        return keys.stored_record(self.results, self.name)

    def write_record(self, *written: Path) -> None:
        """Bring <step>.run.json up to the files just written and the tables that are there: facts of the first table,
        each table's own below, and every file's hash."""
        stored = self.record if self.fresh else {}
        order = [self.path(), *sorted({*self.results.glob(f"{self.name}.*.parquet")} - {self.path("tokens")})]
        tables = {path.stem: stored.get("tables", {}).get(path.stem) for path in order if path.exists()}
        for path in order:
            if path.exists() and (path in written or tables[path.stem] is None):
                tables[path.stem] = records.read_metadata(path)
        first = next(iter(tables.values()), {})
        first = first if "step" in first else stored or self._facts()
        own = ("rows", "units", "seconds", "started", "memory_gb", "commit", "log")
        files = {name: made for name, made in stored.get("files", {}).items() if (self.results / name).is_file()}
        files |= {str(path.relative_to(self.results)): keys.hash_file(path) for path in written}
        record = first | {
            # tables are in the order of their names, not of time
            **({"started": min(table["started"] for table in tables.values())} if tables else {}),
            # as they are now: those that the page alone depends on may be others than when the table was made
            "parameters": self.params.model_dump(mode="json", exclude=set(keys.PLACES)),
            "ingredients": self.ingredients,
            "seconds": round(math.fsum(table["seconds"] for table in tables.values()), 3),
            "log": [line for table in tables.values() for line in table["log"]],
            "tables": {name: {key: table[key] for key in own} for name, table in tables.items()},
            "files": files,
        }
        if record != self.record:
            units.write_json(self.results / f"{self.name}.run.json", units.sealed(record))

    def write_findings(self, findings: Mapping[str, Any]) -> dict[str, Any]:
        """Write <step>.findings.json, headed by what it is about; returns it as later steps will read it.

        Numbers are kept to 12 significant digits, NaN becomes null. Equal findings give equal bytes. The page has then
        written all it writes, and lets go of the folder.
        """
        self._begin_writing()
        if not self.fresh:
            self.write_record()  # of which key they are, before they are there
        if "tokenizer" in self.__dict__:
            self.tokenizer.keep(self.path("tokens"))
        out, path = {**plain(findings), "about": keys.about(self.params)}, self.results / f"{self.name}.findings.json"
        units.write_json(path, out)
        drawn = [self.results / figure["file"] for figure in out.get("figures", ())]
        beside = [self.path("tokens"), *drawn, *(figure.with_suffix(".svg") for figure in drawn)]
        self.write_record(path, *filter(Path.is_file, beside))
        WRITING.pop(self.results.resolve()).release()
        return out

    def write_extra(self, name: str, extra: pd.DataFrame | Mapping[str, Any]) -> Path:
        """Write pairs.parquet (step 01) or claims.json (step 10). Equal contents give equal bytes, which keys hash."""
        allowed, path = self.declaration.extra_files, self.results / name
        if name not in allowed:
            may = ", ".join(allowed) or "nothing more"
            raise StepError(f"step {self.name} does not write {name!r}; it may write {may}")
        self._begin_writing()
        table = isinstance(extra, pd.DataFrame)
        records.write(path, extra, {}, schema=None) if table else units.write_json(path, plain(extra))
        self.write_record(path)
        return path


# Folders that this process writes to.
WRITING: dict[Path, locks.Lock] = {}


class Encoding(dict):
    """Token ids and character offsets, by key or by attribute, as a tokenizer gives them."""

    @property
    def input_ids(self) -> list:
        return self["input_ids"]


class Remembered:
    """What `lib.tasks` and `population` ask of a tokenizer; a page is drawn again from its tables without the real one.

    `load` gives the real one, which is loaded for what is new; `path` (<step>.tokens.parquet) holds what was asked.
    """

    def __init__(self, load: Callable[[], Any], path: Path | None = None) -> None:
        table = records.read(path).to_dict("list") if path and path.exists() else {"asked": [], "answer": []}
        self.load, self.answers = load, dict(zip(table["asked"], map(json.loads, table["answer"]), strict=True))
        self.kept = len(self.answers)

    @cached_property
    def own(self) -> Any:
        """The real tokenizer."""
        return self.load()

    def _answer(self, asked: list, ask: Callable[[], Any]) -> Any:
        key = json.dumps(asked, ensure_ascii=False)
        if key not in self.answers:
            self.answers[key] = json.loads(json.dumps(ask()))  # as it will be read
        return self.answers[key]

    def __call__(self, text: str | list[str], **options: bool) -> Encoding:
        """Ids, and offsets where they are asked for, of a text or of several."""

        def ask() -> dict[str, list]:
            said = self.own(text, **options)
            return {key: said[key] for key in ("input_ids", "offset_mapping") if key in said}

        return Encoding(self._answer(["tokens", text, options], ask))

    def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> str:
        """The messages as the model was trained to read them."""
        return self._answer(["chat", messages, options], lambda: self.own.apply_chat_template(messages, **options))

    def decode(self, ids: list[int]) -> str:
        return self._answer(["decode", ids], lambda: self.own.decode(ids))

    def batch_decode(self, ids: list[list[int]]) -> list[str]:
        return self._answer(["batch_decode", ids], lambda: self.own.batch_decode(ids))

    @property
    def chat_template(self) -> str | None:
        return self._answer(["chat_template"], lambda: getattr(self.own, "chat_template", None))

    @property
    def is_fast(self) -> bool:
        return self._answer(["is_fast"], lambda: getattr(self.own, "is_fast", False))

    @property
    def model_max_length(self) -> int:
        return self._answer(["model_max_length"], lambda: self.own.model_max_length)

    @property
    def added_tokens_decoder(self) -> dict[int, SimpleNamespace]:
        def ask() -> list:
            return [(token.content, token.special) for token in self.own.added_tokens_decoder.values()]

        told = self._answer(["added_tokens"], ask)
        return {i: SimpleNamespace(content=content, special=special) for i, (content, special) in enumerate(told)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)  # all else is asked of the real one

    def keep(self, path: Path) -> None:
        """Write all answers, if there are new ones."""
        if len(self.answers) > self.kept:
            table = pd.DataFrame({"asked": list(self.answers), "answer": map(json.dumps, self.answers.values())})
            records.write(path, table, {}, schema=None)
            self.kept = len(self.answers)


def plain(value: Any) -> Any:
    """Findings as JSON takes them: numpy and dataclasses unpacked, floats to 12 significant digits, NaN as None."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray, pd.Series)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        if math.isinf(value):
            raise ValueError("a finding is infinite; check the numbers it was made from")
        return None if math.isnan(value) else float(f"{value:.12g}")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"a finding of type {type(value).__name__} cannot be written: {value!r}")


RESIDENT: dict[str, Step] = {}


def resident(plan: str, step: str, params: Shared) -> Step:
    """The step of this name and these parameters in this process: its model stays from one table to the next.

    `plan` is the module that has the plan."""
    whole = importlib.import_module(plan).PLAN
    return RESIDENT.setdefault(f"{plan} {step} {params.model_dump_json()}", Step(whole, step, params))


def with_gap(frame: pd.DataFrame) -> pd.DataFrame:
    """The records of a sweep. StepError where a half's pairs have no gap in sum: there is nothing to lose or regain."""
    from lib import effects

    for half, own in effects.in_halves(frame):
        total = effects.gap(own.drop_duplicates("pair_id")).sum()
        if not total > 0:
            raise StepError(
                f"the {own['pair_id'].nunique()} pairs of the {half} half have no gap above 0 between clean and "
                f"corrupt prompts ({total:.3g} logits in sum): see what step 01 says of them, and whether the two "
                "answers of a pair have changed places"
            )
    return frame


def swept(step: Step, *chosen: Any) -> Callable[[Unit], pd.DataFrame]:
    """`Table.compute` of a sweep whose means and resamples come from all of the step's pairs."""
    return step.sweeper(step.prompts())


def single_sites(step: Step) -> pd.DataFrame:
    """Step 04's records of heads and MLPs at `last` on the discovery half, with both answers of their pairs.

    Of the first folder of earlier results that has some about this model and task, all on pairs of this step; no rows
    where none has.
    """
    from lib import effects

    pairs, answers = step.pairs().set_index("pair_id"), ["answer", "corrupt_answer"]
    own = keys.hash_file(keys.find_pairs(step.name, step.params))
    for folder in keys.sources(step.params):
        path = keys.left(folder, SLICE, f"{SLICE}.parquet")
        made = records.read_metadata(path)["ingredients"] if path else None
        if not made or not keys.same_subject(made["parameters"], step.params) or made["inputs"].get("pairs") != own:
            continue
        frame = records.read(path, EFFECTS)
        frame = frame[frame["component"].isin(["head", "mlp"]) & (frame["position"] == "last")]
        if len(frame) and frame["pair_id"].isin(pairs.index).all():
            return effects.in_halves(frame)[0][1].join(pairs[answers], on="pair_id")
    return pd.DataFrame(columns=[*EFFECTS, *answers])


def refuse_no_model(p: Shared) -> None:
    """StepError for a folder as model that has no config or no weights, naming what it lacks."""
    folder = Path(p.model)
    needed = {"config.json": "config.json", "weights (*.safetensors)": "*.safetensors", "tokenizer": "tokenizer*"}
    lacking = [name for name, pattern in needed.items() if not any(folder.glob(pattern))]
    if folder.is_dir() and {*lacking} - {"tokenizer"} and not (folder / "adapter_config.json").is_file():
        raise StepError(f"model {p.model!r} is a folder that holds no model: there is no {', no '.join(lacking)} in it")


def begin(plan: Plan, step: str, namespace: Mapping[str, Any], engine: Callable[[Shared], Engine | None]) -> Step:
    """The step of a notebook, from its `globals()`; `engine` makes who computes for the parameters.

    Results that other parameters made are refused, or, where someone runs the cells by hand, set aside as make does.
    ParameterError or StepError in one sentence if it cannot run.
    """
    checked = params.from_notebook(plan.sections, step, namespace)
    refuse_no_model(checked)
    begun = Step(plan, step, checked, engine(checked))
    if params.run_by_hand(namespace):
        begun.set_stale_aside()
    begun.refuse_stale()
    begun.bring_back()
    return begun
