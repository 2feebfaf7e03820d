"""Loading a decoder and the few handles everything else uses, proved on one prompt.

1. `load` turns a model string into a Hugging Face causal model: a GGUF file, of one's own or inside an installed Python
   package, a local folder, a hub id, or a config file with seeded random weights. A type of model that no test proves
   is refused, and so are weights that are not those of their config.
2. `find_handles` names the modules the project touches, whatever the architecture calls them.
3. `prove` runs one prompt and checks that those modules are what they are taken for.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib import adapters, hooks, single_pass, tasks, weights
from lib.hooks import Model, Site
from lib.single_pass import BaseRun, Row, base_run, grow, prove_base_rows, prove_same
from lib.weights import ModelError, reading, resolve

# Where each architecture keeps its parts; the first name that exists is taken. (path from the causal model, path from
# a block.) Most use the first of each, GPT-2 the second, a decoder inside a model that sees images the third.
NAMES = {
    "blocks": ("model.layers", "transformer.h", "model.language_model.layers"),
    "final_norm": ("model.norm", "transformer.ln_f", "model.language_model.norm"),
    "body": ("model.language_model", "model", "transformer"),
    "attn": ("self_attn", "attn"),
    "o_proj": ("o_proj", "c_proj"),
    "mlp": ("mlp",),
    "down_proj": hooks.DOWN_PROJS,
}
# The types of config for which tests compare sweeps, path patching and read-outs with one forward pass per site. That
# modules have the right names is not enough: what stands between them (a norm over all heads, a factor, blocks side by
# side) may make a right-looking number wrong.
PROVED = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "gemma2", "gemma3", "gemma3_text")
PROVED += ("gpt2", "olmo2", "olmo3", "phi3", "granite", "smollm3")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
Logits = Float[np.ndarray, "prompts vocab"]
SHARED_TOKENS = 512  # fewest tokens that running a shared prefix by itself must spare
SPARE = 1024  # most rows of an embedding that no token has, for round sizes (421 in Qwen 2.5)


def tokenizer(spec: str, sha256: str | None = None, reader: str | None = None) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model string, without the weights. `reader` is the model string that its tokens are for, where
    that is another. ModelError for one that no prompt could be read with."""
    where, _, local = resolve(spec, sha256)
    if spec.startswith("config:"):
        raise ModelError(NO_WORDS.format(spec))
    return words_of(spec, where, local, reader or spec)


NO_WORDS = "model {!r} has no tokenizer; name the model whose it takes as tokenizer"
# Of which a folder with a tokenizer has one. Without any, transformers may make up one that knows no word.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")


def words_of(spec: str, where: str, local: bool, reader: str) -> transformers.PreTrainedTokenizerBase:
    """`tokenizer`, of what `resolve` gave."""
    folder = Path(where)
    if folder.is_dir() and not any(path.name.startswith(VOCABULARIES) for path in folder.iterdir()):
        raise ModelError(NO_WORDS.format(spec))
    with reading(spec, where):
        words = transformers.AutoTokenizer.from_pretrained(where, local_files_only=local, trust_remote_code=False)
    try:
        tasks.encoded(words, "both")
    except ValueError as error:
        raise ModelError(f"model {spec!r}: {error}") from None
    config = weights.config_of(reader)
    context = getattr(config and config.get_text_config(), "max_position_embeddings", None)
    words.model_max_length = min(words.model_max_length, context or words.model_max_length)  # what the model reads
    return words


