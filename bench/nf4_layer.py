"""One full-size layer of the 70B shape in nf4: the share of the device's rate that its matrix products reach.

    python -m bench.nf4_layer [--shape 70b|quarter|small|tiny] [--dtype bfloat16|float32] [--out FOLDER] [--until TIME]

1. One layer of random weights, made as in `bench.scale_70b`; a card's own dispatch chooses the kernels.
2. Rows of one token behind a cached prompt are run through it, as in a growing pass at `last`: 5,000 of them, and fewer
   and more.
3. Each of its matrices multiplies 5,000 rows by itself: packed, and, for comparison, unpacked beforehand.
4. A rate is set beside that of the card's data sheet (data/devices.json), of which `make plan` assumes a share, and
   beside that of a plain square product of the same dtype in this process.

Written after each part (`bench.parts`) to nf4_layer.json in bench/results or --out, to nf4_layer_<shape>.json for other
shapes than the full one:
{"shape", "device", "machine", "versions", "commit", "dirty", "threads", "dtype", "matrix_product_tflops",
 "sheet", "sheet_tflops",  # null for a device that the sheets do not have
 "assumed_share",
 "layer": [{"rows", "seconds", "tflops", "share_of_sheet", "share_of_product"}],
 "matrices": [{"name", "outputs", "inputs", "rows", "seconds", "unpacked_seconds", "tflops", "share_of_sheet",
               "share_of_product"}]}
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import parts
from bench.scale_70b import (
    KEYS,
    MANY,
    RESULTS,
    SHAPES,
    build,
    default_dtype,
    default_shape,
    made_up_pair,
    product_rate,
    seconds,
    weight_shape,
)
from bench.sweep import operations
from lib import models, single_pass
from lib.hooks import Model
from pipeline import machine
from pipeline.params import ROOT

ROWS = 5000
SIZES = (ROWS, MANY, 4 * ROWS)  # rows through the whole layer
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sheet_of(device: str, sheets: dict[str, Any]) -> str | None:
    """The name in data/devices.json of a card that torch calls `device`, None where it is not there."""
    own = words(device)
    return next((name for name in sheets if words(name) <= own or own <= words(name)), None)


def words(name: str) -> set[str]:
    """The words of a card's name: "NVIDIA A100-SXM4-80GB" has four."""
    return set(re.split(r"[\s-]+", name))


class Measurement:
    """The parts of the result, in the order in which they are measured."""

    def __init__(self, shape: str, dtype: str) -> None:
        self.name, self.dtype = shape, models.DTYPES[dtype]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        known = json.loads((ROOT / "data" / "devices.json").read_text(encoding="utf-8"))
        sheet = sheet_of(device, known["devices"])
        self.model: Model | None = None
        self.result: dict[str, Any] = {
            "shape": dict(zip(KEYS, (1, *SHAPES[shape][1:]), strict=True)),
            "device": device,
            "machine": machine.facts(),
            "versions": machine.versions(),
            **machine.commit(),
            "threads": torch.get_num_threads(),
            "dtype": dtype,
            "sheet": sheet,
            "sheet_tflops": known["devices"][sheet][f"{dtype}_tflops"] if sheet else None,
            "assumed_share": known["utilisation"]["quantised"],
        }

    def parts(self) -> dict[str, Callable[[], None]]:
        """Name and function of each part; each adds to the result."""
        return {"model": self.build, "layer": self.layer, "matrices": self.matrices}

    def build(self) -> None:
        """The layer, and how fast the device multiplies."""
        self.model = build(self.name, "nf4", self.dtype, self.device, layers=1)
        rate = product_rate(self.dtype, self.device, SHAPES[self.name][4])
        self.result["matrix_product_tflops"] = round(rate / 1e12, 4)

    @torch.no_grad()
    def layer(self) -> None:
        """Rows of one token through the whole layer, behind a cached prompt."""
        model, pair = self.model, made_up_pair(SHAPES[self.name][-1])
        ids = torch.tensor([pair.corrupt.ids], device=model.device)
        tokens = ids.shape[1]
        base = single_pass.base_run(model, ids, [tokens - 1], ())
        for rows in SIZES:
            owner = torch.zeros(rows, dtype=torch.long, device=model.device)
            inputs = {
                "input_ids": ids[:, -1:].expand(rows, 1),
                "past_key_values": single_pass.SharedPrefix(base.cache, tokens - 1, owner),
                "position_ids": torch.tensor([[tokens - 1]], device=model.device),
                "use_cache": True,
            }
            took = seconds(lambda inputs=inputs: model.body(**inputs), self.device, 5, 2)
            work = operations(model, tokens, 1, [0] * (rows - 1))["rows"]
            self.result.setdefault("layer", []).append({"rows": rows} | self.reached(work, took))

    @torch.no_grad()
    def matrices(self) -> None:
        """Each matrix by itself."""
        for name in MATRICES:
            (matrix,) = (m for path, m in self.model.model.named_modules() if path.endswith(name))
            outputs, inputs = weight_shape(matrix)
            x = torch.randn(ROWS, inputs, device=self.device, dtype=self.dtype)
            plain = torch.randn(outputs, inputs, device=self.device, dtype=self.dtype)
            took = seconds(lambda matrix=matrix, x=x: matrix(x), self.device, 5, 2)
            unpacked = seconds(lambda plain=plain, x=x: x @ plain.T, self.device, 5, 2)
            row = {"name": name, "outputs": outputs, "inputs": inputs, "rows": ROWS}
            row |= self.reached(2 * ROWS * outputs * inputs, took) | {"unpacked_seconds": round(unpacked, 6)}
            self.result.setdefault("matrices", []).append(row)

    def reached(self, work: float, took: float) -> dict[str, float | None]:
        """Seconds of so many operations, their rate and its shares."""
        rate, sheet = work / took / 1e12, self.result["sheet_tflops"]
        return {
            "seconds": round(took, 6),
            "tflops": round(rate, 4),
            "share_of_sheet": round(rate / sheet, 3) if sheet else None,
            "share_of_product": round(rate / self.result["matrix_product_tflops"], 3),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the result; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("auto", *SHAPES), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parts.add_options(parser, RESULTS)
    asked = parser.parse_args(arguments)
    shape = asked.shape if asked.shape != "auto" else default_shape()
    own = Measurement(shape, asked.dtype if asked.dtype != "auto" else default_dtype(shape))
    name = "nf4_layer" if shape == "70b" else f"nf4_layer_{shape}"
    return parts.run(own.parts(), own.result, asked.out / f"{name}.json", asked.until)


if __name__ == "__main__":
    sys.exit(main())
