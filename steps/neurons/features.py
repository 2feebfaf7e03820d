"""Features of a sparse autoencoder (SAE) at one site: trained or loaded, read on the pairs, and patched like any site.

1. `sentences` gives the prompts that activations are harvested from: pairs of the discovery half in every template,
   people (none of the confirmation half) and other things. `harvest` reads the site at every token after the first.
2. `train` fits eai-sparsify's top-k SAE to them (Gao et al. 2024, arXiv 2406.04093). Its trainer runs the model once an
   epoch, on sequences packed to one length, and cannot take harvested activations; so its `SparseCoder` and loss are
   used in a plain loop, on the CPU in fp32 whatever the model runs in: same seed, same SAE, same bytes.
3. `steps.neurons.coders` reads a published SAE instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lib import hooks, tasks
from lib.hooks import Model, Site
from lib.questions import KINDS
from lib.single_pass import plain_runs
from pipeline.population import controls_of, people_of
from pipeline.step import Step
from pipeline.units import Unit, subsample
from steps.neurons import coders
from steps.neurons.coders import Coder

BATCH, WARM_UP, RATE = 256, 20, 3e-3  # samples of a step; steps until the rate is full; Adam's rate


def site_of(step: Step) -> Site:
    """Where features are read: `sae_site`, else the slice's MLP of most recovery, else its first layer's stream."""
    if step.params.sae_site:
        return hooks.site_of(step.params.sae_site)
    sites = step.slice()
    first = next((site for site in sites if site.component == "mlp"), None)
    return first or Site(sites[0].layer, "resid")


# --- harvest ---


class Samples(NamedTuple):
    """Activations of a site, one row per token that follows a beginning of its own."""

    values: Float[Tensor, "samples width"]
    last: Bool[Tensor, " samples"]  # at a prompt's last token
    first_norm: float  # mean norm at the first tokens, which are left out


def harvest(model: Model, site: Site, prompts: Sequence[Sequence[int]], batch: int = 32) -> Samples:
    """The site at every token after the first, in fp32 on the CPU; a beginning that prompts share is read once.

    The first token is left out: attention rests on it, and its activation is of another size (`first_norm` says).
    """
    ids = sorted(dict.fromkeys(map(tuple, prompts)), key=len)
    seen: set[tuple[int, ...]] = set()
    values, last, first = [], [], []
    positions, where = [range(len(one)) for one in ids], {"size": batch, "layers": [site.layer]}
    for places, run in plain_runs(model, ids, positions, (site.component,), **where):
        activation, rows = run.activations[site.component, site.layer].float().cpu(), [ids[place] for place in places]
        new = torch.tensor([[is_new(one[: end + 1], seen) for end in range(len(one))] for one in rows])
        values.append(activation[new])
        first.append(activation[:, 0].norm(dim=-1))
        length = len(rows[0])
        last.append((torch.arange(length) == length - 1).expand(new.shape)[new])
    return Samples(torch.cat(values), torch.cat(last), float(torch.cat(first).mean()))


def is_new(beginning: tuple[int, ...], seen: set[tuple[int, ...]]) -> bool:
    """Whether a beginning of more than one token was not met before; it is then noted."""
    if len(beginning) < 2 or beginning in seen:
        return False
    seen.add(beginning)
    return True


def sentences(step: Step) -> list[tuple[int, ...]]:
    """Token ids of `sae_prompts` prompts: a third pairs of the discovery half, in every template of the task and in the
    profile's own; a third sentences about people who are in no pair of the confirmation half; a third about things and
    about anything."""
    tokenizer, table, rng = step.model.tokenizer, step.pairs(), step.rng("sentences")
    p, topic, third = step.params, step.params.topic, -(-step.params.sae_prompts // 3)
    given = topic.table("sentences")
    texts = {kind: given.loc[given["kind"] == kind, "text"].tolist() for kind in KINDS["sentences"]}
    names = controls_of(step).query("kind == 'thing'")["name"].str.lower()
    own = table[table["half"] == "discovery"]
    templates = {template.name: template for template in (*topic.of_task(p.task), topic.find(p.template, p.task))}
    sides = [
        (template, [row[f"{side}_{slot}"] for slot in template.slots])
        for template in templates.values()
        for row in own.to_dict("records")
        for side in ("clean", "corrupt")
    ]
    out = []
    for index in rng.permutation(len(sides))[:third]:
        with contextlib.suppress(ValueError):  # a name that merges with the text of another template
            out.append(tasks.make_prompt(tokenizer, *sides[index], p.chat_template, p.attributes).ids)
    slots = [f"{side}_{slot}" for side in ("clean", "corrupt") for slot in tasks.SLOTS if f"{side}_{slot}" in table]
    held = table.loc[table["half"] == "confirmation", slots]
    people = people_of(step)["name"]
    people = rng.permutation(people[~people.isin(held.to_numpy().ravel())])
    about = [topic.find(topic.alone).text, *texts["person"]]
    lines = [text.replace("{a}", name) for text, name in islice(zip(cycle(about), cycle(people)), third)]
    things = [text.replace("{a}", name) for name in names for text in texts["thing"]]
    lines += [*texts["general"], *rng.permutation(things)][:third]
    return [*out, *(tasks.encoded(tokenizer, line)[0] for line in lines)]


# --- training ---


def train(samples: Float[Tensor, "samples width"], features: int, active: int, epochs: int, seed: int) -> Any:
    """A SparseCoder of eai-sparsify, fitted with its loss (fraction of variance unexplained) by Adam.

    Samples are scaled to a mean norm of sqrt(width) while training; the scale is folded into the biases afterwards.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # which says that it has no Triton
        from sparsify import SparseCoder, SparseCoderConfig
    width = samples.shape[1]
    scale = math.sqrt(width) / samples.norm(dim=1).mean()
    spread = (samples * scale).var(0, correction=0).sum()  # of all: a last batch of one sample has none
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        coder = SparseCoder(width, SparseCoderConfig(num_latents=features, k=min(active, features)))
        coder.b_dec.data = samples.mean(0) * scale
        optimiser = torch.optim.Adam(coder.parameters(), lr=RATE)
        total = epochs * -(-len(samples) // BATCH)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min(1, (step + 1) / WARM_UP, 3 * (1 - step / total))
        )
        for _ in range(epochs):
            for chosen in torch.randperm(len(samples)).split(BATCH):
                coder.set_decoder_norm_to_unit_norm()
                coder(samples[chosen] * scale, total_variance=spread * len(chosen)).fvu.backward()
                coder.remove_gradient_parallel_to_decoder_directions()
                optimiser.step()
                optimiser.zero_grad()
                schedule.step()
        coder.set_decoder_norm_to_unit_norm()
    coder.b_dec.data /= scale
    coder.encoder.bias.data /= scale
    return coder.requires_grad_(False)