@dataclass(frozen=True)
class Loading:
    """How a model is loaded. ModelError for what does not exist or does not go together."""

    sha256: str | None = None  # checked where the weights are a single local file, and refused elsewhere
    dtype: str = "float32"
    device: str = "auto"
    device_map: str | dict | None = None  # accelerate's, as are the two below that are given with it
    quantisation: str | None = None  # "nf4" or "int8" (bitsandbytes)
    max_memory: dict | None = None  # GB per device
    offload_folder: str | None = None  # for weights on disk that cannot be read where they lie
    attention: str | None = None  # overrides the attention kernel
    seed: int = 0  # of random weights
    tokenizer: str | None = None  # the model string whose tokenizer is taken; None: the model's own
    adapter: str | None = None  # folder of a LoRA adapter to merge

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ModelError(f"dtype {self.dtype!r} is unknown; allowed are {', '.join(DTYPES)}")
        if self.device_map is None and (self.max_memory or self.offload_folder):
            idle = "max_memory" if self.max_memory else "offload_folder"
            raise ModelError(f"{idle} is for models on several devices: give device_map: auto with it, or leave it out")
        if self.adapter is not None and (self.device_map or self.quantisation):
            raise ModelError(f"adapter {self.adapter!r} is merged into plain weights: without quantisation, device_map")

    def arguments(self, random: bool, placed: str | dict) -> dict[str, Any]:
        """Those of transformers' loader, or of its maker of random weights."""
        out = {"dtype": DTYPES[self.dtype], "trust_remote_code": False, "attn_implementation": self.attention}
        out |= quantised(self.quantisation, DTYPES[self.dtype])
        if random:
            return out
        memory = {key: f"{value}GiB" for key, value in self.max_memory.items()} if self.max_memory else None
        spread = self.device_map or self.quantisation
        out |= {"use_safetensors": True, "offload_folder": self.offload_folder, "max_memory": memory}
        out |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `check_loaded` refuses them by name
        return out | {"device_map": placed if spread else None}


def load(spec: str, **options: Any) -> Model:
    """Load a model and prove its handles.

    `spec` is `package:name/file.gguf`, a file.gguf, a folder, a hub id, or `config:file.json` (random weights, for
    shape tests; without a tokenizer, unless one is named). The options are the fields of `Loading`. Raises ModelError
    with what was wrong and what to do.
    """
    how, random = Loading(**options), spec.startswith("config:")
    placed = how.device_map or pick_device(how.device)
    weights.check(spec, how.dtype, placed, how.quantisation, how.max_memory, how.offload_folder)
    transformers.logging.disable_progress_bar()
    where, actual, local = resolve(spec, how.sha256)
    if random and (how.quantisation or how.device_map):
        raise ModelError(f"model {spec!r} has random weights: quantisation and device_map do not apply")
    model, words = fetched(spec, where, local, how, how.arguments(random, placed))
    if how.adapter is not None:
        adapters.merge(model, how.adapter, spec)
        spec = f"{spec} with {Path(how.adapter).name}"
    if how.device_map is None and how.quantisation is None:
        model = model.to(placed)
    handles = find_handles(model.eval().requires_grad_(False), words, spec, actual, how.quantisation)
    prove(handles)
    return handles


def fetched(
    spec: str, where: str, local: bool, how: Loading, arguments: dict[str, Any]
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase | None]:
    """The causal model and its tokenizer, once its type is known to be one of PROVED."""
    words, random = None if how.tokenizer is None else tokenizer(how.tokenizer, reader=spec), spec.startswith("config:")
    with reading(spec, where):
        config = transformers.AutoConfig.from_pretrained(where, local_files_only=local, trust_remote_code=False)
    if config.model_type not in PROVED:
        raise ModelError(
            f"model {spec!r}: looked for one of the types that tests prove ({', '.join(PROVED)}), found "
            f"{config.model_type!r}, whose sweeps and paths nothing has shown to be right"
        )
    if packed := getattr(config, "quantization_config", None):
        raise ModelError(
            f"model {spec!r} has weights that are quantised already, by {packed.get('quant_method')}; give those that "
            "they were made of, and quantisation: nf4 or int8 where they are too large"
        )
    if hasattr(config.get_text_config(), "num_experts_per_tok") and how.dtype == "float64":
        arguments["experts_implementation"] = "eager"  # the only kernel that has it
    if random:
        torch.manual_seed(how.seed)
        with reading(spec, where):
            model = transformers.AutoModelForCausalLM.from_config(config, **arguments).to(DTYPES[how.dtype])
    else:
        words = words_of(spec, where, local, spec) if words is None else words
        with reading(spec, where):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(where, local_files_only=local, **arguments)
        weights.check_loaded(spec, model, info)
    if words is not None:
        check_vocabulary(spec, len(model.get_input_embeddings().weight), how.tokenizer or spec, words)
    return model, words


