"""A researcher's own pairs: what each input gives, a right result or one sentence, and what step 01 makes of them."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from lib import data, models, tables, tasks
from pipeline import params
from pipeline import step as steps
from pipeline.params import ParameterError
from pipeline.step import StepError
from steps import __main__ as command
from steps import registry
from steps.baselines import measure, names, page
from steps.necessity import measure as necessity
from steps.registry import PLAN

ROOT = Path(__file__).resolve().parents[1]
HEADER = "clean_a,clean_b,corrupt_a,corrupt_b,answer,corrupt_answer"
ONE = "Brad Pitt,Bill Murray,Isaac Newton,Albert Einstein,artist,scientist"
TWO = "Bruce Willis,Gary Cooper,Charles Darwin,Francis Crick,artist,scientist"
FOUR = [
    ONE,
    TWO,
    "Charles Darwin,Louis Pasteur,Bruce Willis,James Dean,scientist,artist",
    "Paul Newman,Harrison Ford,James Watson,Edwin Hubble,artist,scientist",
]
COMMON = "What {a} and {b} have in common is that they are both"
LONG = "Brad " * 8200
# Pairs that SmolLM2-135M answers, both prompts of each; no name is in two.
KNOWN = [
    "Frank Drake,Edwin Hubble,Jim Morrison,Miles Davis,scientist,artist",
    "John C. Calhoun,Mike Huckabee,Scott Joplin,Kendrick Lamar,politician,artist",
    "Andy Warhol,Fred Astaire,William Shockley,David Bohm,artist,scientist",
    "Caravaggio,Antonio Vivaldi,LeBron James,Karim Benzema,artist,athlete",
    "Marilyn Monroe,Bela Bartok,Barbara McClintock,Walther Bothe,artist,scientist",
    "Bruce Springsteen,Frida Kahlo,Jake LaMotta,Diego Maradona,artist,athlete",
    "Mahmoud Abbas,Mitt Romney,Joshua Lederberg,Paul Sabatier,politician,scientist",
]


def begin(folder: Path, text: str | bytes | None = None, step: str = "necessity", **given: object) -> steps.Step:
    """A step on pairs in folder/mine.csv; results go to folder/out."""
    if text is not None:
        (folder / "mine.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    own = {"profile": "own", "pairs_file": str(folder / "mine.csv"), "results_dir": str(folder / "out")}
    base = params.load_profile("smoke") | own | given
    return steps.begin(PLAN, step, {key: value for key, value in base.items() if value is not None}, lambda _: None)


@pytest.fixture
def with_tokenizer(monkeypatch, smollm_tokenizer):
    """The tokenizer is loaded once for all tests."""
    monkeypatch.setattr("lib.models.tokenizer", lambda *_: smollm_tokenizer)


def lines(*rows: str, header: str = HEADER, end: str = "\n") -> str:
    return end.join([header, *rows]) + end


# --- inputs that give the pairs that were meant

GOOD = {
    "plain": lines(ONE, TWO),
    "no line break at the end": lines(ONE, TWO).rstrip(),
    "CRLF": lines(ONE, TWO, end="\r\n"),
    "CR": lines(ONE, TWO, end="\r"),
    "byte order mark": b"\xef\xbb\xbf" + lines(ONE, TWO).encode(),
    "spaces after commas": lines(ONE.replace(",", ", "), TWO.replace(",", " , ")),
    "quoted": lines('"' + ONE.replace(",", '","') + '"', TWO),
    "quoted after spaces": lines('"' + ONE.replace(",", '", "') + '"', TWO),
    "empty lines": lines("", ONE, "", "  ", TWO, ""),
    "rows of commas alone": lines(ONE, ",,,,,", TWO),
    "commas at the end of every line": lines(ONE + ",,", TWO + ",,", header=HEADER + ",,"),
    "columns in another order": lines(
        *(",".join(row.split(",")[::-1]) for row in (ONE, TWO)), header=",".join(HEADER.split(",")[::-1])
    ),
    "the task named": lines(ONE + ",superset", TWO + ",", header=HEADER + ",task"),
    "the template named": lines(ONE + ",profession_both", TWO + ",", header=HEADER + ",template"),
    "the template's text named": lines(
        ONE + ",The profession of {a} and {b} is that they are both", TWO + ",", header=HEADER + ",template"
    ),
    "no third names": lines(ONE + ",,", TWO + ",,", header=HEADER + ",clean_c,corrupt_c"),
    "some ids": lines(ONE + ",", TWO + ",p0001", header=HEADER + ",pair_id"),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_was_meant_is_read(name, tmp_path, with_tokenizer):
    step = begin(tmp_path, GOOD[name])
    table = step.pairs()
    assert [",".join(row) for row in table[HEADER.split(",")].to_numpy()] == [ONE, TWO]
    assert list(table["pair_id"]) == ["p0000", "p0001"] and list(table["quad_id"]) == ["cluster0", "cluster1"]
    assert set(table["template"]) == {step.params.template} and set(table["task"]) == {"superset"}
    assert [pair.clean.text for pair in step.prompts()][0] == (
        "The profession of Brad Pitt and Bill Murray is that they are both"
    )


# --- names that are odd and right

NAMES = [
    "Conan O'Brien",
    'Dwayne "The Rock" Johnson',
    '"Weird Al" Yankovic',
    "Sammy Davis Jr.",
    "Björk",
    "José Ferrer",
    "毛泽东",
    "علی‌رضا قربانی",
    "Jean-Luc Godard",
    "50 Cent",
    "Prince (musician)",
    "Davis, Miles",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_may_be_odd(name, tmp_path, smollm_tokenizer):
    row = dict(zip(HEADER.split(","), ONE.split(","), strict=True)) | {"clean_a": name}
    pd.DataFrame([row]).to_csv(tmp_path / "mine.csv", index=False)
    assert data.load_pairs_file(tmp_path / "mine.csv")["clean_a"].tolist() == [name]
    assert name in tasks.make_prompt(smollm_tokenizer, tasks.find_template("profession_both"), [name, "Bob Dylan"]).text


# --- inputs that cannot be used: one sentence, with the line

BAD = {
    "a comma in a name": (lines("Allen, " + ONE, TWO), r"line 2: column 7 holds 'scientist', and the header has 6"),
    "a cell too few": (
        lines(ONE, "", "Bob Dylan,Brad Pitt"),
        "line 4: ends before corrupt_a; the header has 6",
    ),
    "empty lines before": (lines("", "", ONE.replace("artist", "actor")), "line 4: answer 'actor' is unknown; allowed"),
    "a line break in a name": (lines(ONE.replace("Brad Pitt", '"Brad\nPitt"')), r"line 2: clean_a 'Brad\\nPitt' holds"),
    "quotes within quotes": (lines(ONE.replace("Brad Pitt", '"""Brad Pitt"""')), r"line 2: clean_a .*quotation marks"),
    "single quotes": (lines(ONE.replace("Brad Pitt", "'Brad Pitt'")), "line 2: clean_a .*holds quotation marks"),
    "typographic quotes": (lines(ONE.replace("Brad Pitt", "“Brad Pitt”")), "line 2: clean_a .*holds quotation marks"),
    "one quote": (lines(ONE.replace("Brad Pitt", 'Brad" Pitt')), "line 2: clean_a .*holds quotation marks"),
    "an open quote": (lines(ONE, '"' + TWO), "line 3: unexpected end of data; quotation marks go around"),
    "text behind a quote": (lines(TWO, '"Brad" Pitt' + ONE[9:]), "line 3: ',' expected after '\"'; quotation marks"),
    "two spaces": (lines(ONE.replace("Brad Pitt", "Brad  Pitt")), "line 2: clean_a 'Brad  Pitt' has two spaces"),
    "a hard space": (lines(ONE.replace("Brad ", "Brad\xa0")), "line 2: clean_a .*cannot be seen"),
    "a zero-width space": (lines(ONE.replace("Brad ", "Brad\u200b ")), "line 2: clean_a .*cannot be seen"),
    "a NUL": (lines(ONE.replace("Brad", "Br\0ad")), r"line 2: clean_a 'Br\\x00ad Pitt' .*cannot be seen"),
    "a tab in a name": (lines(ONE.replace("Brad ", "Brad\t")), r"line 2: clean_a 'Brad\\tPitt' .*cannot be seen"),
    "a lost character": (lines(ONE.replace("Brad", "Br\ufffdd")), "line 2: clean_a .*lost in another encoding"),
    "Latin-1": (lines(TWO, ONE.replace("Brad", "Bräd")).encode("latin-1"), "line 3: not UTF-8 text; save the file"),
    "UTF-16": (lines(ONE).encode("utf-16"), "line 1: not UTF-8 text"),
    "semicolons": (lines(ONE).replace(",", ";"), "separated by semicolons; save the file with commas"),
    "tabs": (lines(ONE).replace(",", "\t"), "separated by tabs; save the file with commas"),
    "nothing": ("", "mine.csv is empty"),
    "empty lines alone": ("\n\n \n", "mine.csv is empty"),
    "a header alone": (lines(), "mine.csv has no rows"),
    "no header": (ONE + "\n" + TWO + "\n", r"missing columns \['clean_a'.*unknown columns \['Brad Pitt'"),
    "a missing column": (lines(ONE[:-10], header=HEADER[:-15]), r"missing columns \['corrupt_answer'\].*needed are"),
    "a surplus column": (lines(ONE + ",x", header=HEADER + ",hobby"), r"unknown columns \['hobby'\]; needed.*besides"),
    "a column twice": (lines(ONE + ",x", header=HEADER + ",clean_a"), "the header has 'clean_a' more than once"),
    "an empty name": (lines(ONE.replace("Bill Murray", "")), "line 2: clean_b is empty; task superset needs"),
    "an unknown answer": (lines(ONE.replace(",artist", ",artists")), "line 2: answer 'artists' is unknown; allowed: "),
    "an answer in capitals": (lines(ONE.replace(",artist", ",Artist")), "line 2: answer 'Artist' is unknown; allowed"),
    "an empty answer": (lines(ONE.replace(",scientist", ",")), "line 2: corrupt_answer '' is unknown"),
    "equal answers": (lines(ONE.replace("scientist", "artist")), "line 2: answer and corrupt_answer are both 'artist'"),
    "the same pair twice": (lines(ONE, "", TWO, ONE), "line 5: the same pair as line 2"),
    "a person twice in a prompt": (
        lines(",".join([ONE.split(",")[0], *ONE.split(",")[:1], *ONE.split(",")[2:]])),
        "line 2: clean: 'Brad Pitt' stands there twice",
    ),
    "one pair with two answers": (
        lines(ONE, ONE.replace("scientist", "writer", 1)),
        "line 3: the same names as line 2, with other answers",
    ),
    "an id twice": (lines(ONE + ",p", TWO + ",p", header=HEADER + ",pair_id"), "line 3: pair_id 'p' is that of line 2"),
    "an id that is given by number": (lines(ONE + ",p0001", TWO + ",", header=HEADER + ",pair_id"), "line 3: pair_id"),
    "an empty quad_id": (lines(ONE + ",q", TWO + ",", header=HEADER + ",quad_id"), "line 3: quad_id '' is empty"),
    "a third name": (
        lines(ONE + ",Bob Dylan", header=HEADER + ",clean_c"),
        "line 2: clean_c is 'Bob Dylan', and task superset has the names a, b alone",
    ),
    "another task": (lines(ONE + ",bi_association", header=HEADER + ",task"), "line 2: task 'bi_association' is not"),
    "mixed tasks": (
        lines(ONE + ",", TWO + ",one_name", header=HEADER + ",task"),
        "line 3: task 'one_name' is not that",
    ),
    "an unknown task": (lines(ONE + ",riddle", header=HEADER + ",task"), "line 2: task 'riddle' is unknown; allowed"),
    "another template": (lines(ONE + ",both_famous", header=HEADER + ",template"), "template 'both_famous' is not the"),
    "a template of another task": (lines(ONE + ",odd_one_out", header=HEADER + ",template"), "task 'odd_one_out' is"),
    "an unknown template": (lines(ONE + ",both", header=HEADER + ",template"), "line 2: unknown template 'both'"),
    "unequal tokens": (
        lines(ONE, "Brad Pitt,Bob Dylan,Arnold Schwarzenegger,Isaac Newton,artist,scientist"),
        r"line 3: the names have different token counts: in slot a 'Brad Pitt' has 2, 'Arnold Schwarzenegger' has 4; "
        r"in slot b 'Bob Dylan' has 3, 'Isaac Newton' has 2; choose names of equal counts; `make pairs`",
    ),
    "the same names": (lines("A,B,A,B,artist,writer"), "line 2: the clean and the corrupt prompt have the same names"),
    "a special token": (lines(ONE.replace("Brad", "<|im_end|>")), r"line 2: .*holds '<\|im_end\|>'.*special token"),
    "a long name": (lines(LONG + ONE), r"line 2: the prompt has \d+ tokens, and the model reads 8192; choose shorter"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_one_sentence(name, tmp_path, with_tokenizer):
    text, message = BAD[name]
    step = begin(tmp_path, text)
    with pytest.raises(StepError, match=message) as caught:
        step.prompts()
    assert "mine.csv" in str(caught.value) and str(caught.value).count("\n") == 0
    assert not (tmp_path / "out").exists(), "nothing is computed, nothing written"


def test_a_name_that_makes_one_token_with_the_text_is_named(tmp_path, with_tokenizer):
    step = begin(tmp_path, lines(ONE, ONE.replace("Brad Pitt", "Fela Jr.")), template="{a}, like {b}, is one of the")
    with pytest.raises(StepError, match="line 3: the token '.,' holds part of the name 'Fela Jr.' and of the text"):
        step.pairs()


def test_all_rows_that_cannot_be_used_are_named_at_once(tmp_path, with_tokenizer):
    text = lines(ONE, "", ONE.replace("artist", "actor"), "Bob,Brad Pitt,Isaac Newton,Albert Einstein,artist,scientist")
    with pytest.raises(StepError) as caught:
        begin(tmp_path, text + TWO + ",x\n").pairs()
    first, *rest = str(caught.value).split("\n")
    assert first.startswith("pairs_file mine.csv: 3 of 4 rows cannot be used; `make pairs`")
    assert [line.split(":")[0] for line in rest] == ["  line 4", "  line 5", "  line 6"]
    assert "'Bob' has 1, 'Isaac Newton' has 2" in rest[1] and "column 7 holds 'x'" in rest[2]


def test_the_case_of_the_surplus_field(tmp_path, with_tokenizer):
    rows = (
        "Allen, Bruce Willis,Bill Murray,Isaac Newton,Albert Einstein,artist,scientist",
        "Paul Newman, Brad Pitt,Bob Hope,Charles Darwin,Francis Crick,artist,scientist",
    )
    with pytest.raises(StepError) as caught:
        begin(tmp_path, lines(*rows)).pairs()
    for line in (2, 3):
        assert f"line {line}: column 7 holds 'scientist', and the header has 6 columns" in str(caught.value)


@pytest.mark.parametrize("kind", ["str", "category"])
def test_parquet_is_read_alike_and_counts_rows(kind, tmp_path):
    table = pd.DataFrame([row.split(",") for row in FOUR], columns=HEADER.split(","))
    table.astype(kind).to_parquet(tmp_path / "mine.parquet")
    read = data.load_pairs_file(tmp_path / "mine.parquet")
    assert list(read["row"]) == [1, 2, 3, 4] and read[table.columns.tolist()].equals(table)
    table.assign(answer="actor").to_parquet(tmp_path / "mine.parquet")
    with pytest.raises(ValueError, match="4 of 4 rows cannot be used\n  row 1: answer 'actor' is unknown"):
        data.load_pairs_file(tmp_path / "mine.parquet")
    (tmp_path / "mine.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match="mine.parquet' is not a readable table"):
        data.load_pairs_file(tmp_path / "mine.parquet")


def test_many_rows_are_read_in_seconds_and_many_faults_are_cut(tmp_path):
    """10,000 rows take half a second of an idle core; ten times that is slow by accident."""
    rows = [f"A{i},B{i},C{i},D{i},artist,{'writer' if i % 10 else 'riter'}" for i in range(10_000)]
    (tmp_path / "mine.csv").write_text(lines(*rows))
    began = time.process_time()
    table, faults = data.read_pairs_file(tmp_path / "mine.csv")
    assert time.process_time() - began < 5
    assert len(table) == 10_000 and len(faults) == 1000 and 2 in faults and table.index[0] == 2
    assert tables.unusable("x", table, faults).endswith("\n  and 500 more")


# --- what the parameters say holds


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("What {a} and {b} share is that they are both\n", r"ends in white space.*`>-` and `\|-`"),
        ("What {a} and {b} share is that they are both ", "ends in white space"),
        ("What {b} and {a} share is", "must hold the slots {a}, {b} once each, in this order"),
        ("What {a} and {name} share is", r"\{name\} is no slot; slots are"),
        ("What {a} and {B} share is", r"\{B\} is no slot"),
        ("What {a} and {b} and {c} share is", "must hold the slots"),
        ("What {a} and {a} share with {b} is", "must hold the slots"),
        ("What {a} shares is", "must hold the slots"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template, message, tmp_path):
    with pytest.raises(ParameterError, match=f"parameter template = .*{message}"):
        begin(tmp_path, lines(ONE), template=template)


@pytest.mark.parametrize("mark", [">", "|", ">+"])
def test_a_folded_template_ends_in_a_line_break_and_is_refused(mark, tmp_path):
    text = f"template: {mark}\n  What {{a}} and {{b}} have in common is\n  that they are both\n\n"
    with pytest.raises(ParameterError, match="ends in white space"):
        begin(tmp_path, lines(ONE), **yaml.safe_load(text))
    stripped = yaml.safe_load(text.replace(mark, ">-"))
    assert begin(tmp_path, lines(ONE), **stripped).params.template == COMMON


def test_template_seed_and_attributes_of_the_parameters_hold(tmp_path, with_tokenizer):
    step = begin(tmp_path, lines(*FOUR), template=COMMON)
    assert set(step.pairs()["template"]) == {pair.template for pair in step.prompts()} == {COMMON}
    assert step.prompts()[0].clean.text == "What Brad Pitt and Bill Murray have in common is that they are both"
    with pytest.raises(StepError, match="template 'profession_both' is not the one of the parameters, 'What {a}"):
        begin(tmp_path, lines(ONE + ",profession_both", header=HEADER + ",template"), template=COMMON).pairs()
    many = [f"A{i} B,C{i} D,E{i} F,G{i} H,artist,writer" for i in range(10, 40)]
    halves = [tuple(begin(tmp_path, lines(*many), seed=seed).pairs()["half"]) for seed in (0, 0, 1)]
    assert halves[0] == halves[1] != halves[2]
    asked = begin(tmp_path, lines(ONE), task="bi_association", template=None, attributes=["school"]).prompts()[0]
    assert "Same school" in asked.clean.text and "Same profession" not in asked.clean.text


def test_pairs_of_step_01_in_another_template_are_not_taken(tmp_path, with_tokenizer):
    """They would be swept, and the record would state the template that was asked for."""
    baselines = begin(tmp_path, step="baselines", pairs_file=None, people_file="data/people.csv")
    baselines.write_extra("pairs.parquet", pd.DataFrame({"pair_id": ["p0"]}))
    assert begin(tmp_path, pairs_file=None).pairs()["pair_id"].tolist() == ["p0"]
    with pytest.raises(ParameterError, match="has none of model .* and task superset in template 'What {a}"):
        begin(tmp_path, pairs_file=None, template=COMMON)


@pytest.mark.parametrize(("step", "other"), [("necessity", False), ("retrieval_heads", True)])
def test_a_page_says_what_is_not_of_the_given_pairs(tmp_path, with_tokenizer, step, other):
    said = registry.given(begin(tmp_path, lines(ONE, TWO), step))
    assert said.startswith(" Pairs: the 2 of `mine.csv`, in 2 quads.")
    assert said.endswith("is of the table of people, not of these pairs.") == other
    assert "Not all are taken" not in registry.given(begin(tmp_path, lines(ONE, TWO), step, pairs=2))
    fewer = registry.given(begin(tmp_path, lines(ONE, TWO), step, pairs=1))
    what = "pairs on which senders at `last` are patched" if other else "pairs at `last`"
    assert f"in 2 quads. Not all are taken: `pairs` is 1 ({what})." in fewer


def test_own_pairs_in_an_own_template_are_what_is_swept(tmp_path, smollm, with_tokenizer):
    """The sum is from plain code of one forward pass per site."""
    how = {"layers": "20,23", "components": "mlp", "ablations": "counterfactual"}
    how |= {"name_components": "mlp", "name_roles": "names", "template": COMMON}
    step = begin(tmp_path, lines(*FOUR), memory=2, **how)
    step.__dict__["model"] = smollm
    rows = necessity.run(step).records
    rows = rows[rows["component"] == "mlp"]  # beside the ceiling, a resid
    assert len(rows) == 16 and rows["logit_diff_after"].sum() == pytest.approx(52.2246, abs=2e-4)
    assert set(rows["template"]) == {COMMON} == {step.record["parameters"]["template"]}


# --- step 01


def first_step(folder: Path, rows: list[str], smollm: object, **given: object) -> tuple[steps.Step, dict]:
    """Step 01 on own pairs, with its findings."""
    how = {"templates": "profession_both", "odd_one_out_items": 0, "memory": 2, "min_pairs": 3} | given
    step = begin(folder, lines(*rows), "baselines", **how)
    step.__dict__["model"] = smollm
    measured = measure.run(step)
    return step, {"m": measured} | page.findings(step, measured)


@pytest.fixture(scope="module")
def asked(tmp_path_factory, smollm):
    """Step 01 on seven pairs that the model knows, and the mirror of the first; the last has its answers exchanged."""
    names, turned = KNOWN[0].split(","), KNOWN[6].split(",")
    mirror = ",".join([*names[2:4], *names[:2], names[5], names[4]])
    rows = [KNOWN[0], mirror, *KNOWN[1:6], "", ",".join([*turned[:4], turned[5], turned[4]])]
    folder = tmp_path_factory.mktemp("asked")
    return folder, *first_step(folder, rows, smollm)


def test_step_01_asks_about_the_given_pairs(asked, smollm):
    _, _, found = asked
    m, own = found["m"], found["m"].records
    own = own[own["template"] == "profession_both"].set_index("names")
    sides = [", ".join(names) for row in KNOWN for names in (row.split(",")[:2], row.split(",")[2:4])]
    assert sorted(own.index) == sorted(sides), "two prompts of each pair, each once"
    assert own.loc["Mahmoud Abbas, Mitt Romney", "answer"] == "scientist", "as the file has it"
    assert own["correct"].sum() == 12
    alone = m.records[m.records["task"] == "one_name"].set_index("names")
    assert len(alone) == 28 and alone.loc["Frida Kahlo", "answer"] == "artist"
    first = m.pairs.iloc[0].to_dict()
    made = tasks.make_pair(smollm.tokenizer, first)
    logits = models.next_logits(smollm, [made.clean.ids, made.corrupt.ids])
    tokens = [made.clean_tokens[i] for i in (made.answer, made.corrupt_answer)]
    by_hand = logits[:, tokens[0]] - logits[:, tokens[1]]
    assert [first["logit_diff_clean"], first["logit_diff_corrupt"]] == pytest.approx(by_hand, abs=1e-4)
    assert first["gap"] == pytest.approx(by_hand[0] - by_hand[1], abs=2e-4)
    assert m.pairs["gap"][1] == pytest.approx(first["gap"], abs=2e-4), "a mirror has the same gap"


def test_step_01_counts_gaps_and_names_the_line_of_a_wrong_sign(asked):
    _, _, found = asked
    pairs = found["m"].pairs
    assert pairs["kept"].tolist() == pairs["solved"].tolist() == [True] * 7 + [False]
    assert pairs["line"].tolist() == [2, 3, 4, 5, 6, 7, 8, 10]
    assert found["pairs"] == 8 and found["able"]["superset"]["able"]
    assert "7 of the 8 given pairs have a gap of the right sign" in found["able"]["superset"]["why"]
    text = " ".join(found["sentences"])
    halves = pairs.groupby("half")["quad_id"].nunique()
    assert f"`mine.csv` gives 8 pairs ({halves['discovery']} discovery quads and" in text
    assert pairs["quad_id"].nunique() == 7, "a pair and its mirror share names"
    assert "The gap has the wrong sign in line 10 of the file" in text
    assert "names are those of `mine.csv`" in text and "drawn before" not in text
    assert "7 pairs have a gap" in text and "7 of these are solved" in text
    kept = next(row for row in found["selection"] if row["pairs of"] == "a gap above the noise")
    assert kept["pairs"] == 7 and "drawn before" not in found["figures"][0]["caption"]


def test_the_guard_is_about_these_pairs(asked, tmp_path):
    folder, _, found = asked
    there = {"results_dir": str(folder / "out")}
    able = begin(tmp_path, (folder / "mine.csv").read_bytes(), **there).able()
    assert able and able.known and "7 of the 8 given pairs" in able.why
    other = begin(tmp_path, lines(ONE), **there).able()
    assert other and not other.known and other.why.endswith("does superset on these pairs")
    step, m = begin(tmp_path, lines(*KNOWN[:4]), "baselines", min_pairs=4), found["m"]
    few = page.abilities(m.accuracy, m.pairs.tail(4), step.params)
    why = few["superset"]["why"]
    assert "3 of the 4 given pairs have a gap of the right sign, fewer than the 4 asked for (min_pairs)" in why
    step.write_findings({"able": few})
    assert not begin(tmp_path).able() and begin(tmp_path).able().why == why, "said on every page"


def test_given_pairs_are_asked_about_in_units(tmp_path, with_tokenizer, monkeypatch):
    monkeypatch.setattr(measure, "GIVEN_SIZE", 2)
    step = begin(tmp_path, lines(*FOUR, TWO.replace("Bruce Willis", "Bob Hope")), "baselines")
    assert [unit.pairs for unit in measure.given_units(step)] == [("p0000", "p0001"), ("p0002", "p0003"), ("p0004",)]


def test_names_that_stand_in_several_quads_are_spoken_of(tmp_path, smollm):
    rows = [f"{row},q{number}" for number, row in enumerate(FOUR)]
    (tmp_path / "mine.csv").write_text(lines(*rows, header=HEADER + ",quad_id"))
    pairs = data.load_pairs_file(tmp_path / "mine.csv").assign(kept=True, solved=True, gap=1.0)
    pairs = pairs.assign(logit_diff_clean=1.0, logit_diff_corrupt=0.0)
    m = measure.Measured(pairs, pairs, pairs, None, [], "", given="mine.csv")
    own = begin(tmp_path, step="baselines").params
    assert "Names stand in several quads" in " ".join(page.given_sentences(m, page.selection(m, own)))
    apart = pairs.drop(index=2)
    m = m._replace(pairs=apart)
    assert "Names stand in several quads" not in " ".join(page.given_sentences(m, page.selection(m, own)))


# --- from names to pairs


def table_of_names(folder: Path, rows: list[tuple[str, str]]) -> Path:
    path = folder / "names.csv"
    pd.DataFrame(rows, columns=["name", "superset"]).to_csv(path, index=False)
    return path


def test_a_table_of_names_makes_pairs_that_line_up(tmp_path, with_tokenizer, monkeypatch, capsys):
    people = pd.read_csv(ROOT / "data" / "people.csv").groupby("superset").sample(12, random_state=0)
    path = table_of_names(tmp_path, list(zip(people["name"], people["superset"], strict=True)))
    words = ["pairs", str(path), "--to", str(tmp_path / "mine.csv"), "--profile", "smoke"]
    assert command.main(words) == 0
    told = capsys.readouterr().out
    step = begin(tmp_path)
    table, superset = step.pairs(), dict(zip(people["name"], people["superset"], strict=True))
    assert len(step.prompts()) == len(table) and table.groupby("quad_id").size().eq(2).all()
    for row in table.to_dict("records"):
        for side, answer in (("clean", "answer"), ("corrupt", "corrupt_answer")):
            assert {superset[row[f"{side}_{slot}"]] for slot in "ab"} == {row[answer]}
    used = set(table[[f"{side}_{slot}" for side in ("clean", "corrupt") for slot in "ab"]].to_numpy().ravel())
    assert len(used) == 4 * table["quad_id"].nunique() >= 40, "nobody is in two quads, most are in one"
    assert f"{len(table)} pairs of {table['quad_id'].nunique()} quads" in told
    lacking = 40 - len(used) // 4
    assert (
        f"20 quads in each of the two halves, {lacking} more than these, of at least {4 * lacking} more people" in told
    )
    assert names.too_few(39).endswith("1 more than these, of at least 4 more people") and names.too_few(40) == ""
    assert f"{60 - len(used)} of 60 people are left over" in told
    assert all(name in told for name in set(people["name"]) - used)
    assert command.main(words) == 1 and "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("Brad Pitt", "artist"), ("Brad Pitt", "artist")], "line 3: 'Brad Pitt' stands there already"),
        ([("Brad Pitt", "actor")], "line 2: superset 'actor' is unknown"),
        ([("“Brad Pitt”", "artist")], "line 2: .*quotation marks"),
        ([("", "artist")], "line 2: name is empty"),
        (
            [("Brad Pitt", "artist"), ("Bob Dylan", "artist")],
            "the 2 names of names.csv make no pair: 2 for whom no one",
        ),
    ],
)
def test_a_table_that_makes_no_pairs_is_one_sentence(rows, message, tmp_path, with_tokenizer, capsys):
    path = table_of_names(tmp_path, rows)
    assert command.main(["pairs", str(path), "--to", str(tmp_path / "mine.csv"), "--profile", "smoke"]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and not (tmp_path / "mine.csv").exists()


def test_quads_are_of_people_with_equal_counts():
    groups = {((2, 2), "artist"): ["a1", "a2", "a3"], ((2, 2), "writer"): ["w1", "w2", "w3", "w4"]}
    groups |= {((3, 3), "artist"): ["a5"], ((3, 3), "writer"): ["w5"], ((3, 3), "athlete"): ["t5"]}
    quads = names.quads_of(groups)
    shape = {name: key for (key, _), own in groups.items() for name in own}
    assert len(quads) == 2 and {key for key, *_ in quads} == {("artist", "writer")}
    for _, *swaps in quads:
        assert all(shape[one] == shape[other] for one, other in swaps)
    used = [name for _, *swaps in quads for swap in swaps for name in swap]
    assert len(set(used)) == 8
