"""The per-token breakdown of responses: a table on the terminal, and explain.html, one page that needs nothing else.

Each breakdown is appended to explain.jsonl and the page is made from that file, so that the page of a resumed run is
that of a run never stopped.
"""

import json
import math
import re
from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from minirlhf.algorithms.experience import Step
from minirlhf.algorithms.losses import clipped, kl_terms
from minirlhf.algorithms.ppo import Networks, PPOConfig, token_losses
from minirlhf.algorithms.rollout import microbatches
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.run.folder import Run, write_text
from minirlhf.run.terminal import console

PAGE_STEPS = 10  # steps on the page: the first and the last ones; explain.jsonl holds them all
PROMPT_ROWS = 8  # tokens of a prompt on the terminal: the last ones; the page holds them all


class Column(NamedTuple):
    """One column of the table."""

    label: str
    format: str
    meaning: str


# What a token's record holds, in this order; numbers are None in the prompt.
COLUMNS = {
    "text": Column("text", "", r"The token; ␣ is a space, ⏎ a line break, \xc3 a byte that is no whole character."),
    "mask": Column("mask", "", "✓ = drawn by the policy and trained on; · = prompt, where nothing counts."),
    "logprob": Column("log-prob", ".2f", "log π_old of the token, as it was drawn; nats, at the sampling temperature."),
    "ref_logprob": Column("ref log-prob", ".2f", "The same under the reference, π_ref."),
    "kl": Column("KL", ".3f", "KL(π_old‖π_ref) of the distribution that the token was drawn from, over the whole "
                 "vocabulary: how far the policy stands from the reference here, whatever it drew; nats."),
    "reward": Column("reward", "+.3f", "−β times the KL by the estimator it is paid for with (k1: log-prob − ref "
                     "log-prob, not the KL column), where it is paid for in the reward; at the last token also the "
                     "score, as PPO sees it."),
    "value": Column("value", "+.2f", "What the critic expected, before the token was drawn, of the rewards to come."),
    "advantage": Column("advantage", "+.2f", "How much better than expected it went from here on (GAE). Updates push a "
                        "token with + up and one with − down."),
    "return": Column("return", "+.2f", "Value + advantage before any whitening: what the critic learns to expect."),
    "ratio": Column("ratio", ".3f", "π/π_old of the token, with π the policy after the rollout's updates. It may go "
                    "against its own advantage: other tokens move the same weights."),
    "clipped": Column("clipped", "", "Yes where ratio > 1 + ε and advantage > 0, or ratio < 1 − ε and advantage < 0: "
                      "it went beyond ε the way its advantage pushes, and the clipped surrogate has no gradient left. "
                      "Beyond ε the other way it is pulled back, and not clipped."),
}  # fmt: skip


class Explained(NamedTuple):
    """One response of a rollout with its breakdown: a row of explain.jsonl."""

    step: int
    response: int  # its row in the rollout
    truncated: bool  # cut at the limit
    score: float  # as the reward gave it
    shaped_score: float  # as PPO sees it: normalised, clipped, less the penalty for being cut
    kl_coef: float  # β
    kl_estimator: str
    kl_in: str
    kl_paid: float  # by that estimator, before the updates, summed over the response; nats
    clip: float  # ε
    whiten: bool
    tokens: list[dict[str, Any]]  # one record per token, the prompt's first, with the keys of COLUMNS


@torch.no_grad()
def breakdown(
    seen: Step, rows: Sequence[int], networks: Networks, tokenizer: Tokenizer, config: PPOConfig
) -> list[Explained]:
    """Some responses of a rollout, token by token, with the columns of `COLUMNS`; padding is left out.

    The networks are those after the rollout's updates: ratio and clipped are of them, all else was known before. The
    prompt's tokens come first; they do not count and have no numbers.
    """
    episodes, experience, old = seen.rollout, seen.experience, seen.experience.old
    ratio = torch.ones_like(episodes.old_logprobs)
    for part in microbatches(episodes.counted, torch.tensor(rows), config.at_a_time):
        ratio[part] = token_losses(networks, episodes, experience, part, seen.kl_coef, config).logratio.exp()
    numbers = {
        "logprob": episodes.old_logprobs, "ref_logprob": old.ref_logprobs, "kl": old.kl,
        "reward": experience.rewards, "value": old.values, "advantage": experience.advantages,
        "return": experience.returns, "ratio": ratio, "clipped": clipped(ratio, experience.advantages, config.clip),
    }  # each (B, R)  # fmt: skip
    kl_paid = kl_terms(episodes.old_logprobs, old.ref_logprobs, old.kl, config.kl_estimator)  # (B, R)

    responses = []
    for row in rows:
        tokens = [
            {"text": token_text(tokenizer, t), "mask": False} | dict.fromkeys(numbers) for t in seen.prompts[row].tokens
        ]
        mask = episodes.mask[row]
        columns = (table[row][mask].tolist() for table in (episodes.responses, *numbers.values()))
        for token, *own in zip(*columns):
            finite = (x if math.isfinite(x) else None for x in own)  # JSON knows no others
            tokens.append({"text": token_text(tokenizer, token), "mask": True} | dict(zip(numbers, finite)))
        responses.append(
            Explained(
                seen.step, row, bool(episodes.truncated[row]), float(seen.scores[row]), float(seen.shaped_scores[row]),
                seen.kl_coef, config.kl_estimator, config.kl_in, float(kl_paid[row].sum()), config.clip, config.whiten,
                tokens,
            )
        )  # fmt: skip
    return responses


