"""The parameters of every step: one pydantic model each, with units, defaults and bounds in the field descriptions.

1. `Shared` holds the keys that every step takes; `Baselines`, `CoarseSweep`, ... add their own section's keys.
2. `STEPS` names the models in the order of the plan. `pipeline.params` reads profiles and notebooks into them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Component = Literal["resid", "attn", "mlp", "head"]
Ablation = Literal["zero", "mean", "resample", "counterfactual"]
Role = Literal["name_a", "name_b", "name_c", "names", "swapped", "last", "all"]


def _words(value: Any) -> Any:
    """`-p components head,mlp` comes as text; YAML gives lists. One word alone is a list of one."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return tuple(value) if isinstance(value, list) else value


def _layers(value: Any) -> Any:
    """`all`, `auto`, a number, a list, or papermill's text "21,22"."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return (value,)
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+(\s*,\s*-?\d+)*\s*,?\s*", value):
        return tuple(int(part) for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _numbers(value: Any) -> Any:
    """A list of numbers, one number, or papermill's text "-1,0,0.5"."""
    if isinstance(value, str):
        value = [float(word) if re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", word) else word for word in value.split(",")]
    value = [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    return tuple(float(x) if type(x) is int else x for x in value) if isinstance(value, (list, tuple)) else value


def _distinct(value: tuple | None) -> tuple | None:
    if value is not None and len(set(value)) < len(value):
        raise ValueError("names something twice")
    return value


Layer = Annotated[int, Field(ge=0)]
ONCE = AfterValidator(_distinct)
Layers = Annotated[
    Literal["all", "auto"] | Annotated[tuple[Layer, ...], Field(min_length=1), ONCE], BeforeValidator(_layers)
]
Components = Annotated[tuple[Component, ...], Field(min_length=1), BeforeValidator(_words), ONCE]
Ablations = Annotated[tuple[Ablation, ...], Field(min_length=1), BeforeValidator(_words), ONCE]
Roles = Annotated[tuple[Role, ...], BeforeValidator(_words), ONCE]
Words = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_words), ONCE]
# papermill reads "True" as a truth value and leaves "true" a text
Flag = Annotated[bool, BeforeValidator(lambda value: {"true": True, "false": False}.get(str(value).lower(), value))]
Share = Annotated[float, Field(gt=0, le=1)]
Sites = Annotated[
    tuple[Annotated[str, Field(pattern=r"^(\d+\.\d+|(mlp|attn) \d+)$")], ...] | None, BeforeValidator(_words), ONCE
]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), BeforeValidator(_layers), ONCE]
Doses = Annotated[tuple[float, ...], Field(min_length=1), BeforeValidator(_numbers), ONCE]
SaeSite = Annotated[str, Field(pattern=r"^(mlp|resid) \d+$")]


class Workers(BaseModel):
    """Who does the work units: this process, or actors on a Ray cluster that each hold the model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    engine: Literal["local", "ray"] = Field("local", description="local: this process; ray: actors on a Ray cluster")
    address: str = Field("auto", description="auto: the cluster this machine belongs to; local: start one; host:port")
    replicas: int = Field(1, ge=1, description="actors that each hold the model")
    gpus_per_replica: float = Field(0, ge=0, description="GPUs of each")


class Shared(BaseModel):
    """The keys that every step takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    profile: str = Field(
        "smollm2-135m",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of params/<profile>.yaml and results/<profile>",
    )
    model: str = Field(
        min_length=1, description="package:name/file.gguf, a folder, a hub id owner/name, or config:file.json"
    )
    model_sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="SHA-256 of the weights file, checked at load"
    )
    dtype: Literal["float32", "float64", "float16", "bfloat16"] = Field(
        "float32", description="type of the weights and activations"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N or mps")
    device_map: str | dict[str, int | str] | None = Field(
        None, description="accelerate's device map, for models on several devices"
    )
    quantisation: Literal["nf4", "int8"] | None = Field(None, description="load in 4 or 8 bits through bitsandbytes")
    max_memory: dict[int | str, float] | None = Field(None, description="GB per device, for device_map")
    offload_folder: str | None = Field(None, description="folder for weights that fit on no device")
    chat_template: Flag = Field(False, description="wrap prompts in the tokenizer's chat template")
    task: Literal["superset", "bi_association", "odd_one_out", "one_name"] = Field(
        "superset", description="what is asked"
    )
    template: str | None = Field(
        None, description="a template of the task, or its text with {a} and {b}; default: the task's first"
    )
    attributes: Words = Field(("profession", "school"), description="attributes listed in the bi-association prompt")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random choice")
    full_profile: str | None = Field(None, description="the profile that this one is a quicker form of, if it is")
    layers: Layers = Field(
        "all", description="all, auto (the critical layers of step 02), or a list of layers, counted from 0"
    )
    aggregator_layer: Literal["auto"] | Layer = Field(
        "auto", description="a layer to test as the aggregator; auto: step 02 chooses"
    )
    pairs_file: str | None = Field(None, description="CSV of your own pairs, instead of those of step 01")
    people_file: str = Field("data/people.csv", description="table of people that pairs are made of")
    results_dir: str | None = Field(None, description="folder for results; default results/<profile>")
    memory: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto", description="GB that one pass may take; auto: from the machine's size"
    )
    workers: Workers = Field(Workers(), description="who does the work: engine, address, replicas, gpus_per_replica")
    overwrite: Flag = Field(False, description="replace results that other parameters wrote")
    level: float = Field(0.95, gt=0.5, lt=1, description="confidence level of intervals")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples over quads")
    flips: int = Field(2000, ge=100, description="sign flips of whole quads in max-T tests")
    min_pairs: int = Field(
        40,
        ge=1,
        description="fewest pairs with a margin above 0 (clean) and below 0 (corrupt) for a task to count as done",
    )
    critical_share: Share = Field(
        0.8, description="share of the denoise curve's rises that the critical layers add up to"
    )
    slice_share: Share = Field(0.8, description="joint recovery and damage that the critical slice must reach")
    slice_limit: int = Field(24, ge=1, description="most heads and MLPs in the critical slice")
    restores_share: Share = Field(0.5, description="share of pairs whose top candidate must become the clean answer")
    restores_recovery: float = Field(
        0.5, ge=0, le=1, description="what the lower end of recovery's interval must exceed"
    )


