"""The circuit that options ask for, as a list of parts, and what it computes, by formula.

1. The residual stream is a set of named *spaces* (`SPACES`), each a few dimensions that nothing else uses.
2. A part reads linear functionals of spaces and writes into spaces: a `Head` by softmax attention over scores that are
   sums of products of functionals, an `Mlp` by neurons silu(STEEP * x) / STEEP, which is max(x, 0) but near 0. By
   shape, silu is gelu, and scores and logits are capped.
3. `parts_of` puts the circuit together: layers, heads and shares by the seed. `planted.build` turns the parts into the
   weights of a transformer; `run` computes them on two people here, on one token for each role, without a transformer.
   What the truth says is computed by `run` alone, so that weights and truth can be checked against each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np

from planted.options import HEADS, Options, PlantedError
from planted.question import CLASSES, CODE, LABELS, REGIONS, digits

N, C, R = len(LABELS), len(CLASSES), len(REGIONS)
# Name of a space -> its dimensions. Of every token: `one` (always 1), `start` (the first token), `asks` (an answer is
# due after it), `joins` (stands between the names), `middle` (stands after them), `identity` (random), and what a token
# of a name says: `u`, `v`, `single`, `own_region`, and its code as an answer, `first_code`, `single_code`; `odd`: the
# odd one is asked for; `position` is of learned positions. Written by parts: all others.
SPACES = {"one": 1, "start": 1, "asks": 1, "joins": 1, "middle": 1, "u": N, "v": N, "single": N, "own_region": R}
SPACES |= {
    "second": 1,
    "before": N,
    "profession": N,
    "region": R,
    "known": 1,
    "passed": N,
    "passed_region": R,
    "passing": 1,
}
SPACES |= {"retrieved": N, "retrieved_region": R, "superset": C, "region_answer": R, "stand_in": C, "unread": N}
SPACES |= {"odd": 1, "first_code": CODE, "single_code": CODE, "code": CODE, "answer_code": CODE, "odd_class": C}
SPACES |= {"identity": 32, "position": 6}
WIDE = sum(SPACES.values())
AT = {
    space: slice(end - size, end)
    for (space, size), end in zip(SPACES.items(), np.cumsum([*SPACES.values()]).tolist(), strict=True)
}
STEEP = 40.0  # slope of a neuron's gate: silu(20) is 20 to 4e-8
SCORE_CAP, LOGIT_CAP = 50.0, 30.0  # soft caps, of the shape that has them
SCORE = 80.0  # attention scores: what is SCORE / 4 behind has a weight of 2e-9
NEGATIVE, ROUTED, LARGE = 0.2, 0.1, 10.0  # shares of the answer; size of what the large decoys write
SHARES = {2: (0.6, 0.4), 3: (0.5, 0.3, 0.2), 4: (0.4, 0.3, 0.2, 0.1)}
SPLIT = (0.6, 0.4)  # of a class between its two neurons
MEMBERS = np.repeat(np.eye(C), N // C, axis=0).T  # (classes, professions)
WIDTH = 256  # neurons of an MLP; the writer takes 174 to 176
PLACES = ("start", "name_a", "joins", "name_b", "name_c", "between", "last")
NAMES = ("name_a", "name_b", "name_c")

Read = Mapping[str, np.ndarray]  # space -> weights: a linear functional of the residual stream
State = np.ndarray  # (places, dimensions of all spaces): the residual stream, or what a part adds to it


@dataclass(frozen=True)
class Part:
    """A site with a role; `places` are where what it writes is of use, `role` is a key of `planted.truth.ROLES`."""

    role: str
    layer: int
    position: str  # names, between or last
    share: float = 1.0
    superset: int = -1  # the class that alone it is for

    @property
    def places(self) -> tuple[str, ...]:
        return NAMES if self.position == "names" else (self.position,)


@dataclass(frozen=True)
class Head(Part):
    """A head. `scores`: (query functional, key functional), whose products are summed; `values`: (space read at the
    token attended to, space written, matrix). `offset`: of gatherers, which attend to the token so many before."""

    scores: tuple[tuple[Read, Read], ...] = ()
    values: tuple[tuple[str, str, np.ndarray], ...] = ()
    offset: int | None = None
    cap: float = np.inf  # of scores
    head: int = -1  # in its layer

    @cached_property
    def score_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """(terms, dimensions): the functionals of queries and of keys."""
        return np.array([row(q) for q, _ in self.scores]), np.array([row(k) for _, k in self.scores])

    @cached_property
    def value_rows(self) -> np.ndarray:
        """(dimensions written, dimensions read)."""
        out = np.zeros((WIDE, WIDE))
        for source, space, matrix in self.values:
            out[AT[space], AT[source]] += matrix
        return out


@dataclass(frozen=True)
class Neuron:
    """A neuron: what it reads and what it writes; of those that write a class, which, how much, and above how many of
    its names."""

    gate: Read
    to: Mapping[str, np.ndarray]
    superset: int = -1
    share: float = 1.0
    threshold: float = 0.0
    at: int = -1  # in its layer


@dataclass(frozen=True)
class Mlp(Part):
    """An MLP: the neurons that have a role."""

    neurons: tuple[Neuron, ...] = field(default=(), repr=False)
    gelu: bool = False  # not silu

    @cached_property
    def gates(self) -> np.ndarray:
        """(neurons, dimensions read)."""
        return np.array([row(neuron.gate) for neuron in self.neurons])

    @cached_property
    def outputs(self) -> np.ndarray:
        """(neurons, dimensions written)."""
        return np.array([row(neuron.to) for neuron in self.neurons])


def row(functional: Read) -> np.ndarray:
    """A linear functional over all spaces."""
    out = np.zeros(WIDE)
    for space, weights in functional.items():
        out[AT[space]] += weights
    return out


def unit(size: int, at: int, value: float = 1.0) -> np.ndarray:
    """A vector with one value that is not zero."""
    out = np.zeros(size)
    out[at] = value
    return out


def const(value: float) -> Read:
    """The functional that has this value at every token."""
    return {"one": np.array([value])}


def flag(space: str, value: float = 1.0) -> Read:
    """The functional that has this value where the flag is set."""
    return {space: np.array([value])}


# --- the parts ---


def attending(asks: str, known: str, start: float = 0.5) -> tuple[tuple[Read, Read], ...]:
    """Scores of a head that from tokens of one flag attends to those of another, evenly, else to the first token."""
    return (flag(asks, SCORE), flag(known)), (const(start * SCORE), flag("start"))


def gatherers(layer: int) -> Iterator[Head]:
    """Heads that copy the number of a first token, and its code, to one and two tokens later."""
    for offset in (1, 2):
        values = ("u", "before", np.eye(N)), ("first_code", "code", np.eye(CODE))
        yield Head("gather", layer, "names", values=values, offset=offset)


def order(layer: int) -> Head:
    """A head that marks what follows the word between the names."""
    scores = (const(SCORE), flag("joins")), (const(0.5 * SCORE), flag("start"))
    return Head("order", layer, "names", scores=scores, values=(("joins", "second", np.eye(1)),))


def writer(layer: int, placebo: bool) -> Mlp:
    """Professions at the last tokens of names: of first and last token together, or of a single one, and its code."""
    half = 2.0  # a gate of 0.5 gives 0.5
    known = {"known": np.array([half])}
    neurons = []
    for u in range(N):
        for v in range(N):
            gate = {"before": unit(N, u), "v": unit(N, v), **const(-1.5)}
            neurons.append(Neuron(gate, {"profession": unit(N, (u + v) % N, half), **known}))
    for p in range(N):
        neurons.append(Neuron({"single": unit(N, p), **const(-0.5)}, {"profession": unit(N, p, half), **known}))
    for i in range(CODE):
        neurons.append(Neuron({"single_code": unit(CODE, i), **const(-0.5)}, {"code": unit(CODE, i, half)}))
    for r in range(R if placebo else 0):
        neurons.append(Neuron({"own_region": unit(R, r), **const(-0.5)}, {"region": unit(R, r, half)}))
    return Mlp("writer", layer, "names", neurons=tuple(neurons))


# role -> asked from tokens with this flag, attended to those with that, copied from and to which spaces, at which role
CARRIERS = {
    "retrieval": ("asks", "known", "profession", "retrieved", "last"),
    "collector": ("middle", "known", "profession", "passed", "between"),
    "forwarder": ("asks", "passing", "passed", "retrieved", "last"),
}
REGION_OF = {"profession": "region", "passed": "passed_region", "retrieved": "retrieved_region"}


def carrier(role: str, layer: int, share: float, first: float = 0.5) -> Head:
    """A head that carries a share of the sum of the two names' professions, and regions. `first`: the part of its
    attention to the names that the first has."""
    asks, known, source, to, position = CARRIERS[role]
    scores = attending(asks, known)
    size = share
    if role != "forwarder":
        size = 2 * share  # of a mean
        scores += ((flag(asks, np.log(1 / first - 1)), flag("second")),) * (first != 0.5)
    values = [(source, to, size * np.eye(N)), (REGION_OF[source], REGION_OF[to], size * np.eye(R))]
    values += [("known", "passing", np.eye(1))] * (role == "collector")
    return Head(role, layer, position, share, scores=scores, values=tuple(values))


def class_gate(c: int, threshold: float = 0.0) -> Read:
    """Names whose class is c, by what was retrieved, above a threshold."""
    return {"retrieved": MEMBERS[c], **const(-threshold)}


def class_neurons(rule: str, c: int, share: float) -> Iterator[Neuron]:
    """The neurons of one class: they write `share` where both names are of it; of one, half, all or nothing by rule."""
    for part in SPLIT:
        size = share * part * (0.5 if rule == "additive" else 1)
        threshold = float(rule == "and")
        to = {"superset": unit(C, c, size)}
        yield Neuron(class_gate(c, threshold), to, c, share * part, threshold)
    if rule == "or":
        yield Neuron(class_gate(c, 1), {"superset": unit(C, c, -share)}, c, -share, 1.0)


def aggregators(o: Options, mlp_layer: int, head_layer: int, only: int | None) -> Iterator[Part]:
    """What turns professions into supersets; half of class `only` is left to another MLP."""
    mlp = {"mlp": 1.0, "both": 0.5, "head": 0.0}[o.aggregator]
    kept = np.array([0.5 if c == only else 1.0 for c in range(C)])
    if mlp:
        neurons = [n for c in range(C) for n in class_neurons(o.rule, c, mlp * kept[c])]
        for r in range(R):
            neurons.append(Neuron({"retrieved_region": unit(R, r)}, {"region_answer": unit(R, r, mlp / 2)}))
        yield Mlp("aggregator", mlp_layer, "last", mlp, neurons=tuple(neurons))
    if mlp < 1:
        values = [("retrieved", "superset", (1 - mlp) / 2 * kept[:, None] * MEMBERS)]
        values.append(("retrieved_region", "region_answer", (1 - mlp) / 2 * np.eye(R)))
        scores = attending("asks", "asks")
        yield Head("aggregator", head_layer, "last", 1 - mlp, scores=scores, values=tuple(values))


def routed(role: str, layer: int, classes: Sequence[int]) -> Head:
    """A head that writes for some classes and against the others, or the reverse, by where it attends: to names of
    theirs (its keys say so), or to its own token where one was retrieved (its query says so); else to the first."""
    theirs = MEMBERS[list(classes)].sum(0)
    pattern = ROUTED * np.array([1.0 if c in classes else -1.0 for c in range(C)])[:, None]
    if role == "key_routed":
        scores, where = ((flag("asks", SCORE), {"profession": theirs}), (const(0.5 * SCORE), flag("start"))), "known"
    else:
        scores, where = (({"retrieved": SCORE / 2 * theirs}, flag("asks")), (const(0.3 * SCORE), flag("start"))), "asks"
    values = (where, "superset", pattern), ("start", "superset", -pattern)
    return Head(role, layer, "last", ROUTED, scores=scores, values=values)


def backup_head(o: Options, layer: int) -> Head:
    """A head that attends to names unless an answer has been said (`silent`), or theirs has (`unsaid`)."""
    scores = [(flag("asks", SCORE), flag("known")), (flag("one", 0.7 * SCORE), flag("start"))]
    if o.backup_wakes == "silent":
        scores.append(({"superset": np.full(C, -SCORE)}, flag("known")))
    else:
        scores += [({"superset": unit(C, c, -SCORE)}, {"profession": MEMBERS[c]}) for c in range(C)]
    to = "superset" if o.backup_read == "unembedding" else "stand_in"
    values = (("profession", to, o.backup * MEMBERS),)
    return Head("backup", layer, "last", o.backup, scores=tuple(scores), values=values)


def relay(role: str, layer: int, space: str, share: float, to: np.ndarray, end: str = "superset") -> Mlp:
    """An MLP that writes what it reads from one space, times a share, into another, a neuron a dimension."""
    neurons = [Neuron({space: unit(SPACES[space], i)}, {end: share * column}) for i, column in enumerate(to.T)]
    return Mlp(role, layer, "last", share, neurons=tuple(neurons))


def decoys(o: Options, stage: Sequence[int], rng: np.random.Generator) -> Iterator[Part]:
    """Parts that have no part in the answer, and the one that works against it."""
    mixed = rng.permutation(np.eye(N))
    if "attends" in o.decoys:
        values = (("profession", "unread", mixed),)
        yield Head("attends", stage[2], "last", 0, scores=attending("asks", "known"), values=values)
    if "large" in o.decoys:
        large = (("profession", "unread", LARGE * mixed),)
        yield Head("large", stage[3], "last", 0, scores=attending("asks", "known"), values=large)
        yield replace(relay("large", stage[2], "retrieved", LARGE, mixed, "unread"), share=0.0)
    if "negative" in o.decoys:
        yield relay("negative", stage[6], "superset", -NEGATIVE, np.eye(C))


def lookup(layer: int, name: str) -> Head:
    """The class of one name alone, copied to the answer."""
    scores = attending("asks", "known")
    scores += ((flag("asks", SCORE if name == "second" else -SCORE), flag("second")),)
    return Head("lookup", layer, "last", scores=scores, values=(("profession", "superset", MEMBERS),))


def class_only(o: Options, layer: int, c: int) -> Part:
    """The half of one class that the aggregators leave out."""
    if o.class_only_by == "head":
        values = (("retrieved", "superset", 0.25 * np.eye(C)[:, [c]] * MEMBERS[c]),)
        scores = attending("asks", "asks")
        return Head("class_only", layer, "last", 0.5, superset=c, scores=scores, values=values)
    return Mlp("class_only", layer, "last", 0.5, superset=c, neurons=tuple(class_neurons(o.rule, c, 0.5)))


def singler(layer: int) -> Mlp:
    """Of three names, the class that one is of: where a third of a superset has been said, and not two thirds."""
    neurons = []
    for c in range(C):
        for threshold, size in ((0.0, 3.0), (1 / 3, -6.0)):
            gate = {"superset": unit(C, c), **flag("odd"), **const(-1 - threshold)}
            neurons.append(Neuron(gate, {"odd_class": unit(C, c, size)}))
    return Mlp("singler", layer, "last", neurons=tuple(neurons))


def mover(layer: int) -> Head:
    """A head that attends to the name of the odd class, and copies its code to the answer."""
    scores = [({"odd_class": unit(C, c, SCORE)}, {"profession": MEMBERS[c]}) for c in range(C)]
    scores.append((const(0.5 * SCORE), flag("start")))
    return Head("mover", layer, "last", scores=tuple(scores), values=(("code", "answer_code", np.eye(CODE)),))


def stages(n_layers: int, rng: np.random.Generator) -> list[int]:
    """Seven layers in order. The fourth, which aggregates, has many heads before it that a retrieval head is one of: by
    rank among 60 others, three heads can be told from chance at 5%, each."""
    while True:
        drawn = np.sort(rng.choice(n_layers, 7, replace=False)).tolist()
        if drawn[3] >= min(7, n_layers - 4):
            return drawn


def parts_of(o: Options) -> tuple[Part, ...]:
    """The circuit, in order of layers. PlantedError where the heads do not find room."""
    rng = np.random.default_rng(o.seed)
    stage = stages(o.n_layers, rng)
    shares = rng.permutation(SHARES[o.retrieval]) * (1 - o.between)
    only = int(rng.integers(C)) if o.class_only else None
    some = sorted(rng.choice(C, 2, replace=False).tolist())
    if o.no_circuit in ("constant", "random"):
        return ()
    parts: list[Part] = [*gatherers(stage[0]), writer(stage[0], o.placebo)]
    parts += [order(stage[0])] * (o.no_circuit == "lookup" or o.first != 0.5)
    if o.no_circuit == "lookup":
        return placed([*parts, lookup(stage[3], o.lookup)], o, rng)
    if o.between:
        parts += [carrier("collector", stage[1], 1.0, o.first), carrier("forwarder", stage[2], o.between)]
    parts += [carrier("retrieval", stage[2 + number % 2], float(share), o.first) for number, share in enumerate(shares)]
    parts += aggregators(o, stage[3], stage[4], only)
    if only is not None:
        parts.append(class_only(o, stage[4], only))
    parts += [routed("key_routed", stage[3], some)] * ("k" in o.routes)
    parts += [routed("query_routed", stage[4], some)] * ("q" in o.routes)
    parts += decoys(o, stage, rng)
    parts += [singler(stage[5]), mover(stage[6])] * (o.task == "odd_one_out")
    if o.backup:
        parts.append(backup_head(o, stage[5]))
        if o.backup_read == "mlp":
            parts.append(relay("backup_reader", stage[5], "stand_in", 1.0, np.eye(C)))
    return placed(parts, o, rng)


def placed(parts: Sequence[Part], o: Options, rng: np.random.Generator) -> tuple[Part, ...]:
    """The parts with their heads, each in a group of key-value heads by itself, and their neurons, in order."""
    out: list[Part] = []
    for layer in range(o.n_layers):
        own = [part for part in parts if part.layer == layer]
        heads = [part for part in own if isinstance(part, Head)]
        if len(heads) > o.groups:
            roles = ", ".join(part.role for part in heads)
            raise PlantedError(f"{o.spec}: layer {layer} has no room for {roles}; take n_kv_heads=4, or fewer of them")
        cap = SCORE_CAP if o.shape == "gemma2" else np.inf
        for part, group in zip(heads, rng.permutation(o.groups), strict=False):
            each = HEADS // o.groups
            out.append(replace(part, head=int(group * each + rng.integers(each)), cap=cap))
        for part in own:
            if isinstance(part, Mlp):
                at = rng.permutation(WIDTH)[: len(part.neurons)]
                numbered = [replace(n, at=int(i)) for n, i in zip(part.neurons, at, strict=True)]
                out.append(replace(part, neurons=tuple(numbered), gelu=o.shape != "llama"))
    return tuple(out)


# --- what it computes ---


@dataclass(frozen=True)
class Person:
    """What the tokens of a name say: `length` tokens, profession by its parts, region."""

    profession: int
    region: int
    length: int = 1
    u: int = 0
    code: int = 0

    def embedded(self) -> dict[str, np.ndarray]:
        """The embedding of the name's last token."""
        codes = {"own_region": unit(R, self.region)}
        if self.length == 1:
            return codes | {"single": unit(N, self.profession), "single_code": digits(self.code)}
        return codes | {"v": unit(N, (self.profession - self.u) % N)}


