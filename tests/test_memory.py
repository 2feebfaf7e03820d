"""What a pass takes on the 70B shape, counted without a GPU: tensors on the meta device have sizes but no values."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.scale_70b import KEYS, ROLES, SHAPES
from lib import batches, hooks, models, single_pass
from lib.single_pass import Row
from pipeline import machine

TOKENS = 18
CARD = 85.0e9  # an 80 GB card says that it has 79.2 GiB
NF4 = 39.4e9  # 68.5e9 weights at half a byte and one byte for 64 of them, embeddings and unembedding in bf16
INT8 = 72.7e9


def build(layers):
    """A model of the 70B shape, of fewer layers: what a pass takes does not depend on them."""
    config = LlamaConfig(**dict(zip(KEYS, (layers, *SHAPES["70b"][1:]), strict=True)), tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return models.find_handles(model.eval().requires_grad_(False), None, "70B shape")


@pytest.fixture(scope="module")
def shape():
    return build(3)


class Live(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, and the most of them; nothing may come from the host."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakKeyDictionary(dict.fromkeys(known, 0))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
        assert all(x.device.type == "meta" for x in given), f"{function} is given a tensor of the host"
        out = function(*args, **(kwargs or {}))
        for storage in {x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)} - set(self.seen):
            size = self.seen[storage] = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, size)
        return out

    def gone(self, size):
        self.now -= size


@pytest.mark.parametrize("role", ["last", "name_a", "all"])
def test_a_row_takes_no_more_than_is_counted_for_it_and_nothing_comes_from_the_host(shape, role, monkeypatch):
    """With a fused attention kernel, as CUDA's are: a value that is asked for on the way is an error on `meta`."""
    fused = lambda q, k, v, **_: torch.empty_like(q)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    monkeypatch.setattr(single_pass.Growing, "proof", lambda self: (None, None, None))
    ids = torch.zeros(2, TOKENS, dtype=torch.long, device="meta")
    runs = single_pass.base_run(shape, ids, ROLES[role])
    rows = [Row((site,), 0, 0) for site in hooks.all_sites(shape)] * 5
    known = [value.untyped_storage() for value in shape.model.parameters()]
    live, real = Live(known + [x.untyped_storage() for layer in runs.cache for x in layer]), single_pass.Batch.run

    def counted(*args):
        with live:
            return real(*args)

    monkeypatch.setattr(single_pass.Batch, "run", counted)
    single_pass.grow(shape, runs.part(1, 2), rows, runs.part(0, 1).activations)
    counted_for = single_pass.row_bytes(shape, TOKENS, TOKENS - min(ROLES[role]))
    assert 0.1 * counted_for < live.peak / len(rows) <= counted_for


@pytest.mark.parametrize(
    "cards,weights,memory",
    [
        ([CARD], NF4, 27.36),  # the 70B profile on one 80 GB card
        ([CARD], INT8, 7.38),
        ([CARD, CARD], 141.1e9, 8.67),  # bf16 on two
        ([150.1e9], NF4, 66.42),
        ([24e9], NF4, 0.5),  # most of it offloaded
    ],
)
def test_what_the_weights_leave_is_shared_out(cards, weights, memory):
    assert machine.card_memory(cards, weights) == pytest.approx(memory, abs=0.01)


@pytest.mark.parametrize(
    "role,nf4,int8",
    [("last", 15300, 4127), ("name_a", 3737, 1008), ("all", 2842, 766)],
)
def test_passes_of_the_70b_shape_fit_an_80_gb_card(shape, role, nf4, int8):
    base = SimpleNamespace(ids=torch.zeros(1, TOKENS), positions=ROLES[role])
    sites = 80 * (64 + 3)
    for weights, rows in ((NF4, nf4), (INT8, int8)):
        memory = machine.card_memory([CARD], weights)
        limit = single_pass.row_limit(shape, base, memory)
        assert limit == pytest.approx(rows, abs=2)
        logits = 3 * 4 * batches.logit_rows(shape) * 128256  # a block, its centred copy, and one of them being made
        matrix = 2 * 8192 * 28672  # one at a time is dequantised
        one_pass = min(limit, sites) * single_pass.row_bytes(shape, TOKENS, TOKENS - min(ROLES[role]))
        assert weights + one_pass + logits + matrix < 0.98 * CARD
    assert role != "last" or nf4 > sites  # all sites of a pair in one pass


def test_a_pass_never_has_more_rows_than_a_kernel_takes(shape):
    base = SimpleNamespace(ids=torch.zeros(1, TOKENS), positions=[TOKENS - 1])
    assert single_pass.row_limit(shape, base, 1e3) == single_pass.MOST_ROWS < 2**16
    assert single_pass.row_limit(shape, base, 1e-6) == 1
