"""People, quads and pairs: from a table of names to the pairs table that every sweep reads.

1. `load_people` reads and checks the table; people known for two supersets are kept out of everything below.
2. `add_fame` asks the model about each person alone: is the own superset its first choice, and how sure is it?
3. `build_quads` puts four people of the same token count together, a, b of one superset and c, d of another, a matched
   to c and b to d in fame, and keeps the quads whose prompts the model answers. Failed quads free their people again.
4. `pairs_of` turns quads into pairs; `load_pairs_file` reads a user's own; `generate_odd_one_out` makes triples.

A model is only ever seen through `score`: a function from a list of token id tuples to fp32 next-token logits
(prompts, vocabulary), in the order given (`lib.models.next_logits`). Bad input raises ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pa
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.special import log_softmax

from lib import tasks
from lib.tasks import SUPERSETS, TEMPLATES, Template

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


Score = Callable[[list[tuple[int, ...]]], np.ndarray]
_CHUNK = 256  # prompts scored at once: their full-vocabulary logits are 50 MB at 50,000 tokens
_REQUIRED = ("clean_a", "clean_b", "corrupt_a", "corrupt_b", "answer", "corrupt_answer")
_OPTIONAL = ("task", "template", "clean_c", "corrupt_c", "pair_id", "quad_id")

PEOPLE = pa.DataFrameSchema(
    {
        "name": pa.Column(str, pa.Check.str_matches(r"^\S(.*\S)?$"), unique=True),
        "profession": pa.Column(str, pa.Check.str_matches(r"^[a-z][a-z -]*$")),
        "superset": pa.Column(str, pa.Check.isin(SUPERSETS)),
        "two_supersets": pa.Column(bool),
        "second_superset": pa.Column(str, pa.Check.isin((*SUPERSETS, ""))),
        "region": pa.Column(str, pa.Check.str_length(min_value=1)),
        "century": pa.Column(int, pa.Check.in_range(-30, 21)),
    },
    strict=True,
)


def _read(path: Path, what: str) -> pd.DataFrame:
    """A CSV (every cell as text) or Parquet file."""
    if not path.is_file():
        raise ValueError(f"{what} {str(path)!r} does not exist")
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"{what} {str(path)!r} must end in .csv or .parquet")
    try:
        return (
            pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=str, keep_default_na=False)
        )
    except ValueError as error:
        raise ValueError(f"{what} {str(path)!r} is not a readable table, or empty: {error}") from None


def load_people(path: str | Path) -> pd.DataFrame:
    """The table of people, checked: one row per name, superset and profession known, flags consistent.

    Columns: name, profession, superset, two_supersets, second_superset ("" if none), region, century (-5: fifth BC).
    Raises ValueError naming the file's row (the header is row 1), the column, the value and what is allowed.
    """
    table = _read(Path(path), "people_file").astype(str)
    missing, unknown = set(PEOPLE.columns) - set(table), set(table) - set(PEOPLE.columns)
    if missing or unknown:
        raise ValueError(
            f"{path}: columns missing: {sorted(missing)}, unknown: {sorted(unknown)}; needed: {list(PEOPLE.columns)}"
        )
    if not len(table):
        raise ValueError(f"{path} has no rows")
    flags = {"true": True, "True": True, "false": False, "False": False}
    for column, allowed in (("two_supersets", flags), ("century", None)):
        known = table[column].isin(allowed) if allowed else table[column].str.fullmatch(r"-?\d+")
        if not known.all():
            row = int(np.argmin(known))
            raise ValueError(
                f"{path}, row {row + 2}: {column} is {table[column][row]!r}; allowed: "
                f"{'true, false' if allowed else 'a whole number'}"
            )
        table[column] = table[column].map(allowed) if allowed else table[column].astype(int)
    try:
        table = PEOPLE.validate(table, lazy=True)
    except pa.errors.SchemaErrors as error:
        first = error.failure_cases.iloc[0]
        row = "" if pd.isna(first["index"]) else f", row {int(first['index']) + 2}"
        raise ValueError(f"{path}{row}: {first['column']} {first['failure_case']!r} fails {first['check']}") from None
    odd = table[table.two_supersets != table.second_superset.ne("")]
    odd = pd.concat([odd, table[table.second_superset == table.superset]])
    if len(odd):
        raise ValueError(
            f"{path}, row {odd.index[0] + 2}: {odd['name'].iloc[0]!r}: second_superset must be given where "
            "two_supersets is true, be empty where it is false, and differ from superset"
        )
    return table


def _logits(score: Score, prompts: Sequence[tuple[int, ...]], tokens: Sequence[Sequence[int]]) -> np.ndarray:
    """Logits (prompts, k) of k tokens per prompt, scored in chunks so that few full-vocabulary rows are held."""
    parts = []
    for at in range(0, len(prompts), _CHUNK):
        logits = np.asarray(score(list(prompts[at : at + _CHUNK])))
        parts.append(np.take_along_axis(logits, np.asarray(tokens[at : at + _CHUNK]), axis=1))
    out = np.concatenate(parts)
    if not np.isfinite(out).all():
        raise ValueError(
            f"the model gives NaN or infinite logits, first for prompt {int(np.argmin(np.isfinite(out).all(1)))}"
        )
    return out


def add_fame(
    people: pd.DataFrame,
    tokenizer: Any,
    score: Score,
    template: Template = TEMPLATES["profession_is"],
    chat_template: bool = False,
    centred: bool = True,
) -> pd.DataFrame:
    """`people` with `fame` (nats, at most 0), `known`, and `first` (the superset the model gives this name alone).

    The evidence for a superset is the logit of its candidate on the one-name prompt. A model prefers some words
    whatever the name, so each superset's evidence is centred on its mean over people, every superset counting alike
    (batch calibration, Zhou et al. 2023, arXiv 2309.17249). Fame is the log-softmax of the own superset's evidence.
    """
    _, tokens = tasks.candidates(tokenizer, template)
    prompts = [tasks.make_prompt(tokenizer, template, [name], chat_template).ids for name in people.name]
    evidence = _logits(score, prompts, [tokens] * len(prompts)).astype(np.float64)
    own = people.superset.map(SUPERSETS.index).to_numpy()
    if centred:
        evidence = evidence - np.mean([evidence[own == s].mean(0) for s in np.unique(own)], axis=0)
    first = evidence.argmax(1)
    fame = log_softmax(evidence, axis=1)[np.arange(len(own)), own]
    return people.assign(fame=fame, known=first == own, first=[SUPERSETS[i] for i in first])


def add_tokens(
    people: pd.DataFrame, tokenizer: Any, template: Template, chat_template: bool = False, **options: Any
) -> pd.DataFrame:
    """`people` with `n_tokens` and `first_token`: tuples, how many tokens the name has in each slot and its first one.

    People whose name cannot be told from the template's text in some slot ("Jr.," is one token) are left out.
    """
    kept, counts, firsts = [], [], []
    for index, name in people.name.items():
        try:
            prompt = tasks.make_prompt(tokenizer, template, [name] * len(template.slots), chat_template, **options)
        except ValueError:
            continue
        places = [prompt.roles[f"name_{slot}"] for slot in template.slots]
        kept.append(index)
        counts.append(tuple(map(len, places)))
        firsts.append(tuple(prompt.ids[place[0]] for place in places))
    return people.loc[kept].assign(n_tokens=counts, first_token=firsts)


def build_quads(
    people: pd.DataFrame,
    tokenizer: Any,
    score: Score,
    template: str = "profession_both",
    *,
    quads_per_half: int = 100,
    pairs_per_quad: int = 2,
    fame_tolerance: float = 0.25,
    min_bucket: int = 4,
    seed: int = 0,
    rounds: int = 6,
    people_per_superset: int | None = None,
    chat_template: bool = False,
    attributes: Sequence[str] = tasks.DEFAULT_ATTRIBUTES,
    one_name: Template = TEMPLATES["profession_is"],
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Quads that the model solves, in two halves without a person in common, and what each filter dropped.

    Args:
        quads_per_half: the most quads a half may have; the superset pairs share them evenly.
        pairs_per_quad: which prompts of a quad must be solved (see pairs_of): margin above 0 on every clean prompt and
            below 0 on every corrupt one.
        fame_tolerance: the largest difference in fame (nats) between a and c, and between b and d.
        min_bucket: fewest quads of one half and bucket; the others lend a quad its means and resamples.
        rounds: how often the people of failed quads are matched anew. Only "solved or not" is looked at.
        people_per_superset: ask the model about a random sample of so many; None: 25 for each quad of a half.

    Returns:
        quads: quad_id, half, task, template, superset, other, bucket, and for each of a, b, c, d its name, profession
            and fame; n_tokens_a, n_tokens_b. All four people have the same token counts, so both orders line up.
        drops: dicts of filter, unit ("people" or "quads"), dropped, left.

    Raises:
        ValueError: nothing is left after a filter; the message has all counts.
    """
    words = tasks.find_template(template)
    if len(words.slots) != 2:
        raise ValueError(f"quads need a template of two names; {template!r} is of task {words.task!r}")
    rng = np.random.default_rng(seed)
    options = {"chat_template": chat_template, "attributes": attributes}
    drops: list[dict[str, Any]] = []

    def keep(table: pd.DataFrame, name: str, before: int, unit: str = "people") -> pd.DataFrame:
        drops.append({"filter": name, "unit": unit, "dropped": before - len(table), "left": len(table)})
        if not len(table):
            counts = "; ".join(f"{d['filter']}: {d['dropped']} {d['unit']} dropped, {d['left']} left" for d in drops)
            raise ValueError(f"no quads of template {template!r} are left after filtering: {counts}")
        return table

    free = keep(people[~people.two_supersets], "known for two supersets", len(people))
    sampled = free.iloc[rng.permutation(len(free))].groupby("superset").head(people_per_superset or 25 * quads_per_half)
    free = keep(sampled.sort_index(), "not sampled", len(free))
    asked = add_fame(free, tokenizer, score, one_name, chat_template)
    known = keep(asked[asked.known], "not known by the model", len(asked))
    free = keep(add_tokens(known, tokenizer, words, **options), "name merges with the template", len(known))

    chosen = list(combinations([s for s in SUPERSETS if s in set(free.superset)], 2))
    share, extra = divmod(2 * quads_per_half, max(len(chosen), 1))
    wanted = {chosen[i]: share + (k < extra) for k, i in enumerate(rng.permutation(len(chosen)))}
    kept, tried = [], 0
    for _ in range(rounds):
        planned = choose(free, wanted, fame_tolerance, rng)
        if not planned:
            break
        tried += len(planned)
        quads = describe(planned, free, words)
        for quad in quads[_solved(quads, pairs_per_quad, tokenizer, score, options)].to_dict("records"):
            kept.append(quad | {"quad_id": f"q{len(kept):03d}"})
            wanted[tuple(sorted((quad["superset"], quad["other"]), key=SUPERSETS.index))] -= 1
        used = {quad[slot] for quad in kept for slot in "abcd"}
        free = free[~free.name.isin(used)]
    reason = "not solved" if tried else "no match in token count and fame"
    quads = keep(pd.DataFrame(kept), reason, tried, "quads")
    quads = quads.assign(half=halves(list(zip(quads.pair, quads.bucket, strict=True)), rng)).drop(columns="pair")
    size = quads.groupby(["half", "bucket"]).quad_id.transform("size")
    quads = keep(quads[size >= min_bucket].reset_index(drop=True), f"bucket under {min_bucket}", len(quads), "quads")
    drops.insert(-2, {"filter": "in no solved quad", "unit": "people", "dropped": len(free), "left": 4 * len(kept)})
    return quads, drops


