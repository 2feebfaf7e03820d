"""Every claim of the plan, in its order: the step it rests on, its numbers, its rule, the figure and the rows under it.

Thresholds stand in the profile, verdicts are `steps.story.claims`'s. A claim says nothing of any model. `measured` in a path
is what step 10 itself computes from an earlier step's table (`steps.story.page.measured`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Claim:
    """One claim of the plan and how it is decided."""

    id: str
    section: str  # of the plan
    text: str
    step: str
    quantity: str  # what is estimated, with its unit
    rule: Literal["above", "below", "within", "p", "count", "most", "own"]  # see steps.story.claims.RULES
    path: str  # of its numbers in the step's findings; see steps.story.claims.at
    figure: str  # a figure of the step's page
    rows: tuple[str, str] | None  # table in the results folder, and the rows of it
    threshold_from: str | None = None  # the parameter that is its threshold, `step.key` or a shared key; else `claims`
    pick: Literal["first", "largest", "weakest", "count"] = "first"  # which row of several; weakest: lowest lower end
    columns: tuple[str | None, str | None, str | None] = ("estimate", "low", "high")
    p: str | None = None  # column of a p value
    centre: float = 0.0  # of the rule `within`
    tests: str | None = None  # rule `count`: path of the tests that were counted
    requires: tuple[str, str] | None = None  # a path that must hold something, and what it means if it does not
    excludes: tuple[str, str] | None = None  # a path that must hold nothing, and what it means if it does
    companion: str | None = None  # a claim about another task, which this profile does not measure


COARSE = ("coarse_sweep", "direction == 'denoise' and position == 'last' and half == 'confirmation'")
GRID = ("generality.joint", "site_set == 0")
RULE = ("generality.rule", "n_a + n_b > 0")
GROUPS = "receivers == '{}' and mlps == '{}' and half == 'confirmation'"
PROBE = "kind == '{}' and target == '{}' and position == '{}' and folds == 'people'"
CIRCUIT = ("story.circuits", "half == 'confirmation'")
SHARE = "share of the clean-to-corrupt gap"


def accuracy(name: str, section: str, text: str, task: str, template: str | None, **more: str) -> Claim:
    """A claim about a task's accuracy against chance."""
    where = f"task={task}" + (f",template={template}" if template else "")
    query = f"task == '{task}'" + (" and template == {template!r}" if template else "")
    return Claim(
        name, section, text, "baselines", "accuracy (share of prompts), against chance", "p", f"accuracy[{where}]",
        "fig-accuracy", ("baselines", query), p="p", **more,
    )  # fmt: skip


def carried(name: str, section: str, text: str, senders: str, receivers: str, mlps: str, **more: tuple) -> Claim:
    """A claim about what a group of senders at the names carries into the slice's heads."""
    path = f"carried[senders={senders},receivers={receivers},mlps={mlps}]"
    rows = ("retrieval_heads.groups", GROUPS.format(receivers, mlps))
    return Claim(name, section, text, "retrieval_heads", SHARE, "above", path, "fig-groups", rows, **more)


def held(name: str, text: str, path: str, figure: str, rows: tuple[str, str] = GRID) -> Claim:
    """A claim that the circuit holds in every one of some groups of pairs: the weakest decides."""
    quantity = "joint damage or recovery, the weakest group's " + f"({SHARE})"
    return Claim(name, "3", text, "generality", quantity, "above", path, figure, rows, "generality.general_floor",
                 "weakest")  # fmt: skip


def control(name: str, kind: str, text: str) -> Claim:
    """A claim about one negative control, decided by step 07's equivalence tests."""
    return Claim(
        f"control_{name}", "3", text, "generality", "largest change of a candidate's logit, as a share of the ordinary "
        "effect", "own", f"controls[control={kind},scoring=centred]", "fig-generality-controls",
        ("generality.controls", "ablation == 'mean'"), "generality.silence_margin", columns=(None, None, None), p="p",
    )  # fmt: skip


def additive(name: str, text: str, centre: float) -> Claim:
    """A claim about the second name's step as a share of the first's: 0 under OR, 1 if names add up."""
    return Claim(name, "3", text, "generality", "the second name's step over the first's (ratio)", "within",
                 "rule.ratio", "fig-generality-rule", RULE, centre=centre)  # fmt: skip


def features(other: str, text: str) -> Claim:
    """A claim about what SAE features do beside other units at equal budget: the weakest budget decides."""
    return Claim(
        f"features_beat_{other.split()[0]}", "4.3", text, "neurons", "recovery by features less that of the others, at "
        "the budget least in their favour (logits)", "above", f"features.compared[other={other},quantity=recovery]",
        "fig-neurons-feature-budgets", ("neurons.features", "half == 'confirmation'"), pick="weakest",
    )  # fmt: skip