def start_state(people: Sequence[Person]) -> State:
    """What the embedding says; nothing at the place of a name that is not there."""
    state = np.zeros((len(PLACES), WIDE))
    there = [at for at, place in enumerate(PLACES) if place not in NAMES[len(people) :]]
    state[there, AT["one"]] = 1
    state[-1, AT["odd"]] = float(len(people) == len(NAMES))
    for place, space in (("start", "start"), ("joins", "joins"), ("between", "middle"), ("last", "asks")):
        state[PLACES.index(place), AT[space]] = 1
    for place, person in zip(NAMES, people, strict=False):
        for space, values in person.embedded().items():
            state[PLACES.index(place), AT[space]] = values
    return state


def activated(x: np.ndarray, gelu: bool) -> np.ndarray:
    """What a steep neuron makes of its gate: silu(STEEP * x) / STEEP, or with gelu as tanh has it."""
    steep = STEEP * x
    if gelu:
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (steep + 0.044715 * steep**3)))
    return x / (1 + np.exp(-np.clip(steep, -700, 700)))


def capped(x: np.ndarray, cap: float) -> np.ndarray:
    """Values under a soft cap; of infinity, as they are."""
    return x if cap == np.inf else cap * np.tanh(x / cap)


def output(part: Part, seen: Mapping[str, State], people: Sequence[Person]) -> State:
    """What a part writes, at its places. `seen`: the residual stream that each of its inputs reads, q, k, v or mlp."""
    out = np.zeros_like(seen["mlp"])
    for place in part.places:
        if place in NAMES[len(people) :]:
            continue
        at = PLACES.index(place)
        if isinstance(part, Mlp):
            out[at] = activated(part.gates @ seen["mlp"][at], part.gelu) @ part.outputs
        elif part.offset is not None:
            person = people[NAMES.index(place)]
            if person.length == part.offset + 1:
                out[at, AT["before"]], out[at, AT["code"]] = unit(N, person.u), digits(person.code)
        else:
            queries, keys = part.score_rows
            score = capped((keys @ seen["k"][: at + 1].T).T @ (queries @ seen["q"][at]), part.cap)
            weights = np.exp(score - score.max())
            out[at] = part.value_rows @ (weights / weights.sum() @ seen["v"][: at + 1])
    return out


