"""The truth of a circuit, computed from its parts by `planted.circuit.run`: no transformer is asked.

1. Two people of one class in the clean prompt, two of another in the corrupt one, for all ordered pairs of classes; or
   three of whom one is the odd one out.
2. Each part is silenced, or given what it writes in the other prompt; each input of a part is shown that another part
   wrote what it writes in the corrupt prompt.
3. The same with two regions and one class, for the placebo attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations, product

import numpy as np

from planted.circuit import C, Head, Mlp, N, Part, Person, Run, people_of, run, three_of
from planted.options import Options
from planted.question import CLASSES, NAME
from planted.truth import Backup, Edge, Effect, Neuron, Readable, Site, Truth

LEAST = 1e-4  # share of the gap below which a path is none
PLACEBO = "region"


class Contrast:
    """Clean and corrupt runs for a pair of classes, and what an edit does to the metric."""

    def __init__(self, o: Options, parts: Sequence[Part], classes: tuple[int, int], length: int) -> None:
        self.o, self.parts, self.classes = o, parts, classes
        self.people = [people_of(c, lengths=(length, length)) for c in classes]
        if o.task == "odd_one_out":
            self.people = three_of(*classes, length)
        self.clean, self.corrupt = (run(parts, people) for people in self.people)

    def metric(self, found: Run) -> float:
        """logit(answer) - logit(corrupt answer)."""
        if self.o.task == "odd_one_out":
            answer, corrupt = self.people[0][0], self.people[1][2]
            return found.named(self.o, answer.code) - found.named(self.o, corrupt.code)
        own, other = (found.logits(self.o)[c] for c in self.classes)
        return float(own - other)

    def gap(self) -> float:
        return self.metric(self.clean) - self.metric(self.corrupt)

    def zero(self, part: int) -> float:
        return self.metric(self.clean) - self.metric(run(self.parts, self.people[0], {part: 0.0}))

    def counterfactual(self, part: int) -> float:
        return self.metric(self.clean) - self.metric(run(self.parts, self.people[0], {part: self.corrupt.wrote[part]}))

    def recovery(self, part: int) -> float:
        return self.metric(run(self.parts, self.people[1], {part: self.clean.wrote[part]})) - self.metric(self.corrupt)

    def arrived(self, layer: int) -> float:
        """What the clean residual stream at the last token, put in after a layer, wins back."""
        own = enumerate(self.parts)
        edits = {i: self.clean.wrote[i] for i, part in own if part.position == "last" and part.layer <= layer}
        return self.metric(run(self.parts, self.people[1], edits)) - self.metric(self.corrupt)

    def path(self, sender: int, receiver: int | None, seen_by: str) -> float:
        other = self.corrupt.wrote[sender]
        if receiver is None:
            final = self.clean.final - self.clean.wrote[sender] + other
            return self.metric(self.clean) - self.metric(Run([], final))
        return self.metric(self.clean) - self.metric(
            run(self.parts, self.people[0], path=(sender, receiver, seen_by, other))
        )


def over_classes(contrasts: Sequence[Contrast], measure: Callable[[Contrast], float]) -> Effect:
    """A measure over all pairs of classes, and over those of each answer."""
    found = [(contrast.classes[0], measure(contrast)) for contrast in contrasts]
    by = {label: float(np.mean([value for c, value in found if c == at])) for at, label in enumerate(CLASSES)}
    return Effect(mean=float(np.mean([value for _, value in found])), by_answer=by)


def contrasts_of(o: Options, parts: Sequence[Part], length: int) -> list[Contrast]:
    return [Contrast(o, parts, pair, length) for pair in permutations(range(len(CLASSES)), 2)]


def placebo_effects(o: Options, parts: Sequence[Part]) -> tuple[float, list[float]]:
    """The gap of a placebo pair, two northerners against two southerners of one class, and what each part recovers."""
    both = [people_of(0, region) for region in range(2)]
    clean, corrupt = (run(parts, people) for people in both)

    def metric(found: Run) -> float:
        own, other = found.regions(o)
        return float(own - other)

    won = [metric(run(parts, both[1], {i: clean.wrote[i]})) - metric(corrupt) for i in range(len(parts))]
    return metric(clean) - metric(corrupt), won


def sites_of(o: Options, parts: Sequence[Part], by_length: Mapping[int, Sequence[Contrast]]) -> list[Site]:
    """The parts as sites. What a gatherer of another name would bring depends on the names: it is silenced alone."""
    _, placebo = placebo_effects(o, parts)
    out = []
    for i, part in enumerate(parts):
        gathers = isinstance(part, Head) and part.offset is not None
        tokens = (part.offset + 1,) if gathers else (1, 2, 3)
        own = by_length[tokens[0]]
        necessity = {"zero": over_classes(own, lambda contrast, i=i: contrast.zero(i))}
        if not gathers:
            necessity["counterfactual"] = over_classes(own, lambda contrast, i=i: contrast.counterfactual(i))
        recovery = None if gathers else over_classes(own, lambda contrast, i=i: contrast.recovery(i))
        out.append(
            Site(
                layer=part.layer,
                component="head" if isinstance(part, Head) else "mlp",
                head=part.head if isinstance(part, Head) else None,
                position=part.position,
                role=part.role,
                share=part.share,
                tokens=tokens,
                necessity=necessity,
                recovery=recovery,
                placebo=0.0 if gathers else placebo[i],
            )
        )
    return out


def edges_of(parts: Sequence[Part], contrasts: Sequence[Contrast], gap: float) -> list[Edge]:
    """Every path from one part straight to an input of another, or to the final norm, that moves the metric."""
    out = []
    for i, sender in enumerate(parts):
        receivers: list[tuple[int | None, str]] = [(None, "final")]
        for j in range(i + 1, len(parts)):
            if (parts[j].layer, isinstance(parts[j], Mlp)) > (sender.layer, isinstance(sender, Mlp)):
                receivers += [(j, name) for name in (("mlp",) if isinstance(parts[j], Mlp) else ("q", "k", "v"))]
        for j, name in receivers:
            noise = over_classes(contrasts, lambda contrast, i=i, j=j, name=name: contrast.path(i, j, name))
            if max(map(abs, noise.by_answer.values())) > LEAST * gap:
                out.append(Edge(sender=i, receiver=j, input=name, noise=noise))
    return out


def neurons_of(parts: Sequence[Part]) -> list[Neuron]:
    """The neurons that write supersets by what was retrieved."""
    return [
        Neuron(layer=part.layer, neuron=n.at, superset=CLASSES[n.superset], share=n.share, threshold=n.threshold)
        for part in parts
        if isinstance(part, Mlp)
        for n in part.neurons
        if n.superset >= 0
    ]


def backup_of(o: Options, parts: Sequence[Part]) -> Backup | None:
    roles = [part.role for part in parts]
    if "backup" not in roles:
        return None
    reader = roles.index("backup_reader") if "backup_reader" in roles else None
    when = ("zero",) if o.backup_wakes == "silent" else ("zero", "resample", "counterfactual")
    return Backup(site=roles.index("backup"), reader=reader, ratio=o.backup, ablations=when)


def readable_of(o: Options, parts: Sequence[Part]) -> list[Readable]:
    """Where probes can read: a single token says it all, two say it where the writer has put them together."""
    if o.no_circuit == "random":
        return []
    whats = ["profession", "superset"]
    out = [Readable(what=what, position="names", tokens=1, first=-1) for what in whats]
    first = {part.role: part.layer for part in reversed(parts)}
    if not parts:
        return out
    out += [Readable(what=what, position="names", tokens=n, first=first["writer"]) for what in whats for n in (2, 3)]
    whats += [PLACEBO] * o.placebo
    if "collector" in first:
        out += [Readable(what=what, position="between", tokens=None, first=first["collector"]) for what in whats]
    at_last = min(first[role] for role in ("retrieval", "forwarder", "lookup") if role in first)
    if "lookup" in first:
        whats = ["superset"]
    return out + [Readable(what=what, position="last", tokens=None, first=at_last) for what in whats]


def by_names(say: Callable[[int, int], np.ndarray]) -> dict[str, float]:
    """The logit of a class, less the mean of the classes of neither name, where the first name alone is of it, the
    second, or both; the mean over classes. `say`: the classes' logits by the first name's class and the second's."""
    found: dict[str, list[float]] = {"first": [], "second": [], "both": []}
    for c, d in product(range(len(CLASSES)), repeat=2):
        logits = say(c, d)
        above = logits - np.delete(logits, [c, d]).mean()
        for key, own in (("both", c),) if c == d else (("first", c), ("second", d)):
            found[key].append(float(above[own]))
    return {key: float(np.mean(values)) for key, values in found.items()}


