"""Compare runs on the same held-out prompts: who wins, by how much, at what KL; a table, a picture, a page to read.

    python -m minirlhf.evaluate runs/ppo runs/dpo --baseline runs/sft --reward runs/rm --out runs/report
    python -m minirlhf.evaluate runs/ppo --best-of 4 16                 and the best of 4 and of 16 of the baseline's
    python -m minirlhf.evaluate runs/ppo --temperature 0.5 1            each at several temperatures
    python -m minirlhf.evaluate runs/ppo --judge human                  and you choose, blind

    report.json        {"baseline", "judge", …, "runs": {NAME: {"win_rate", "gold", "kl", …}}, "head_to_head": […]}
    report.html        the table, the picture and the responses side by side, in one file
    report.png         win rates, reward against KL, training curves
    responses.jsonl    every response, with its scores
    human.jsonl        a person's verdicts, with --judge human; never replaced

Two numbers say whether a reward was learned or exploited: the judge's score, which no training saw, and the KL to the
baseline, the price paid for it (Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization", figure 1).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.markup import escape

from minirlhf import InputError
from minirlhf.algorithms.rewards import Reward, load_reward, reward_models, score
from minirlhf.checks import check_at_least, check_positive
from minirlhf.commands import human
from minirlhf.commands.best_of_n import kl_bound, logratio, sample_each
from minirlhf.commands.evaluate_report import (
    MOST_CURVES,
    Outcome,
    answers,
    for_terminal,
    plot_report,
    tables,
    training_curves,
)
from minirlhf.commands.measures import (
    bootstrap_interval,
    distinct_n,
    repetition,
    sequence_stats,
    sign_test,
    standard_error,
    win_rate,
    wins,
)
from minirlhf.commands.prompts import PromptArgs, read_prompts, respond
from minirlhf.commands.report_page import page
from minirlhf.data import helpdesk
from minirlhf.data.records import write_records
from minirlhf.data.tokenizer import Tokenizer, TokenText
from minirlhf.devices import pick_device
from minirlhf.run.folder import load_run, require_same_tokenizer, write_text
from minirlhf.run.terminal import console, show_samples
from minirlhf.seeds import mix

SCRIPTS = {"runs/sft": "train_sft.py", "runs/rm": "train_rm.py", "runs/ppo": "train_ppo.py", "runs/dpo": "train_dpo.py"}


POOL = 64  # responses a prompt that best-of-n draws at least: those it does not choose from say how rare the best is


@dataclass(frozen=True)
class Args(PromptArgs):
    """Compare runs with a baseline on the same held-out prompts."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Runs to compare; without any, runs/ppo and runs/dpo, and runs/rm as the reward."""
    baseline: Path = Path("runs/sft")
    """The run they started from, or GPT-2 (a folder, gpt2, ORG/NAME)."""
    out: Path = Path("runs/report")
    """Folder of the report; an older report in it is replaced, but for a person's verdicts."""
    reward: str | None = None
    """What the runs were trained on, scored beside the judge: a folder, pkg.module:function or hf:DIR."""
    judge: str | None = None
    """Who decides the wins, with the same choice; gold on the helpdesk. human: you, beside the automatic one."""
    human_n: int = 40
    """--judge human: comparisons to show."""
    best_of: tuple[int, ...] = ()
    """Rows for the best of so many responses of the baseline, chosen by the reward (without one, by the judge)."""
    temperature: tuple[float, ...] = (1.0,)
    """Divides the logits, in sampling and in the KL; of several, each run has a row for each, and is compared with the
    baseline at the same one."""
    show: int = 3
    """Prompts whose responses are shown side by side."""
    page: int = 100
    """Prompts whose responses are on the page."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(0, show=self.show, page=self.page)
        check_at_least(1, human_n=self.human_n, temperatures=len(self.temperature))
        for temperature in self.temperature:
            check_positive(temperature=temperature)
        for n in self.best_of:
            check_at_least(2, best_of=n)
        for flag, values in (("--temperature", self.temperature), ("--best-of", self.best_of)):
            if len(set(values)) < len(values):
                raise InputError(f"{flag} {' '.join(map(str, values))}: one is named twice; name each once")


def main(args: Args) -> None:
    """Sample every run, judge, compare, and write the report."""
    folders = [args.baseline, *(args.runs or (Path("runs/ppo"), Path("runs/dpo")))]
    reward_spec = args.reward if args.runs or args.reward else "runs/rm"
    judge_spec = None if args.judge == "human" else args.judge
    for named in [*folders, reward_spec, judge_spec]:
        if str(named) in SCRIPTS and not Path(named).is_dir():
            raise InputError(f"{named} does not exist yet; run python {SCRIPTS[str(named)]} first")
    if judge_spec is None and args.prompts == "helpdesk":
        judge_spec = "gold"
    elif judge_spec is None and args.judge == "human":
        judge_spec = reward_spec  # the automatic judge that the person's verdicts are held against
    if judge_spec is None:
        needs = "--reward beside --judge human" if args.judge == "human" else "--judge to decide the wins"
        raise InputError(f"--prompts {args.prompts} needs a {needs}; gold only knows the helpdesk")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file; name a folder")
    if args.judge == "human":
        human.read_verdicts(args.out / "human.jsonl")  # a damaged file is better known before than after

    device = pick_device(args.device)
    baseline, tokenizer = load_run(args.baseline, device=device)
    models = {}
    curves = {
        folder: training_curves(folder) for folder in folders
    }  # read first: a damaged line is better known before
    for name, folder in zip(_names(folders, [f"best of {n}" for n in args.best_of]), folders):
        models[name], own = (baseline, tokenizer) if not models else load_run(folder, device=device)
        models[name].run_with(args.kernel)
        require_same_tokenizer(tokenizer, args.baseline, own, folder)
    shared = {"policy_tokenizer": tokenizer, "policy_folder": args.baseline}
    judge = load_reward(judge_spec, device, **shared)
    reward = load_reward(reward_spec, device, **shared) if reward_spec else None
    read = [*models.values(), *(scorer.model for scorer in [*reward_models(judge), *reward_models(reward)])]
    context = min(model.config.n_positions for model in read)
    prompts = read_prompts(args, helpdesk.held_out_prompts, tokenizer, context, "minirlhf.evaluate")

    first = next(iter(models))
    outcomes: dict[str, Outcome] = {}
    for temperature in args.temperature:
        at = "" if len(args.temperature) == 1 else f", T = {temperature}"
        for name, model in models.items():  # a seed for each row: no two share their luck
            console.print(f"{name}{at}: {len(prompts)} responses", markup=False)
            drawn = respond(model, tokenizer, prompts, args, mix(args.seed, len(outcomes)), temperature)
            tokens = [prompt.tokens for prompt in prompts], [response.tokens for response in drawn]
            stats = sequence_stats(model, baseline, *tokens, temperature)
            scores = score(reward, prompts, drawn) if reward else None
            gold = score(judge, prompts, drawn)
            outcomes[name + at] = Outcome(first + at, temperature, drawn, gold, scores, stats.kl, stats.entropy)
        rows = best_of_rows(args, baseline, tokenizer, prompts, judge, reward, temperature, first + at, len(outcomes))
        outcomes |= {f"best of {n}{at}": row for n, row in rows.items()}

    report = {
        "baseline": first,
        "judge": judge.name,
        "reward": reward.name if reward else None,
        "prompts": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        "temperatures": list(args.temperature),
        "seed": args.seed,
        "runs": {name: _measure(o, outcomes[o.baseline], tokenizer.eot, args.seed) for name, o in outcomes.items()},
        "head_to_head": head_to_head(outcomes, args.seed),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_records(args.out / "responses.jsonl", _response_rows(prompts, outcomes))
    if args.judge == "human":
        judged = human.ask(comparisons(prompts, outcomes), args.out / "human.jsonl", args.human_n, args.seed)
        report["human"] = human.summarise(judged, args.seed)
    trained = [(name, curves[folder]) for name, folder in zip(models, folders) if curves[folder]]
    plot_report(args.out / "report.png", report, dict(trained[:MOST_CURVES]))
    picture = (args.out / "report.png").read_bytes()
    shown = prompts[: args.page]
    write_text(args.out / "report.html", page(report, tables(report), shown, answers(outcomes, len(shown)), picture))
    write_text(args.out / "report.json", json.dumps(report, indent=2) + "\n")

    rows = [
        {"prompt": str(prompt)} | {name: f"{o.responses[i]}\n({o.gold[i]:.2f})" for name, o in outcomes.items()}
        for i, prompt in enumerate(prompts[: args.show])
    ]
    show_samples(escape(f"the same prompts, with the score of the judge ({judge.name})"), rows)
    for grid in tables(report):
        console.print(for_terminal(grid))
    console.print(f"report.json, report.html, report.png and responses.jsonl are in {args.out}", markup=False)


def best_of_rows(
    args: Args,
    baseline: Any,
    tokenizer: Tokenizer,
    prompts: list[TokenText],
    judge: Reward,
    reward: Reward | None,
    temperature: float,
    compared_with: str,
    row: int,
) -> dict[int, Outcome]:
    """The best of n of the baseline's own responses, for each n; its KL from how rare its scores are."""
    if not args.best_of:
        return {}
    pool = max(2 * max(args.best_of), POOL)  # at least as many again as are chosen from
    console.print(f"best of {', '.join(map(str, args.best_of))}: {pool * len(prompts):,} responses")
    asked, drawn = sample_each(baseline, tokenizer, prompts, pool, args, mix(args.seed, row, 1), temperature)
    scores = score(reward or judge, asked, drawn).view(len(prompts), pool)
    rows = {}
    for n in args.best_of:
        best, place = scores[:, :n].max(-1)  # among equals, the first drawn
        chosen = [drawn[i * pool + int(k)] for i, k in enumerate(place)]
        kl = logratio(best, scores[:, n:], n)
        gold = score(judge, prompts, chosen)
        rows[n] = Outcome(compared_with, temperature, chosen, gold, best if reward else None, kl, None, kl_bound(n))
    return rows


