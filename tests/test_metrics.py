"""Numbers per row of logits, against the same numbers worked out plainly in fp64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import metrics

PAIRS, CANDIDATES = 3, 4


def example(vocab: int = 128, rows: int = 40, dtype=torch.float64, seed: int = 0, spread: float = 3.0) -> dict:
    """Arguments of `from_logits`: random rows of three pairs, in no order, base rows beside them."""
    torch.manual_seed(seed)
    base = torch.randn(PAIRS, vocab, dtype=torch.float64) * spread
    owner = torch.randint(PAIRS, (rows,))
    return {
        "logits": (base[owner] + torch.randn(rows, vocab, dtype=torch.float64)).to(dtype),
        "base": base.to(dtype),
        "owner": owner,
        "candidate_tokens": torch.stack([torch.randperm(vocab)[:CANDIDATES] for _ in range(PAIRS)]),
        "answer": torch.tensor([0, 2, 3]),
        "corrupt_answer": torch.tensor([1, 0, 2]),
        "label_tokens": torch.tensor([5, 9, 9, 30]),
    }


def plain(arguments: dict) -> dict[str, np.ndarray]:
    """The definitions, row by row, in numpy and fp64."""
    logits, base = (arguments[name].double().numpy() for name in ("logits", "base"))
    out = {}
    for row, pair in zip(logits, arguments["owner"].tolist(), strict=True):
        tokens = arguments["candidate_tokens"][pair].numpy()
        answer, corrupt = int(arguments["answer"][pair]), int(arguments["corrupt_answer"][pair])
        candidates = row[tokens]
        others = [index for index in range(CANDIDATES) if index != answer]
        foil = max(others, key=lambda index: candidates[index])
        total = np.log(np.exp(row - row.max()).sum()) + row.max()
        p = np.exp(base[pair] - base[pair].max()) / np.exp(base[pair] - base[pair].max()).sum()
        numbers = {
            "candidate_logits": candidates,
            "label_logits": row[arguments["label_tokens"].numpy()],
            "metric": candidates[answer] - candidates[foil],
            "logit_diff": candidates[answer] - candidates[corrupt],
            "foil": foil,
            "top_token": row.argmax(),
            "top_logit": row.max(),
            "logsumexp": total,
            "rank": (row > candidates[answer]).sum(),
            "kl": (p * (np.log(p) - (row - total))).sum(),
            "candidate_probability": np.exp(candidates - total).sum(),
        }
        for name, number in numbers.items():
            out.setdefault(name, []).append(number)
    return {name: np.array(values) for name, values in out.items()}


# 128 tokens: a tile; 1,152: nine; 101: none. 9,000 tokens: several blocks of rows, the last one shorter.
@pytest.mark.parametrize(("vocab", "rows"), [(128, 40), (1_152, 40), (101, 40), (9_000, 300)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 5e-6)])
@pytest.mark.filterwarnings("error")  # torch warns where a block and its scratch copy are not of one size
def test_every_number_equals_its_definition(vocab, rows, dtype, tolerance):
    arguments = example(vocab, rows, dtype)
    got, wanted = metrics.from_logits(**arguments), plain(arguments)
    assert set(vars(got)) == set(wanted)
    for name, values in wanted.items():
        assert getattr(got, name).shape == values.shape, name
        np.testing.assert_allclose(getattr(got, name), values, rtol=0, atol=tolerance, err_msg=name)


def test_small_example_by_hand():
    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0], [1.0, 0.0, 0.0, 0.0]])
    got = metrics.from_logits(logits, logits[1:], [0, 0], [[1, 2, 0]], [0], [2], [3])
    assert got.metric.tolist() == [1.0, -1.0]  # 2 - max(1, 0); 0 - max(0, 1)
    assert got.foil.tolist() == [1, 2]
    assert got.logit_diff.tolist() == [2.0, -1.0]
    assert got.rank.tolist() == [1, 1]  # ties with the answer do not count
    assert got.top_token.tolist() == [3, 0]
    assert got.top_logit.tolist() == [3.0, 1.0]
    assert got.label_logits.tolist() == [[3.0], [0.0]]
    assert got.candidate_probability[0] == pytest.approx(1 - np.exp(3) / np.exp([0, 2, 1, 3]).sum(), abs=1e-6)


def test_kl_of_the_base_row_is_zero_and_small_kl_is_resolved():
    """A head's effect on a whole vocabulary is often a KL of 1e-5: fp32 sums must not drown it."""
    torch.manual_seed(1)
    base = torch.randn(1, 49_152) * 3
    rows = torch.cat([base, base + 0.01 * torch.randn(20, 49_152)])
    arguments = (torch.zeros(21, dtype=torch.long), [[0, 1]], [0], [1])
    got = metrics.from_logits(rows, base, *arguments).kl
    exact = metrics.from_logits(rows.double(), base.double(), *arguments).kl
    assert got[0] == pytest.approx(0, abs=2e-6)
    assert (exact[1:] > 2e-5).all()
    np.testing.assert_allclose(got, exact, rtol=0, atol=2e-6)
    assert (got >= 0).all()


