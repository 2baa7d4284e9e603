"""Bad input to every command: one line that names file, line and cure, code 2, no traceback, nothing half-written."""

import gzip
import importlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minirlhf.data.tokenizer import Tokenizer
from minirlhf.model.checkpoints import load_model
from minirlhf.run.command_line import cli

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_sft", "train_rm", "train_ppo", "train_dpo")
COMMANDS = (*SCRIPTS, "generate", "rewards", "evaluate", "best_of_n", "reward_report")
WITHOUT_POLICY = ("rewards", "reward_report")
GOOD = {
    "demonstrations": [
        {"prompt": f"Customer: My lamp {i} is broken!\nAgent:", "response": f" Send photo {i}."} for i in range(8)
    ],
    "pairs": [
        {"prompt": f"Customer: My lamp {i} is broken!\nAgent:", "chosen": " I'm sorry.", "rejected": f" No {i}."}
        for i in range(8)
    ],
}


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_run, tiny_reward_run):
    """An empty working directory that holds a policy, `sft`, a reward model, `rm`, and two good files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    shutil.copytree(tiny_run, "sft")
    shutil.copytree(tiny_reward_run, "rm")
    for name, records in GOOD.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


@pytest.fixture
def run(here, commands, monkeypatch, capfd):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def run(command, *arguments):
        if "--device" not in arguments:
            arguments += ("--device", "cpu")  # where the same seed promises the same bits
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli(commands[command].main, commands[command].Args)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


def contents(folder):
    """Every file below a folder, byte for byte, and every folder."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def the_line(code, out, err):
    """What every mistake promises; the one line comes back."""
    assert code == 2, out + err
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in out
    return err


@pytest.fixture
def refused(here, run):
    """Run a command line that is to be refused: nothing may be written anywhere; the line on stderr comes back."""

    def refused(command, *arguments):
        before = contents(here)
        line = the_line(*run(command, *arguments))
        assert contents(here) == before
        return line

    return refused


def reading(command, file, policy="sft", reward="rm", out="out"):
    """A small command line that reads a file."""
    return {
        "train_sft": ["--data", file, "--init", policy, "--out", out, "--steps", 2],
        "train_rm": ["--data", file, "--init", policy, "--out", out, "--steps", 2],
        "train_dpo": ["--data", file, "--init", policy, "--out", out, "--steps", 2],
        "train_ppo": ["--prompts", file, "--init", policy, "--reward", reward, "--out", out, "--steps", 2,
                      "--batch-size", 4, "--response-tokens", 8],
        "generate": [policy, "--prompts", file, "--out", f"{out}.jsonl", "--max-new-tokens", 8],
        "rewards": [reward, file, "--out", f"{out}.jsonl"],
        "evaluate": [policy, "--baseline", policy, "--prompts", file, "--judge", reward, "--out", out,
                     "--max-new-tokens", 8],
        "best_of_n": [policy, "--reward", reward, "--prompts", file, "--out", f"{out}.jsonl", "--of", 2,
                      "--max-new-tokens", 8],
        "reward_report": [reward, "--data", file, "--out", out],
    }[command]  # fmt: skip


def good_file(command):
    return "demonstrations.jsonl" if command == "train_sft" else "pairs.jsonl"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_lines_below_work_on_good_input(run, command):
    code, out, err = run(command, *reading(command, good_file(command)))
    assert code == 0, out + err
    assert Path("out").exists() or Path("out.jsonl").exists()


# --- files ------------------------------------------------------------------------------------------------------------

