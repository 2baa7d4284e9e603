"""How good a reward model is: how often it is right, how sure it may be, what length does to it, whom it agrees with.

    python -m minirlhf.reward_report runs/rm --out runs/rm-report

    report.json   every number; {"value", "low", "high"} is an estimate with its 95% interval over prompts
    pairs.csv     one row for each pair that the annotators ordered, with the scores of every judge
    report.png    reliability, accuracy by margin, score against length

A reward r trained by maximum likelihood on comparisons claims more than an order: σ(r_a - r_b) is its probability that
a is preferred to b. That holds for rankings of K responses too. Plackett and Luce's model chooses the best first, then
the best of the rest; the probability that it places a before b, summed over all places of the others, is
e^{r_a} / (e^{r_a} + e^{r_b}), Bradley and Terry's, whatever the others are. So the ranking's likelihood fits the same
r as pairs do, and σ(difference) needs no other scale for any K. What may still part it from the truth: too few data for
too large a model (differences too wide), `margin` and `centring` in the loss, and people who do not choose this way.

On the embedded world the truth is known: the annotators are Plackett-Luce on the gold score, at a temperature of
`helpdesk.ANNOTATOR_TEMPERATURE`, and "gold" stands in every table beside the models, with that temperature. Pairs that
felt alike are recorded as ties and left out, which makes the rest a little surer than its probability says.
"""

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from jaxtyping import Float, Int
from torch import Tensor

from minirlhf import InputError
from minirlhf.algorithms.rewards import Reward, RewardModelScorer, load_reward, reward_models, score
from minirlhf.checks import check_at_least
from minirlhf.commands.calibration import (
    Estimate,
    Pairs,
    agreement,
    all_pairs,
    best_temperature,
    bootstrap,
    chance_ece,
    clustered_error,
    differences,
    ece,
    kendall_tau_b,
    log_losses,
    mean_with_interval,
    ordered,
    partial_correlation,
    pearson,
    preference_probability,
    quantile_bins,
    reliability,
    reliability_bins,
    spearman,
    squared_errors,
)
from minirlhf.commands.measures import wins
from minirlhf.commands.reward_report_show import CORRELATIONS, Data, Judge, as_csv, plot_report, tables, without_nan
from minirlhf.commands.score import cut_to_context
from minirlhf.data import helpdesk
from minirlhf.data.records import Ranking, expect, read_records
from minirlhf.devices import pick_device
from minirlhf.run.folder import write_text
from minirlhf.run.terminal import console
from minirlhf.seeds import seeded

MARGIN_BINS = 5  # of |r_a - r_b|, about as many pairs in each


NEUTRAL = "This is all that there is to say here."  # a sentence that does nothing, outside the embedded world


@dataclass(frozen=True)
class Args:
    """Report on reward models: accuracy, calibration, length bias, agreement."""

    rm: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Reward models, or anything else that scores (pkg.module:function, hf:DIR, …); without any, runs/rm."""
    data: str = "helpdesk"
    """helpdesk (held-out rankings of the embedded world), or a file of pairs or rankings that no training saw."""
    out: Path = Path("runs/rm-report")
    """Folder of the report; an older report in it is replaced."""
    n: int = 600
    """Rankings; of a longer file, a random choice."""
    filler: str | None = None
    """Sentence appended to every response to see what length alone earns; by default one of the embedded world's that
    does nothing, or, for a file, a neutral one."""
    batch_size: int = 64
    """Sequences scored at a time."""
    seed: int = 0
    """Of the rankings, the order of the pairs, the second annotators and the intervals."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self):
        check_at_least(2, n=self.n)
        check_at_least(1, batch_size=self.batch_size)
        if self.filler is not None and not self.filler.strip():
            raise InputError("--filler is empty; give a sentence, or leave the flag out")