def aligned(pairs: pd.DataFrame, tokenizer: Any, **options: Any) -> tuple[pd.DataFrame, list[str]]:
    """The pairs whose prompts line up token by token under this tokenizer, and why each of the others does not."""
    fits, reasons = [], []
    for row in pairs.to_dict("records"):
        try:
            tasks.make_pair(tokenizer, row, **options)
            fits.append(True)
        except ValueError as error:
            fits.append(False)
            reasons.append(str(error))
    return pairs[fits], reasons


def add_margins(pairs: pd.DataFrame, tokenizer: Any, score: Score, **options: Any) -> pd.DataFrame:
    """`pairs` with `metric_clean` and `metric_corrupt`: the margin of the clean answer in both prompts, in logits.

    Options (chat_template, attributes) go to make_pair. The margin is the logit of the clean prompt's answer minus the
    highest other candidate's, so a solved pair has metric_clean > 0 > metric_corrupt.
    """
    made = [tasks.make_pair(tokenizer, row, **options) for row in pairs.to_dict("records")]
    prompts = {
        side.ids: tokens for p in made for side, tokens in ((p.clean, p.clean_tokens), (p.corrupt, p.corrupt_tokens))
    }
    logits = dict(zip(prompts, _logits(score, list(prompts), list(prompts.values())), strict=True))

    def margin(ids: tuple[int, ...], answer: int) -> float:
        return float(logits[ids][answer] - np.delete(logits[ids], answer).max())

    return pairs.assign(
        metric_clean=[margin(p.clean.ids, p.answer) for p in made],
        metric_corrupt=[margin(p.corrupt.ids, p.answer) for p in made],
    )