def check_vocabulary(spec: str, rows: int, other: str, words: transformers.PreTrainedTokenizerBase) -> None:
    """ModelError where a token that a prompt may have is none of the model's `rows`, or where far fewer are used."""
    special, own = tasks.special_tokens(words), tasks.encoded(words, "both")[0]
    # special tokens that are not written before each prompt are refused in prompts (Gemma 3 has one too many)
    vocabulary = words.get_vocab().items()
    most = 1 + max((number for token, number in vocabulary if token not in special or number in own), default=-1)
    if most > rows or most < rows - SPARE and not spec.startswith("config:"):
        raise ModelError(
            f"model {spec!r} has {rows} tokens, and the tokenizer of {other!r} {most}: the two do not belong together"
        )


def pick_device(device: str) -> str:
    """`auto` takes CUDA, then Apple's MPS, then the CPU."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(kind for kind, here in found.items() if here)
    if (kind := device.split(":")[0]) not in found:
        raise ModelError(f"device {device!r} is unknown; allowed are auto, cpu, cuda, mps")
    if not found[kind]:
        raise ModelError(f"device {device!r} was asked for, but torch sees no such device; use device: auto or cpu")
    return device


def quantised(kind: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """The option that makes transformers load in 4 or 8 bits through bitsandbytes."""
    if kind is None:
        return {}
    if kind not in ("nf4", "int8"):
        raise ModelError(f"quantisation {kind!r} is unknown; allowed are nf4, int8, or none")
    if kind == "int8":
        # With a threshold, columns that any token of the batch makes stand out are computed in 16 bits for all: what
        # shares a pass then moves a row (SmolLM2: by 2.5 logits; without: 2e-5), and each layer waits for the device.
        return {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)}
    config = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, "bnb_4bit_use_double_quant": True}
    return {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True, **config)}


def named(root: nn.Module, part: str, names: tuple[str, ...], owner: str) -> nn.Module:
    """The first of the named submodules that exists, or ModelError with every name that was looked for."""
    for name in names:
        try:
            return root.get_submodule(name)
        except AttributeError:
            continue
    raise ModelError(f"{owner}: no {part} found; looked for {', '.join(names)}. Add its name to lib.models.NAMES")


def find_handles(
    model: transformers.PreTrainedModel,
    words: transformers.PreTrainedTokenizerBase | None,
    name: str,
    sha256: str | None = None,
    quantisation: str | None = None,
) -> Model:
    """The handles of a causal model, or ModelError naming the modules that were looked for."""
    config, owner = model.config.get_text_config(), type(model).__name__
    blocks = list(named(model, "blocks", NAMES["blocks"], owner))
    if not blocks:
        raise ModelError(f"{name}: {owner} has no blocks: its config has num_hidden_layers 0")
    attns = [named(block, "attention", NAMES["attn"], owner) for block in blocks]
    if not all(getattr(attn, "is_causal", True) for attn in attns):  # what a token sees would be held when it changes
        raise ModelError(
            f"{name}: {owner} attends in both directions; only models that read from left to right are swept"
        )
    heads, mlps = config.num_attention_heads, [named(block, "MLP", NAMES["mlp"], owner) for block in blocks]
    dense = all(any(hasattr(mlp, name) for name in NAMES["down_proj"]) for mlp in mlps)
    return Model(
        model=model,
        tokenizer=words,
        body=named(model, "decoder body", NAMES["body"], owner),
        blocks=blocks,
        attns=attns,
        o_projs=[named(attn, "o_proj", NAMES["o_proj"], owner) for attn in attns],
        mlps=mlps,
        down_projs=[named(mlp, "down_proj", NAMES["down_proj"], owner) for mlp in mlps] if dense else [],
        final_norm=named(model, "final norm", NAMES["final_norm"], owner),
        unembed=model.get_output_embeddings(),
        n_layers=len(blocks),
        n_heads=heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        softcap=getattr(config, "final_logit_softcapping", None),
        name=name,
        sha256=sha256,
        quantisation=quantisation,
        residual_scale=getattr(config, "residual_multiplier", 1.0),
        logit_scale=1 / getattr(config, "logits_scaling", 1.0),
    )


@torch.no_grad()
def prove(model: Model) -> None:
    """Check on one prompt that the handles are what they are taken for; ModelError names the module that is not.

    1. Each module's hook fires once, in the order of the layers. 2. o_proj of the captured heads equals the captured
    attention output, and down_proj of the captured neurons the MLP's. 3. The body, and the final norm of the last
    block, give the model's own logits, in fp32 or better. 4. Prompts of two lengths, read together, are what each is
    alone. 5. The base pass of the sweep (cached prefix, rows appended) equals the plain forward pass.
    """
    # spread over the vocabulary: its first tokens may all be reserved, with one embedding between them (SmolLM2)
    ids = torch.arange(1, 9, device=model.device)[None] * 997 % model.model.config.get_text_config().vocab_size
    ends = (0, model.n_layers - 1)
    sites = [Site(layer, component) for layer in ends for component in ("attn", "mlp", "resid")]
    fired: list[tuple[int, str]] = []
    inputs: dict[tuple[int, str], Tensor] = {}
    with hooks.removing() as handles, hooks.capture(model, sites) as seen:
        for key in itertools.product(range(model.n_layers), hooks.COMPONENTS):
            handles.append(hooks.on_activation(model, *key, lambda _, key=key: fired.append(key)))
        for key in itertools.product(ends, hooks.PARTS if model.down_projs else ("head",)):
            handles.append(hooks.on_activation(model, *key, lambda z, key=key: inputs.update({key: z.clone()})))
        with reading(model.name, ""):  # a config may ask for what cannot be computed
            logits = model.model(ids).logits[0]
    if not logits.isfinite().all():
        raise ModelError(
            f"{model.name}: the logits of a prompt are not finite in {model.dtype}: damaged weights, or a narrow dtype"
        )
    prove_order(model, fired)
    for (layer, part), z in inputs.items():
        prove_projection(model, layer, part, z, seen)
    base = base_run(model, ids, [5, 7])
    last = model.final_norm(seen[Site(model.n_layers - 1, "resid")])[:, -1]
    final = model.logits(torch.cat([base.hidden, last.to(base.hidden.device)]))
    off = (final - logits[-1].to(final.device)).abs().max().item()
    # the model's own logits are in its dtype: bf16 moves in steps of 0.125 at 16 to 32
    if not off <= model.noise_of(logits):
        raise ModelError(f"{model.name}: fp32 logits of the final hidden state differ from the model's own: {off:.2g}")
    if torch.finfo(model.dtype).bits == 16 and torch.equal(final, final.to(model.dtype).to(final.dtype)):
        raise ModelError(f"{model.name}: logits of the final hidden state are rounded to {model.dtype}, not fp32")
    prove_lengths(model, ids, seen[Site(0, "resid")])
    prove_identity(model, base)


def prove_lengths(model: Model, ids: Int[Tensor, "1 tokens"], resid: Float[Tensor, "1 tokens hidden"]) -> None:
    """ModelError unless a prompt and its beginning, read together, give the prompt's own residual stream of layer 0:
    padding that is seen, or that moves positions, does not."""
    prompts = [ids[0].tolist(), ids[0, :-2].tolist()]
    ends = [[len(prompt) - 1] for prompt in prompts]
    for places, run in single_pass.plain_runs(model, prompts, ends, ("resid",), size=2, layers=[0]):
        wanted = resid[0, [ends[place][0] for place in places]]
        off, loose = (run.activations["resid", 0][:, 0] - wanted).norm(), 1e-1 if model.low_precision else 1e-3
        if not off <= loose * wanted.norm():
            raise ModelError(f"{model.name}: prompts of two lengths, read together, are not what each is alone")


def prove_order(model: Model, fired: Sequence[tuple[int, str]]) -> None:
    """ModelError unless every hook fired once, a layer after the other, `resid` last in each."""
    for layer, component in itertools.product(range(model.n_layers), hooks.COMPONENTS):
        if (times := fired.count((layer, component))) != 1:
            raise ModelError(f"{model.name}: the hook at layer {layer} {component} fired {times} times, not once")
    for (layer, earlier), (later, component) in itertools.pairwise(fired):
        if (later, component == "resid") < (layer, earlier == "resid"):
            raise ModelError(f"{model.name}: layer {later} {component} was computed after layer {layer} {earlier}")


def prove_projection(model: Model, layer: int, part: str, z: Tensor, seen: Mapping[Site, Tensor]) -> None:
    """ModelError unless a layer's projection of its captured heads or neurons gives the captured module output."""
    if part == "head":
        whole, name, projection, width = "attn", "o_proj", model.o_projs[layer], model.n_heads * model.head_size
        wanted, output = f"{model.n_heads} heads x {model.head_size}", "attention"
    else:
        whole, name, projection, width = "mlp", "down_proj", model.down_projs[layer], model.n_neurons
        wanted, output = f"{width} neurons", "MLP"
    if z.shape[-1] != width:
        raise ModelError(f"{model.name}: the input of {name} at layer {layer} has width {z.shape[-1]}, not {wanted}")
    output_seen = seen[Site(layer, whole)]
    off = (projection(z) - output_seen).abs().max().item()
    if not off <= model.noise_of(output_seen):
        raise ModelError(
            f"{model.name}: {name} of the {part}s differs from the {output} output of layer {layer}: {off:.2g}"
        )