def main(args: Args) -> None:
    """Read, score, measure, and write the report."""
    specs = args.rm or ("runs/rm",)
    if not args.rm and not Path("runs/rm").is_dir():
        raise InputError("runs/rm does not exist yet; run python train_rm.py first")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file; name a folder")
    device = pick_device(args.device)
    rewards = [load_reward(spec, device, batch_size=args.batch_size) for spec in specs]
    data = _read(args)
    names = _names(specs, taken=data.raters)
    fillers = _fillers(args, data)

    judges: dict[str, Judge] = {}
    for name, spec, reward in zip(names, specs, rewards):
        console.print(f"{name}: {len(data.responses):,} responses", markup=False)
        judges[name] = _judge(spec, reward, data, fillers)
    if "gold" in data.raters:
        judges["gold"] = _judge("gold", load_reward("gold"), data, fillers, helpdesk.ANNOTATOR_TEMPERATURE)

    truth = judges["gold"] if "gold" in data.raters else None  # on a file, "gold" is a model like any other

    annotators = differences(data.raters["annotators"], data.labelled)
    report = {
        "data": args.data,
        "rankings": len(data.rankings),
        "prompts": data.groups,
        "responses": len(data.responses),
        "pairs": len(data.labelled.first),
        "tied_pairs": len(data.pairs.first) - len(data.labelled.first),
        "noise_ceiling": None if truth is None else helpdesk.noise_ceiling(data.rankings),
        "annotators_prefer_longer": _prefers_longer(annotators, data, args.seed),
        "filler": fillers[0] if len(set(fillers)) == 1 else sorted(set(fillers)),
        "seed": args.seed,
        "judges": {name: _measure(judge, truth, data, args.seed) for name, judge in judges.items()},
        "agreement": _agreement({**data.raters, **{name: judge.scores for name, judge in judges.items()}}, data),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "pairs.csv", as_csv(data, judges))
    plot_report(args.out / "report.png", report, judges, data)
    write_text(args.out / "report.json", json.dumps(without_nan(report), indent=2) + "\n")
    for table in tables(report):
        console.print(table)
    console.print(f"report.json, pairs.csv and report.png are in {args.out}", markup=False)


def _read(args: Args) -> Data:
    """The rankings, their responses in one row, and who rates them without a model."""
    if args.data == "helpdesk":
        rankings = helpdesk.rankings(args.n, args.seed, held_out=True)
    else:
        rankings = list(expect(read_records(args.data), (Ranking,), args.data, "minirlhf.reward_report"))
        if len(rankings) > args.n:
            console.print(f"{args.n:,} of the {len(rankings):,} records of {args.data}, at random", markup=False)
            rankings = random.Random(f"reward report {args.seed}").sample(rankings, args.n)
    # Where a file says several things about one prompt, they are one group; without a prompt each is its own.
    keys = {ranking.prompt or i: None for i, ranking in enumerate(rankings)}
    if len(keys) < 2:
        raise InputError(f"{args.data}: holds a single prompt; give at least 2, which the intervals resample")
    number = {key: i for i, key in enumerate(keys)}
    group = torch.tensor([number[r.prompt or i] for i, r in enumerate(rankings) for _ in r.responses])
    prompts = [ranking.prompt for ranking in rankings for _ in ranking.responses]
    responses = [response for ranking in rankings for response in ranking.responses]

    raters = {"annotators": _utilities(rankings)}
    if args.data == "helpdesk":
        raters["annotators again"] = _utilities(helpdesk.rank_again(rankings, args.seed))
        raters["gold"] = torch.tensor(helpdesk.gold(prompts, responses), dtype=torch.double)
    raters["longer"] = torch.tensor([len(response.split()) for response in responses], dtype=torch.double)
    pairs = all_pairs([len(ranking.responses) for ranking in rankings])
    labelled = ordered(pairs, raters["annotators"])
    if not len(labelled.first):
        raise InputError(f"{args.data}: all responses are tied; add some that are better than others")
    coin = torch.rand(len(labelled.first), generator=seeded(args.seed, 1)) < 0.5
    return Data(rankings, prompts, responses, group, len(keys), pairs, labelled, coin, raters)


def _utilities(rankings: Sequence[Ranking]) -> Float[Tensor, " N"]:
    return torch.tensor([-rank for ranking in rankings for rank in ranking.ranks], dtype=torch.double)


def _names(specs: Sequence[str], taken: Sequence[str] | dict[str, Any]) -> list[str]:
    """A folder's own name, or the spec; where that is taken, the spec, and then a number."""
    names: list[str] = []
    for spec in specs:
        own = Path(spec).resolve().name if Path(spec).is_dir() else spec
        choice = [own, spec, *(f"{spec} ({i})" for i in range(2, len(specs) + 3))]
        names.append(next(name for name in choice if name not in names and name not in taken))
    return names


def _fillers(args: Args, data: Data) -> list[str]:
    """What to append to each response: on the embedded world, an idle sentence that it does not hold yet."""
    if args.filler is not None or args.data != "helpdesk":
        return [(args.filler or NEUTRAL).strip()] * len(data.responses)
    rng = random.Random(f"filler {args.seed}")
    return [rng.choice([idle for idle in helpdesk.RAMBLING if idle not in said]) for said in data.responses]


