"""What a planted model is asked to be: `planted:seed=3,rule=or,backup=0.7` as checked options.

A spec is `planted:` and then options `name=value`, separated by commas; several values of one are joined by +
(`decoys=attends+large`). Whatever is unknown, out of range or contradicts another option is a PlantedError of one
sentence. Torch is not needed here: make asks for keys without it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lib.errors import Refusal

PREFIX = "planted:"
HEADS = 8  # query heads of a layer
Decoy = Literal["attends", "large", "negative"]
Route = Literal["v", "k", "q"]


class PlantedError(Refusal):
    """A planted model that cannot be made, or a truth that is not this model's."""


def _several(value: Any) -> Any:
    return tuple(part for part in value.split("+") if part) if isinstance(value, str) else value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdigit() else value


class Options(BaseModel):
    """How a planted model is made. What no option changes stands in `planted.circuit`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0, description="which layers, heads, neurons and directions")
    n_layers: int = Field(12, ge=8, le=64, description="layers")
    task: Literal["superset", "odd_one_out"] = Field(
        "superset", description="odd_one_out: it also names the odd one of three, and the truth is of that"
    )
    shape: Literal["llama", "gpt2", "gemma2"] = Field("llama", description="the architecture")
    n_kv_heads: Annotated[Literal[2, 4] | None, BeforeValidator(_whole)] = Field(
        None, description=f"key-value heads, over which {HEADS} query heads are shared; 4, but of gpt2 as many"
    )
    logits: float = Field(10, gt=0, le=1e5, description="logits that two names of one class give to its answer")
    rule: Literal["additive", "or", "and"] = Field("additive", description="how two names' classes become one answer")
    retrieval: int = Field(2, ge=2, le=4, description="heads that carry professions from the names to the last token")
    aggregator: Literal["mlp", "head", "both"] = Field("mlp", description="what turns professions into supersets")
    first: float = Field(0.5, gt=0, lt=1, description="share of the first name in what is carried; 0.5: both alike")
    between: float = Field(0, ge=0, le=0.9, description="share that travels by way of the tokens after the names")
    backup: float = Field(0, ge=0, le=1, description="share of the answer that a backup head restores; 0: none")
    backup_read: Literal["unembedding", "mlp"] = Field("unembedding", description="what reads the backup head")
    backup_wakes: Literal["silent", "unsaid"] = Field(
        "silent", description="the backup speaks where no class has been said, or where the names' own has not"
    )
    decoys: Annotated[tuple[Decoy, ...], BeforeValidator(_several)] = Field(
        (),
        description="attends: a head that reads names and writes nothing of use; large: a head and an MLP that write "
        "large vectors nobody reads; negative: an MLP that takes a share of the answer away",
    )
    class_only: bool = Field(False, description="a site without which one class is half as strong, and no other")
    class_only_by: Literal["mlp", "head"] = Field("mlp", description="what that site is")
    placebo: bool = Field(False, description="an attribute beside the class travels through the same sites")
    routes: Annotated[tuple[Route, ...], BeforeValidator(_several)] = Field(
        ("v",), description="k, q: beside values, a head that depends on names by its keys, on retrieval by its queries"
    )
    noise: float = Field(0, ge=0, le=10, description="size of what all else writes, per site; 0: nothing")
    rotated: bool = Field(False, description="the residual stream is turned at random: no code is along an axis")
    no_circuit: Literal["none", "constant", "random", "lookup"] = Field(
        "none",
        description="constant: the same logits for every prompt; random: random weights; lookup: one head copies the "
        "class of one name, whatever the other",
    )
    lookup: Literal["first", "second"] = Field("first", description="which name is looked up")

    def model_post_init(self, _: Any) -> None:
        """ValueError for options that contradict each other."""
        if self.no_circuit != "none":
            own = self.model_dump(exclude_defaults=True).keys()
            if idle := sorted(
                own - {"seed", "shape", "n_layers", "n_kv_heads", "no_circuit", "lookup", "logits", "noise", "rotated"}
            ):
                raise ValueError(f"{idle[0]} is of a circuit, and no_circuit={self.no_circuit} has none; leave one out")
        if self.task == "odd_one_out":
            for name in ("no_circuit", "rule", "first", "backup", "routes", "placebo"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} contradicts task=odd_one_out, which counts the names of each class")
        if self.backup and self.rule == "and":
            raise ValueError("backup contradicts rule=and: it would speak for two names of different classes")
        if self.aggregator != "mlp" and self.rule != "additive":
            raise ValueError(f"aggregator={self.aggregator} contradicts rule={self.rule}: a head only adds")
        if self.first != 0.5 and self.rule != "additive":
            raise ValueError(f"first={self.first:g} contradicts rule={self.rule}: shares of names are of a sum")
        if self.first != 0.5 and self.shape == "gemma2":
            raise ValueError(f"first={self.first:g} contradicts shape=gemma2, whose cap on scores changes shares")
        if self.class_only_by == "head" and self.rule != "additive":
            raise ValueError(f"class_only_by=head contradicts rule={self.rule}: a head only adds")
        self._needs("backup_read", self.backup, "says how a backup is made, and backup is 0; give it a ratio")
        self._needs("backup_wakes", self.backup, "says how a backup is made, and backup is 0; give it a ratio")
        self._needs("class_only_by", self.class_only, "says what a site is, and class_only is false; set it")
        self._needs("lookup", self.no_circuit == "lookup", "says which name no_circuit=lookup reads; ask for that")
        if self.shape == "gpt2" and self.n_kv_heads:
            raise ValueError("n_kv_heads contradicts shape=gpt2, whose heads share no keys and values; leave it out")
        for name in ("decoys", "routes"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} has the same value twice")
        if "v" not in self.routes:
            raise ValueError("routes must hold v: retrieval heads carry professions by their values")

    def _needs(self, name: str, given: Any, wrong: str) -> None:
        """ValueError where an option is set that says something of another, and that is not given."""
        if not given and getattr(self, name) != type(self).model_fields[name].default:
            raise ValueError(f"{name} {wrong}")

    @property
    def groups(self) -> int:
        """Key-value heads of a layer."""
        return HEADS if self.shape == "gpt2" else self.n_kv_heads or 4

    @property
    def spec(self) -> str:
        """The shortest spec that gives these options."""
        given = self.model_dump(exclude_defaults=True)
        texts = {name: "+".join(value) if isinstance(value, tuple) else str(value) for name, value in given.items()}
        return PREFIX + ",".join(f"{name}={text}" for name, text in texts.items())


def parse(spec: str) -> Options:
    """The options of a spec; PlantedError in one sentence for whatever is wrong with it."""
    if not spec.startswith(PREFIX):
        raise PlantedError(f"model {spec!r} is no planted one: begin it with {PREFIX}")
    given: dict[str, str] = {}
    for part in filter(None, spec.removeprefix(PREFIX).split(",")):
        name, equals, value = (text.strip() for text in part.partition("="))
        if name not in Options.model_fields:
            known = ", ".join(Options.model_fields)
            raise PlantedError(f"model {spec!r}: there is no option {name!r}; there are {known}")
        if not equals or name in given:
            raise PlantedError(f"model {spec!r}: give {name} one value, as in {name}=...")
        given[name] = value
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"{part}: " for part in first["loc"][:1])
        raise PlantedError(f"model {spec!r}: {where}{first['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:
        raise PlantedError(f"model {spec!r}: {error}") from None


def fingerprint(spec: str) -> str:
    """A hash of the options, of the code that makes a model of them, and of the question's files."""
    own, question = Path(__file__).parent, Path(__file__).parents[1] / "data" / "questions" / "planted"
    digest = hashlib.sha256(parse(spec).spec.encode())
    for path in sorted([*own.glob("*.py"), *question.iterdir()]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
