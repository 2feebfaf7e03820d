"""Quads: which four people go together, in which half, and the pairs they give. No model and no tokenizer here.

1. `choose` plans quads from people whose token counts and fame are known; `lib.data` asks the model about them.
2. `describe` writes planned quads out, `halves` splits them.
3. `pairs_of` gives the pairs of a quad: either side clean, either order of the names. `odd_one_out_pairs` gives the
   triples of one; `clusters` finds what takes a quad's place in a user's own pairs.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lib.tasks import Template

HALVES = ("discovery", "confirmation")


def choose(people: pd.DataFrame, wanted: Mapping[tuple[str, str], int], tolerance: float, rng: Any) -> list[dict]:
    """Up to `wanted` quads per superset pair, from people none of whom is used twice.

    Superset pairs are served in turn, the one with most quads still wanted first; each turn takes one quad from the
    largest group of token counts that still has people of both. Within a group the people of the two supersets are
    matched one to one with the least total difference in fame (linear_sum_assignment); matches beyond the tolerance
    are left out.
    """
    free = {
        key: list(group.index[rng.permutation(len(group))]) for key, group in people.groupby(["n_tokens", "superset"])
    }
    fame, wanted, planned = people.fame.to_dict(), dict(wanted), []
    order = [list(wanted)[i] for i in rng.permutation(len(wanted))]
    # few, large groups of token counts: they lend each other means and resamples, and share passes
    shapes = sorted(set(people.n_tokens), key=lambda shape: (-(people.n_tokens == shape).sum(), shape))
    # 1. how many quads of which superset pair and token count
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
            break
        *_, shape, pair = min(options)
        room[shape, pair] += 1
        wanted[pair] -= 1
        for side in pair:
            left[shape, side] -= 2
    # 2. which people
    for (shape, (x, y)), n in room.items():
        one, other = free.get((shape, x), []), free.get((shape, y), [])
        if n == 0 or len(one) < 2 or len(other) < 2:
            continue
        cost = np.abs(np.subtract.outer([fame[p] for p in one], [fame[p] for p in other]))
        rows, columns = linear_sum_assignment(np.where(cost <= tolerance, cost, 1e6))
        matches = [(one[i], other[j]) for i, j in zip(rows, columns, strict=True) if cost[i, j] <= tolerance]
        matches = [matches[i] for i in rng.permutation(len(matches))][: 2 * n]
        for (a, c), (b, d) in zip(matches[0::2], matches[1::2], strict=False):
            sides = {"superset": (x, y), "a": (a, c), "b": (b, d), "c": (c, a), "d": (d, b), "other": (y, x)}
            turned = int(rng.integers(2))  # either superset may be the a, b side
            planned.append({key: both[turned] for key, both in sides.items()})
            free[shape, x] = [p for p in free[shape, x] if p not in (a, b)]
            free[shape, y] = [p for p in free[shape, y] if p not in (c, d)]
    return planned


def describe(planned: Sequence[dict], people: pd.DataFrame, template: Template) -> pd.DataFrame:
    """The quads frame of build_quads from planned quads of people's indices (quad_id as planned, no half yet)."""
    rows = []
    for number, quad in enumerate(planned):
        four = {slot: people.loc[quad[slot]] for slot in "abcd"}
        counts = four["a"].n_tokens
        row = {"quad_id": f"q{number:03d}", "half": "", "task": template.task, "template": template.name}
        row |= {"superset": quad["superset"], "other": quad["other"]}
        row["bucket"] = "|".join([template.name, *map(str, counts)])
        row["pair"] = " ".join(sorted((quad["superset"], quad["other"])))
        row |= {slot: person["name"] for slot, person in four.items()}
        row |= {f"profession_{slot}": person.profession for slot, person in four.items()}
        row |= {f"fame_{slot}": float(person.fame) for slot, person in four.items()}
        rows.append(row | {f"n_tokens_{slot}": n for slot, n in zip(template.slots, counts, strict=True)})
    return pd.DataFrame(rows)


def halves(strata: Sequence[tuple], rng: Any) -> list[str]:
    """A half for each item, at random, such that each stratum, each part of it, and the whole are split evenly."""
    counts: dict[Any, int] = {}
    chosen = [""] * len(strata)
    for index in rng.permutation(len(strata)):
        levels = [strata[index], *enumerate(strata[index]), "all"]
        sizes = [(*(counts.get((level, half), 0) for level in levels), rng.random(), half) for half in HALVES]
        chosen[index] = min(sizes)[-1]
        for level in levels:
            counts[level, chosen[index]] = counts.get((level, chosen[index]), 0) + 1
    return chosen


# The pairs of a quad: clean names, corrupt names. The first two show both sides and both orders.
_PAIRS = (("ab", "cd"), ("dc", "ba"), ("cd", "ab"), ("ba", "dc"))


def pairs_of(quads: pd.DataFrame, pairs_per_quad: int = 2) -> pd.DataFrame:
    """The pairs table: one row per pair, `pairs_per_quad` (1 to 4) of each quad, made of the quads frame alone."""
    if not 1 <= pairs_per_quad <= 4:
        raise ValueError(f"pairs_per_quad must be 1 to 4, got {pairs_per_quad}")
    rows = []
    for quad in quads.to_dict("records"):
        for number, (clean, corrupt) in enumerate(_PAIRS[:pairs_per_quad]):
            row = {"pair_id": f"{quad['quad_id']}.{number}"}
            row |= {key: quad[key] for key in ("quad_id", "half", "task", "template")}
            for side, people in (("clean", clean), ("corrupt", corrupt)):
                row |= {f"{side}_{slot}": quad[person] for slot, person in zip("ab", people, strict=True)}
                row |= {f"{side}_profession_{s}": quad[f"profession_{p}"] for s, p in zip("ab", people, strict=True)}
                row[f"{side}_c"] = row[f"{side}_profession_c"] = ""
                row[f"fame_{side}"] = float(np.mean([quad[f"fame_{person}"] for person in people]))
            row["answer"], row["corrupt_answer"] = (
                quad["superset" if p[0] in "ab" else "other"] for p in (clean, corrupt)
            )
            rows.append(row | {key: quad[key] for key in ("n_tokens_a", "n_tokens_b", "bucket")})
    return pd.DataFrame(rows)


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


def clusters(pairs: pd.DataFrame) -> np.ndarray:
    """A cluster number per pair: pairs that share a name, directly or through other pairs, have the same one."""
    names = pairs[[f"{side}_{slot}" for side in ("clean", "corrupt") for slot in "abc"]].to_numpy()
    codes = pd.factorize(names.ravel())[0].reshape(names.shape) + len(pairs)
    rows = np.repeat(np.arange(len(pairs)), names.shape[1])[names.ravel() != ""]
    columns = codes.ravel()[names.ravel() != ""]
    size = int(codes.max()) + 1
    return connected_components(coo_matrix((np.ones(len(rows)), (rows, columns)), (size, size)), directed=False)[1][
        : len(pairs)
    ]