def _judge(spec: str, reward: Reward, data: Data, fillers: Sequence[str], temperature: float = 1.0) -> Judge:
    """Score the responses as they are, and with the filler behind them."""
    prompts, responses, tokens = data.prompts, data.responses, None
    longer = [f"{response.rstrip()} {filler}" for response, filler in zip(responses, fillers)]
    probed = torch.arange(len(responses))
    for i, model in enumerate(reward_models(reward)):  # one, or the members of an ensemble
        if i == 0:
            tokens = torch.tensor([len(model.tokenizer.encode(text)) for text in responses], dtype=torch.double)
        lengths = torch.tensor([len(model.example(*both).tokens) for both in zip(data.prompts, longer)])
        probed = probed[lengths[probed] <= model.model.config.n_positions]
    if isinstance(reward, RewardModelScorer):
        prompts, responses, cut = cut_to_context(reward, prompts, responses)
        if cut:
            context = reward.model.config.n_positions
            console.print(f"{cut:,} of {len(responses):,} responses were cut to the context of {context} tokens")
    if len(probed) < len(longer):
        console.print(f"{len(longer) - len(probed):,} have no room for the filler and are left out of that probe")
    fit = probed.tolist()
    filled = score(reward, [data.prompts[i] for i in fit], [longer[i] for i in fit]) if fit else torch.zeros(0)
    return Judge(spec, score(reward, prompts, responses).double(), probed, filled.double(), tokens, temperature)


def _measure(judge: Judge, gold: Judge | None, data: Data, seed: int) -> dict[str, Any]:
    """All that the report says of one judge; beside gold, where there is such a one and it is another."""
    gold = None if judge is gold else gold
    group = data.group[data.labelled.first]

    def right(scores: Float[Tensor, " N"], pairs: Pairs) -> Float[Tensor, " P"]:
        return wins(scores[pairs.first], scores[pairs.second])

    hits, lead = right(judge.scores, data.labelled), differences(judge.scores, data.labelled)
    row = {"spec": judge.spec, "accuracy": mean_with_interval(hits, group, data.groups, seed)}
    if gold is not None:
        of_gold = ordered(data.pairs, gold.scores)
        row["below_ceiling"] = mean_with_interval(right(gold.scores, data.labelled) - hits, group, data.groups, seed)
        row["gold_accuracy"] = mean_with_interval(
            right(judge.scores, of_gold), data.group[of_gold.first], data.groups, seed
        )
    row["by_margin"] = _by_margin(hits, lead.abs(), group, data.groups, seed)
    if gold is not None:
        margins = differences(gold.scores, data.labelled).abs()
        row["by_gold_margin"] = _by_margin(hits, margins, group, data.groups, seed)
    row["calibration"] = _calibration(judge, gold, data, seed)
    row["length"] = _length(judge, gold, data, seed)
    row["filler"] = _filler(judge, data)
    return row


def _by_margin(
    hits: Float[Tensor, " P"], margins: Float[Tensor, " P"], group: Int[Tensor, " P"], groups: int, seed: int
) -> list[dict[str, Any]]:
    """Accuracy of the pairs in each bin of margins."""
    bins, rows = quantile_bins(margins, MARGIN_BINS), []
    for b in range(int(bins.max()) + 1):
        here = bins == b
        accuracy = mean_with_interval(hits[here], group[here], groups, seed)
        rows.append({"pairs": int(here.sum()), "mean_margin": float(margins[here].mean()), "accuracy": accuracy})
    return rows


def _calibration(judge: Judge, gold: Judge | None, data: Data, seed: int) -> dict[str, Any]:
    """How far σ(difference) can be trusted as a probability, each pair taken in its random order."""
    group, pairs = data.group[data.labelled.first], data.labelled
    lead = differences(judge.scores, pairs)
    outcomes = data.chosen_first.double()  # 1 where the first of the forecast is the chosen one

    def forecast(scores: Float[Tensor, " N"], temperature: float) -> Float[Tensor, " P"]:
        signed = torch.where(data.chosen_first, differences(scores, pairs), -differences(scores, pairs))
        return preference_probability(signed, temperature)

    p = forecast(judge.scores, judge.temperature)
    which, bins = reliability_bins(p), []
    for b, claimed in enumerate(reliability(p, outcomes).claimed.tolist()):
        here = which == b
        happened = mean_with_interval(outcomes[here], group[here], data.groups, seed)
        bins.append({"pairs": int(here.sum()), "claimed": claimed, "happened": happened})
    by_chance, high = chance_ece(p, seed)
    best = best_temperature(lead)
    fitted = forecast(judge.scores, best) if math.isfinite(best) else None
    # Of 1/T, which is 0 where no temperature is high enough: as an infinite T it would have no quantiles.
    (inverse,) = bootstrap(lambda rows: [1 / best_temperature(lead[rows])], group, data.groups, seed)
    ends = [1 / inverse[end] if inverse[end] else math.inf for end in ("high", "low")]
    said = {
        "temperature": judge.temperature,
        "ece": ece(p, outcomes),
        "ece_by_chance": by_chance,
        "ece_by_chance_95": high,
        "brier": mean_with_interval(squared_errors(p, outcomes), group, data.groups, seed),
        "nll": mean_with_interval(log_losses(lead, judge.temperature), group, data.groups, seed),
        "best_temperature": {"value": best, "low": ends[0], "high": ends[1]},
        "best_ece": math.nan if fitted is None else ece(fitted, outcomes),
        "best_ece_by_chance": math.nan if fitted is None else chance_ece(fitted, seed)[0],
        "best_nll": math.nan if fitted is None else float(log_losses(lead, best).mean()),
        "reliability": bins,
    }
    if gold is not None:  # E (p - y)² = E (p* - y)² + E (p - p*)²: what of the Brier score is the model's own
        truth = forecast(gold.scores, gold.temperature)
        said["rms_from_truth"] = math.sqrt(float((p - truth).square().mean()))
    return said