@settings(max_examples=30, deadline=None)
@given(shift=st.floats(-50, 50), order=st.permutations(range(12)))
def test_shifts_and_the_order_of_rows_change_nothing(shift, order):
    arguments = example(rows=12)
    before = metrics.from_logits(**arguments)
    moved = arguments | {"logits": arguments["logits"][list(order)] + shift, "owner": arguments["owner"][list(order)]}
    after = metrics.from_logits(**moved)
    for name in ("metric", "logit_diff", "foil", "top_token", "rank", "kl", "candidate_probability"):
        np.testing.assert_allclose(getattr(after, name), getattr(before, name)[list(order)], atol=1e-9, err_msg=name)
    np.testing.assert_allclose(after.logsumexp, before.logsumexp[list(order)] + shift, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("token", [0, 77, 100])
def test_a_broken_logit_anywhere_is_an_error_that_names_its_rows(value, token):
    arguments = example(101)
    arguments["base"][:, token] -= 900  # a base probability that underflows must not hide it
    arguments["logits"][[3, 17], token] = value
    with pytest.raises(ValueError, match=r"NaN or infinite logits in 2 of 40 rows: 3, 17$"):
        metrics.from_logits(**arguments)


@pytest.mark.parametrize(("broken", "named"), [(10, "8, 9"), (11, "8, 9, ...")])
def test_of_many_broken_rows_the_first_ten_are_named(broken, named):
    arguments = example()
    arguments["logits"][:broken] = float("nan")
    with pytest.raises(ValueError) as caught:
        metrics.from_logits(**arguments)
    assert str(caught.value).endswith(named)


def test_arguments_that_do_not_fit_are_errors():
    good = example()
    broken = [
        ({"logits": good["logits"].half(), "base": good["base"].half()}, "fp32 or fp64"),
        ({"base": good["base"].float()}, "fp32 or fp64"),
        ({"base": good["base"][:, :-1]}, "vocabulary: 128 and 127"),
        ({"base": good["base"] * float("nan")}, "base rows of pairs"),
        ({"owner": good["owner"][:-1]}, r"owner has shape \(39,\)"),
        ({"owner": good["owner"] + 1}, r"owner must lie in 0\.\.2"),
        ({"answer": torch.tensor([0, 2, 4])}, r"answer must lie in 0\.\.3; got 0\.\.4"),
        ({"candidate_tokens": good["candidate_tokens"] + 100}, r"candidate_tokens must lie in 0\.\.127"),
        ({"candidate_tokens": good["candidate_tokens"][:, :1]}, "at least 2 candidates"),
        ({"label_tokens": [128]}, r"label_tokens must lie in 0\.\.127"),
    ]
    for change, message in broken:
        with pytest.raises(ValueError, match=message):
            metrics.from_logits(**(good | change))


def test_margins_take_one_answer_or_one_per_row():
    logits = np.array([[1.0, 4.0, 2.0], [5.0, 0.0, 1.0]])
    for answer, margin, foil in (([1, 2], [2, -4], [2, 0]), (1, [2, -5], [2, 0])):
        got_margin, got_foil = metrics.margins(logits, answer)
        assert got_margin.tolist() == margin
        assert got_foil.tolist() == foil
