"""What the minimal circuit and gradient attribution come to: tables, numbers and sentences, without the model.

The numbers that a page hands on (`numbers`), each of `estimate`, `low`, `high` (None where there are too few quads);
shares are of what the model has over the circuit without sites, F(model) - F(nothing), confirmation half:

circuit      `sites` (names in order of joining), `size`, `searched_to`, `reached` (whether the search got to the share
             of logit_diff asked for), `why` where there is no circuit.
             `faithfulness`, `faithfulness_discovery`: what the circuit keeps when all else is resampled (share).
             `faithfulness_counterfactual`: the same when all else is taken from the pair's corrupt prompt.
             `necessity`: what the model keeps when the circuit is resampled (share; 0 is best).
             `margin_share`: pairs whose answer still leads the candidates, kept by the circuit alone.
             `members`: per site `site`, `estimate`, `low`, `high`, `p` (what its removal from the circuit costs, logits,
             all members together), `share`, `matters`. `weakest` is the member of least cost; `failing` their names.
             `incompleteness`: the largest |F(C without K) - F(model without K)| over the sampled K (share), `subsets`
             how many, `worst` its members.
             `areas`: per order (`circuit`, `recovery`, `damage`, `attribution`, `random`) the area under faithfulness
             against size, and `minus` the circuit's area less that order's.
             `overlap`: with the slice of step 04, `sites` in both, `jaccard`, `p` by chance.
attribution  per method (`atp`, `atp_qk`, `grad_drop`) and kind of node (`sites`, `queries`): `spearman` (estimate, low,
             high), `kendall`, `top10`, `top20` (shares of the exact top found), `signs` (share right), `missed` (sites).
             `cost`: token-layers of each method, forward and backward, `ratio` exact over attribution.
"""