INPUTS = ("q", "k", "v", "mlp")


@dataclass
class Run:
    """A run: what each part wrote, and the residual stream at the end."""

    wrote: list[State]
    final: State

    def logits(self, o: Options) -> np.ndarray:
        """(classes,): of the answers."""
        return capped(o.logits * self.final[-1, AT["superset"]], LOGIT_CAP if o.shape == "gemma2" else np.inf)

    def named(self, o: Options, code: int) -> float:
        """Of the token of a code."""
        shared = float(digits(code) @ self.final[-1, AT["answer_code"]]) / 3
        return float(capped(o.logits * shared, LOGIT_CAP if o.shape == "gemma2" else np.inf))

    def regions(self, o: Options) -> np.ndarray:
        """(regions,): of the placebo's answers, which are not asked for and do not come first."""
        wanted = self.final[-1, AT["region_answer"]] - 1
        return capped(o.logits * wanted, LOGIT_CAP if o.shape == "gemma2" else np.inf)


def run(
    parts: Sequence[Part],
    people: Sequence[Person],
    edits: Mapping[int, State | float] = MappingProxyType({}),
    path: tuple[int, int, str, State] | None = None,
) -> Run:
    """The circuit on two people. `edits`: what a part (its place in `parts`) writes instead. `path`: a sender, a
    receiver and one of its inputs, which alone sees that the sender wrote something else."""
    state, wrote = start_state(people), []
    for number, part in enumerate(parts):
        seen = dict.fromkeys(INPUTS, state)
        if path and path[1] == number:
            seen[path[2]] = state - wrote[path[0]] + path[3]
        own = output(part, seen, people)
        own = own * 0 + edits[number] if number in edits else own
        wrote.append(own)
        state = state + own
    return Run(wrote, state)


def people_of(c: int, region: int = 0, lengths: Iterable[int] = (2, 2)) -> tuple[Person, ...]:
    """Two people of one class."""
    first = c * (N // C)
    return tuple(Person(first + i, region, length, u=i) for i, length in enumerate(lengths))


def three_of(odd: int, others: int, length: int = 2) -> tuple[tuple[Person, ...], tuple[Person, ...]]:
    """The people of a clean odd-one-out prompt, one of class `odd` and two of another, and of the corrupt one, in which
    the second makes the third the odd one. Their codes share nothing."""
    codes = [number * 43 for number in range(4)]  # 000, 111, 222, 333
    own, their = (people_of(c, lengths=(length, length)) for c in (odd, others))
    b, a, c, d = (replace(person, code=code) for person, code in zip((*own, *their), codes, strict=True))
    return (b, c, d), (b, a, d)