def head_to_head(outcomes: dict[str, Outcome], seed: int) -> list[dict[str, Any]]:
    """Every two rows at one temperature, on the same prompts: who wins, and could it be chance?"""
    found = []
    names = list(outcomes)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if outcomes[one].baseline == outcomes[other].baseline:
                won = wins(outcomes[one].gold, outcomes[other].gold)
                low, high = bootstrap_interval(won, seed)
                found.append({
                    "run": one, "over": other, "win_rate": float(won.mean()), "win_rate_low": low,
                    "win_rate_high": high, "ties": float((won == 0.5).float().mean()), "p_value": sign_test(won),
                })  # fmt: skip
    return found


def comparisons(prompts: list[TokenText], outcomes: dict[str, Outcome]) -> list[human.Comparison]:
    """Every row against its baseline on every prompt."""
    return [
        human.Comparison(
            name, run.baseline, str(prompt), str(run.responses[i]), str(outcomes[run.baseline].responses[i]),
            float(run.gold[i] - outcomes[run.baseline].gold[i]),
        )
        for name, run in outcomes.items()
        if name != run.baseline
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip


def _names(folders: Sequence[Path], taken: Sequence[str] = ()) -> list[str]:
    """A folder's own name; where that is taken, its path, and then a number."""
    names: list[str] = []
    for folder in folders:
        choice = [folder.resolve().name, str(folder), *(f"{folder} ({i})" for i in range(2, len(folders) + 2))]
        names.append(next(name for name in choice if name not in (*names, *taken)))
    return names


def _measure(run: Outcome, baseline: Outcome, eot: int, seed: int) -> dict[str, Any]:
    """One row of the report."""
    won, lead = wins(run.gold, baseline.gold), run.gold - baseline.gold
    low, high = bootstrap_interval(won, seed)
    lead_low, lead_high = bootstrap_interval(lead, seed)
    n = len(run.responses)
    tokens = sum(len(response.tokens) for response in run.responses)
    return {
        "baseline": run.baseline,
        "temperature": run.temperature,
        "win_rate": win_rate(run.gold, baseline.gold),
        "win_rate_low": low,
        "win_rate_high": high,
        "ties": float((won == 0.5).float().mean()),
        "p_value": sign_test(won),
        "gold": float(run.gold.mean()),
        "gold_se": standard_error(run.gold),
        "lead": float(lead.mean()),
        "lead_low": lead_low,
        "lead_high": lead_high,
        "score": None if run.scores is None else float(run.scores.mean()),
        "score_se": None if run.scores is None else standard_error(run.scores),
        "kl": float(run.kl.mean()),
        "kl_se": standard_error(run.kl),
        "kl_bound": run.kl_bound,
        "length": tokens / n,
        "eos_rate": sum(response.tokens[-1] == eot for response in run.responses) / n,
        "entropy": None if run.entropy is None else float(run.entropy.sum()) / tokens,
        "repetition": repetition(run.responses),
        **{f"distinct_{k}": distinct_n(run.responses, k) for k in (1, 2, 3)},
    }


def _response_rows(prompts: list[TokenText], outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    """One record per response, which the other commands read as {"prompt", "response"}."""
    rows = []
    for i, prompt in enumerate(prompts):
        for name, run in outcomes.items():
            row = {"run": name, "prompt": prompt, "response": run.responses[i], "gold": float(run.gold[i])}
            row |= {} if run.scores is None else {"score": float(run.scores[i])}
            rows.append(row | {"kl": float(run.kl[i])})
    return rows
