"""Path patching: rows that did not do what they must are found, and bad input is one clear error."""

import contextlib
from collections import OrderedDict

import pytest
import torch
from brute_force_paths import receiver
from test_sweep import PAIRS

from lib import hooks, paths, single_pass
from lib.hooks import EMBED, Site


def no_hook(visit) -> torch.utils.hooks.RemovableHandle:
    """A place that is never visited."""
    return torch.utils.hooks.RemovableHandle(OrderedDict())


def dropped(_: torch.Tensor) -> None:
    """What a hook returns to change nothing."""


@pytest.mark.parametrize("name", ["q 1.2 last", "mlp 2 last", "block 2 last", "final last"])
def test_a_receiver_that_is_never_set_is_found(tiny, monkeypatch, name):
    real = paths.input_of
    monkeypatch.setattr(paths, "input_of", lambda model, told: real(model, told)._replace(on=no_hook))
    monkeypatch.setattr(paths, "prove_receivers", lambda *_: None)  # which finds those of a head before
    with pytest.raises(single_pass.SweepError, match=r"receiver .* was set 0 times"):
        paths.run(tiny("llama"), PAIRS[:1], receivers=[receiver("v 1.1 last"), receiver(name)])


@pytest.mark.parametrize("name", ["q 1.2 last", "mlp 2 last", "block 2 last", "final last"])
def test_a_receiver_whose_new_input_is_dropped_is_found(tiny, monkeypatch, name):
    real = paths.input_of

    def deaf(*told):
        place = real(*told)
        return place._replace(on=lambda visit: place.on(lambda value: dropped(visit(value))))

    monkeypatch.setattr(paths, "input_of", deaf)
    with pytest.raises(single_pass.SweepError):
        paths.run(tiny("llama"), PAIRS[:1], receivers=[receiver(name)])


def test_a_receiver_that_is_never_read_is_found(tiny, monkeypatch):
    real = paths.input_of
    monkeypatch.setattr(paths, "input_of", lambda *told: real(*told)._replace(read=torch.nn.Identity()))
    with pytest.raises(single_pass.SweepError, match="mlp 2 at last: its input was not read in the first run"):
        paths.run(tiny("llama"), PAIRS[:1], senders=[[Site(0, "mlp")]], receivers=[receiver("mlp 2 last")])


def test_a_sender_that_is_never_replaced_is_found(tiny, monkeypatch):
    monkeypatch.setattr(single_pass.Edit, "write", lambda self, activation: None)
    with pytest.raises(single_pass.SweepError, match=r"pair p0, noise counterfactual at names, .*did not take effect"):
        paths.run(tiny("llama"), PAIRS[:1], receivers=[receiver("v 2.1 names")], sender_role="names")


def test_attention_that_is_not_held_is_found(tiny, monkeypatch):
    monkeypatch.setattr(hooks, "with_forwards", lambda forwards: contextlib.nullcontext())
    with pytest.raises(single_pass.SweepError, match="base rows"):
        paths.run(tiny("llama"), PAIRS[:1], senders=[[EMBED]], receivers=[receiver("v 2.1 last")])


@pytest.mark.parametrize(
    "receivers,options,message",
    [
        ([], {}, "receiver"),
        (["q 0.1 last"], {"senders": [[Site(1, "mlp")]]}, "before"),
        (["mlp 1 last"], {"senders": [[Site(1, "mlp")]]}, "before"),
        (["mlp 1 last"], {"senders": [[EMBED], [Site(2, "head", 0)]]}, "before"),
        (["k 1.0 names", "mlp 2 name_b"], {"sender_role": "last"}, "last"),
        (["q 1.0 last"], {"sender_role": "name_a"}, "name_a"),
        (["q 1.0 last"], {"sender_role": "name_c"}, "'name_c' is not in template 't'.*; it has name_a"),
        (["q 1.0 last", "q 1.1 name_c"], {}, "'name_c' is not in template 't'.*; it has name_a"),
        (["z 1.0 last"], {}, "'z' is unknown"),
        (["q 1.4 last"], {}, "1.4 q at last: .* has query heads 0 to 3"),
        (["k 1.2 last"], {}, "1.2 k at last: .* has key-value heads 0 to 1"),
        (["v 1.2 last"], {}, "1.2 v at last: .* has key-value heads 0 to 1"),
        (["q 3.0 last"], {}, "3.0 q at last: .* has layers 0 to 2"),
        (["q 1 last"], {}, "has query heads 0 to 3"),
        (["final names"], {"sender_role": "names"}, "only the last token"),
        (["q 1.0 last"], {"mlps": "melted"}, "'melted' is unknown"),
        (["q 1.0 last"], {"direction": "up"}, "direction 'up' is unknown"),
        (["q 1.0 last"], {"ablations": ["knockout"]}, "ablation 'knockout' is unknown"),
        (["q 1.0 last"], {"senders": [[]]}, "empty set"),
        (["q 1.0 last"], {"senders": [[Site(0, "resid")]]}, "resid"),
        (["q 1.0 last"], {"senders": [[Site(0, "head", 4)]]}, "head 4 .* heads 0 to 3"),
    ],
)
def test_bad_input_is_one_clear_error(tiny, receivers, options, message):
    with pytest.raises(ValueError, match=message):
        paths.run(tiny("llama"), PAIRS[:1], receivers=[receiver(name) for name in receivers], **options)


def test_no_pairs_is_an_error(tiny):
    with pytest.raises(ValueError, match="no pairs"):
        paths.run(tiny("llama"), [], receivers=[receiver("q 1.0 last")])
