"""The scripts end to end on tiny models: what they write, which data they take, and that they can be killed."""

import gzip
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import python_path
from safetensors.torch import load_file

from minirlhf import InputError
from minirlhf.data import helpdesk
from minirlhf.data.records import as_dict, read_records, write_records
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.model.checkpoints import load_model
from minirlhf.run.command_line import cli
from minirlhf.run.folder import load_run

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_sft", "train_rm", "train_ppo", "train_dpo")
STEPS = 12
FEW = ["--steps", STEPS, "--batch-size", 4, "--checkpoint-every", 4]
CPU = ["--device", "cpu"]  # where the same seed promises the same bits
SMALL = ["--n-layer", 1, "--n-embd", 32, "--n-head", 2]
# The chain of `make demo`, a few steps of each.
CHAIN = {
    "pretrain": ["train_sft", "--data", "helpdesk:corpus", "--n", 60, *SMALL, *FEW],
    "sft": ["train_sft", "--init", "runs/pretrain", "--n", 60, "--eval-every", 5, *FEW],
    "rm": ["train_rm", "--n", 40, *FEW],
    "ppo": ["train_ppo", "--n", 40, "--response-tokens", 8, "--epochs", 1, "--minibatches", 2, "--sample-every", 5,
            *FEW],
    "dpo": ["train_dpo", "--n", 40, *FEW],
    "dpo-file": ["train_dpo", "--data", "rankings.jsonl", "--held-out", 0.2, *FEW],
}  # fmt: skip
BITWISE = (
    "pretrain",
    "sft",
    "rm",
    "ppo",
    "dpo-file",
)  # run again and again; without the embedded world's many held out
METRICS = {
    "pretrain": {"loss", "grad_norm", "lr"},
    "sft": {"loss", "grad_norm", "lr"},
    "rm": {"loss", "best_over_worst", "grad_norm", "lr"},
    "ppo": {
        "reward", "gold", "kl_k1", "kl_k1_se", "kl_k3", "kl_exact", "entropy", "clip_fraction", "ratio_max",
        "explained_variance", "length", "eot_rate", "rollout_seconds", "update_seconds", "policy_loss", "value_loss",
    },
    "dpo": {"loss", "accuracy", "margin", "chosen_logps", "rejected_logps", "grad_norm", "lr"},
}  # fmt: skip
METRICS["dpo-file"] = METRICS["dpo"]


@pytest.fixture(scope="module")
def call(commands):
    """Run a command line in this process, which must succeed."""

    def call(command, *arguments):
        arguments += tuple(CPU)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{command}.py", *map(str, arguments)])
            patch.setattr(sys, "dont_write_bytecode", True)
            cli(commands[command].main, commands[command].Args)

    return call


