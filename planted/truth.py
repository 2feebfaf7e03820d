"""What is true of a planted model, as data: `truth.json` beside its weights.

Every number is in logits, computed from the construction (`planted.circuit`), for two names of one class in the clean
prompt and two of another in the corrupt one; the mean over all ordered pairs of classes, and over those of one answer.
The metric is logit_diff, logit(answer) - logit(corrupt answer). What noise adds to an effect is not in it, but in
`rule_logits`: they are of two names that may be of different classes, and where there is noise, of the weights
themselves, because little of it can wake a backup that one name leaves asleep by a narrow margin. With
task=odd_one_out there are three names, of which one is swapped, so that another is the odd one; no two of them have
first tokens whose codes share anything.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from planted.options import Options, PlantedError

FILE = "truth.json"
# What a site may be. What stands behind a dash has no part in the answer.
ROLES = {
    "gather": "head that brings a name's first token to its last, one or two tokens back; at the names",
    "order": "head that marks what follows the word between the names; at the names",
    "writer": "MLP that writes profession (and placebo attribute) at a name's last token; at the names",
    "collector": "head that copies professions to the tokens between; at `between`",
    "forwarder": "head that carries them on from there; at the last token, as are all below",
    "retrieval": "head that carries professions from the names, by its values",
    "key_routed": "head that writes for some classes, known by its keys at the names",
    "query_routed": "head that writes for some classes, known by its query: what retrieval heads wrote",
    "aggregator": "MLP or head that turns professions into supersets by the rule",
    "class_only": "MLP or head that does half of it for one class alone",
    "singler": "MLP that tells of which class one name is, and not two (odd-one-out)",
    "mover": "head that copies the name of that class (odd-one-out)",
    "negative": "MLP that takes a share of the answer away",
    "backup": "head that speaks up only when the answer has not been said",
    "backup_reader": "MLP that turns what the backup wrote into supersets",
    "lookup": "head that copies the class of one name, whatever the other (no circuit)",
    "attends": "decoy - head that attends to names",
    "large": "decoy - head or MLP that writes a large vector",
}


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Effect(Strict):
    """An effect in logits: over all ordered pairs of classes, and over those whose clean answer is one class."""

    mean: float
    by_answer: dict[str, float]


class Site(Strict):
    """One site with its exact effects. `position` is the role of the tokens at which it acts."""

    layer: int
    component: str  # head or mlp
    head: int | None
    position: str  # names, between or last
    role: str  # a key of ROLES
    share: float  # of what its kind does, as planted: a retrieval head's part of the professions, ...
    tokens: tuple[int, ...]  # lengths of names for which it does anything; a gatherer needs two or three
    necessity: dict[str, Effect]  # ablation (zero, counterfactual) -> logits lost in the clean prompt; gather: zero
    recovery: Effect | None  # logits won back in the corrupt prompt by its clean activation
    placebo: float  # logits of a placebo pair's gap that its clean activation wins back


class Edge(Strict):
    """Sender -> receiver, as indices of `sites` (receiver None: the final norm), by one of the receiver's inputs."""

    sender: int
    receiver: int | None
    input: str  # q, k, v; mlp; final
    noise: Effect  # logits lost where only this input sees the sender's corrupt activation


class Neuron(Strict):
    """A neuron of an aggregating MLP: the class it is of, and which part of that class's evidence it writes."""

    layer: int
    neuron: int
    superset: str
    share: float
    threshold: float  # names of the class (0, 1) above which it speaks


class Readable(Strict):
    """Where a linear probe reads something without error: after the block of which layer (-1: the embedding)."""

    what: str  # profession, superset, or the placebo attribute's name
    position: str  # the role; of a name its last token
    tokens: int | None  # of names of so many tokens; None: of all
    first: int  # after this layer's block and later; before it, at chance


class Backup(Strict):
    """What stands in for the answer: `ratio` of the aggregators' effect, where they are ablated by `ablations`."""

    site: int  # in `sites`
    reader: int | None  # the MLP that reads it; None: the unembedding
    ratio: float
    ablations: tuple[str, ...]  # by which the aggregator must be ablated for it to speak: zero, resample, ...


class Truth(Strict):
    """All of it. `sites` are those with a planted role; every other site of the model has the effect 0 (and noise)."""

    spec: str
    options: Options
    sha256: str  # of model.safetensors
    question: str
    classes: tuple[str, ...]
    gap: Effect  # clean less corrupt logit_diff; 0 where nothing depends on the names
    placebo_attribute: str
    placebo_gap: float
    rule: str | None  # None: there is no circuit
    rule_logits: dict[str, float]  # of a class above those of neither name: first alone of it, second, both
    arrived: tuple[float, ...]  # by layer: logits that the clean residual stream at the last token wins back after it
    sites: tuple[Site, ...]
    paths: tuple[Edge, ...]
    neurons: tuple[Neuron, ...]
    backup: Backup | None
    readable: tuple[Readable, ...]
    directions: dict[
        str, dict[str, list[float]]
    ]  # profession, superset, "at last" (means), ...: label -> residual vector
    class_only: str | None  # the class of the `class_only` site

    def of(self, *roles: str) -> list[Site]:
        """The sites of these roles."""
        return [site for site in self.sites if site.role in roles]


def read(folder: str | Path, sha256: str | None = None) -> Truth:
    """The truth of the model in a folder; PlantedError where there is none, or where it is another model's."""
    from lib.weights import sha256_of  # torch

    path = Path(folder) / FILE
    if not path.is_file():
        raise PlantedError(f"{path} is not there: the folder holds no planted model; make one with python -m planted")
    truth = Truth.model_validate_json(path.read_text(encoding="utf-8"))
    found = sha256 or sha256_of(path.with_name("model.safetensors"))
    if found != truth.sha256:
        raise PlantedError(
            f"{path} is the truth of other weights ({truth.sha256[:12]}, not {found[:12]}); make it again"
        )
    return truth
