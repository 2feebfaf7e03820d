"""pyvene: an intervenable model per site, as its tutorials do, with the clean values given as constant sources."""

from __future__ import annotations

import pyvene
import torch
from torch import Tensor

from bench.peers.work import TASKS, Run, Task, Tool, Work


def prepare(work: Work) -> dict[str, Run]:
    """A model with one intervention for each site."""
    network = work.network()

    def wrapped(places: list[dict]) -> pyvene.IntervenableModel:
        return pyvene.IntervenableModel(pyvene.IntervenableConfig(places), network)

    def collected(work: Work, positions: list[int]) -> list[Tensor]:
        """The inputs of every layer's o_proj in the clean prompt, (1, positions, width)."""
        kind = {"component": "attention_value_output", "unit": "pos", "max_number_of_units": len(positions)}
        kind["intervention_type"] = pyvene.CollectIntervention
        model = wrapped([kind | {"layer": layer} for layer in range(work.model.n_layers)])
        prompt = {"input_ids": work.source(), "logits_to_keep": 1}
        (_, values), _ = model(prompt, unit_locations={"base": [[positions]] * len(model.interventions)})
        return values

    @torch.no_grad()
    def one_by_one(task: Task) -> Tensor:
        prompt, positions, out = {"input_ids": work.base(task), "logits_to_keep": 1}, work.positions(task), []
        values = [] if task.zero else collected(work, positions)
        for site in work.sites(task):
            place = {"layer": site.layer, "max_number_of_units": len(positions)}
            if task.zero:
                place |= {"component": "mlp_output", "unit": "pos", "intervention_type": pyvene.ZeroIntervention}
                where = [[positions]]
            else:
                source = values[site.layer].reshape(1, len(positions), -1)[:, None, :, work.columns(site)]
                place |= {"component": "head_attention_value_output", "unit": "h.pos", "source_representation": source}
                where = [[[[site.head]], [positions]]]
            _, changed = wrapped([place])(prompt, unit_locations={"base": where}, use_cache=False)
            out.append(changed.logits[0, -1])
        return torch.stack(out)

    return {task.name: lambda task=task: one_by_one(task) for task in TASKS}


NOTE = (
    "an `IntervenableModel` per site, `logits_to_keep=1`; the clean values collected once and given as constant "
    "sources, which spares it a run of the source per site. Its tutorial has a recipe for path patching, which was not "
    "measured"
)
TOOLS = [Tool("pyvene", "pyvene", NOTE, prepare)]