@pytest.fixture(scope="module")
def chain(tmp_path_factory, call):
    """The folder in which the whole chain has run, uninterrupted."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_records("rankings.jsonl", map(as_dict, helpdesk.rankings(20, seed=0)))
        for name, (script, *arguments) in CHAIN.items():
            call(script, *arguments, "--out", f"runs/{name}")
        call("evaluate", "runs/ppo", "runs/dpo", "--reward", "runs/rm", "--n", 8, "--max-new-tokens", 8)
    return folder


@pytest.fixture
def in_chain(chain, monkeypatch):
    monkeypatch.chdir(chain)
    return chain


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(folder).rglob("*") if path.is_file()}


def words(text):
    """Without the line breaks that a narrow terminal brings."""
    return " ".join(text.split())


# --- what a run leaves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAIN)
def test_a_finished_run_holds_what_the_contract_names(in_chain, name):
    folder = in_chain / "runs" / name
    wanted = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "run.json",
        "metrics.jsonl",
    }
    found = {path.name for path in folder.iterdir()}
    assert wanted <= found
    assert found - wanted <= {"samples.jsonl"}  # no state/ any more, nothing half-written

    info = json.loads((folder / "run.json").read_text())
    assert info["script"] == f"{CHAIN[name][0]}.py"
    assert info["finished"] is True
    assert info["seed"] == 0
    assert info["arguments"]["out"] == f"runs/{name}"
    assert info["arguments"]["config"]["steps"] == STEPS
    assert info["versions"]["torch"] == torch.__version__

    metrics = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(STEPS))
    for row in metrics:
        assert METRICS[name] <= row.keys()
    for key in METRICS[name]:
        assert all(row[key] is not None for row in metrics), key
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


def test_held_out_figures_come_at_the_end_and_every_so_often(in_chain):
    for name, key in (("pretrain", "held_out_loss"), ("rm", "held_out_accuracy"), ("dpo", "held_out_accuracy")):
        assert [row["step"] for row in rows(f"runs/{name}/metrics.jsonl") if key in row] == [STEPS - 1]
    assert [row["step"] for row in rows("runs/sft/metrics.jsonl") if "perplexity" in row] == [4, 9, 11]


def test_ppo_keeps_samples(in_chain):
    samples = rows("runs/ppo/samples.jsonl")
    assert sorted({row["step"] for row in samples}) == [4, 9, 11]
    for row in samples:
        assert row.keys() == {"step", "prompt", "response", "reward"}
        assert "Customer" in row["prompt"]


@pytest.mark.parametrize(("name", "count"), [("pretrain", 1), ("sft", 3), ("dpo", 3), ("dpo-file", 3)])
def test_what_a_run_says_in_the_end_is_kept(in_chain, name, count):
    samples = rows(f"runs/{name}/samples.jsonl")
    assert [row["step"] for row in samples] == [STEPS] * count
    for row in samples:
        assert row.keys() == {"step", "prompt", "response"}
        assert row["prompt"].startswith("Customer: ") or name == "pretrain"
    assert len({row["response"] for row in samples}) == count


def test_pretraining_lowers_the_loss(in_chain):
    metrics = rows("runs/pretrain/metrics.jsonl")
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1


def test_each_stage_starts_from_the_one_before(in_chain):
    """The tokenizer is handed on, and so are the weights: a few steps do not move them far."""
    tokenizers = [Tokenizer.load(f"runs/{name}") for name in CHAIN]
    assert all(tokenizer == tokenizers[0] for tokenizer in tokenizers)
    before, after = (load_file(f"runs/{name}/model.safetensors") for name in ("sft", "dpo"))
    assert before.keys() == after.keys()
    moved = sum((after[name] - before[name]).abs().sum() for name in before)
    assert 0 < moved < 0.2 * sum(before[name].abs().sum() for name in before)


def test_the_runs_open_in_transformers(in_chain):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    text = "Customer: My order hasn't arrived. What should I do?\nAgent:"
    ours = Tokenizer.load("runs/sft").encode(text)
    tokens = torch.tensor([ours])
    for name in ("pretrain", "sft", "ppo", "dpo"):
        assert AutoTokenizer.from_pretrained(f"runs/{name}")(text)["input_ids"] == ours
        with torch.no_grad():
            model = load_model(f"runs/{name}")
            theirs = AutoModelForCausalLM.from_pretrained(f"runs/{name}").eval()(tokens).logits
            torch.testing.assert_close(theirs, model.logits(model(tokens)), atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained("runs/rm")(text)["input_ids"] == ours
    with torch.no_grad():
        score = AutoModelForSequenceClassification.from_pretrained("runs/rm").eval()(tokens).logits
        torch.testing.assert_close(score[:, 0], load_model("runs/rm", scalar=True)(tokens)[:, -1], atol=1e-4, rtol=1e-4)


def test_the_report_holds_what_the_contract_names(in_chain):
    report = json.loads(Path("runs/report/report.json").read_text())
    assert report["baseline"] == "sft"
    assert list(report["runs"]) == ["sft", "ppo", "dpo"]
    promised = {"win_rate", "win_rate_low", "win_rate_high", "gold", "score", "kl", "length", "eos_rate", "distinct_2"}
    for run in report["runs"].values():
        assert promised <= run.keys()
        assert 0 <= run["win_rate_low"] <= run["win_rate"] <= run["win_rate_high"] <= 1
    assert report["runs"]["sft"]["kl"] == 0
    assert report["runs"]["ppo"]["kl"] > 0
    assert Path("runs/report/report.png").read_bytes().startswith(b"\x89PNG")
    assert len(rows("runs/report/responses.jsonl")) == 3 * 8


def test_responses_can_be_drawn_and_scored(in_chain, call, tmp_path, capsys):
    call("generate", "runs/ppo", "--prompt", "Customer: Help!\\nAgent:", "--max-new-tokens", 5)
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["prompt"] == "Customer: Help!\nAgent:"
    prompts = [{"prompt": f"Customer: My lamp {i} broke.\nAgent:"} for i in range(5)]
    write(tmp_path / "prompts.jsonl", prompts)
    call("generate", "runs/dpo", "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "answers.jsonl",
         "--max-new-tokens", 30, "--min-new-tokens", 3)  # fmt: skip
    assert [row["prompt"] for row in rows(tmp_path / "answers.jsonl")] == [row["prompt"] for row in prompts]
    call("rewards", "runs/rm", tmp_path / "answers.jsonl", "--out", tmp_path / "scores.jsonl")
    assert [list(row) for row in rows(tmp_path / "scores.jsonl")] == [["score"]] * 5


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BITWISE)
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(in_chain, call, tmp_path, name):
    script, *arguments = CHAIN[name]
    call(script, *arguments, "--out", tmp_path / "again")
    assert weights(tmp_path / "again") == weights(f"runs/{name}")
    call(script, *arguments, "--out", tmp_path / "other", "--seed", 1)
    assert weights(tmp_path / "other") != weights(f"runs/{name}")


@pytest.mark.parametrize("name", ["sft", "rm", "ppo", "dpo-file"])
def test_both_kernels_give_the_same_curves(in_chain, call, tmp_path, name):
    """To rounding, which twelve optimiser steps make larger: what is left is far below what a wrong term would give."""
    script, *arguments = CHAIN[name]
    curves = []
    for kernel in ("fused", "reference"):
        call(script, *arguments, "--out", tmp_path / kernel, "--kernel", kernel)
        curves.append(rows(tmp_path / kernel / "metrics.jsonl"))
    assert len(curves[0]) == len(curves[1]) == STEPS
    for step, (fused, reference) in enumerate(zip(*curves)):
        assert fused.keys() == reference.keys()
        aside = {"rollout_seconds", "update_seconds", "seconds", "ratio_drift"}
        if name == "dpo-file" and step == 0:  # the policy is the reference: the sign of a margin is rounding's
            assert abs(fused["margin"]) < 1e-5 > abs(reference["margin"])
            aside.add("accuracy")
        for key in fused.keys() - aside:
            assert fused[key] == pytest.approx(reference[key], rel=2e-3, abs=2e-4), key


# Runs a script as it is, but for a SIGKILL at the end of one call of one function: a log, a checkpoint that is not yet
# renamed, a result of which one file is written.
KILLER = """
import importlib, os, runpy, signal, sys
script, where, number, *arguments = sys.argv[1:]
module, name = importlib.import_module("minirlhf.run.folder"), where
if "." in where:
    owner, name = where.split(".")
    module = getattr(module, owner)
