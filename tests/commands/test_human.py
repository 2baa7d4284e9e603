"""human: blind, on random sides, one key a verdict, nothing lost, nothing asked twice; and in the command."""

import io
import json
import os
import sys
from pathlib import Path

import pytest

from minirlhf import InputError
from minirlhf.commands import human
from minirlhf.commands.evaluate import Args, main
from minirlhf.commands.human import Comparison, ask, summarise

PAIRS = [Comparison("ppo", "sft", f"prompt {i}", f"RUN {i}", f"BASE {i}", float(i % 3 - 1)) for i in range(30)]


def keys(pressed):
    """Keys one after the other; at the end of them, q."""
    rest = iter(pressed)
    return lambda: next(rest, "q")


def knowing(capsys, wanted):
    """A person who reads what is shown and presses the key of the text that starts with `wanted`."""

    def press():
        lines = capsys.readouterr().out.splitlines()
        line = next(line for line in lines if "RUN" in line and "BASE" in line)
        return "1" if (line.index(wanted) < len(line) // 2) else "2"

    return press


def test_verdicts_are_of_the_text_and_not_of_the_side(tmp_path, capsys):
    judged = ask(PAIRS, tmp_path / "human.jsonl", 20, 0, knowing(capsys, "RUN"))
    assert len(judged) == 20 and all(verdict == 1.0 for _, verdict in judged)
    judged = ask(PAIRS, tmp_path / "other.jsonl", 20, 0, knowing(capsys, "BASE"))
    assert all(verdict == 0.0 for _, verdict in judged)
    rows = [json.loads(line) for line in (tmp_path / "human.jsonl").read_text().splitlines()]
    assert 4 < sum(row["left"] == "run" for row in rows) < 16  # both sides occur


def test_it_is_blind_and_in_an_order_of_its_own(tmp_path, capsys):
    ask(PAIRS, tmp_path / "human.jsonl", 30, 1, keys("1" * 30))
    shown = capsys.readouterr().out
    assert "ppo" not in shown and "sft" not in shown
    rows = [json.loads(line) for line in (tmp_path / "human.jsonl").read_text().splitlines()]
    order = [row["prompt"] for row in rows]
    assert order != [pair.prompt for pair in PAIRS] and sorted(order) == sorted(pair.prompt for pair in PAIRS)
    left = [row["left"] for row in rows]
    assert [row["chosen"] for row in rows] == ["run" if side == "run" else "baseline" for side in left]  # 1 = left


def test_whoever_stops_goes_on_and_is_not_asked_twice(tmp_path, capsys):
    path = tmp_path / "human.jsonl"
    assert len(ask(PAIRS, path, 10, 0, keys("1120"))) == 4
    assert "stopped; the verdicts so far are in" in capsys.readouterr().out
    first = path.read_text()
    asked = []
    judged = ask(PAIRS, path, 10, 0, lambda: asked.append(1) or "2")
    assert len(judged) == 10 and len(asked) == 6 and path.read_text().startswith(first)
    whole = ask(PAIRS, tmp_path / "whole.jsonl", 10, 0, keys("1120222222"))
    assert judged == whole


def test_the_same_response_is_a_tie_and_not_shown(tmp_path):
    same = [Comparison("ppo", "sft", "p", "yes", "yes", 0.0)]
    assert ask(same, tmp_path / "human.jsonl", 5, 0, keys("")) == [(same[0], 0.5)]
    assert not (tmp_path / "human.jsonl").exists()


def test_another_key_is_asked_for_again(tmp_path, capsys):
    assert [v for _, v in ask(PAIRS[:1], tmp_path / "human.jsonl", 1, 0, keys("x7="))] == [0.5]
    assert capsys.readouterr().out.count("press 1, 2, 0 or q") == 2


def test_agreement_counts_what_both_order_strictly():
    pair = lambda lead: Comparison("ppo", "sft", "p", "a", "b", lead)  # noqa: E731
    judged = [(pair(1.0), 1.0), (pair(2.0), 0.0), (pair(-1.0), 0.0), (pair(0.0), 1.0), (pair(3.0), 0.5)]
    row = summarise(judged, 0)["ppo"]
    assert (row["comparisons"], row["strict"]) == (5, 3) and row["ties"] == pytest.approx(0.2)
    assert row["agreement"] == pytest.approx(2 / 3) and row["win_rate"] == pytest.approx(0.5)
    assert row["win_rate_low"] < 0.5 < row["win_rate_high"]
    none = summarise([(pair(0.0), 1.0), (pair(1.0), 0.5)], 0)["ppo"]
    assert none["agreement"] is None and none["strict"] == 0


@pytest.mark.parametrize("line", ["{", "[]", '{"run": "ppo"}', '{"chosen": "me"}'])
def test_a_damaged_file_is_named_with_its_line(tmp_path, line):
    path = tmp_path / "human.jsonl"
    ask(PAIRS, path, 2, 0, keys("12"))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=r"human.jsonl:3: not a verdict .*; mend or delete this line"):
        human.read_verdicts(path)