GOOD_LINES = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 2
BAD_LINES = {
    "broken JSON": (b'{"prompt": "a", "chosen": "b" "rejected": "c"}', "not valid JSON", "fix or delete this line"),
    "cut JSON": (b'{"prompt": "a", "chosen": "b', "not valid JSON", "fix or delete this line"),
    "no object": (b'["a", "b"]', "not a JSON object but a list", "write one {...} a line"),
    "missing key": (b'{"prompt": "a", "chosen": "b"}', 'the key "rejected" is missing', "add it or delete this line"),
    "missing prompt": (b'{"response": "b"}', 'the key "prompt" is missing', "add it or delete this line"),
    "unknown keys": (b'{"question": "a"}', 'no known kind of record (keys: "question")', "write one of"),
    "wrong type": (b'{"prompt": 3, "chosen": "b", "rejected": "c"}', '"prompt" must be a string, not a number',
                   "fix or delete this line"),
    "label of the wrong type": (b'{"text": "a", "label": "1"}', '"label" must be a whole number, not a string',
                                "fix or delete this line"),
    "invalid UTF-8": (b'{"prompt": "caf\xe9"}', "not valid UTF-8 (byte 0xe9 at column 16)", "save the file as UTF-8"),
    "empty response": (b'{"prompt": "a", "response": ""}', '"response" is empty', "fill it in or delete this line"),
    "empty chosen": (b'{"prompt": "a", "chosen": "", "rejected": "c"}', '"chosen" is empty', "fill it in"),
    "empty response of a ranking": (b'{"prompt": "a", "responses": ["b", ""], "ranking": [1, 2]}',
                                    '"responses" is empty', "fill it in"),
    "ranking of other lengths": (b'{"prompt": "a", "responses": ["b", "c"], "ranking": [1, 2, 3]}',
                                 "2 responses but 3 ranks", "one number for each response"),
    "binary bytes": (b"\x00\x01\x02\xff", "holds binary bytes", "give UTF-8 text"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_line_is_named(here, refused, command):
    for bad, what, cure in BAD_LINES.values():
        Path("bad.jsonl").write_bytes(GOOD_LINES + bad + b"\n" + GOOD_LINES)
        line = refused(command, *reading(command, "bad.jsonl"))
        assert line.startswith("error: bad.jsonl:3: ")
        assert what in line
        assert cure in line


BAD_FILES = {
    "empty.jsonl": (b"", "empty.jsonl: holds no records", "at least one"),
    "empty.txt": (b"", "empty.txt: holds no records", "at least one"),
    "blank.jsonl": (b"\n \n\n", "blank.jsonl: holds no records", "at least one"),
    "cut.jsonl.gz": (gzip.compress(GOOD_LINES)[:-12], "cut.jsonl.gz: the gzip data is cut off", "compress the file"),
    "plain.jsonl.gz": (GOOD_LINES, "plain.jsonl.gz: the gzip data is cut off or corrupt", "compress the file"),
    "packed.jsonl": (gzip.compress(GOOD_LINES), "packed.jsonl:1: holds binary bytes", "name a compressed file"),
    "random.jsonl": (bytes(range(256)) * 8, "random.jsonl:1: holds binary bytes", "give UTF-8 text"),
    "table.csv": (b"prompt,response\n", "table.csv: unknown kind of file", "give a .jsonl, .jsonl.gz or .txt"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_file_is_named(here, refused, command):
    for name, (content, what, cure) in BAD_FILES.items():
        Path(name).write_bytes(content)
        line = refused(command, *reading(command, name))
        assert what in line
        assert cure in line
    assert "nowhere.jsonl: no such file; check the name" in refused(command, *reading(command, "nowhere.jsonl"))


@pytest.mark.parametrize(
    ("command", "record", "what"),
    [
        ("train_sft", {"prompt": "a"}, "bad.jsonl:1: this record is a prompt"),
        ("train_rm", {"prompt": "a", "response": "b"}, "bad.jsonl:1: this record is a demonstration"),
        ("train_rm", {"text": "a"}, 'has no "label"'),
        ("train_dpo", {"text": "a", "label": 1}, "bad.jsonl:1: this record is a text"),
        ("train_ppo", {"text": "a"}, "bad.jsonl:1: a text has no prompt; --prompt-tokens 2:8"),
        ("rewards", {"prompt": "a"}, "bad.jsonl:1: this record is a prompt"),
    ],
)
def test_records_of_another_kind_are_named(refused, command, record, what):
    rows = [record | {key: f"{record[key]} {i}" for key in ("prompt", "text") if key in record} for i in range(4)]
    Path("bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert what in refused(command, *reading(command, "bad.jsonl"))


def test_records_of_two_kinds_are_named(refused):
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"prompt": "c", "response": "d"}\n')
    line = refused("train_sft", *reading("train_sft", "bad.jsonl"))
    assert "bad.jsonl:3: this record is a demonstration" in line
    Path("mixed.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"text": "b", "label": 1}\n')
    line = refused("train_rm", *reading("train_rm", "mixed.jsonl"))
    assert "mixed.jsonl:2: this record is a text" in line
    assert '"chosen", "rejected"' in line  # what the file began with is what is wanted


@pytest.mark.parametrize("command", ["train_rm", "train_dpo"])
def test_rankings_that_order_nothing_are_an_error(refused, command):
    rows = [{"prompt": f"a{i}", "responses": ["b", "c"], "ranking": [1, 1]} for i in range(4)]
    Path("ties.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refused(command, *reading(command, "ties.jsonl"))
    assert "ties.jsonl" in line
    assert "all responses are tied; add some that are better than others" in line


def test_labelled_texts_need_both_labels(refused):
    for label in (0, 1):
        Path("bad.jsonl").write_text("".join(f'{{"text": "a{i}", "label": {label}}}\n' for i in range(4)))
        line = refused("train_rm", *reading("train_rm", "bad.jsonl"))
        assert f"bad.jsonl: no text has label {1 - label}; both 0 and 1 are needed" in line


def test_too_few_records_to_hold_some_out_are_an_error(refused):
    for command in ("train_sft", "train_rm", "train_dpo"):
        Path("one.jsonl").write_text(json.dumps(GOOD[good_file(command).removesuffix(".jsonl")][0]) + "\n")
        assert "one.jsonl: too few different records" in refused(command, *reading(command, "one.jsonl"))


@pytest.mark.parametrize("command", ["train_ppo", "generate", "evaluate"])
def test_a_prompt_longer_than_the_context_is_named(refused, run, command):
    rows = [{"prompt": "Please help."}, {"prompt": "Agent? "}, {"prompt": "help " * 60}]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refused(command, *reading(command, "long.jsonl"))
    assert line.startswith("error: long.jsonl:3: a prompt of ")
    assert "the context of 64; shorten" in line
    if command != "generate":  # the cure that the line names
        assert "--skip-long-prompts" in line
        code, out, err = run(command, *reading(command, "long.jsonl"), "--skip-long-prompts")
        assert code == 0, err
        assert "1 of 3 prompts were too long for the context of 64 and left out" in out


def test_too_few_prompts_that_fit_are_too_few_to_compare_on(refused):
    rows = [{"prompt": "Please help."}, {"prompt": "help " * 60}, {"prompt": "help " * 61}]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refused("evaluate", *reading("evaluate", "long.jsonl"), "--skip-long-prompts")
    assert line.strip() == (
        "error: long.jsonl: 1 of 3 prompts fit the context of 64; give at least 2 that do, or lower --max-new-tokens"
    )


def test_a_reward_model_of_a_shorter_context_is_named(here, run, refused, make_run, tiny_tokenizer):
    make_run(here / "short", scalar=True, n_positions=16)
    longest = max(len(tiny_tokenizer.encode(record["prompt"])) for record in GOOD["pairs"])
    line = refused("train_ppo", *reading("train_ppo", "pairs.jsonl", reward="short"))
    assert line.startswith("error: short: this reward model reads 16 tokens, too few for a prompt of ")
    assert f" a prompt of {longest} and a response of 8; lower --response-tokens" in line
    # It is refused for what may come, at the start, and not when a response happens to be too long.
    make_run(here / "almost", scalar=True, n_positions=longest + 7)
    assert "error: almost: this reward" in refused("train_ppo", *reading("train_ppo", "pairs.jsonl", reward="almost"))
    make_run(here / "enough", scalar=True, n_positions=longest + 8)
    code, out, err = run("train_ppo", *reading("train_ppo", "pairs.jsonl", reward="enough"))
    assert code == 0, out + err
    line = refused("evaluate", *reading("evaluate", "pairs.jsonl", reward="short"))
    assert "exceed the context of 16; shorten the prompt" in line


def test_one_prompt_longer_than_the_context_is_an_error(refused):
    line = refused("generate", "sft", "--prompt", "help " * 60)
    assert line.startswith("error: --prompt: a prompt of ")


def test_prompts_that_are_all_too_long_are_an_error(refused):
    Path("long.jsonl").write_text(json.dumps({"prompt": "help " * 60}) + "\n")
    line = refused("train_ppo", *reading("train_ppo", "long.jsonl"), "--skip-long-prompts")
    assert "long.jsonl: no prompt fits the context of 64; lower --response-tokens" in line


# --- run folders ------------------------------------------------------------------------------------------------------


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def in_parts(folder):
    """Write a model's one file as two; both, and their index."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    places = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(tensors)}
    parts = [folder / f"model-{i}.safetensors" for i in (1, 2)]
    for part in parts:
        save_file({name: tensors[name] for name, place in places.items() if place == part.name}, part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return *parts, index


DAMAGES = {
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing; "),
    "weights cut off": (lambda f: os.truncate(f / "model.safetensors", 20_000),
                        "model.safetensors: cut off or damaged"),
    "weights empty": (lambda f: os.truncate(f / "model.safetensors", 0), "model.safetensors: cut off or damaged"),
    "weights and config do not fit": (lambda f: edit(f / "config.json", n_positions=32),
                                      "has shape (64, 32), config.json asks for (32, 32); "),
    "another architecture": (lambda f: edit(f / "config.json", model_type="llama"),
                             "config.json: model_type is 'llama', but only 'gpt2' can be loaded; "),
    "another activation": (lambda f: edit(f / "config.json", activation_function="relu"),
                           "config.json: activation_function is 'relu', this GPT-2 needs 'gelu_new'; "),
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json is missing; "),
    "config cut off": (lambda f: os.truncate(f / "config.json", 30), "config.json: not valid JSON"),
    "config of no shape": (lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'),
                           "config.json: the model's shape is not there"),
    "another vocabulary": (lambda f: edit(f / "config.json", vocab_size=1000),
                           "model.safetensors: transformer.wte.weight has shape"),
    "larger tokenizer": (lambda f: Tokenizer.train([json.dumps(GOOD)], 310).save(f), "310 tokens, the model only "),
    "a part missing": (lambda f: in_parts(f)[0].unlink(), "model-1.safetensors is missing, but model.safetensors."),
    "a part cut off": (lambda f: os.truncate(in_parts(f)[1], 1000), "model-2.safetensors: cut off or damaged"),
    "index cut off": (lambda f: os.truncate(in_parts(f)[2], 90), "index.json: cut off or corrupt, not valid JSON; "),
    "tokenizer missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file; "),
    "tokenizer cut off": (lambda f: os.truncate(f / "tokenizer.json", 500), "tokenizer.json: cut off or corrupt"),
    "not finished": (lambda f: edit(f / "run.json", finished=False), "is not finished; go on with --resume"),
    "gone": (shutil.rmtree, "no such folder; "),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused_as_input(here, refused, damage, tiny_run, tiny_reward_run):
    do, what = DAMAGES[damage]
    shutil.copytree(tiny_run, "bad")
    do(here / "bad")
    for command in COMMANDS:
        if command not in WITHOUT_POLICY:
            line = refused(command, *reading(command, good_file(command), policy="bad"))
            assert line.startswith("error: bad")
            assert what in line
    shutil.rmtree("bad", ignore_errors=True)
    shutil.copytree(tiny_reward_run, "bad")
    do(here / "bad")
    for command in ("train_ppo", "rewards", "evaluate"):
        line = refused(command, *reading(command, good_file(command), reward="bad"))
        assert "no reward is named 'bad'" in line if damage == "gone" else what in line


def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model(refused):
    for command in COMMANDS:
        if command not in WITHOUT_POLICY:
            line = refused(command, *reading(command, good_file(command), policy="rm"))
            assert "rm: a reward model, not a language model; name a run of" in line
    for command in ("train_ppo", "rewards", "evaluate"):
        line = refused(command, *reading(command, good_file(command), reward="sft"))
        assert "sft: a language model, not a reward model (no score.weight); train one with train_rm.py" in line


def test_models_with_other_tokenizers_do_not_meet(here, refused, make_run):
    other = Tokenizer.train(["Nothing here reads as the other tokenizer's texts did."] * 3, 290)
    make_run(here / "other", scalar=True, tokenizer=other)
    for command in ("train_ppo", "evaluate"):
        line = refused(command, *reading(command, "pairs.jsonl", reward="other"))
        assert "sft and other have different tokenizers; train one from the other with --init" in line
    make_run(here / "other-policy", tokenizer=other)
    line = refused("evaluate", "other-policy", *reading("evaluate", "pairs.jsonl")[1:])
    assert "sft and other-policy have different tokenizers" in line


@pytest.mark.parametrize(
    ("command", "flag"),
    [*((script, "--init") for script in SCRIPTS), ("train_ppo", "--reward"), ("evaluate", "--baseline"),
     ("evaluate", "--reward"), ("evaluate", "--judge")],
)  # fmt: skip
def test_an_input_that_names_nothing_is_named(refused, command, flag):
    line = refused(command, *reading(command, good_file(command)), flag, "runs/sft-tpyo")
    assert "runs/sft-tpyo" in line
    assert "no such folder; " in line


@pytest.mark.parametrize("offline", [False, True])
def test_a_name_of_the_hub_without_a_network(here, refused, monkeypatch, offline):
    """A hub that does not answer, or that may not be asked: one line, and nothing is written."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    for command in COMMANDS:
        for name in ("gpt2", "somebody/gpt2") if command not in WITHOUT_POLICY else ():
            assert refused(command, *reading(command, good_file(command), policy=name)) == (
                f"error: {name}: no such folder, and the hub cannot be reached, nor is all of it in its cache; connect "
                "to the network, or give a local folder\n"
            )


def test_which_names_are_taken_from_the_hub_is_said(run):
    for command in SCRIPTS:
        code, out, _ = run(command, "--help")
        assert code == 0
        init = " ".join(out.split()).partition("--init ")[2].partition("--n ")[0]
        assert "gpt2," in init
        assert "ORG/NAME" in init


def test_a_default_input_is_only_trained_for_the_embedded_world(refused):
    """A file of one's own says which run to start from; nothing is trained behind its back."""
    for command in ("train_rm", "train_ppo", "train_dpo"):
        arguments = reading(command, good_file(command))
        at = arguments.index("--init")
        line = refused(command, *arguments[:at], *arguments[at + 2 :])
        assert "runs/sft: no such folder; name a run" in line


# --- pickles ----------------------------------------------------------------------------------------------------------


class Trap:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def trap(here):
    """A pickle that betrays its loading."""
    trap = Trap(here / "unpickled")
    pickle.loads(pickle.dumps(trap))
    trap.marker.unlink()  # it works
    yield trap
    assert not trap.marker.exists()


def pickled(trap, path, protocol):
    if protocol == "torch":
        torch.save({"transformer.wte.weight": trap}, path)
    else:
        path.write_bytes(pickle.dumps(trap, protocol))


@pytest.mark.parametrize("protocol", ["torch", 0, 2, 4, 5])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickle_is_refused_and_never_loaded(here, refused, trap, name, protocol):
    for folder in ("sft", "rm"):
        (here / folder / "model.safetensors").unlink()
        pickled(trap, here / folder / name, protocol)
    for command in COMMANDS:
        line = refused(command, *reading(command, good_file(command)))
        assert f"{'rm' if command in WITHOUT_POLICY else 'sft'}/{name}: " in line
        if name != "model.safetensors" or protocol != 0:  # of the oldest kind nobody can tell that it is a pickle
            assert "pickle" in line
            assert "refused (loading one can run any code); convert it to" in line


def test_a_pickle_is_no_text_classifier(here, refused, trap):
    folder = here / "classifier"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "distilbert", "architectures": ["X"], "vocab_size": 10}')
    pickled(trap, folder / "pytorch_model.bin", "torch")
    line = refused("train_ppo", *reading("train_ppo", "pairs.jsonl", reward="hf:classifier"))
    assert "hf:classifier: not a text classifier with config.json, model.safetensors" in line


@pytest.mark.parametrize("protocol", ["torch", 4])
def test_a_pickle_is_no_checkpoint(here, run, refused, trap, monkeypatch, protocol):
    arguments = reading("train_sft", "demonstrations.jsonl")
    with monkeypatch.context() as patch:
        spoil(patch, LOSSES["train_sft"], at_call=2, interrupt=True)
        assert run("train_sft", *arguments, "--checkpoint-every", 1)[0] == 130
    pickled(trap, here / "out" / "state" / "checkpoint.safetensors", protocol)
    line = refused("train_sft", *arguments, "--resume")
    assert "out/state/checkpoint.safetensors: cut off or damaged" in line


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        *((command, "--batch-size", value) for command in COMMANDS for value in (0, -1)),
        *((script, flag, -1) for script in SCRIPTS for flag in ("--lr", "--warmup-steps", "--weight-decay")),
        *((script, "--lr", value) for script in SCRIPTS for value in (0, "nan", "inf")),
        *((script, flag, 0) for script in SCRIPTS for flag in ("--steps", "--checkpoint-every", "--n")),
        *((script, "--microbatch-size", -1) for script in SCRIPTS),
        *((script, "--max-grad-norm", 0) for script in SCRIPTS),
        *((script, "--held-out", 1.5) for script in ("train_sft", "train_rm", "train_dpo")),
        ("train_ppo", "--critic-lr", -1e-4),
        ("train_ppo", "--temperature", 0),
        ("train_ppo", "--kl-coef", -0.1),
        ("train_ppo", "--gamma", 1.5),
        ("train_ppo", "--lam", -0.5),
        ("train_ppo", "--clip", 0),
        ("train_ppo", "--response-tokens", "8:4"),
        ("train_ppo", "--response-tokens", "many"),
        ("train_ppo", "--prompt-tokens", "0:4"),
        ("train_ppo", "--minibatches", 3),
        ("train_ppo", "--responses-per-prompt", 3),
        ("train_dpo", "--beta", 0),
        ("train_dpo", "--label-smoothing", 0.6),
        ("train_ppo", "--kl-estimator", "exact"),
        ("train_ppo", "--kl-in", "loss"),
        ("train_rm", "--margin", -1),
        *(("generate", "--top-p", value) for value in (1.5, 0, -0.5, "nan")),
        ("generate", "--top-k", -1),
        ("generate", "--temperature", -1),
        ("generate", "--max-new-tokens", 0),
        ("generate", "--min-new-tokens", 9),
        ("evaluate", "--max-new-tokens", 0),
        ("evaluate", "--temperature", 0),
        ("evaluate", "--n", 1),
    ],
)
def test_a_number_out_of_range_is_named_by_its_flag(refused, command, flag, value):
    line = refused(command, *reading(command, good_file(command)), flag, value)
    assert flag in line
    assert str(value) in line


@pytest.mark.parametrize("loss", ["ipo", "hinge"])
def test_an_option_of_another_loss_is_refused(refused, loss):
    line = refused("train_dpo", *reading("train_dpo", "pairs.jsonl"), "--loss", loss, "--label-smoothing", 0.1)
    assert f"--label-smoothing is not for --loss {loss}; use --loss sigmoid or leave it out" in line


def test_fresh_weights_of_an_impossible_shape_are_refused(refused):
    fresh = ["--data", "demonstrations.jsonl", "--out", "out"]
    assert "n_head must divide n_embd, got 5 heads" in refused("train_sft", *fresh, "--n-head", 5)
    assert "n_layer must be at least 1, got 0" in refused("train_sft", *fresh, "--n-layer", 0)
    assert "at least 257" in refused("train_sft", *fresh, "--vocab-size", 20)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_parser_refuses_is_named_by_its_flag(refused, command):
    for extra in (["--batch-size", "many"], ["--no-such-flag"]):
        assert extra[0] in refused(command, *reading(command, good_file(command)), *extra)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_gpu_asked_for_and_absent_is_an_error(refused, monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(command, *reading(command, good_file(command)), "--device", "cuda")
    assert "--device cuda: this machine has 0 such GPUs; use --device cpu" in line
    line = refused(command, *reading(command, good_file(command)), "--device", "cuda:7")
    assert "--device cuda:7" in line
    assert "--device 'gpu' is not a device; use" in refused(
        command, *reading(command, good_file(command)), "--device", "gpu"
    )


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_checkpoint_of_another_model_is_refused(here, run, refused, monkeypatch, command):
    """What a run started from was trained again in another shape, between the kill and the resuming."""
    arguments = [*reading(command, good_file(command)), "--checkpoint-every", 1]
    if command == "train_ppo":
        arguments += ["--epochs", 1, "--minibatches", 1]
    with monkeypatch.context() as patch:
        spoil(patch, LOSSES[command], at_call=2, interrupt=True)
        assert run(command, *arguments)[0] == 130
    weights = load_file(here / "sft" / "model.safetensors")
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"].repeat(2, 1)
    save_file(weights, here / "sft" / "model.safetensors", metadata={"format": "pt"})
    edit(here / "sft" / "config.json", n_positions=128)
    line = refused(command, *arguments, "--resume")
    assert line.startswith("error: out/state/checkpoint.safetensors: does not fit the ")
    assert "size mismatch for" in line and "wpe.weight" in line
    assert "put it back, or start again with --overwrite" in line


# --- output folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_folder_that_holds_another_run_is_refused(here, refused, command):
    """`refused` compares every byte: the old run stays as it was."""
    arguments = reading(command, good_file(command), out="sft")
    line = refused(command, *arguments)
    assert "--out sft already holds files; give --resume, --overwrite or another folder" in line
    assert "contradict" in refused(command, *arguments, "--resume", "--overwrite")

    other = "train_rm.py" if command == "train_sft" else "train_sft.py"
    edit(here / "sft" / "run.json", script=other)
    line = refused(command, *arguments, "--resume")
    assert f"--out sft is a run of {other}, not {command}.py; name another folder" in line

    (here / "notes").mkdir()
    (here / "notes" / "thesis.txt").write_text("months of work")
    for flags in ([], ["--resume"], ["--overwrite"]):
        assert "--out notes " in refused(command, *reading(command, good_file(command), out="notes"), *flags)
    assert "--out pairs.jsonl is a file" in refused(
        command, *reading(command, good_file(command), out="pairs.jsonl"), "--overwrite"
    )


@pytest.mark.parametrize("command", SCRIPTS)
def test_overwriting_waits_until_the_input_is_known_to_be_good(here, refused, monkeypatch, command):
    """Bad input or a loss that is no number at once: the run that was to be replaced is still there, every byte."""
    (here / "old").mkdir()
    for path in (here / "sft").iterdir():
        shutil.copy(path, here / "old")
    Path("bad.jsonl").write_bytes(GOOD_LINES + b"{]\n")
    arguments = reading(command, "bad.jsonl", out="old")
    assert "bad.jsonl:3: not valid JSON" in refused(command, *arguments, "--overwrite")
    arguments = reading(command, good_file(command), out="old")
    assert "nowhere: no such folder" in refused(command, *arguments, "--init", "nowhere", "--overwrite")
    spoil(monkeypatch, LOSSES[command], at_call=1)
    assert "became nan at step 0" in refused(command, *arguments, "--overwrite")


@pytest.mark.parametrize("command", SCRIPTS)
def test_resuming_with_other_arguments_is_refused(here, run, refused, command):
    arguments = reading(command, good_file(command))
    assert run(command, *arguments)[0] == 0
    line = refused(command, *arguments, "--seed", 5, "--resume")
    assert "--resume: seed was 0 when out began, now 5; resume with the same arguments" in line
    assert refused(command, *arguments, "--steps", 3, "--resume").startswith("error: --resume: ")


# --- reward functions -------------------------------------------------------------------------------------------------

FUNCTIONS = """
import torch
calls = 0

def column(prompts, responses, texts): return torch.zeros(len(texts), 1)
def short(prompts, responses, texts): return [0.0] * (len(texts) - 1)
def number(prompts, responses, texts): return 1.0
def nothing(prompts, responses, texts): return None
def words(prompts, responses, texts): return ["good"] * len(texts)
def ragged(prompts, responses, texts): return [[1.0], *[[1.0, 2.0]] * (len(texts) - 1)]
def not_a_number(prompts, responses, texts): return [0.0, float("nan"), *[0.0] * (len(texts) - 2)]
def infinite(prompts, responses, texts): return [float("-inf")] * len(texts)

def later(prompts, responses, texts):
    global calls
    calls += 1
    return [float("nan") if calls > 3 else float(len(text)) for text in texts]
"""
WRONG = {
    "column": ("returned shape (4, 1), expected (4,)", "one number per response"),
    "short": ("returned shape (3,), expected (4,)", "one number per response"),
    "number": ("returned shape (), expected (4,)", "one number per response"),
    "nothing": ("returned NoneType, expected 4 numbers", "one number per response"),
    "words": ("returned list, expected 4 numbers", "one number per response"),
    "ragged": ("returned list, expected 4 numbers", "one number per response"),
    "not_a_number": ("returned NaN for response 1", "finite numbers"),
    "infinite": ("returned -inf for response 0", "finite numbers"),
}


@pytest.fixture
def functions(here, monkeypatch):
    """A module of reward functions in the working directory."""
    (here / "my_bad_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(here)
    yield
    sys.modules.pop("my_bad_rewards", None)


def test_a_reward_function_that_returns_nonsense_is_named(refused, functions):
    Path("four.jsonl").write_text("".join(json.dumps(record) + "\n" for record in GOOD["demonstrations"][:4]))
    for name, (what, cure) in WRONG.items():
        for command in ("train_ppo", "rewards", "evaluate"):
            line = refused(command, *reading(command, "four.jsonl", reward=f"my_bad_rewards:{name}"))
            assert f"reward function my_bad_rewards:{name} {what}" in line
            assert cure in line.rpartition(";")[2]


def test_a_reward_function_that_does_not_exist_is_named(refused, functions):
    for spec, what in (
        ("my_bad_rewards:none_such", "none_such does not exist in my_bad_rewards; check the name"),
        ("my_bad_rewards:calls", "calls is no function in my_bad_rewards; check the name"),
        ("no_such_module:f", "there is no module no_such_module"),
        ("not a name:f", "does not name a function; write pkg.module:function"),
    ):
        for command in ("train_ppo", "rewards"):
            assert what in refused(command, *reading(command, "pairs.jsonl", reward=spec))


def test_a_reward_function_that_turns_to_nan_keeps_what_was_learned(here, run, functions):
    arguments = [*reading("train_ppo", "pairs.jsonl", reward="my_bad_rewards:later"), "--checkpoint-every", 2]
    arguments[arguments.index("--steps") + 1] = 6
    line = the_line(*run("train_ppo", *arguments))
    assert "reward function my_bad_rewards:later returned NaN for response 0" in line
    assert not (here / "out" / "model.safetensors").exists()
    assert step_of_checkpoint(here / "out") == 2
    assert_finite(here / "out")
    sys.modules["my_bad_rewards"].calls = -100  # mended
    code, out, err = run("train_ppo", *arguments, "--resume")
    assert code == 0, out + err
    assert "6 steps, from 2" in out


# --- numbers that are not numbers -------------------------------------------------------------------------------------

LOSSES = {
    "train_sft": "minirlhf.algorithms.sft.sft_loss",
    "train_rm": "minirlhf.algorithms.reward_model.ranking_loss",
    "train_ppo": "minirlhf.algorithms.losses.policy_loss",
    "train_dpo": "minirlhf.algorithms.dpo.preference_loss",
}


def spoil(monkeypatch, name, at_call, interrupt=False):
    """Have one call of a loss, counted from 1, return NaN, or be interrupted from the keyboard."""
    module, _, function = name.rpartition(".")
    original = getattr(importlib.import_module(module), function)
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        loss = original(*args, **kwargs)
        if len(calls) == at_call and interrupt:
            raise KeyboardInterrupt
        return loss * math.nan if len(calls) == at_call else loss

    monkeypatch.setattr(name, wrapped)


def step_of_checkpoint(folder) -> int:
    """The step a checkpoint was written after."""
    with safe_open(folder / "state" / "checkpoint.safetensors", "pt") as file:
        return json.loads(file.metadata()["info"])["step"]


def tensors(folder) -> dict[str, Tensor]:
    """What a run has kept: its result and its checkpoint."""
    paths = [folder / "model.safetensors", folder / "state" / "checkpoint.safetensors"]
    return {f"{path.name}/{name}": t for path in paths if path.exists() for name, t in load_file(path).items()}


def assert_finite(folder):
    for name, tensor in tensors(folder).items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_checkpoint(here, run, monkeypatch, command):
    arguments = reading(command, good_file(command))
    arguments[arguments.index("--steps") + 1] = 6
    arguments += ["--checkpoint-every", 2]
    if command == "train_ppo":
        arguments += ["--epochs", 1, "--minibatches", 1]  # one loss a step, as elsewhere
    assert run(command, *arguments, "--out", "whole")[0] == 0

    with monkeypatch.context() as patch:
        spoil(patch, LOSSES[command], at_call=6)
        line = the_line(*run(command, *arguments))
    assert f"loss became nan at step 5 of {command}.py; the checkpoint of step 4 is kept in out/state; " in line
    assert "lower the learning rate or look at the data" in line
    assert not (here / "out" / "model.safetensors").exists()  # nobody can take it for a finished run
    assert step_of_checkpoint(here / "out") == 4
    assert_finite(here / "out")

    code, out, err = run(command, *arguments, "--resume")  # the checkpoint is whole: it leads to the same weights
    assert code == 0, out + err
    assert (here / "out" / "model.safetensors").read_bytes() == (here / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("command", SCRIPTS)
@pytest.mark.parametrize("steps", [1, 4])
def test_an_absurd_learning_rate_leaves_nothing_that_is_no_number(here, run, command, steps):
    """Nothing is patched here: the weights overflow, and neither a checkpoint nor a result may hold them."""
    arguments = reading(command, good_file(command))
    arguments[arguments.index("--steps") + 1] = steps
    line = the_line(*run(command, *arguments, "--checkpoint-every", 1, "--lr", 3e38, "--warmup-steps", 0))
    assert " at step " in line
    assert "lower the learning rate" in line
    assert not (here / "out" / "model.safetensors").exists()
    assert_finite(here / "out")


# --- the processes themselves -----------------------------------------------------------------------------------------


def process(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_script_keeps_the_promises_as_a_process(here):
    Path("bad.jsonl").write_bytes(GOOD_LINES + b'{"prompt": }\n')
    before = contents(here)
    line = the_line(*process(ROOT / "train_dpo.py", *reading("train_dpo", "bad.jsonl")))
    assert line == "error: bad.jsonl:3: not valid JSON (Expecting value at column 12); fix or delete this line\n"
    assert contents(here) == before


def test_a_module_keeps_the_promises_as_a_process(here, trap):
    (here / "sft" / "model.safetensors").unlink()
    pickled(trap, here / "sft" / "pytorch_model.bin", "torch")
    before = contents(here)
    line = the_line(*process("-m", "minirlhf.generate", *reading("generate", "pairs.jsonl")))
    assert "sft/pytorch_model.bin: pickled weights are refused" in line
    assert contents(here) == before


def test_the_model_that_is_refused_here_loads_elsewhere(here):
    """So that none of the refusals above is about the fixtures."""
    load_model(here / "sft")
    load_model(here / "rm", scalar=True)
