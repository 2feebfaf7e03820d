"""From people to fair pairs: quads whose prompts differ as they should, odd-one-out items, pairs before any selection.

1. `to_ask` draws the people whom the model is asked about, each alone.
2. `build_quads` filters them (`add_fame`, `add_tokens`), puts four of the same token counts together, a, b of one
   superset and c, d of another, a matched to c and b to d in fame, and in region, century and gender as far as the
   people allow (`choose`), and keeps the quads whose gap has the right sign (`right_signed`). Failed quads free their
   people again.
3. `unselected_quads` puts four together whatever the model makes of them.
4. `generate_odd_one_out` makes items of three from four people of one token count each.
5. `sample_pairs` draws people without asking the model: for accuracies.

What is random depends on the seed alone. Bad input raises ValueError.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from lib import questions
from lib.data import halves
from lib.errors import Refusal
from lib.tasks import DEFAULT_ATTRIBUTES, Template
from pipeline.population import (
    PER_QUAD,
    Score,
    add_fame,
    add_margins,
    add_tokens,
    pairs_of,
    right_signed,
    unambiguous,
)

ROUNDS = 6  # how often the people of failed quads are matched anew; only the sign of the gap is looked at


@dataclass(frozen=True)
class Options:
    """What decides which quads are built; step 01's parameters, which hold the same, stand in for it."""

    template: str = "profession_both"
    task: str = "superset"
    quads_per_half: int = 100  # the most that a half may have; the superset pairs share them evenly
    pairs_per_quad: int = 2  # of a quad (`pairs_of`): over these its gap must be above the noise
    fame_tolerance: float = 0.25  # the largest difference in fame (nats) between a and c, and between b and d
    min_bucket: int = 4  # fewest quads of one half and bucket: they are each other's donors of means and resamples
    seed: int = 0
    chat_template: bool = False
    attributes: Sequence[str] = DEFAULT_ATTRIBUTES
    question: str | questions.Question = questions.DEFAULT


class Filters:
    """What each filter dropped and left, in order; an error with all counts where one leaves nothing."""

    def __init__(self, template: str) -> None:
        self.template, self.drops = template, []

    def keep(self, table: pd.DataFrame, name: str, before: int, unit: str = "people") -> pd.DataFrame:
        """The table that a filter left of `before` rows."""
        self.drops.append({"filter": name, "unit": unit, "dropped": before - len(table), "left": len(table)})
        if not len(table):
            counts = "; ".join(
                f"{d['filter']}: {d['dropped']} {d['unit']} dropped, {d['left']} left" for d in self.drops
            )
            raise Refusal(f"no quads of template {self.template!r} are left after filtering: {counts}")
        return table


def to_ask(people: pd.DataFrame, options: Options) -> tuple[pd.DataFrame, np.random.Generator]:
    """Whom the model is asked about, drawn by the seed, as many of each superset if there are as many; the generator,
    for what is drawn next."""
    rng, free = np.random.default_rng(options.seed), unambiguous(people)
    shuffled = free.iloc[rng.permutation(len(free))]
    return shuffled.groupby("superset").head(PER_QUAD * options.quads_per_half).sort_index(), rng


