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

import csv
import io
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from jaxtyping import Bool, Float, Int
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from minirlhf import InputError, helpdesk
from minirlhf.calibration import (
    BINS,
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
    estimate,
    kendall_tau_b,
    log_losses,
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
from minirlhf.data import Ranking, expect, read_records
from minirlhf.measures import wins
from minirlhf.plot import drawing, look, right_axis
from minirlhf.rewards import Reward, RewardModelScorer, cut_to_context, load_reward, reward_models, score
from minirlhf.runs import check_at_least, cli, console, pick_device, seeded, write_text

MARGIN_BINS = 5  # of |r_a - r_b|, about as many pairs in each
NEUTRAL = "This is all that there is to say here."  # a sentence that does nothing, outside the embedded world
CORRELATIONS = ("within", "pearson", "pearson_given_gold", "spearman", "spearman_given_gold")  # of score and length

# --- python -m minirlhf.reward_report ---------------------------------------------------------------------------------


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


class Data(NamedTuple):
    """N responses of Q rankings, side by side, and who rates them."""

    rankings: Sequence[Ranking]
    prompts: list[str]  # N
    responses: list[str]  # N
    group: Int[Tensor, " N"]  # which prompt: what another sample would draw anew
    groups: int
    pairs: Pairs  # all of them
    labelled: Pairs  # those that the annotators ordered, chosen first
    chosen_first: Bool[Tensor, " P"]  # of the labelled: whether a forecast is made of chosen ≻ rejected, or the reverse
    raters: dict[str, Float[Tensor, " N"]]  # annotators, annotators again, gold, longer: what they order by


class Judge(NamedTuple):
    """What one reward says about the responses."""

    spec: str
    scores: Float[Tensor, " N"]
    probed: Int[Tensor, " M"]  # responses that fit with the filler behind them
    filled: Float[Tensor, " M"]  # their scores with it
    tokens: Float[Tensor, " N"] | None  # lengths, where the reward has a tokenizer
    temperature: float  # of the differences: P(a ≻ b) = σ((r_a - r_b) / temperature)


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
    write_text(args.out / "pairs.csv", _csv(data, judges))
    draw_report(args.out / "report.png", report, judges, data)
    write_text(args.out / "report.json", json.dumps(_without_nan(report), indent=2) + "\n")
    for table in _tables(report):
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


# --- measures ---------------------------------------------------------------------------------------------------------


def _measure(judge: Judge, gold: Judge | None, data: Data, seed: int) -> dict[str, Any]:
    """All that the report says of one judge; beside gold, where there is such a one and it is another."""
    gold = None if judge is gold else gold
    group = data.group[data.labelled.first]

    def right(scores: Float[Tensor, " N"], pairs: Pairs) -> Float[Tensor, " P"]:
        return wins(scores[pairs.first], scores[pairs.second])

    hits, lead = right(judge.scores, data.labelled), differences(judge.scores, data.labelled)
    row = {"spec": judge.spec, "accuracy": estimate(hits, group, data.groups, seed)}
    if gold is not None:
        of_gold = ordered(data.pairs, gold.scores)
        row["below_ceiling"] = estimate(right(gold.scores, data.labelled) - hits, group, data.groups, seed)
        row["gold_accuracy"] = estimate(right(judge.scores, of_gold), data.group[of_gold.first], data.groups, seed)
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
        accuracy = estimate(hits[here], group[here], groups, seed)
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
        happened = estimate(outcomes[here], group[here], data.groups, seed)
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
        "brier": estimate(squared_errors(p, outcomes), group, data.groups, seed),
        "nll": estimate(log_losses(lead, judge.temperature), group, data.groups, seed),
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
    return estimate(agreement(lead, longer)[differs], data.group[data.labelled.first][differs], data.groups, seed)


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


# --- files and tables -------------------------------------------------------------------------------------------------


def _csv(data: Data, judges: dict[str, Judge]) -> str:
    """The labelled pairs, chosen and rejected; `first` is the one that a forecast was made for."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    fields = ("chosen", "rejected", "margin")
    judged = [f"{name}:{field}" for name in judges for field in fields]
    writer.writerow(["ranking", "source", "prompt", "chosen", "rejected", "first", *judged])
    for a, b, q, ahead in zip(*(part.tolist() for part in data.labelled), data.chosen_first.tolist()):
        ranking, row = data.rankings[q], []
        for judge in judges.values():
            high, low = float(judge.scores[a]), float(judge.scores[b])
            row += [high, low, high - low]
        texts = ranking.source, ranking.prompt, data.responses[a], data.responses[b]
        writer.writerow([q, *texts, "chosen" if ahead else "rejected", *row])
    return text.getvalue()


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for what is not defined."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(found: Estimate | None, digits: int = 3) -> str:
    if found is None or math.isnan(found["value"]):
        return "–"
    return escape(f"{found['value']:.{digits}f} ") + rf"\[{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def _plain(value: float, error: float | None = None, digits: int = 3) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None and not math.isnan(error) else "")


def _grid(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    for i, column in enumerate(columns):
        narrowest = min(24, max([len(column), *(len(row[0]) for row in rows)])) if i == 0 else None
        table.add_column(
            escape(column), justify="right" if i else "left", overflow="fold", no_wrap=bool(i), min_width=narrowest
        )
    for row in rows:
        if set(row[1:]) != {"–"}:  # what no judge has
            table.add_row(*row)
    return table


def _tables(report: dict[str, Any]) -> list[Table]:
    judges, raters = report["judges"], report["agreement"]["raters"]
    known = report["noise_ceiling"] is not None
    title = f"{report['pairs']:,} pairs of {report['prompts']:,} prompts ({report['tied_pairs']:,} more are ties)"
    if known:
        title += f"; a perfect judge is right on {report['noise_ceiling']:.3f}"
    rows = [
        [escape(name), _show(row["accuracy"]), *[_show(row.get(k)) for k in ("below_ceiling", "gold_accuracy")] * known]
        for name, row in judges.items()
    ]
    columns = ["accuracy", "pairs right, 95%", *["below the ceiling", "gold's order"] * known]
    tables = [_grid(escape(title), columns, rows)]

    for name, row in judges.items():
        by = [row[key] for key in ("by_margin", "by_gold_margin") if key in row]
        columns = ["its own margin", "pairs", "pairs right, 95%", "gold margin", "pairs", "pairs right, 95%"]
        cells = [[[f"{b['mean_margin']:.2f}", f"{b['pairs']:,}", _show(b["accuracy"])] for b in bins] for bins in by]
        rows = [list(itertools.chain(*parts)) for parts in itertools.zip_longest(*cells, fillvalue=["", "", ""])]
        tables.append(_grid(f"{escape(name)}: accuracy by margin", columns[: 3 * len(by)], rows))

    beside = max(1, (console.width - 28) // 21)  # judges that fit beside each other
    for start in range(0, len(judges), beside):
        part = dict(list(judges.items())[start : start + beside])
        tables += [_calibration_table(part), _length_table(part, report["annotators_prefer_longer"])]

    for key, title in (
        ("share", "share of all pairs ordered alike, ties half"),
        ("tau_b", "Kendall's τ_b, mean over rankings"),
    ):
        table, errors = report["agreement"][key], report["agreement"][f"{key}_se"]
        largest = max((e for row in errors for e in row if not math.isnan(e)), default=math.nan)
        title += f" (s.e. at most {_plain(largest)})"
        rows = [
            [f"{i} {escape(name)}", *(_plain(v, digits=2) for v in table[i - 1])] for i, name in enumerate(raters, 1)
        ]
        tables.append(_grid(title, ["", *map(str, range(1, len(raters) + 1))], rows))
    return tables


def _calibration_table(judges: dict[str, Any]) -> Table:
    found = [row["calibration"] for row in judges.values()]
    rows = [
        ["T", *(f"{c['temperature']:g}" for c in found)],
        ["ECE", *(_plain(c["ece"]) for c in found)],
        ["ECE by chance (95% below)", *(f"{c['ece_by_chance']:.3f} ({c['ece_by_chance_95']:.3f})" for c in found)],
        ["Brier score", *(_show(c["brier"]) for c in found)],
        ["-log likelihood, nats", *(_show(c["nll"]) for c in found)],
        ["best T", *(_show(c["best_temperature"], 2) for c in found)],
        ["ECE at the best T", *(_plain(c["best_ece"]) for c in found)],
        ["rms distance to the truth", *(_plain(c.get("rms_from_truth", math.nan)) for c in found)],
    ]
    return _grid("calibration of P(a ≻ b) = σ((r_a - r_b) / T)", ["", *judges], rows)


def _length_table(judges: dict[str, Any], annotators: Estimate) -> Table:
    found, fillers = [row["length"] for row in judges.values()], [row["filler"] for row in judges.values()]
    names = [f"{how}_{unit}" for unit in ("words", "tokens") for how in CORRELATIONS]
    rows = [[name.replace("_", " "), *(_show(length.get(name), 2) for length in found)] for name in names]
    rows.append(["longer preferred", *(_show(length["prefers_longer"], 2) for length in found)])
    rows.append(["filler adds", *(_plain(f["change"], f["change_se"]) for f in fillers)])
    rows.append(["in deviations of the score", *(_plain(f["deviations"]) for f in fillers)])
    rows.append(["filler helps", *(_plain(f["rises"], f["rises_se"], 2) for f in fillers)])
    title = f"length; annotators prefer the longer of two in {_show(annotators, 2)}"
    return _grid(title, ["score and length", *judges], rows)


# --- the picture ------------------------------------------------------------------------------------------------------


BARS, CLOUD = "#e3e3e3", "#bdbdbd"  # behind the curves


def draw_report(path: Path, report: dict[str, Any], judges: dict[str, Judge], data: Data) -> None:
    """Draw reliability, accuracy by margin, and score against length."""
    with drawing(path, columns=3) as axes:
        _draw_reliability(axes[0], report)
        _draw_margins(axes[1], report)
        _draw_length(axes[2], judges, data)


def _bars(found: Sequence[Estimate]) -> list[list[float]]:
    """Error bars below and above."""
    below, above = ([max(sign * (f["value"] - f[end]), 0.0) for f in found] for sign, end in ((1, "low"), (-1, "high")))
    return [below, above]


def _draw_reliability(axes, report: dict[str, Any]) -> None:
    first = next(iter(report["judges"]))
    counts = right_axis(axes, f"pairs of {first} (bars)")
    pairs = [b["pairs"] for b in report["judges"][first]["calibration"]["reliability"]]
    counts.bar([(b + 0.5) / BINS for b in range(BINS)], pairs, width=0.9 / BINS, color=BARS, zorder=0)
    counts.set_ylim(0, 4 * max(pairs))  # they stay below the curves
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, label="calibrated")
    for i, (name, row) in enumerate(report["judges"].items()):
        bins = [b for b in row["calibration"]["reliability"] if b["pairs"]]
        found = [b["happened"] for b in bins]
        label = "true probability" if name == "gold" and report["noise_ceiling"] is not None else name
        axes.errorbar([b["claimed"] for b in bins], [f["value"] for f in found], _bars(found),
                      capsize=2, markersize=4, linewidth=1.2, label=label, **look(i))  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="σ(difference of scores)", ylabel="preferred, 95% interval")
    axes.set_title("Reliability")
    axes.legend(loc="upper left")


def _draw_margins(axes, report: dict[str, Any]) -> None:
    for i, (name, row) in enumerate(report["judges"].items()):
        found = [b["accuracy"] for b in row["by_margin"]]
        axes.errorbar([b["mean_margin"] for b in row["by_margin"]], [f["value"] for f in found], _bars(found),
                      capsize=2, markersize=4, linewidth=1.2, label=name, **look(i))  # fmt: skip
    axes.axhline(0.5, color="black", linewidth=0.8)
    axes.set(xlabel="|difference of scores|, mean of a fifth", ylabel="pairs right, 95% interval")
    axes.set_title("Accuracy by margin")
    axes.legend(loc="center right")


def _draw_length(axes, judges: dict[str, Judge], data: Data) -> None:
    words = data.raters["longer"]
    bins = quantile_bins(words, BINS)
    for i, (name, judge) in enumerate(judges.items()):
        z = (judge.scores - judge.scores.mean()) / judge.scores.std().clamp(min=1e-12)
        if i == 0:  # the first alone, for a cloud of several says nothing
            axes.plot(words, z, ".", color=CLOUD, markersize=1.5)
        here = [bins == b for b in range(int(bins.max()) + 1)]
        means = [float(z[h].mean()) for h in here]
        errors = [2 * clustered_error(z[h], data.group[h]) for h in here]
        axes.errorbar([float(words[h].mean()) for h in here], means, errors,
                      capsize=2, markersize=4, linewidth=1.2, label=name, **look(i))  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="words of the response", ylabel="score, standardised, ± 2 s.e.", title="Score against length")
    axes.legend(loc="upper right")


if __name__ == "__main__":
    cli(main, Args, prog="python -m minirlhf.reward_report")