def show_explained(run: Run, responses: list[Explained]) -> None:
    """Print the tables, append to explain.jsonl and write explain.html anew."""
    run.append("explain.jsonl", [response._asdict() for response in responses])
    for response in responses:
        console.print(table(response))
    lines = (run.folder / "explain.jsonl").read_text(encoding="utf-8").split("\n")
    everything = [Explained(**json.loads(line)) for line in lines if line]
    write_text(run.folder / "explain.html", page(everything, title=f"{run.script} → {run.folder}"))
    console.print(Text(f"  as a page, with colour: {run.folder / 'explain.html'}"), soft_wrap=True)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""A token's text; bytes that are no whole character as \xc3."""
    return tokenizer.encoding.decode_single_token_bytes(token).decode("utf-8", errors="backslashreplace")


def visible(text: str) -> str:
    """Spaces as ␣, line breaks as ⏎, and whatever else cannot be seen as an escape."""
    shown = {" ": "␣", "\n": "⏎"}
    return "".join(shown.get(c, c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def number(value: float | None, spec: str) -> str:
    """A formatted number, 0 without a minus; one that is infinite or none at all is –."""
    return (
        "–" if value is None or not math.isfinite(value) else format(value if float(format(value, spec)) else 0.0, spec)
    )


def cell(token: dict[str, Any], key: str) -> str:
    """What stands in the table."""
    value = token[key]
    if key in ("text", "mask"):
        return visible(value) if key == "text" else "✓" if value else "·"
    if not token["mask"] or key == "clipped":
        return "yes" if value else ""
    return number(value, COLUMNS[key].format)


def totals(one: Explained) -> str:
    """The score, and the sums that lead from it to the rewards."""
    counted = [token for token in one.tokens if token["mask"]]

    def total(key: str, spec: str) -> str:
        numbers = [token[key] for token in counted]
        return number(None if None in numbers else sum(numbers), spec)

    shaped, paid = number(one.shaped_score, "+.3f"), number(one.kl_paid, ".3f")
    price = "" if one.kl_in == "loss" else f" − {one.kl_coef:.4g} × {paid}"
    return (
        f"{len(counted)} tokens, {'cut at the limit' if one.truncated else 'ended by itself'}; "
        f"score {number(one.score, '+.3f')}{'' if one.shaped_score == one.score else f', to PPO {shaped}'}; "
        f"Σ KL {total('kl', '.3f')} nats{'' if one.kl_estimator == 'exact' else f', {paid} by {one.kl_estimator}'}; "
        f"Σ reward {total('reward', '+.3f')} = {shaped}{price}"
    )


def table(one: Explained) -> Table:
    """One response for the terminal: green went better than expected, red worse."""
    title = Text(f"step {one.step}, response {one.response}: {totals(one)}")
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for key, column in COLUMNS.items():
        head, text = re.sub("[- ]", r"\g<0>\n", column.label), key == "text"
        made.add_column(head, no_wrap=not text, overflow="fold", justify="left" if text else "right")
    hidden = max(0, sum(not token["mask"] for token in one.tokens) - PROMPT_ROWS)
    if hidden:
        made.add_row(f"… {hidden} more", "·", style="dim")
    for token in one.tokens[hidden:]:
        cells = {key: Text(cell(token, key)) for key in COLUMNS}
        cells["advantage"].stylize("green" if (token["advantage"] or 0.0) > 0 else "red")
        cells["clipped"].stylize("bold")
        made.add_row(*cells.values(), style="" if token["mask"] else "dim")
    return made


# --- the page ---------------------------------------------------------------------------------------------------------

TINTED = ("kl", "reward", "advantage", "ratio")
STYLE = """
:root { color-scheme: light dark; --up: 40 110 230; --down: 225 115 20; --far: 140 80 190; --line: #8884 }
@media (prefers-color-scheme: dark) { :root { --up: 80 140 255; --down: 240 140 50; --far: 180 120 235 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
nav a { margin-right: .8em } dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }
dt { font-weight: 600 } dd { margin: 0 } i { font-style: normal; opacity: .5 }
h3 { font-size: 1rem; margin: 2rem 0 .5rem } .strip { line-height: 1.2; margin: 0 } span.prompt { opacity: .6 }
.strip span { display: inline-block; vertical-align: top; padding: 2px 3px; margin: 0 1px 3px 0; text-align: center }
.strip small { display: block; font-size: 10px } .strip, table { font-variant-numeric: tabular-nums }
table { border-collapse: collapse; font-size: 13px; width: 100% } caption { text-align: left; padding: .3rem 0 }
th, td { text-align: right; padding: 1px 8px; border-bottom: 1px solid var(--line); white-space: nowrap }
th { position: sticky; top: 0; background: Canvas } th:first-child, td:first-child { text-align: left }
td:first-child { font-family: ui-monospace, monospace; white-space: normal; overflow-wrap: anywhere }
tr.prompt td { border: 0; padding-block: 0; font-size: 11px; line-height: 1.3; opacity: .7 }
td:last-child { font-weight: 700 }
.up { background: rgb(var(--up) / var(--a)) } .down { background: rgb(var(--down) / var(--a)) }
.far { background: rgb(var(--far) / var(--a)) }
"""


def page(responses: list[Explained], title: str) -> str:
    """The first step and the last ones as one HTML page, without scripts and without anything from outside."""
    steps = [list(step) for _, step in groupby(responses, key=lambda one: one.step)]
    shown = steps if len(steps) <= PAGE_STEPS else [steps[0], *steps[1 - PAGE_STEPS :]]
    one, title = responses[-1], escape(title)
    places = "the reward and the loss" if one.kl_in == "both" else f"the {one.kl_in}"
    legend = {column.label: escape(column.meaning) for column in COLUMNS.values()}
    if one.whiten:
        legend["advantage"] += (
            " Whitened here (mean 0 and deviation 1 over the whole rollout): its sign is against the average token, "
            "and return − value is the advantage as it was."
        )
    legend = "".join(f"<dt>{label}</dt><dd>{meaning}</dd>" for label, meaning in legend.items())
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{STYLE}</style></head><body><h1>{title}: responses, token by token</h1>",
        f"<p>ε = {one.clip:g}; the KL is paid for by {one.kl_estimator}, in {places}. Ratio and clipped tell of the "
        "policy after the rollout's updates, all else was known before them. Blue is above 0 (a ratio: above 1), "
        "orange below, violet is KL; the deeper, the larger beside the step's largest. The strips show advantages.</p>",
        f"<dl>{legend}</dl>",
        "<nav>" + "".join(f'<a href="#step{step[0].step}">step {step[0].step}</a>' for step in shown) + "</nav>",
        f"<p>{len(steps) - len(shown)} more are in explain.jsonl.</p>" if len(steps) > PAGE_STEPS else "",
    ]
    for step in shown:
        parts.append(f'<h2 id="step{step[0].step}">Step {step[0].step}, β = {step[0].kl_coef:.4g}</h2>')
        tokens = [token for one in step for token in one.tokens]
        largest = {key: max(abs(lean(token, key)) for token in tokens) for key in TINTED}
        parts += [article(one, largest) for one in step]
    return "\n".join([*parts, "</body></html>\n"])


def article(one: Explained, largest: dict[str, float]) -> str:
    """One response: the strip of its tokens, the table."""
    strip, rows = "", ""
    for token in one.tokens:
        cells = {key: re.sub("[␣⏎]", r"<i>\g<0></i>", escape(cell(token, key))) for key in COLUMNS}
        tints = {key: tint(token, key, largest) for key in COLUMNS}
        kind = "" if token["mask"] else ' class="prompt"'
        strip += f"<span{kind or tints['advantage']}>{cells['text']}<small>{cells['advantage']}</small></span>"
        rows += f"<tr{kind}>" + "".join(f"<td{tints[key]}>{cells[key]}</td>" for key in COLUMNS) + "</tr>\n"
    head = "".join(f"<th>{column.label}</th>" for column in COLUMNS.values())
    return (
        f'<h3>Response {one.response}</h3><p class="strip">{strip}</p>\n'
        f"<table><caption>{escape(totals(one))}</caption><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table>"
    )


def lean(token: dict[str, Any], key: str) -> float:
    """How far a number is from neutral, with its sign; a ratio on a log scale."""
    value = token[key] or 0.0
    return value if key != "ratio" else math.log(value or 1.0)


def tint(token: dict[str, Any], key: str, largest: dict[str, float]) -> str:
    """What colours a cell: blue above neutral, orange below, as deep as it is large beside the step's largest."""
    share = lean(token, key) / (largest[key] or 1.0) if key in TINTED else 0.0
    kind = "far" if key == "kl" else "up" if share > 0 else "down"
    return f' class="{kind}" style="--a:{0.6 * abs(share):.2f}"' if share else ""