def _prefers_longer(lead: Float[Tensor, " P"], data: Data, seed: int) -> Estimate:
    """Share of labelled pairs of unequal length (in words) whose longer response leads; a tie counts half."""
    longer = differences(data.raters["longer"], data.labelled)
    differs = longer != 0
    return mean_with_interval(
        agreement(lead, longer)[differs], data.group[data.labelled.first][differs], data.groups, seed
    )


def _length(judge: Judge, gold: Judge | None, data: Data, seed: int) -> dict[str, Any]:
    """Correlations of score and length; given the gold score, those that quality does not explain.

    A reward is free up to a constant per prompt, which no pair sees: `within` is Pearson's correlation once the mean of
    each prompt is taken from both.
    """
    said: dict[str, Any] = {"prefers_longer": _prefers_longer(differences(judge.scores, data.labelled), data, seed)}
    for unit, length in (("words", data.raters["longer"]), ("tokens", judge.tokens)):
        if length is not None:
            named = _correlations(judge.scores, length, None if gold is None else gold.scores, data, seed)
            said |= {f"{name}_{unit}": value for name, value in named.items()}
    return said


def _correlations(
    scores: Float[Tensor, " N"], length: Float[Tensor, " N"], gold: Float[Tensor, " N"] | None, data: Data, seed: int
) -> dict[str, Estimate]:
    own_scores, own_length = (x - _group_means(x, data)[data.group] for x in (scores, length))

    def statistics(rows: Int[Tensor, " rows"]) -> list[float]:
        found = [pearson(own_scores[rows], own_length[rows])]
        for correlation in (pearson, spearman):
            found.append(correlation(scores[rows], length[rows]))
            if gold is not None:
                rest = correlation(scores[rows], gold[rows]), correlation(length[rows], gold[rows])
                found.append(partial_correlation(found[-1], *rest))
        return found

    names = [name for name in CORRELATIONS if gold is not None or not name.endswith("given_gold")]
    return dict(zip(names, bootstrap(statistics, data.group, data.groups, seed)))


def _group_means(x: Float[Tensor, " N"], data: Data) -> Float[Tensor, " Q"]:
    return data.group.bincount(x, minlength=data.groups) / data.group.bincount(minlength=data.groups)


def _filler(judge: Judge, data: Data) -> dict[str, Any]:
    """What an idle sentence at the end changes: an intervention, so no quality that comes with length is in it."""
    change = judge.filled - judge.scores[judge.probed]
    group, rises = data.group[judge.probed], (change > 0).double()
    return {
        "responses": len(change),
        "change": float(change.mean()),
        "change_se": clustered_error(change, group),
        "deviations": float(change.mean() / judge.scores.std()),  # of the score, whose scale is the reward's own
        "rises": float(rises.mean()),
        "rises_se": clustered_error(rises, group),
    }


def _agreement(raters: dict[str, Float[Tensor, " N"]], data: Data) -> dict[str, Any]:
    """Share of all pairs ordered alike and mean Kendall's τ_b, for each two raters."""
    leads = {name: differences(scores, data.pairs) for name, scores in raters.items()}
    group, table = data.group[data.pairs.first], {key: [] for key in ("share", "share_se", "tau_b", "tau_b_se")}
    of_ranking = torch.tensor([data.group[i] for i in _starts(data.rankings)])
    for x in leads.values():
        row: dict[str, list[float]] = {key: [] for key in table}
        for y in leads.values():
            alike = agreement(x, y)
            tau = kendall_tau_b(x, y, data.pairs.ranking, len(data.rankings))
            defined = ~tau.isnan()
            row["share"].append(float(alike.mean()))
            row["share_se"].append(clustered_error(alike, group))
            row["tau_b"].append(float(tau.nanmean()))
            row["tau_b_se"].append(clustered_error(tau[defined], of_ranking[defined]))
        for key, values in row.items():
            table[key].append(values)
    return {"raters": list(leads), **table}


def _starts(rankings: Sequence[Ranking]) -> list[int]:
    return [0, *itertools.accumulate(len(ranking.responses) for ranking in rankings[:-1])]
