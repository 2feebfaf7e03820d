"""What a row of logits says: every number that the records keep of it.

The logits of a sweep are the largest thing it makes (1,440 rows of 49,152 for a pair of the default profile). So they
are read in blocks of rows that stay in cache, and each block is fetched from memory once:

1. the top logit and its token;
2. how many logits exceed the answer's (rank);
3. centred on the top logit: the expectation under the base distribution (for KL) and the sum of exponentials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

# Elements of a block of rows on a CPU: 3 MB in fp32, so that the block and its scratch copy stay in cache (measured:
# 16 rows of 49,152 are as fast as larger blocks; the whole matrix at once takes twice as long, or more).
CPU_BLOCK = 2**20
DEVICE_BLOCK = 2**28
TILE = 128  # the top token is looked for tile by tile: 2.5 times faster than torch's argmax over a row


@dataclass(frozen=True)
class RowMetrics:
    """Numbers per row of logits, in the order of the rows; floats in the dtype of the logits."""

    candidate_logits: np.ndarray  # (rows, C)
    label_logits: np.ndarray  # (rows, L)
    metric: np.ndarray  # the margin: logit(answer) - logit(foil)
    logit_diff: np.ndarray  # logit(answer) - logit(corrupt answer)
    foil: np.ndarray  # index of the highest candidate other than the answer
    top_token: np.ndarray  # id of the token with the highest logit
    top_logit: np.ndarray
    logsumexp: np.ndarray
    rank: np.ndarray  # of the answer token: how many tokens of the vocabulary have a higher logit
    kl: np.ndarray  # KL(base distribution || row distribution), nats
    candidate_probability: np.ndarray  # total over the candidates


@torch.no_grad()
def from_logits(
    logits: Float[Tensor, "rows vocab"],
    base: Float[Tensor, "pairs vocab"],
    owner: Int[Tensor, " rows"],
    candidate_tokens: Int[Tensor, "pairs C"],
    answer: Int[Tensor, " pairs"],
    corrupt_answer: Int[Tensor, " pairs"],
    label_tokens: Int[Tensor, " L"] | Sequence[int] = (),
) -> RowMetrics:
    """Every number that the records keep of a row.

    `logits` and `base` are fp32 or fp64, on one device; the index arguments may be tensors, arrays or lists. Row r
    belongs to pair `owner[r]`, whose base row is `base[owner[r]]`. `answer` and `corrupt_answer` index the candidates.

    Rows are centred on their top logit before anything is summed, so that KL in fp32 is right to about 2e-6 nats; what
    rounding makes negative is set to 0. A tie with the answer does not raise its rank.

    Raises ValueError for NaN or infinite logits (with the row numbers), for other dtypes, and for shapes or indices
    that do not fit together.
    """
    owner, candidate_tokens, answer, corrupt_answer, label_tokens = (
        torch.as_tensor(index, dtype=torch.long, device=logits.device)
        for index in (owner, candidate_tokens, answer, corrupt_answer, label_tokens)
    )
    count, pairs, vocab = candidate_tokens.shape[1], len(base), logits.shape[1]
    _check(
        logits,
        base,
        count,
        owner=(owner, (len(logits),), len(candidate_tokens)),
        candidate_tokens=(candidate_tokens, (pairs, count), vocab),
        answer=(answer, (pairs,), count),
        corrupt_answer=(corrupt_answer, (pairs,), count),
        label_tokens=(label_tokens, (len(label_tokens),), vocab),
    )
    candidate_logits = logits.gather(1, candidate_tokens[owner])
    answer_logit, corrupt_logit = (candidate_logits.gather(1, of[owner][:, None]) for of in (answer, corrupt_answer))
    sums = _sums(logits, base, owner, answer_logit)
    logsumexp = sums["top_logit"] + sums.pop("log_total")
    values = sums | {
        "candidate_logits": candidate_logits,
        "label_logits": logits[:, label_tokens],
        "logit_diff": (answer_logit - corrupt_logit)[:, 0],
        "logsumexp": logsumexp,
        "candidate_probability": (candidate_logits - logsumexp[:, None]).exp().sum(1),
    }
    arrays = {name: value.cpu().numpy() for name, value in values.items()}
    metric, foil = margins(arrays["candidate_logits"], answer[owner].cpu().numpy())
    return RowMetrics(metric=metric, foil=foil, **arrays)


def _sums(logits: Tensor, base: Tensor, owner: Tensor, answer_logit: Float[Tensor, "rows 1"]) -> dict[str, Tensor]:
    """What the whole vocabulary says of each row, a block of rows at a time: `top_logit`, `top_token`, `rank`, `kl` and
    `log_total`, the log of the sum of exponentials of the logits less the top one."""
    rows, vocab = logits.shape
    top_logit, log_total, expected, rank = logits.new_empty(4, rows)
    top_token = torch.empty(rows, dtype=torch.long, device=logits.device)
    base_centred = base - base.amax(1, keepdim=True)
    base_total = base_centred.exp().sum(1, keepdim=True)
    # No probability may underflow to 0, or an infinite logit could hide behind it.
    base_probability = (base_centred.exp() / base_total).clamp_min(torch.finfo(base.dtype).tiny)
    negative_entropy = (base_probability * base_centred).sum(1) - base_total[:, 0].log()
    step = max(1, min(rows, (CPU_BLOCK if logits.device.type == "cpu" else DEVICE_BLOCK) // vocab))
    scratch = logits.new_empty(step, vocab)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        block, centred = logits[part], scratch[: min(step, rows - start)]
        top_logit[part], top_token[part] = _top(block)
        rank[part] = torch.gt(block, answer_logit[part], out=centred).sum(1)
        torch.sub(block, top_logit[part, None], out=centred)
        owners, which = owner[part].unique(return_inverse=True)
        expected[part] = _expectation(centred, base_probability[owners]).gather(1, which[:, None])[:, 0]
        log_total[part] = centred.exp_().sum(1).log()
    # NaN and +inf show in the maximum, -inf in the expectation; so the check needs no pass of its own.
    bad = (~(top_logit.isfinite() & expected.isfinite())).nonzero()[:, 0].tolist()
    if bad:
        some = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        raise ValueError(f"NaN or infinite logits in {len(bad)} of {rows} rows: {some}")
    kl = (negative_entropy[owner] - expected + log_total).clamp_min(0)
    return {"top_logit": top_logit, "top_token": top_token, "rank": rank.long(), "kl": kl, "log_total": log_total}


def _top(block: Float[Tensor, "rows vocab"]) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """The highest logit of each row and its token."""
    if block.shape[1] % TILE:
        return tuple(block.max(1))
    tiles = block.unflatten(1, (-1, TILE))
    top, tile = tiles.amax(2).max(1)
    inside = tiles[torch.arange(len(block), device=block.device), tile].argmax(1)
    return top, tile * TILE + inside


def _expectation(
    values: Float[Tensor, "rows vocab"], probability: Float[Tensor, "owners vocab"]
) -> Float[Tensor, "rows owners"]:
    """values @ probability.T, summed in up to 64 pieces: one long fp32 sum is off by 2e-5, as much as a small KL."""
    pieces = math.gcd(values.shape[1], 64)
    pieced = values.unflatten(1, (pieces, -1)).transpose(0, 1), probability.unflatten(1, (pieces, -1)).permute(1, 2, 0)
    return torch.bmm(*pieced).sum(0)


def _check(logits: Tensor, base: Tensor, count: int, **indices: tuple[Tensor, tuple[int, ...], int]) -> None:
    """Dtypes, shapes and index ranges of `from_logits`, and finite base logits. Indices: tensor, shape, upper bound."""
    if logits.dtype not in (torch.float32, torch.float64) or base.dtype != logits.dtype:
        raise ValueError(f"logits and base must both be fp32 or fp64; got {logits.dtype} and {base.dtype}")
    if count < 2:
        raise ValueError(f"a margin needs at least 2 candidates; got {count}")
    if logits.shape[1] != base.shape[1]:
        raise ValueError(f"logits and base differ in vocabulary: {logits.shape[1]} and {base.shape[1]} tokens")
    for name, (index, shape, limit) in indices.items():
        if index.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(index.shape)}; {len(logits)} rows of {len(base)} pairs need {shape}"
            )
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= limit):
            raise ValueError(f"{name} must lie in 0..{limit - 1}; got {int(index.min())}..{int(index.max())}")
    bad = (~base.isfinite().all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"NaN or infinite logits in the base rows of pairs {bad[:10]}")


def margins(candidate_logits: ArrayLike, answer: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Margin and foil from candidate logits (rows, C) and answer indices (rows,) or one index. For margins over both
    tokens of a name, pass the sums of the two tokens' logits."""
    candidate_logits = np.asarray(candidate_logits)
    answer = np.broadcast_to(np.asarray(answer), len(candidate_logits))[:, None]
    others = candidate_logits.copy()
    np.put_along_axis(others, answer, -np.inf, 1)
    return np.take_along_axis(candidate_logits, answer, 1)[:, 0] - others.max(1), others.argmax(1)