def test_the_command_asks_and_reports(tmp_path, make_run, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("sft", "ppo")):
        make_run(tmp_path / "runs" / name, seed=seed)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{c}?"}) + "\n" for c in "abcdef"))
    (tmp_path / "lengths.py").write_text(
        "def longest(prompts, responses, texts):\n    return [len(r) for r in responses]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(human, "read_key", keys("1212"))
    shared = {"prompts": "prompts.jsonl", "reward": "lengths:longest", "max_new_tokens": 8, "device": "cpu", "show": 0}
    main(Args(runs=(Path("runs/ppo"),), **shared, judge="human", human_n=4, out=Path("report")))
    report = json.loads(Path("report/report.json").read_text())
    assert report["judge"] == "lengths:longest" and report["human"]["ppo"]["comparisons"] == 4
    assert "as you judged, and how far lengths:longest agrees" in capsys.readouterr().out
    rows = [json.loads(line) for line in Path("report/human.jsonl").read_text().splitlines()]
    responses = [json.loads(line) for line in Path("report/responses.jsonl").read_text().splitlines()]
    for row in rows:  # what the person saw is what was drawn
        own = {r["run"]: r for r in responses if r["prompt"] == row["prompt"]}
        assert own["ppo"]["response"] == row["response"] and own["sft"]["response"] == row["other"]
        assert row["lead"] == own["ppo"]["gold"] - own["sft"]["gold"]
    sys.modules.pop("lengths", None)


def test_keys_come_through_a_pipe_line_by_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n\n two\nq"))
    assert [human.read_key() for _ in range(5)] == ["1", "", "t", "q", "q"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals on Windows")
def test_keys_come_from_a_terminal_one_by_one(monkeypatch):
    import pty

    writer, reader = pty.openpty()
    with open(reader, encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        for typed, key in ((b"2", "2"), (b"\x1b[1~", "\x1b"), (b"1", "1")):  # Home is no vote for 1
            os.write(writer, typed)
            assert human.read_key() == key
    os.close(writer)


def test_a_file_without_its_last_newline_loses_nothing(tmp_path):
    path = tmp_path / "human.jsonl"
    ask(PAIRS, path, 2, 0, keys("12"))
    path.write_text(path.read_text().rstrip("\n"))
    assert len(ask(PAIRS, path, 3, 0, keys("1"))) == 3 and len(human.read_verdicts(path)) == 3


def test_ctrl_c_stops_as_q_does(tmp_path, capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert ask(PAIRS, tmp_path / "human.jsonl", 3, 0, interrupted) == []
    assert "stopped" in capsys.readouterr().out


def test_without_an_automatic_judge_it_says_what_is_missing(tmp_path, make_run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    make_run(tmp_path / "runs/sft")
    with pytest.raises(InputError, match="needs a --reward beside --judge human; gold only knows the helpdesk"):
        main(Args(runs=(Path("runs/sft"),), prompts="prompts.jsonl", judge="human", device="cpu"))