def prove_identity(model: Model, base: BaseRun) -> float:
    """The identity patch: every component of every layer replaced by its own value must change nothing; the prompts of
    the run take turns. Returns the largest logit difference; SweepError when it exceeds the noise of the dtype."""
    sites = hooks.all_sites(model, ("resid", "attn", "mlp"))
    sites += [Site(layer, "head", head) for layer in range(model.n_layers) for head in {0, model.n_heads - 1}]
    owners = itertools.cycle(range(len(base.ids)))
    rows = [Row((site,), owner, owner) for site, owner in zip(sites, owners, strict=False)]
    grown = grow(model, base, rows, base.activations)
    prove_base_rows(model, base, grown)
    logits, plain = model.logits(grown.hidden), model.logits(base.hidden)[[row.owner for row in rows]]
    words = "{}: the identity patch at {} moved a logit by {:.3g}"
    return prove_same(model, logits, plain, lambda index, off: words.format(model.name, rows[index].sites[0], off))


def prove_whole_residual(model: Model, ids: Int[Tensor, " tokens"], other: Int[Tensor, " tokens"]) -> float:
    """The whole residual stream of `other` at all positions into `ids`, at the first, middle and last layer, must give
    `other`'s logits, and all heads together what whole attention modules give. Returns the largest difference from
    `other`'s logits; SweepError when either exceeds the noise of the dtype."""
    everywhere, layers = range(len(ids)), sorted({0, model.n_layers // 2, model.n_layers - 1})
    base, source = (base_run(model, prompt[None], everywhere, ("resid", "attn", "head")) for prompt in (ids, other))
    sets = [tuple(hooks.all_sites(model, [part])) for part in ("attn", "head")]
    sets += [(Site(layer, "resid"),) for layer in layers]
    grown = grow(model, base, [Row(sites, 0, 0) for sites in sets], source.activations)
    (modules, heads, *logits), plain = model.logits(grown.hidden), model.logits(source.hidden)
    words = "{}: the whole residual of one run in another does not give its logits; they differ by {:.3g}"
    whole = prove_same(model, torch.stack(logits), plain, lambda _, off: words.format(model.name, off))
    words = "{}: all heads of one run in another do not give what its attention modules do; they differ by {:.3g}"
    prove_same(model, heads[None], modules[None], lambda _, off: words.format(model.name, off))
    return whole


@torch.no_grad()
def next_logits(model: Model, prompts: Sequence[Sequence[int]], batch_tokens: int = 8192) -> Logits:
    """fp32 logits of the next token for each prompt of token ids, in batches of one length."""
    if not prompts:
        raise ValueError("no prompts to score")
    out: np.ndarray | None = None
    for places in single_pass.index_batches(
        [len(ids) for ids in prompts], lambda length: max(1, batch_tokens // length)
    ):
        ids = single_pass.token_ids(model, [prompts[place] for place in places])
        logits = model.logits(final_states(model, ids)).float().cpu().numpy()
        if out is None:
            out = np.empty((len(prompts), logits.shape[-1]), dtype=np.float32)
        out[places] = logits
    return out


def final_states(model: Model, ids: Int[Tensor, "prompts tokens"]) -> Float[Tensor, "prompts hidden"]:
    """Final hidden states at the last token; a long beginning that all prompts share (worked examples) is run once."""
    shared = ((ids == ids[0]).all(0).tolist()[:-1] + [False]).index(False)
    if shared * (len(ids) - 1) < SHARED_TOKENS:
        return base_run(model, ids, (), (), cache=False).hidden
    prefix = base_run(model, ids[:1, :shared], (), ())
    return single_pass.rerun(model, prefix, shared, ids.new_zeros(len(ids)), ids[:, shared:])