def order(name: str, text: str) -> Claim:
    """A claim about the area under the circuit's curve of faithfulness against size beside another order's."""
    return Claim(
        f"circuit_beats_{name}", "4, outcome", text, "story", "area under faithfulness against size, the circuit's "
        "less the other's (share)", "above", f"circuit.areas[order={name}]", "fig-circuit-curves", CIRCUIT,
        columns=("minus_estimate", "minus_low", "minus_high"),
    )  # fmt: skip


def attributed(nodes: str, method: str, whose: str) -> Claim:
    """A claim about gradient attribution as a cheap stand-in for exact patching."""
    return Claim(
        f"attribution_{nodes}", "4, outcome", f"Gradient attribution ranks {whose} effects as exact patching does.",
        "story", "Spearman's correlation over nodes", "above", f"attribution.methods[nodes={nodes},method={method}]",
        "fig-attribution", ("story.attribution", "pair_id.notna()"),
    )  # fmt: skip


CLAIMS = (
    # --- guard-rails ---
    accuracy("task_done", "guard-rails", "The model does the task above chance.", "{task}", "{template}"),
    Claim("fame_matched", "guard-rails", "Clean and corrupt names are matched in fame.", "baselines",
          "difference in fame between the two sides of a pair (nats)", "below", "measured.fame", "fig-fame",
          ("pairs", "fame_clean.notna()"), "baselines.fame_tolerance"),
    # --- the coarse sweep ---
    Claim("critical_layers", "coarse sweep", "A few critical layers, picked on one half of the quads, bring the answer "
          "to the last token in the other half as well.", "coarse_sweep", "their rises' share of the recovery curve at "
          "`last`", "above", "measured.critical_layers", "fig-coarse",
          COARSE, "critical_share"),
    Claim("middle_layers", "coarse sweep", "The signal moves from the names to the last token in the middle layers: "
          "most of it has arrived when two thirds of the layers are done.", "coarse_sweep", "recovery at `last` after "
          "two thirds of the layers", "above", "measured.middle_layers", "fig-coarse",
          COARSE),
    Claim("one_layer", "1", "One layer is the aggregator.", "coarse_sweep", "rise of the layer named in the profile, "
          "else of the largest on the discovery half (share of the recovery curve at `last`)", "above",
          "measured.one_layer", "fig-coarse", COARSE),
    # --- 1 necessity, sufficiency, hydra ---
    Claim("slice_necessary", "1.1", "The critical slice is necessary: without it the answer is lost.", "sufficiency",
          f"joint damage ({SHARE})", "above", "joint[quantity=damage]", "fig-slice",
          ("sufficiency.slice", "direction == 'noise' and half == 'confirmation'"), "generality.general_floor"),
    Claim("single_suffices", "1.2", "A single head or MLP restores the answer.", "sufficiency",
          f"recovery by the best single site ({SHARE})", "above", "sites[component=head|mlp]", "fig-sufficiency-ranked",
          ("sufficiency", "component in ['head', 'mlp'] and half == 'confirmation'"), "restores_recovery", "largest",
          ("ratio", "ratio_low", "ratio_high"),
          requires=("restoring", "but in too few pairs does the clean answer come first")),
    Claim("slice_sufficient", "1.2", "The critical slice is jointly sufficient: it brings the answer back.",
          "sufficiency", f"joint recovery ({SHARE})", "above", "joint[quantity=recovery]", "fig-slice",
          ("sufficiency.slice", "direction == 'denoise' and half == 'confirmation'"), "generality.general_floor"),
    Claim("no_repair", "1.3", "Later sites do not repair what the slice loses.", "hydra", "compensation ratio (share "
          "of the slice's loss)", "below", "compensation[half=confirmation,later=heads and MLPs]", "fig-hydra-split",
          ("hydra", "slice == 'slice' and half == 'confirmation'")),
    Claim("no_backup", "1.3", "No backup lights up when the slice is ablated: the pathway is unique.", "hydra",
          "largest rise of a later site's direct effect that the test could have missed (share of the slice's own)",
          "below", "missed", "fig-hydra-rises",
          ("hydra", "slice == 'slice' and component != '' and half == 'confirmation'"), None, "largest",
          ("share", None, "share"), excludes=("backups[stands_in=True]", "but a backup stands in for the slice")),
    # --- 2 retrieval heads ---
    Claim("retrieval_heads", "2", "Heads outside the slice retrieve the profession for it: two stages.",
          "retrieval_heads", "heads that pass all four tests", "count", "verdicts.retrieval_heads", "fig-four-tests",
          ("retrieval_heads.ablation", "half == 'confirmation'"), None, "count", tests="tests"),
    carried("one_stage", "2, instead", "The slice's own heads read the names and write the profession: one stage.",
            "everything", "k and v at names", "recomputed",
            requires=("verdicts.slice_heads_that_retrieve",
                      "but no head of the slice both attends to the names and writes the right profession")),
    carried("values_carry", "2", "What the slice's heads read at the names reaches them through value vectors.",
            "everything", "v at names", "recomputed"),
    carried("heads_at_names", "2", "Earlier heads write what the slice reads at the names.", "heads",
            "k and v at names", "frozen"),
    carried("mlps_at_names", "2, instead", "MLPs at the names write what the slice reads there.", "MLPs",
            "k and v at names", "frozen"),
    Claim("path_ablation", "2", "Ablating only the path from the leading earlier heads into the slice breaks the "
          "answer.", "retrieval_heads", "answers that flip (share of pairs)", "above", "measured.path_ablation",
          "fig-four-tests", ("retrieval_heads.ablation", "position == 'names' and site_set == 0 and half == "
                             "'confirmation'"), "restores_share"),
    # --- 3 generality ---
    held("general_supersets", "The slice carries every superset.", "classes[kind=superset]", "fig-generality-forest"),
    held("general_left_out", "A circuit picked without a superset carries that superset too.", "leave_one_out",
         "fig-generality-left-out", ("generality.joint", "site_set > 0")),
    held("general_professions", "The slice carries every profession with enough quads.", "classes[kind=profession]",
         "fig-generality-professions"),
    held("general_templates", "The slice works in templates that were never used for picking.",
         "classes[kind=template,group!={template}]", "fig-generality-forest"),
    Claim("class_specific", "3", "The slice's sites share the work differently in different supersets.", "generality",
          "class x site interaction", "p", "interaction", "fig-generality-sites", GRID, columns=(None, None, None),
          p="p"),
    control("invented_names", "invented names", "With invented names the slice stays silent."),
    control("things", "things", "With things instead of people the slice stays silent."),
    control("two_supersets", "two supersets", "With names of two supersets each, both of theirs fall, by less than an "
            "ordinary answer."),
    control("mixed", "mixed", "With two names of different supersets both fall, by less than an ordinary answer."),
    control("shuffled_labels", "shuffled labels", "With labels shuffled the slice has no effect on them."),
    control("random_heads", "random heads", "Random heads have no effect like that of the slice's own."),
    Claim("either_name", "3", "Either name alone raises the logit of its superset.", "generality", "what one name adds "
          "(logits)", "above", "rule.fitted[term=one name]", "fig-generality-rule", RULE),
    additive("rule_or", "One name is enough: a second of the same superset adds nothing (OR).", 0.0),
    additive("rule_additive", "Two names add up: the second adds as much as the first.", 1.0),
    Claim("rule_and", "3", "Only two names together count (AND).", "generality", "what one name alone adds (logits)",
          "within", "rule.fitted[term=one name]", "fig-generality-rule", RULE),
    # --- 4 the black box ---
    Claim("profession_at_names", "4.1", "The tokens of a name hold its profession, for a linear probe to read.",
          "subspace", "balanced accuracy beyond the highest under permuted labels (share)", "above",
          "measured.profession_at_names", "fig-probes-layers",
          ("subspace.probes", PROBE.format("one-name", "profession", "names"))),
    Claim("superset_at_last", "4.1", "The last token holds the superset, for a linear probe to read.", "subspace",
          "balanced accuracy beyond the highest under permuted labels (share)", "above", "measured.superset_at_last",
          "fig-probes-layers", ("subspace.probes", PROBE.format("pair", "superset", "last"))),
    Claim("low_rank", "4.1", "The map to supersets is of low rank.", "subspace", "rank that keeps 90% of the probe's "
          "accuracy above chance (share of the most there can be)", "most", "measured.low_rank", "fig-probes-rank",
          ("subspace.probes", PROBE.format("pair", "superset", "last")), columns=("estimate", None, None),
          requires=("measured.low_rank.below_permuted", "but class means of permuted labels are of as low a rank")),
    Claim("one_direction", "4.2", "One direction is enough: patching only the component between the two supersets "
          "brings the answer back.", "subspace", f"recovery ({SHARE})", "above",
          "directions.by_number[method=class difference,k=1]", "fig-subspace-direction-numbers",
          ("subspace.direction_patches", "variant == 'class difference|1|'"), "restores_recovery",
          requires=("directions.restores", "but in too few pairs does the clean answer come first")),
    Claim("class_direction", "4.2", "The direction of one superset against the rest ('artistness') is enough in pairs "
          "with that superset.", "subspace", f"recovery, the weakest superset's ({SHARE})", "above",
          "directions.single_classes[there=True]", "fig-subspace-direction-numbers",
          ("subspace.direction_patches", "variant.str.contains('against the rest')"), "restores_recovery", "weakest"),
    Claim("few_directions", "4.2", "The few directions that the supersets' means span are enough.", "subspace",
          f"recovery by all of them ({SHARE})", "above", "directions.by_number[method=class means]",
          "fig-subspace-direction-numbers", ("subspace.direction_patches", "variant.str.startswith('class means')"),
          "restores_recovery", "largest"),
    Claim("beats_random", "4.2", "The direction does more than random ones of equal norm.", "subspace",
          f"recovery less that of random directions ({SHARE})", "above",
          "directions.against_random[method=class difference,k=1]", "fig-subspace-direction-numbers",
          ("subspace.direction_patches", "variant.str.startswith('random|1')")),
    Claim("no_illusion", "4.2", "The direction works through what the model's own activations vary in.", "subspace",
          "effect of the part inside their span (share of the direction's effect)", "above",
          "directions.parts[method=class difference,k=1,part=inside]", "fig-subspace-direction-parts",
          ("subspace.direction_patches", "variant == 'class difference|1|inside'"),
          columns=("share", "share_low", "share_high")),
    Claim("steering", "4.2", "Adding a superset's direction to a prompt of two supersets raises its logit.", "subspace",
          "slope, the weakest superset's (logits per dose)", "above", "directions.slopes[kind=mixed,added!=random]",
          "fig-subspace-doses", ("subspace.steering", "variant.notna()"), pick="weakest"),
    Claim("few_neurons", "4.3", "A few MLP neurons do the work of the slice's MLPs.", "neurons", "damage by the ten "
          "neurons that help most, together (share of the MLPs' joint damage)", "above",
          "neurons.shares[quantity=damage,kind=helping,n_sites=10]", "fig-neurons-joint",
          ("neurons.top", "half == 'confirmation'")),
    Claim("feature_per_superset", "4.3", "For every superset there is a feature of a sparse autoencoder that tells it "
          "from the others.", "neurons", "area under the ROC curve of the weakest superset's best feature (share)",
          "above", "features.map", "fig-neurons-feature-map", ("neurons.feature_reads", "half == 'confirmation'"),
          "neurons.sae_selective", "weakest"),
    features("neurons", "SAE features do more than single neurons, as many of them, whatever their number."),
    features("directions", "SAE features do more than class directions, as many of them, whatever their number."),
    features("random features", "SAE features do more than random ones of equal norm, whatever their number."),
    # --- 4, outcome: the circuit ---
    Claim("circuit_faithful", "4, outcome", "A small circuit keeps the task when all else is resampled.", "story",
          "what it keeps of the model's logit_diff (share)", "above", "circuit.faithfulness", "fig-circuit-curves",
          CIRCUIT),
    Claim("circuit_necessary", "4, outcome", "Without the circuit the task is lost.", "story",
          "what the model keeps of its logit_diff (share)", "below", "circuit.necessity", "fig-circuit-curves",
          CIRCUIT),
    Claim("circuit_minimal", "4, outcome", "Every member of the circuit matters.", "story",
          "what leaving out the member of least cost costs (logits)", "above", "circuit.members", "fig-circuit-members",
          CIRCUIT, pick="weakest", p="p"),
    Claim("circuit_complete", "4, outcome", "The circuit leaves nothing behind: cut by any of its parts, it does what "
          "the model does without them.", "story", "largest difference over sampled parts (share)", "below",
          "circuit.incompleteness", "fig-circuit-completeness", CIRCUIT),
    order("random", "The circuit found is better than random ones of its size."),
    order("recovery", "The circuit found is better than the sites of largest single effect, as many of them."),
    attributed("sites", "atp", "heads' and MLPs'"),
    attributed("queries", "atp_qk", "queries'"),
    Claim("published_heads", "4, outcome", "The circuit's heads are among those published for this model more often "
          "than by chance.", "story", "heads in both (number)", "p", "overlap", "", None,
          columns=("estimate", None, None), p="p"),
    # --- the companion task ---
    accuracy("odd_one_out", "companion", "The odd-one-out task runs through the same circuit.", "odd_one_out", None,
             companion="odd_one_out"),
)  # fmt: skip