class Baselines(Shared):
    """01: people, quads and pairs; does the model do the task at all?"""

    templates: Words = Field(("profession_both",), description="templates whose accuracy is measured")
    quads_per_half: int = Field(100, ge=1, description="most quads in each half")
    pairs_per_quad: int = Field(2, ge=1, le=4, description="pairs taken from a quad")
    fame_tolerance: float = Field(
        0.25,
        gt=0,
        description="largest difference in fame between matched people, nats of log-probability",
    )
    min_bucket: int = Field(
        4, ge=2, description="fewest quads of one half, template and token counts (means and resamples come from them)"
    )
    odd_one_out_items: int = Field(60, ge=0, description="generated odd-one-out items, beside the plan's six")
    accuracy_pairs: int = Field(200, ge=1, description="pairs per template on which accuracy is measured")


class CoarseSweep(Shared):
    """02: the residual stream at the names and at the last token, every layer."""

    roles: Roles = Field(("name_a", "name_b", "names", "last"), min_length=1, description="token roles that are swept")
    pairs: int | None = Field(None, ge=1, description="pairs at `last`; default all")
    name_pairs: int = Field(80, ge=1, description="pairs at the name roles")


class Necessity(Shared):
    """03: every site ablated in the clean run."""

    components: Components = Field(("resid", "attn", "mlp", "head"), description="components swept at `last`")
    ablations: Ablations = Field(
        ("zero", "mean", "resample", "counterfactual"), description="kinds of ablation at `last`"
    )
    pairs: int | None = Field(None, ge=1, description="pairs at `last`; default all")
    name_roles: Roles = Field(("name_a", "name_b", "names"), description="name roles swept, counterfactual only")
    name_components: Components = Field(("resid", "attn", "mlp"), description="components swept at the name roles")
    name_pairs: int = Field(40, ge=1, description="pairs at the name roles")


class Sufficiency(Shared):
    """04: every site patched from the clean into the corrupt run."""

    components: Components = Field(("resid", "attn", "mlp", "head"), description="components swept at `last`")
    pairs: int | None = Field(None, ge=1, description="pairs at `last`; default all")


class OfSlice(Shared):
    """What the steps about the critical slice share."""

    slice_sites: Sites = Field(
        None, description="the slice, as heads and modules such as 21.6,mlp 23; default: that of step 04"
    )


class Hydra(OfSlice):
    """05: the slice ablated; who stands in for it?"""

    pairs: int | None = Field(None, ge=1, description="pairs on which the slice is ablated; default all")
    ablations: Ablations = Field(
        ("resample", "zero"), description="how the slice is ablated; the first one decides what is a backup"
    )
    rounds: int = Field(3, ge=1, description="most times that the slice is widened by the backups found")
    candidates: int = Field(8, ge=1, description="most candidates whose joint ablation is measured in a round")
    direct_floor: float = Field(0.5, gt=0, description="logits; single pairs count where the direct effect exceeds it")


class RetrievalHeads(OfSlice):
    """06: what feeds the slice; path patching, value vectors, attention, path ablation."""

    pairs: int | None = Field(None, ge=1, description="pairs on which senders at `last` are patched; default all")
    name_pairs: int = Field(60, ge=1, description="pairs on which senders at the names are patched")
    probe_people: int = Field(200, ge=1, description="people asked about with the one-name templates")
    mlps: Literal["recomputed", "frozen"] = Field(
        "recomputed", description="MLPs between sender and receiver: recomputed, or frozen at their base values"
    )
    candidates: int = Field(6, ge=1, description="most retrieval heads whose path is ablated")
    random_sets: int = Field(20, ge=2, description="sets of matched random heads whose path is ablated beside them")


