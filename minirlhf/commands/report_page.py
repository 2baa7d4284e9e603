"""The report as one page: tables, picture, responses side by side; no scripts, and nothing from outside."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8884; --won: 40 110 230; --lost: 225 115 20 }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 90rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: 2px 8px; border-bottom: 1px solid var(--line); white-space: nowrap }
th { position: sticky; top: 0; background: Canvas } th:first-child, td:first-child { text-align: left }
img { max-width: 100%; background: white } figure { margin: 1rem 0 }
.prompt { white-space: pre-wrap; margin: 2rem 0 .5rem; font-weight: 600 }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: .5rem }
.answers div { border: 1px solid var(--line); border-left-width: 4px; padding: .3rem .6rem; white-space: pre-wrap }
.answers .won { border-left-color: rgb(var(--won)) } .answers .lost { border-left-color: rgb(var(--lost)) }
small { display: block; opacity: .75; font-variant-numeric: tabular-nums }
"""


def page(
    report: Mapping[str, Any],
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]],
    prompts: Sequence[str],
    answers: Sequence[Sequence[tuple[str, str, str, str]]],
    picture: bytes,
) -> str:
    """The whole page.

    Args:
        report: for its title: who was judged, by whom, on how many prompts.
        tables: (title, columns, rows) of text.
        prompts: those whose responses are shown.
        answers: for each of these, (run, response, what is said of it, "won", "lost", "tied" or "" for the baseline).
        picture: report.png.
    """
    title = escape(f"{report['prompts']} held-out prompts, judged by {report['judge']}")
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>",
        *(_table(*table) for table in tables),
        f'<figure><img alt="win rates, reward against KL, training curves" '
        f'src="data:image/png;base64,{b64encode(picture).decode()}"></figure>',
        f"<h2>Responses to the first {len(prompts)} prompts</h2>" if prompts else "",
    ]
    for prompt, own in zip(prompts, answers):
        parts.append(f'<p class="prompt">{escape(prompt)}</p><div class="answers">')
        parts += [_answer(*answer) for answer in own]
        parts.append("</div>")
    return "\n".join([*parts, "</body></html>\n"])


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>\n" for row in rows)
    return f"<h2>{escape(title)}</h2>\n<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _answer(run: str, response: str, said: str, outcome: str) -> str:
    kind = f' class="{outcome}"' if outcome else ""
    said = f"{said}, {outcome}" if outcome else said
    return f"<div{kind}><small>{escape(run)}: {escape(said)}</small>{escape(response.strip())}</div>"