def coder_of(coder: Any) -> Coder:
    """A trained SparseCoder as a Coder."""
    own = (coder.encoder.weight, coder.encoder.bias, coder.W_dec, coder.b_dec)
    return Coder(*(value.data for value in own), active=coder.cfg.k)


def quality(coder: Coder, x: Float[Tensor, "samples width"]) -> dict[str, Any]:
    """Variance explained, mean number of features that fire (L0), share that never does, share of samples for each."""
    fires, left = torch.zeros(len(coder.bias)), 0.0
    for part in x.split(1024):
        values = coder.encode(part)
        left += float((coder.decode(values) - part).square().sum())
        fires += (values > 0).sum(0)
    fires /= len(x)
    total = float((x - x.mean(0)).square().sum())
    explained = 1 - left / total if total > 0 else float("nan")
    return {
        "explained": explained,
        "l0": float(fires.sum()),
        "dead": float((fires == 0).float().mean()),
        "fires": fires,
    }


WEIGHTS = ("encoder", "bias", "decoder", "centre")


def trainer(step: Step, site: Site) -> Callable[[Unit], pd.DataFrame]:
    """What `Step.table` computes the table of SAEs with: a row per seed (or one for `sae_file`) with the weights of a
    trained one, the SHA-256 of its safetensors bytes, and its quality on prompts of the confirmation half."""

    @cache
    def harvested() -> tuple[Samples, Samples]:
        own = [pair for pair in step.prompts() if pair.half == "confirmation"] or step.prompts()
        own = subsample(own, step.params.top_pairs)
        held = [prompt.ids for pair in own for prompt in (pair.clean, pair.corrupt)]
        return tuple(harvest(step.model, site, prompts) for prompts in (sentences(step), held))

    def compute(unit: Unit) -> pd.DataFrame:
        published = None
        if path := step.params.sae_file:  # before anything is computed
            published, origin = coders.read(path, step.model.unembed.weight.shape[1])
            coders.check_names(path, origin, site, step.params.model)
            coders.check_model(path, origin, site, step.model)
        samples, held = harvested()
        width = samples.values.shape[1]
        row: dict[str, Any] = {"seed": unit.options["seed"], "site": hooks.site_name(*site), "width": width}
        if published:
            coder = published
            row |= dict.fromkeys(("sha256", *WEIGHTS))
        else:
            own = {key: unit.options[key] for key in ("features", "active", "epochs", "seed")}
            trained = train(samples.values, **own)
            coder = coder_of(trained)
            row["sha256"] = hashlib.sha256(safetensors.torch.save(trained.state_dict())).hexdigest()
            row |= {name: getattr(coder, name).flatten().numpy() for name in WEIGHTS}
        every, last = quality(coder, held.values), quality(coder, held.values[held.last])
        row |= {"features": len(coder.bias), "active": coder.active or 0, "fires": every.pop("fires").numpy(), **every}
        row |= {"explained_train": quality(coder, samples.values)["explained"], "explained_last": last["explained"]}
        row |= {"l0_last": last["l0"], "samples": len(samples.values), "held_samples": len(held.values)}
        row |= {"norm": float(samples.values.norm(dim=1).mean()), "first_norm": samples.first_norm}
        return pd.DataFrame([row])

    return compute


def of_table(step: Step, table: pd.DataFrame) -> Coder:
    """The SAE that features are read with: the published one, or that of the first seed."""
    row = table.iloc[0]
    if step.params.sae_file:
        return coders.load(step.params.sae_file, row["width"], site_of(step), step.params.model)
    own = {name: torch.tensor(np.asarray(row[name], dtype=np.float32)) for name in WEIGHTS}
    own |= {name: own[name].unflatten(0, (-1, row["width"])) for name in ("encoder", "decoder")}
    return Coder(**own, active=row["active"])