class Generality(OfSlice):
    """07: the dense grid, class by class; templates never used for picking; the rule; negative controls."""

    pairs: int | None = Field(None, ge=1, description="most pairs of a template; default all")
    templates: Words = Field(
        ("profession_both", "both_famous", "common_both"), description="templates of the grid; the profile's own leads"
    )
    pairs_per_quad: int = Field(4, ge=1, le=4, description="pairs taken from a confirmation quad, own template")
    template_pairs: int = Field(2, ge=1, le=4, description="pairs taken from a confirmation quad, other templates")
    rule_prompts: int = Field(400, ge=1, description="prompts of two random people from which the rule is read")
    control_prompts: int = Field(60, ge=1, description="prompts of each negative control")
    random_sets: int = Field(5, ge=1, description="sets of random heads ablated")
    silence_margin: Share = Field(
        0.2, description="a control is silent if no candidate moves by this share of the ordinary effect"
    )
    general_floor: Share = Field(0.5, description="what joint recovery and damage must exceed in every class")


class Subspace(OfSlice):
    """08: probes, the rank of the map, patching and steering along directions."""

    pairs: int | None = Field(None, ge=1, description="pairs on which directions are patched; default all")
    probe_people: int = Field(500, ge=1, description="most people that probes ask about with one-name prompts")
    probe_template: str = Field("common_both", description="the pairs' second template, which probes are tried in")
    probe_questions: Words = Field(
        ("profession_is", "What {a} does for a living is"), description="one-name templates; the first one leads"
    )
    probe_folds: int = Field(5, ge=2, description="folds of the probes")
    permutations: int = Field(20, ge=2, description="permutations of the labels in the probes' null")
    ranks: Counts = Field((1, 2, 3, 4, 8, 14), description="ranks of the reduced probes, beside the largest there is")
    dimensions: Counts = Field((1, 2, 3, 4, 8, 16), description="numbers of directions that are patched together")
    random_directions: int = Field(10, ge=2, description="norm-matched random subspaces patched beside each number")
    rotation_steps: int = Field(100, ge=1, description="optimiser steps in which a rotation is learned")
    templates: Words = Field(
        ("profession_both", "both_famous", "common_both"), description="templates that directions are moved between"
    )
    steering_pairs: int = Field(
        40, ge=1, description="prompts that are steered, of each kind: mixed, invented names, things"
    )
    doses: Doses = Field(
        (-2, -1, -0.5, 0, 0.5, 1, 2), description="multiples of class mean - mean of all classes that are added"
    )


class Neurons(OfSlice):
    """09: every MLP neuron of the slice's layers; features of sparse autoencoders."""

    pairs: int = Field(16, ge=1, description="pairs on which every neuron is swept")
    top_neurons: int = Field(50, ge=1, description="neurons of largest effect, swept on all pairs")
    top_pairs: int | None = Field(None, ge=1, description="pairs on which the top neurons are swept; default all")
    random_sets: int = Field(3, ge=1, description="sets of random neurons replaced beside the top ones")
    cards: int = Field(8, ge=1, description="neurons and features that get a card")
    sae_site: SaeSite | None = Field(
        None,
        description="where features are read: mlp 23 or resid 23; default: the MLP of the slice with most recovery",
    )
    sae_file: str | None = Field(None, description="folder or file of a published SAE, instead of training one")
    sae_features: int = Field(1024, ge=2, description="features of a trained SAE")
    sae_active: int = Field(32, ge=1, description="features that are active at once (k of the top-k)")
    sae_prompts: int = Field(3000, ge=1, description="sentences that activations are harvested from")
    sae_epochs: int = Field(4, ge=1, description="passes over the harvested activations")
    sae_seeds: int = Field(3, ge=2, description="trainings from different seeds, whose features are compared")
    sae_selective: Share = Field(
        0.8, description="area under the curve from which a feature or a neuron counts as selective for a superset"
    )
    budgets: Counts = Field(
        (1, 2, 4, 8, 16, 32), description="numbers of neurons, features and directions patched together"
    )


class Story(OfSlice):
    """10: the claims ledger, the minimal circuit and the sentence."""

    pairs: int | None = Field(None, ge=1, description="pairs on which circuits are tested; default all")
    search_pairs: int = Field(40, ge=1, description="discovery pairs on which the circuit is searched")
    circuit_limit: int = Field(40, ge=1, description="most sites of a circuit")
    faithful_share: Share = Field(0.8, description="share of logit_diff that a faithful circuit keeps")
    random_sets: int = Field(10, ge=2, description="random circuits of each size")
    subsets: int = Field(20, ge=2, description="subsets of the circuit in the test of completeness")
    attribution_pairs: int = Field(
        32, ge=1, description="pairs on which gradient attribution is compared with patching"
    )
    claims: dict[str, float] = Field(default_factory=dict, description="threshold of each claim; none may be missing")


STEPS: dict[str, type[Shared]] = {
    "baselines": Baselines,
    "coarse_sweep": CoarseSweep,
    "necessity": Necessity,
    "sufficiency": Sufficiency,
    "hydra": Hydra,
    "retrieval_heads": RetrievalHeads,
    "generality": Generality,
    "subspace": Subspace,
    "neurons": Neurons,
    "story": Story,
}