def build_quads(
    people: pd.DataFrame, asked: pd.DataFrame, tokenizer: Any, score: Score, options: Options, noise: float = 0.0
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Quads of those of the `people` who were `asked` about alone, with a gap above the model's `noise`, in two halves
    without a person in common; what each filter dropped.

    Returns:
        quads: quad_id, half, task, template, superset, other, bucket, and for each of a, b, c, d its name, profession
            and fame; n_tokens_a, n_tokens_b. All four people have the same token counts, so both orders line up.
            `matched`: a and c, and b and d, agree in the attributes of the question's `match`; `same_gender`: in those
            of its `match_also`.
        drops: dicts of filter, unit ("people" or "quads"), dropped, left.

    Raises:
        ValueError: nothing is left after a filter; the message has all counts.
    """
    topic = questions.load(options.question)
    words = topic.find(options.template, options.task)
    if len(words.slots) != 2:
        raise ValueError(f"quads need a template of two names; {options.template!r} is of task {words.task!r}")
    (_, rng), filters = to_ask(people, options), Filters(options.template)
    prompting = {"chat_template": options.chat_template, "attributes": options.attributes}

    free = filters.keep(unambiguous(people), "known for two supersets, or a namesake's name", len(people))
    asked = filters.keep(add_fame(asked, options.question), "not sampled", len(free))
    known = filters.keep(asked[asked.known], "not known by the model", len(asked))
    counted = add_tokens(known, tokenizer, words, **prompting)
    free = filters.keep(counted, "name merges with the template", len(known))

    wanted = shared_out(2 * options.quads_per_half, superset_pairs(free, topic.supersets), rng)
    kept, tried = [], 0
    for _ in range(ROUNDS):
        planned = choose(free, wanted, options.fame_tolerance, rng, topic.shared)
        if not planned:
            break
        tried += len(planned)
        quads = describe(planned, free, words)
        pairs = add_margins(
            pairs_of(quads, options.pairs_per_quad), tokenizer, score, question=options.question, **prompting
        )
        for quad in quads[quads.quad_id.isin(right_signed(pairs, noise).quad_id)].to_dict("records"):
            kept.append(quad | {"quad_id": f"q{len(kept):03d}"})
            wanted[tuple(sorted((quad["superset"], quad["other"]), key=topic.supersets.index))] -= 1
        used = {quad[slot] for quad in kept for slot in "abcd"}
        free = free[~free.name.isin(used)]
    unused = {"filter": "in no quad", "unit": "people", "dropped": len(free), "left": 4 * len(kept)}

    reason = "no gap of the right sign" if tried else "no match in token count and fame"
    quads = filters.keep(pd.DataFrame(kept), reason, tried, "quads")
    quads = in_halves(quads, rng)
    size = quads.groupby(["half", "bucket"]).quad_id.transform("size")
    large = quads[size >= options.min_bucket].reset_index(drop=True)
    quads = filters.keep(large, f"bucket under {options.min_bucket}", len(quads), "quads")
    filters.drops.insert(-2, unused)
    return quads, filters.drops


def superset_pairs(people: pd.DataFrame, supersets: Sequence[str]) -> list[tuple[str, str]]:
    """Every two supersets of these people."""
    return list(combinations([superset for superset in supersets if superset in set(people.superset)], 2))


def shared_out(count: int, pairs: Sequence[tuple[str, str]], rng: Any) -> dict[tuple[str, str], int]:
    """How many quads of each superset pair: the same number, what is left over at random."""
    share, extra = divmod(count, max(len(pairs), 1))
    return {pairs[i]: share + (k < extra) for k, i in enumerate(rng.permutation(len(pairs)))}


def choose(
    people: pd.DataFrame,
    wanted: Mapping[tuple[str, str], int],
    tolerance: float,
    rng: Any,
    shared: Sequence[Sequence[str]],
) -> list[dict]:
    """Up to `wanted` quads per superset pair, from people none of whom is used twice.

    Superset pairs are served in turn, the one with most quads still wanted first; each turn takes one quad from the
    largest group of token counts that still has people of both. Within a group the people of the two supersets are
    matched one to one (`matches`).
    """
    free = {
        key: list(group.index[rng.permutation(len(group))]) for key, group in people.groupby(["n_tokens", "superset"])
    }
    planned = []
    for (shape, (x, y)), n in rooms(people, free, wanted, rng).items():
        one, other = free.get((shape, x), []), free.get((shape, y), [])
        if n == 0 or len(one) < 2 or len(other) < 2:
            continue
        found = matches(people.loc[one], people.loc[other], tolerance, rng, shared)[: 2 * n]
        for (a, c), (b, d) in zip(found[0::2], found[1::2], strict=False):
            sides = {"superset": (x, y), "a": (a, c), "b": (b, d), "c": (c, a), "d": (d, b), "other": (y, x)}
            turned = int(rng.integers(2))  # either superset may be the a, b side
            planned.append({key: both[turned] for key, both in sides.items()})
            free[shape, x] = [p for p in free[shape, x] if p not in (a, b)]
            free[shape, y] = [p for p in free[shape, y] if p not in (c, d)]
    return planned


def rooms(people: pd.DataFrame, free: Mapping[tuple, list], wanted: Mapping[tuple[str, str], int], rng: Any) -> dict:
    """How many quads of which token counts and superset pair the `free` people, by token counts and superset, allow."""
    wanted = dict(wanted)
    order = [list(wanted)[i] for i in rng.permutation(len(wanted))]
    # few, large groups of token counts: they are each other's donors of means and resamples, and share passes
    shapes = sorted(set(people.n_tokens), key=lambda shape: (-(people.n_tokens == shape).sum(), shape))
    left = {key: len(members) for key, members in free.items()}
    room = {(shape, pair): 0 for shape in shapes for pair in order}
    while True:
        options = [
            (-wanted[pair], i, shapes.index(shape), shape, pair)
            for i, pair in enumerate(order)
            for shape in shapes
            if wanted[pair] > 0 and all(left.get((shape, side), 0) >= 2 for side in pair)
        ]
        if not options:
            return room
        *_, shape, pair = min(options)
        room[shape, pair] += 1
        wanted[pair] -= 1
        for side in pair:
            left[shape, side] -= 2


def matches(
    one: pd.DataFrame, other: pd.DataFrame, tolerance: float, rng: Any, shared: Sequence[Sequence[str]]
) -> list[tuple]:
    """People of two supersets matched one to one within the tolerance of fame, by index.

    First those who share the first of the sets of columns in `shared`, then of those left who share the second, ...;
    each time with the least total difference in fame (linear_sum_assignment), in random order.
    """
    apart = np.abs(np.subtract.outer(one.fame.to_numpy(), other.fame.to_numpy()))
    found: list[tuple] = []
    for needed in shared:
        allowed = apart <= tolerance
        for column in needed:
            own, theirs = one[column].to_numpy(), other[column].to_numpy()
            allowed &= (own[:, None] == theirs) & (own != "unknown")[:, None]
        rows, columns = linear_sum_assignment(np.where(allowed, apart, 1e6))
        pairs = [(i, j) for i, j in zip(rows, columns, strict=True) if allowed[i, j]]
        for i, j in (pairs[k] for k in rng.permutation(len(pairs))):
            found.append((one.index[i], other.index[j]))
            apart[i, :] = apart[:, j] = np.inf
    return found


def describe(planned: Sequence[dict], people: pd.DataFrame, template: Template) -> pd.DataFrame:
    """The quads frame of build_quads from planned quads of people's indices (quad_id as planned, no half yet)."""
    rows, topic = [], template.question
    for number, quad in enumerate(planned):
        four = {slot: people.loc[quad[slot]] for slot in "abcd"}
        counts = four["a"].n_tokens
        row = {"quad_id": f"q{number:03d}", "half": "", "task": template.task, "template": template.name}
        row |= {"superset": quad["superset"], "other": quad["other"]}
        row["bucket"] = "|".join([template.name, *map(str, counts)])
        row["pair"] = " ".join(sorted((quad["superset"], quad["other"])))
        row |= {"matched": alike(four, topic.match), "same_gender": alike(four, topic.match_also)}
        row |= {slot: person["name"] for slot, person in four.items()}
        row |= {f"profession_{slot}": person.profession for slot, person in four.items()}
        row |= {f"fame_{slot}": float(person.fame) for slot, person in four.items()}
        rows.append(row | {f"n_tokens_{slot}": n for slot, n in zip(template.slots, counts, strict=True)})
    return pd.DataFrame(rows)


def alike(four: Mapping[str, pd.Series], columns: Sequence[str]) -> bool:
    """Whether a quad's a and c, and its b and d, share what stands in these columns, and it is known."""
    values = [(four[x][column], four[y][column]) for column in columns for x, y in ("ac", "bd")]
    return all(own == other != "unknown" for own, other in values)


def unselected_quads(
    people: pd.DataFrame, tokenizer: Any, options: Options, leave: Collection[str] = ()
) -> pd.DataFrame:
    """As many quads of anyone but `leave`, whatever the model makes of them: neither fame nor answers nor region count.

    As `build_quads` returns them; fame is NaN.
    """
    topic, rng = questions.load(options.question), np.random.default_rng([options.seed, 1])
    words = topic.find(options.template, options.task)
    prompting = {"chat_template": options.chat_template, "attributes": options.attributes}
    free = unambiguous(people)
    free = add_tokens(free[~free["name"].isin(leave)], tokenizer, words, **prompting).assign(fame=0.0)
    wanted = shared_out(2 * options.quads_per_half, superset_pairs(free, topic.supersets), rng)
    quads = describe(choose(free, wanted, np.inf, rng, [()]), free, words)
    quads = in_halves(quads.assign(quad_id=quads["quad_id"].str.replace("q", "u")), rng)
    return quads.assign(**{f"fame_{slot}": np.nan for slot in "abcd"})


def in_halves(quads: pd.DataFrame, rng: Any) -> pd.DataFrame:
    """The quads dealt to two halves that are alike in superset pairs and token counts."""
    return quads.assign(half=halves(list(zip(quads.pair, quads.bucket, strict=True)), rng)).drop(columns="pair")


def generate_odd_one_out(
    people: pd.DataFrame,
    tokenizer: Any,
    n: int,
    seed: int = 0,
    chat_template: bool = False,
    question: str = questions.DEFAULT,
) -> pd.DataFrame:
    """A pairs table of `n` odd-one-out items, or as many as there can be, each of four people of one token count; no
    person in two items.

    As in the plan: clean (s1, t1, t2) asks for s1; t1 is swapped for s2 of the other superset, and (s1, s2, t2) asks
    for t2. The three take every order in turn, so that the odd one stands in every slot equally often. Halves are
    split as in build_quads. Raises ValueError when the people allow none.
    """
    topic = questions.load(question)
    words = topic.of_task("odd_one_out")[0]
    rng = np.random.default_rng(seed)
    free = add_tokens(unambiguous(people), tokenizer, words, chat_template)
    free = free if "fame" in free else free.assign(fame=0.0)
    pairs = superset_pairs(free, topic.supersets)
    items: list[dict] = []
    for _ in range(10):
        share, extra = divmod(n - len(items), max(len(pairs), 1))
        wanted = {pair: share + (k < extra) for k, pair in enumerate(pairs)}
        for quad in choose(free, wanted, np.inf, rng, [()]):
            # names that share a first token cannot be told apart by it
            if len({token for slot in "abcd" for token in set(free.first_token[quad[slot]])}) == 4:
                items.append({slot: free.loc[quad[slot]] for slot in "abcd"})
        used = {item[slot]["name"] for item in items for slot in "abcd"}
        free = free[~free.name.isin(used)]
    if not items:
        raise ValueError(f"{n} odd-one-out items were asked for; the people given allow none")
    return odd_one_out_pairs(items, words, rng)


def odd_one_out_pairs(items: Sequence[Mapping[str, pd.Series]], template: Template, rng: Any) -> pd.DataFrame:
    """The pairs table of odd-one-out items: a, b of one superset and c, d of another, a taking the place of c.

    Clean holds b, c, d in some order (odd: b), corrupt holds b, a, d (odd: d). The six orders are taken in turn.
    """
    rows, orders = [], list(permutations(range(3)))
    for number, item in enumerate(items):
        order = orders[number % 6]
        row = {"pair_id": f"odd{number:03d}.0", "quad_id": f"odd{number:03d}"}
        row |= {"task": template.task, "template": template.name}
        for side, swapped, odd, answer in (("clean", "c", 0, "answer"), ("corrupt", "a", 2, "corrupt_answer")):
            three = [item["b"], item[swapped], item["d"]]
            for slot, place in zip("abc", order, strict=True):
                row[f"{side}_{slot}"] = three[place]["name"]
                row[f"{side}_profession_{slot}"] = three[place]["profession"]
            row[f"fame_{side}"] = float(np.mean([person["fame"] for person in three]))
            row[answer] = "abc"[order.index(odd)]
        row |= {f"n_tokens_{slot}": count for slot, count in zip("abc", item["a"]["n_tokens"], strict=True)}
        row["bucket"] = "|".join([template.name, *map(str, item["a"]["n_tokens"])])
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.assign(half=halves(list(zip(table["answer"], table["bucket"], strict=True)), rng))


def sample_pairs(people: pd.DataFrame, n: int, seed: int = 0, question: str = questions.DEFAULT) -> pd.DataFrame:
    """`n` same-superset pairs of people drawn at random before any selection, each person once, supersets balanced.

    Columns superset, a, b, profession_a, profession_b. Only people of whom it is clear what to say. For accuracies.
    """
    rng = np.random.default_rng(seed)
    people = unambiguous(people)
    known = questions.load(question).supersets
    supersets = [superset for superset in known if superset in set(people.superset)]
    rows = []
    for i, superset in enumerate(supersets):
        group, size = people[people.superset == superset], n // len(supersets) + (i < n % len(supersets))
        if len(group) < 2 * size:
            raise ValueError(f"{n} pairs need {2 * size} people of superset {superset!r}; there are {len(group)}")
        drawn = group.iloc[rng.permutation(len(group))[: 2 * size]]
        for one, other in zip(drawn.iloc[::2].itertuples(), drawn.iloc[1::2].itertuples(), strict=True):
            rows.append((superset, one.name, other.name, one.profession, other.profession))
    return pd.DataFrame(rows, columns=["superset", "a", "b", "profession_a", "profession_b"])
