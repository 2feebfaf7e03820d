"""TransformerLens: `run_with_hooks` per site, on a bridge around the same weights."""

from __future__ import annotations

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from bench.peers.work import TASKS, Run, Task, Tool, Work


def prepare(work: Work) -> dict[str, Run]:
    """A hooked forward pass for each site."""
    bridge = TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        hf_model=work.network(),
        tokenizer=work.model.tokenizer,
        device="cpu",
        dtype=torch.float32,
    )

    @torch.no_grad()
    def with_hooks(task: Task) -> Tensor:
        base, positions, out = work.base(task), work.positions(task), []
        name = "blocks.{}.attn.hook_z" if task.component == "head" else "blocks.{}.mlp.hook_out"
        cache = {}
        if not task.zero:
            names = {name.format(layer) for layer in range(work.model.n_layers)}
            _, cache = bridge.run_with_cache(work.source(), names_filter=names.__contains__, logits_to_keep=1)
        for site in work.sites(task):
            place, head = name.format(site.layer), site.head

            def edit(activation: Tensor, hook: object, place: str = place, head: int = head) -> Tensor:
                if task.zero:
                    activation[:, positions] = 0
                else:  # (batch, tokens, heads, head size)
                    activation[:, positions, head] = cache[place][:, positions, head]
                return activation

            out.append(bridge.run_with_hooks(base, fwd_hooks=[(place, edit)], logits_to_keep=1)[0, -1])
        return torch.stack(out)

    return {task.name: lambda task=task: with_hooks(task) for task in TASKS}


NOTE = (
    "`run_with_hooks` per site on a `TransformerBridge` with raw weights, `logits_to_keep=1`. Its path patching "
    "(`get_act_patch_direct_path`) is another computation: one head into one later head at a time, norms held"
)
TOOLS = [Tool("TransformerLens", "transformer-lens", NOTE, prepare)]