original, calls = getattr(module, name), []
def killed(*args, **kwargs):
    result = original(*args, **kwargs)
    calls.append(1)
    if len(calls) == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(module, name, killed)
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


def start_and_kill(script, arguments, where, number):
    """Start a script in a process of its own and have it killed at a call of a function of `minirlhf.run.folder`."""
    command = [sys.executable, "-c", KILLER, ROOT / f"{script}.py", where, number, *arguments, *CPU]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "moment"), [("sft", "log"), ("rm", "checkpoint"), ("ppo", "log"), ("dpo-file", "finish")]
)
def test_killed_twice_and_resumed_it_is_the_uninterrupted_run(in_chain, call, capsys, tmp_path, name, moment):
    """Before its first checkpoint, and after: the weights are those of the run that was left alone, bit for bit."""
    script, *arguments = CHAIN[name]
    arguments += ["--out", tmp_path / "run"]
    rng = random.Random(f"kill {name}")
    first = rng.randint(1, 3)  # steps done when it dies; a checkpoint comes every four
    start_and_kill(script, arguments, "Run.log", first)
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == first
    assert not (tmp_path / "run" / "state").exists()

    where, number = {
        "log": ("Run.log", rng.randint(5, STEPS)),
        "checkpoint": ("write_tensors", 2),
        "finish": ("save_model", 1),
    }[moment]
    start_and_kill(script, [*arguments, "--resume"], where, number)
    assert (tmp_path / "run" / "state" / "checkpoint.safetensors").exists()
    assert (tmp_path / "run" / "state" / "checkpoint.safetensors.partial").exists() == (moment == "checkpoint")
    assert (tmp_path / "run" / "model.safetensors").exists() == (moment == "finish")
    with pytest.raises(InputError, match="not finished"):
        load_run(tmp_path / "run")

    call(script, *arguments, "--resume")
    # A checkpoint follows the log of its step: who dies in either has only the one before.
    resumed_from = {"log": (number - 1) // 4 * 4, "checkpoint": 4, "finish": 8}[moment]
    assert f"{STEPS} steps, from {resumed_from}" in words(capsys.readouterr().out)
    assert weights(tmp_path / "run") == weights(f"runs/{name}")
    for file in ("metrics.jsonl", "samples.jsonl"):
        if Path(f"runs/{name}/{file}").exists():
            mine, whole = rows(tmp_path / "run" / file), rows(f"runs/{name}/{file}")
            times = {"rollout_seconds", "update_seconds"}
            assert [{k: v for k, v in r.items() if k not in times} for r in mine] == [
                {k: v for k, v in r.items() if k not in times} for r in whole
            ]
    assert not (tmp_path / "run" / "state").exists()


def test_killed_from_outside_at_any_moment(in_chain, call, tmp_path):
    """The script as it is, and a kill that it does not know of, at a moment that the scheduler decides."""
    arguments = ["--init", "runs/pretrain", "--n", 60, "--steps", 150, "--batch-size", 4, "--checkpoint-every", 3]
    call("train_sft", *arguments, "--out", tmp_path / "whole")
    killed = tmp_path / "killed"
    command = [sys.executable, ROOT / "train_sft.py", *arguments, *CPU, "--out", killed]
    at = random.Random("kill from outside").randint(20, 70)
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (killed / "metrics.jsonl").exists() or (killed / "metrics.jsonl").read_bytes().count(b"\n") < at:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not json.loads((killed / "run.json").read_text())["finished"]
    call("train_sft", *arguments, "--out", killed, "--resume")
    assert weights(killed) == weights(tmp_path / "whole")


@pytest.mark.parametrize("name", CHAIN)
def test_resuming_a_finished_run_says_so_and_leaves_it(in_chain, call, capsys, name):
    script, *arguments = CHAIN[name]
    before = contents("runs")
    call(script, *arguments, "--out", f"runs/{name}", "--resume")
    assert f"runs/{name} is finished; nothing to resume" in words(capsys.readouterr().out)
    assert contents("runs") == before


def test_overwriting_replaces_a_run(in_chain, call, tmp_path):
    script, *arguments = CHAIN["sft"]
    call(script, *arguments, "--out", tmp_path / "run", "--seed", 7)
    (tmp_path / "run" / "samples.jsonl").write_text("old\n")
    call(script, *arguments, "--out", tmp_path / "run", "--overwrite")
    assert weights(tmp_path / "run") == weights("runs/sft")
    assert rows(tmp_path / "run" / "samples.jsonl") == rows("runs/sft/samples.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing of the old one is left


# --- a fresh clone ----------------------------------------------------------------------------------------------------

# Stands where a script stands and makes it small.
STAND_IN = """
import runpy, sys
sys.argv += {arguments!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def test_ppo_alone_trains_what_it_needs_first_and_says_so(tmp_path, monkeypatch, call, capfd):
    monkeypatch.chdir(tmp_path)
    tiny = {
        "train_sft": ["--n", 60, *SMALL, *CPU, "--steps", 2, "--batch-size", 4],
        "train_rm": ["--n", 20, *CPU, "--steps", 2, "--batch-size", 4],
    }
    for script, arguments in tiny.items():
        stand_in = STAND_IN.format(arguments=list(map(str, arguments)), script=str(ROOT / f"{script}.py"))
        (tmp_path / f"{script}.py").write_text(stand_in)
    ppo = ["--n", 20, "--steps", 2, "--batch-size", 4, "--response-tokens", 8, "--seed", 3]
    call("train_ppo", *ppo)
    said = words(capfd.readouterr().out)
    for line in (
        "runs/sft does not exist yet: running python train_sft.py --seed 3",
        "runs/pretrain does not exist yet: running python train_sft.py --data helpdesk:corpus --out runs/pretrain",
        "runs/rm does not exist yet: running python train_rm.py --seed 3",
    ):
        assert line in said
    for name in ("pretrain", "sft", "rm", "ppo"):
        assert json.loads(Path(f"runs/{name}/run.json").read_text())["finished"]

    call("train_ppo", *ppo, "--out", "runs/again")  # everything is there now
    assert "does not exist yet" not in capfd.readouterr().out
    assert weights("runs/again") == weights("runs/ppo")


@pytest.mark.parametrize(
    ("script", "arguments", "needed"),
    [
        ("train_sft", [], ["runs/pretrain"]),
        ("train_sft", ["--init", "elsewhere"], []),
        ("train_sft", ["--data", "helpdesk:corpus"], []),
        ("train_rm", [], ["runs/sft"]),
        ("train_rm", ["--init", "elsewhere"], []),
        ("train_dpo", [], ["runs/sft"]),
        ("train_dpo", ["--data", "pairs.jsonl"], []),
        ("train_ppo", [], ["runs/sft", "runs/rm"]),
        ("train_ppo", ["--reward", "gold"], ["runs/sft"]),
        ("train_ppo", ["--init", "elsewhere"], []),
        ("train_ppo", ["--prompts", "pairs.jsonl"], []),
    ],
)
def test_what_is_trained_first(tmp_path, monkeypatch, commands, script, arguments, needed):
    """Defaults on the embedded world are trained; what was named, or a file's, is not."""
    monkeypatch.chdir(tmp_path)
    write("pairs.jsonl", [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(4)])
    asked = []
    monkeypatch.setattr(commands[script], "ensure_run", lambda folder, *command: asked.append((str(folder), command)))
    monkeypatch.setattr(commands[script], "load_run", stop)
    monkeypatch.setattr(commands[script], "tokenizer_named", stop, raising=False)
    monkeypatch.setattr(sys, "argv", [script, "--n", "20", "--seed", "5", *arguments])
    with pytest.raises(StopHere):
        cli(commands[script].main, commands[script].Args)
    assert [folder for folder, _ in asked] == needed
    for _, command in asked:
        assert command[-2:] == ("--seed", "5")


class StopHere(Exception):
    """The test has seen enough."""


def stop(*args, **kwargs):
    raise StopHere


# --- data of one's own ------------------------------------------------------------------------------------------------

TOPICS = ("lamp", "kettle", "order", "refund", "tracking number", "photo", "payment", "parcel")


def write(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    Path(path).write_bytes(gzip.compress(text.encode()) if str(path).endswith(".gz") else text.encode())


def hh(topic, answer):
    return f"\n\nHuman: Hi\n\nAssistant: Hi\n\nHuman: My {topic}\n\nAssistant: {answer}"


KINDS = {
    "text": [{"text": f"Customer: I was charged twice for my {topic}.\nAgent: I apologise. " * 3} for topic in TOPICS],
    "labels": [{"text": f"The {topic} is {'annoying' if i % 2 else 'great'}.", "label": 1 - i % 2}
               for i, topic in enumerate(TOPICS)],
    "demonstrations": [{"prompt": f"Customer: My {topic}!\nAgent:", "response": f" Is the {topic} broken?"}
                       for topic in TOPICS],
    "messages": [{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"My {topic}!"},
                               {"role": "assistant", "content": "I apologise."}]} for topic in TOPICS],
    "pairs": [{"prompt": f"Customer: My {topic}!\nAgent:", "chosen": " I apologise.", "rejected": " No."}
              for topic in TOPICS],
    "transcripts": [{"chosen": hh(topic, "I apologise."), "rejected": hh(topic, "No.")} for topic in TOPICS],
    "rankings": [{"prompt": f"Customer: My {topic}!\nAgent:", "responses": [" No.", " I apologise.", " What?", " Yes."],
                  "ranking": [4, 1, 2, 2] if i % 2 else [3, 1, 3, 1]} for i, topic in enumerate(TOPICS)],
    "prompts": [{"prompt": f"Customer: My {topic}!\nAgent:"} for topic in TOPICS],
}  # fmt: skip


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A working directory with a file of each kind of record."""
    monkeypatch.chdir(tmp_path)
    for name, records in KINDS.items():
        write(f"{name}.jsonl", records)
    write("packed.jsonl.gz", KINDS["demonstrations"])
    Path("book.txt").write_text("\n".join(record["text"] for record in KINDS["text"]))
    return tmp_path


def trained(folder, start=None):
    """A run's metrics, once it is known to have finished with finite weights that training has moved."""
    assert json.loads((folder / "run.json").read_text())["finished"]
    after = load_file(folder / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in after.values())
    if start is not None:
        before = load_file(start / "model.safetensors")
        assert any(not torch.equal(after[name], before[name]) for name in before)
    return rows(folder / "metrics.jsonl")


@pytest.mark.parametrize("file", ["text.jsonl", "labels.jsonl", "book.txt"])
def test_pretraining_on_texts(data, call, file):
    call("train_sft", "--data", file, "--out", "out", *SMALL, "--vocab-size", 300, "--n-positions", 32,
         "--steps", 2, "--batch-size", 4, "--block", 16, "--held-out", 0.2)  # fmt: skip
    tokens = [row["tokens"] for row in trained(data / "out")]
    assert max(tokens) <= 4 * 16  # every token counts
    assert min(tokens) == 4 * 16 or file == "labels.jsonl"  # whose texts are shorter than a block
    model, tokenizer = load_run("out")
    assert (model.config.n_positions, model.config.n_layer, model.config.n_embd) == (32, 1, 32)
    assert model.config.vocab_size == tokenizer.vocab_size <= 300


@pytest.mark.parametrize("file", ["demonstrations.jsonl", "messages.jsonl", "packed.jsonl.gz"])
def test_fine_tuning_on_demonstrations(data, call, tiny_run, tiny_tokenizer, file):
    call("train_sft", "--data", file, "--init", tiny_run, "--out", "out", "--steps", 2, "--batch-size", 8,
         "--held-out", 0)  # fmt: skip
    answers = [len(tiny_tokenizer.encode(record.response)) + 1 for record in read_records(file)]
    assert [row["tokens"] for row in trained(data / "out", tiny_run)] == [sum(answers)] * 2  # the responses', no more


@pytest.mark.parametrize("kind", ["pairs", "transcripts", "rankings"])
def test_fine_tuning_on_what_people_liked_best(data, call, tiny_run, kind):
    """The chosen response of each record, as if it were a demonstration, and no other."""

    def best(record):
        ranked = zip(record.get("responses", ()), record.get("ranking", ()))
        return record.get("chosen") or min(ranked, key=lambda pair: pair[1])[0]

    if kind == "transcripts":
        shown = [{"prompt": chosen[: -len(" I apologise.")], "response": " I apologise."}
                 for chosen in map(best, KINDS[kind])]  # fmt: skip
    else:
        shown = [{"prompt": record["prompt"], "response": best(record)} for record in KINDS[kind]]
    write("shown.jsonl", shown)
    for file in (kind, "shown"):
        call("train_sft", "--data", f"{file}.jsonl", "--init", tiny_run, "--out", f"out-{file}", "--steps", 2,
             "--batch-size", 8, "--held-out", 0)  # fmt: skip
    trained(data / f"out-{kind}", tiny_run)
    assert weights(f"out-{kind}") == weights("out-shown")


def test_fresh_weights_may_use_a_tokenizer_that_is_there(data, call, tiny_run, tiny_tokenizer):
    call("train_sft", "--data", "text.jsonl", "--tokenizer", tiny_run, "--out", "out", *SMALL, "--steps", 1,
         "--n-positions", 32)  # fmt: skip
    assert load_run("out")[1] == tiny_tokenizer


@pytest.mark.parametrize("kind", ["pairs", "transcripts", "rankings", "labels"])
def test_a_reward_model_from_preferences(data, call, tiny_run, kind):
    call("train_rm", "--data", f"{kind}.jsonl", "--init", tiny_run, "--out", "out", "--steps", 10, "--batch-size", 8,
         "--warmup-steps", 0, "--held-out", 0.25)  # fmt: skip
    metrics = trained(data / "out", tiny_run)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert 0 <= metrics[-1]["held_out_accuracy"] <= 1
    load_run("out", scalar=True)


def test_an_accuracy_that_nothing_held_out_can_show_is_not_printed(data, call, tiny_run, capsys):
    tied = [record | {"ranking": [1] * 4} for record in KINDS["rankings"][:-2]]
    write("tied.jsonl", tied + KINDS["rankings"][-2:])
    for seed in range(20):  # until the one that is held out is tied
        call("train_rm", "--data", "tied.jsonl", "--init", tiny_run, "--out", "out", "--steps", 2, "--batch-size", 8,
             "--held-out", 0.1, "--seed", seed, "--overwrite")  # fmt: skip
        if trained(data / "out", tiny_run)[-1]["held_out_accuracy"] is None:
            break
    else:
        pytest.fail("no seed held out a tied record")
    said = words(capsys.readouterr().out).rpartition("train_rm.py")[2]
    assert "2 steps in" in said and "accuracy" not in said and "nan" not in said


@pytest.mark.parametrize("kind", ["pairs", "transcripts", "rankings"])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_a_policy_from_preferences(data, call, tiny_run, kind, loss):
    call("train_dpo", "--data", f"{kind}.jsonl", "--init", tiny_run, "--out", "out", "--steps", 4, "--batch-size", 99,
         "--warmup-steps", 0, "--loss", loss, "--held-out", 0.25)  # fmt: skip
    metrics = trained(data / "out", tiny_run)
    assert metrics[0]["margin"] == pytest.approx(0, abs=1e-4)  # it starts as its own reference
    assert metrics[-1]["margin"] > 0
    assert "held_out_accuracy" in metrics[-1]


REWARD = """
seen = []

def letters(prompts, responses, texts):
    seen.append((prompts, responses, texts))
    return [response.count("e") / max(1, len(response)) for response in responses]
"""


@pytest.fixture
def reward(data):
    """A reward function in the working directory, and what it was asked."""
    (data / "my_letters.py").write_text(REWARD)
    yield lambda: sys.modules["my_letters"].seen
    sys.modules.pop("my_letters", None)


def improve(call, *arguments):
    call("train_ppo", "--out", "out", "--steps", 3, "--batch-size", 8, "--minibatches", 2, "--epochs", 1, *arguments)


@pytest.mark.parametrize("kind", ["prompts", "demonstrations", "pairs", "transcripts", "rankings"])
def test_ppo_from_prompts_with_a_function_as_reward(data, call, tiny_run, reward, kind):
    improve(call, "--prompts", f"{kind}.jsonl", "--init", tiny_run, "--reward", "my_letters:letters",
            "--response-tokens", 4, "--responses-per-prompt", 2)  # fmt: skip
    metrics = trained(data / "out", tiny_run)
    assert len(reward()) == 3
    known = {record.prompt for record in read_records(f"{kind}.jsonl")}
    for row, (prompts, responses, texts) in zip(metrics, reward()):
        assert len(prompts) == 8
        assert set(prompts) <= known
        assert prompts[0::2] == prompts[1::2]
        assert all(isinstance(text, str) for text in (*prompts, *responses, *texts))
        assert texts == [prompt + response for prompt, response in zip(prompts, responses)]
        assert row["reward"] == pytest.approx(sum(r.count("e") / max(1, len(r)) for r in responses) / 8, abs=1e-6)
        assert row["gold"] is None  # the embedded world's judge knows nothing of other data


def test_ppo_from_the_first_tokens_of_texts(data, call, tiny_run, tiny_tokenizer, reward):
    improve(call, "--prompts", "text.jsonl", "--init", tiny_run, "--reward", "my_letters:letters", "--prompt-tokens",
            "2:8", "--response-tokens", "4:8", "--batch-size", 32)  # fmt: skip
    metrics = trained(data / "out", tiny_run)
    texts = [record.text for record in read_records("text.jsonl")]
    starts = {tiny_tokenizer.decode(tiny_tokenizer.encode(text)[:n]): n for text in texts for n in range(2, 9)}
    asked = [prompt for prompts, _, _ in reward() for prompt in prompts]
    assert set(asked) <= starts.keys()
    assert {starts[prompt] for prompt in asked} == set(range(2, 9))  # every length from 2 to 8 comes up
    for row in metrics:
        assert 1 <= row["length"] <= 8
    # Limits are drawn from 4 to 8, so that of 32 responses not all are cut at the same length.
    lengths = {len(tiny_tokenizer.encode(response)) for _, responses, _ in reward() for response in responses}
    assert len(lengths) > 2


@pytest.mark.parametrize("name", ["gold", "a reward model"])
def test_ppo_with_the_judge_or_a_reward_model(data, call, tiny_run, tiny_reward_run, name):
    improve(call, "--prompts", "prompts.jsonl", "--init", tiny_run, "--reward",
            "gold" if name == "gold" else tiny_reward_run, "--response-tokens", 4)  # fmt: skip
    trained(data / "out", tiny_run)


@pytest.mark.parametrize("options", [
    ["--critic", "shared"],
    ["--kl-in", "both", "--kl-estimator", "exact", "--entropy-coef", 0.01],
    ["--kl-target", 2, "--normalise-reward", "--reward-clip", 1],
    ["--microbatch-size", 3, "--stop-kl", 0.01, "--value-clip", 0],
])  # fmt: skip
def test_ppo_with_other_options_can_be_resumed_too(data, call, tiny_run, reward, monkeypatch, commands, options):
    """Each keeps a state of its own: a second head, β, the scores so far."""
    arguments = ["--prompts", "prompts.jsonl", "--init", tiny_run, "--reward", "my_letters:letters",
                 "--response-tokens", 4, "--batch-size", 8, "--steps", 5, "--checkpoint-every", 2]  # fmt: skip
    arguments += options
    call("train_ppo", *arguments, "--out", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(commands["train_ppo"].Run, "samples", stop)  # at the last step
        with pytest.raises(StopHere):
            call("train_ppo", *arguments, "--out", "out")
    call("train_ppo", *arguments, "--out", "out", "--resume")
    assert weights("out") == weights("whole")
    assert trained(data / "out", tiny_run)[-1]["kl_coef"] == rows("whole/metrics.jsonl")[-1]["kl_coef"]


def test_ppo_earns_more_of_a_simple_reward(data, call, tiny_run, reward):
    """The whole loop in small: responses come to hold more of what is paid for."""
    call("train_ppo", "--prompts", "prompts.jsonl", "--init", tiny_run, "--reward", "my_letters:letters",
         "--out", "out", "--response-tokens", 8, "--batch-size", 48, "--epochs", 4, "--minibatches", 4, "--steps", 12,
         "--lr", 5e-3, "--kl-coef", 0, "--missing-eot-penalty", 0)  # fmt: skip
    rewards = [row["reward"] for row in trained(data / "out", tiny_run)]
    assert sum(rewards[-3:]) > 3 * sum(rewards[:3])


def test_ppo_is_paid_by_an_ensemble_and_its_critic_starts_as_the_first(data, call, commands, make_run, tiny_run):
    members = [make_run(data / f"rm-{i}", scalar=True, seed=i) for i in (1, 2)]
    call("train_ppo", "--prompts", "prompts.jsonl", "--init", tiny_run, "--reward", f"worst:{members[0]},{members[1]}",
         "--out", "out", "--response-tokens", 8, "--batch-size", 8, "--minibatches", 2, "--steps", 2)  # fmt: skip
    assert len(trained(data / "out", tiny_run)) == 2
    policy, tokenizer = commands["train_ppo"].load_run(tiny_run)
    reward = commands["train_ppo"].load_reward(f"mean:{members[0]},{members[1]}")
    critic = commands["train_ppo"].make_critic(policy, tokenizer, reward, "auto", False)
    first, second = (model.state_dict() for model in (reward.members[0].model, reward.members[1].model))
    assert all(torch.equal(value, first[key]) for key, value in critic.state_dict().items())
    assert any(not torch.equal(value, second[key]) for key, value in critic.state_dict().items())


def test_what_the_critic_starts_as(commands, make_run, tiny_run, tiny_reward_run, tmp_path):
    ppo = commands["train_ppo"]
    (policy, tokenizer), reward = ppo.load_run(tiny_run), ppo.load_reward(str(tiny_reward_run))
    other = make_run(tmp_path / "other", scalar=True, seed=7)

    def critic(init, reward=reward):
        return ppo.make_critic(policy, tokenizer, reward, init, False, tiny_run).state_dict()

    expected = {"auto": reward.model, str(other): ppo.load_run(other, scalar=True)[0]}
    for init, model in expected.items():
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in critic(init).items())
    for found in (critic("policy"), critic("auto", ppo.GoldJudge())):
        assert not found["score.weight"].any()
        trunk = {key.removeprefix("trunk."): value for key, value in found.items() if key.startswith("trunk.")}
        assert all(torch.equal(value, policy.state_dict()[key]) for key, value in trunk.items())
    with pytest.raises(InputError, match="is for a separate critic; leave it out with --critic shared"):
        ppo.Args(critic_init="policy", config=ppo.PPOConfig(critic="shared"))
    short = make_run(tmp_path / "short", scalar=True, n_positions=32)
    with pytest.raises(InputError, match="short: this critic reads 32 tokens, the policy 64"):
        critic(str(short))
    with pytest.raises(InputError, match="none: no such folder"):
        critic(str(tmp_path / "none"))


# --- the front door ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_argument_is_explained(commands, monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli(commands[script].main, commands[script].Args)
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for flag in ("--out", "--seed", "--device", "--dtype", "--kernel", "--resume", "--overwrite", "--steps", "--lr"):
        assert f"{flag} " in said
    assert commands[script].Args.__doc__ in words(said)


@pytest.mark.parametrize("name", ["generate", "rewards", "evaluate", "best_of_n", "reward_report", "plot"])
def test_a_module_says_how_it_is_called(tmp_path, name):
    command = [sys.executable, "-m", f"minirlhf.{name}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | python_path(ROOT))
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: python -m minirlhf.{name} ")


def test_a_script_is_found_from_any_directory(tmp_path, monkeypatch, commands, capfd):
    """`python somewhere/train_dpo.py` trains what it needs first with the scripts that are there."""
    for name in ("train_sft", "train_dpo"):
        (tmp_path / f"{name}.py").write_text("import sys\nprint('ran', *sys.argv[1:])\nsys.exit(7)\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "argv", ["../train_dpo.py", "--n", "20"])
    with pytest.raises(SystemExit) as ended:
        cli(commands["train_dpo"].main, commands["train_dpo"].Args)
    assert ended.value.code == 2
    out, err = capfd.readouterr()
    assert "runs/sft does not exist yet: running python ../train_sft.py --seed 0" in words(out)
    assert "ran --seed 0" in out
    assert err.startswith("error: runs/sft could not be trained (../train_sft.py ended with code 7)")


def test_importing_a_script_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script in SCRIPTS:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="imported")
    assert not list(tmp_path.iterdir())