def keep_solved(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs of those quads all of whose pairs have metric_clean > 0 > metric_corrupt (see add_margins)."""
    solved = (pairs.metric_clean > 0) & (pairs.metric_corrupt < 0)
    return pairs[solved.groupby(pairs.quad_id).transform("all")]


def _solved(quads: pd.DataFrame, pairs_per_quad: int, tokenizer: Any, score: Score, options: Mapping) -> pd.Series:
    """Whether every pair used of each quad is solved."""
    pairs = add_margins(pairs_of(quads, pairs_per_quad), tokenizer, score, **options)
    return quads.quad_id.isin(keep_solved(pairs).quad_id)


def sample_pairs(people: pd.DataFrame, n: int, seed: int = 0) -> pd.DataFrame:
    """`n` same-superset pairs of people drawn at random before any selection, each person once, supersets balanced.

    Columns superset, a, b, profession_a, profession_b. People of two supersets are left out. For accuracies.
    """
    rng = np.random.default_rng(seed)
    people = people[~people.two_supersets]
    supersets = [superset for superset in SUPERSETS if superset in set(people.superset)]
    rows = []
    for i, superset in enumerate(supersets):
        group, size = people[people.superset == superset], n // len(supersets) + (i < n % len(supersets))
        if len(group) < 2 * size:
            raise ValueError(f"{n} pairs need {2 * size} people of superset {superset!r}; there are {len(group)}")
        drawn = group.iloc[rng.permutation(len(group))[: 2 * size]]
        for one, other in zip(drawn.iloc[::2].itertuples(), drawn.iloc[1::2].itertuples(), strict=True):
            rows.append((superset, one.name, other.name, one.profession, other.profession))
    return pd.DataFrame(rows, columns=["superset", "a", "b", "profession_a", "profession_b"])


def generate_odd_one_out(
    people: pd.DataFrame, tokenizer: Any, n: int, seed: int = 0, template: str = "odd_one_out", **options: Any
) -> pd.DataFrame:
    """A pairs table of `n` odd-one-out items, each of four people of one token count; no person in two items.

    As in the plan: clean (s1, t1, t2) asks for s1; t1 is swapped for s2 of the other superset, and (s1, s2, t2) asks
    for t2. The three take every order in turn, so that the odd one stands in every slot equally often. Halves are
    split as in build_quads. Raises ValueError when the people do not suffice, with how many items they allow.
    """
    words = tasks.find_template(template, "odd_one_out")
    rng = np.random.default_rng(seed)
    free = add_tokens(people[~people.two_supersets], tokenizer, words, **options)
    free = free if "fame" in free else free.assign(fame=0.0)
    chosen = list(combinations([s for s in SUPERSETS if s in set(free.superset)], 2))
    items: list[dict] = []
    for _ in range(10):
        missing = n - len(items)
        wanted = {pair: missing // len(chosen) + (k < missing % len(chosen)) for k, pair in enumerate(chosen)}
        for quad in choose(free, wanted, np.inf, rng):
            # names that share a first token cannot be told apart by it
            if len({token for slot in "abcd" for token in set(free.first_token[quad[slot]])}) == 4:
                items.append({slot: free.loc[quad[slot]] for slot in "abcd"})
        used = {item[slot]["name"] for item in items for slot in "abcd"}
        free = free[~free.name.isin(used)]
    if len(items) < n:
        raise ValueError(f"{n} odd-one-out items were asked for; the people given allow {len(items)}")
    return odd_one_out_pairs(items, words, rng)


def load_pairs_file(path: str | Path, seed: int = 0) -> pd.DataFrame:
    """A user's own pairs (CSV or Parquet) as a pairs table.

    Columns clean_a, clean_b, corrupt_a, corrupt_b, answer, corrupt_answer (superset names; in odd_one_out the slot a, b
    or c); optionally task, template, clean_c, corrupt_c, pair_id, quad_id. Without quad_id, pairs that share a name
    form one cluster. Clusters are split into halves at random by `seed`. Token counts are not known here, so `bucket`
    is the template alone; make_pair checks that the tokens line up.

    Raises ValueError naming the column, the row (the header is row 1) and what is allowed.
    """
    path = Path(path)
    table = _read(path, "pairs_file")
    missing = [column for column in _REQUIRED if column not in table]
    unknown = [column for column in table if column not in (*_REQUIRED, *_OPTIONAL)]
    if missing or unknown:
        raise ValueError(
            f"pairs_file {path.name}: missing columns {missing}, unknown columns {unknown}; needed are "
            f"{', '.join(_REQUIRED)}, allowed besides {', '.join(_OPTIONAL)}"
        )
    if not len(table):
        raise ValueError(f"pairs_file {path.name} has no rows")
    table = table.fillna("").astype(str).apply(lambda column: column.str.strip())
    given = table.columns
    table = table.reindex(columns=[*_REQUIRED, *_OPTIONAL], fill_value="")
    rows = [_own_pair(row, f"pairs_file {path.name}, row {i + 2}", i) for i, row in enumerate(table.to_dict("records"))]
    table = pd.DataFrame(rows)
    for column in ("pair_id", *(["quad_id"] if "quad_id" in given else [])):
        empty_or_twice = table[column].eq("") | (table[column].duplicated() & (column == "pair_id"))
        if empty_or_twice.any():
            row = int(np.argmax(empty_or_twice))
            raise ValueError(
                f"pairs_file {path.name}, row {row + 2}: {column} {table[column][row]!r} is empty or not unique"
            )
    if "quad_id" not in given:
        table["quad_id"] = [f"cluster{number}" for number in clusters(table)]
    quads = list(dict.fromkeys(table.quad_id))
    half = dict(zip(quads, halves([()] * len(quads), np.random.default_rng(seed)), strict=True))
    return table.assign(half=table.quad_id.map(half), bucket=table.template)


def _own_pair(row: dict[str, str], where: str, number: int) -> dict[str, str]:
    """One row of a pairs_file, checked and filled."""
    named = tasks.TEMPLATES.get(row["template"])
    task = row["task"] or (named.task if named else "superset")
    if task not in tasks.TASKS:
        raise ValueError(f"{where}: task {task!r} is unknown; allowed: {', '.join(tasks.TASKS)}")
    try:
        words = tasks.find_template(row["template"] or next(t.name for t in TEMPLATES.values() if t.task == task), task)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    allowed = words.slots if task == "odd_one_out" else SUPERSETS
    for column in [f"{side}_{slot}" for slot in words.slots for side in ("clean", "corrupt")]:
        if not row[column]:
            raise ValueError(
                f"{where}: {column} is empty; task {task} needs the names {', '.join(words.slots)} of both sides"
            )
    for column in ("answer", "corrupt_answer"):
        if row[column] not in allowed:
            raise ValueError(f"{where}: {column} {row[column]!r} is unknown; allowed: {', '.join(allowed)}")
    return row | {"task": task, "template": words.name, "pair_id": row["pair_id"] or f"p{number:04d}"}