def rule_logits(o: Options, parts: Sequence[Part]) -> dict[str, float]:
    """`by_names`, by the construction."""
    return by_names(lambda c, d: run(parts, (people_of(c)[0], people_of(d)[1])).logits(o))


def means_at_last(parts: Sequence[Part]) -> dict[str, np.ndarray]:
    """Class -> all that a prompt of two people of it has at the last token in the end, over all spaces; the mean over
    the ordered pairs of its professions."""
    out = {}
    for c, label in enumerate(CLASSES):
        everyone = product(range(c * N // C, (c + 1) * N // C), repeat=2)
        people = ((Person(a, 0, length=2, u=0), Person(b, 0, length=2, u=1)) for a, b in everyone)
        out[label] = np.mean([run(parts, both).final[-1] for both in people], axis=0)
    return out


def truth_of(
    o: Options, parts: Sequence[Part], sha256: str, directions: Mapping[str, Mapping[str, list[float]]]
) -> Truth:
    """All that is true of the circuit. `directions`: where in the residual stream its codes lie."""
    by_length = {length: contrasts_of(o, parts, length) for length in (1, 2, 3)}
    usual = by_length[2]
    gap = over_classes(usual, Contrast.gap)
    only = [CLASSES[part.superset] for part in parts if part.superset >= 0]
    has = any(part.role == "aggregator" for part in parts)
    return Truth(
        spec=o.spec,
        options=o,
        sha256=sha256,
        question=NAME,
        classes=CLASSES,
        gap=gap,
        placebo_attribute=PLACEBO,
        placebo_gap=placebo_effects(o, parts)[0],
        rule=o.rule if has else None,
        rule_logits=rule_logits(o, parts),
        arrived=tuple(
            over_classes(usual, lambda contrast, layer=layer: contrast.arrived(layer)).mean
            for layer in range(o.n_layers)
        ),
        sites=sites_of(o, parts, by_length),
        paths=edges_of(parts, usual, gap.mean),
        neurons=neurons_of(parts),
        backup=backup_of(o, parts),
        readable=readable_of(o, parts),
        directions={space: dict(labels) for space, labels in directions.items()},
        class_only=only[0] if only else None,
    )
