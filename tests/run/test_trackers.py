"""--log: TensorBoard and Weights & Biases are told what metrics.jsonl and samples.jsonl hold, each step once."""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from minirlhf import InputError
from minirlhf.model.gpt import GPT, GPTConfig, init_weights
from minirlhf.run import trackers
from minirlhf.run.arguments import RunArgs
from minirlhf.run.command_line import cli
from minirlhf.run.folder import Run, read_run

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None,
    reason="the package tensorboard is not installed (pip install 'minirlhf[tensorboard]')",
)
needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None,
    reason="the package wandb is not installed (pip install 'minirlhf[wandb]')",
)
SAMPLES = [
    {"prompt": "a | b", "response": "<b>é</b>\n\n# two\u2028lines", "reward": 0.5},
    {"prompt": "c", "response": "", "reward": None},
]


@dataclass(frozen=True)
class Args(RunArgs):
    """Arguments of a made-up script."""

    out: Path = Path("runs/made-up")
    """The run's folder."""
    lr: float = 1e-3
    """Learning rate."""


def train(folder: Path, steps: int, stop: int | None = None, **arguments) -> Run:
    """A made-up run that writes a checkpoint every 4 steps and samples every 3; it is killed after `stop` steps."""
    run = Run(Args(out=folder, checkpoint_every=4, **arguments), "train_x.py", steps)
    part = nn.Linear(1, 1, bias=False)
    for step in range(run.restore(part=part), steps):
        loss = torch.tensor(1 / (step + 1))
        run.log(step, {"loss": loss, "gold": None if step % 2 else float(step), "nan": float("nan"), "updates": step})
        if step % 3 == 2:
            run.samples(step, SAMPLES)
        run.checkpoint(step + 1, part=part)
        if step + 1 == stop:
            break
    return run


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n") if line]


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """By name, (step, value) of every number in metrics.jsonl."""
    found = defaultdict(list)
    for row in rows(folder):
        for key, value in row.items():
            if key != "step" and value is not None:
                found[key].append((row["step"], value))
    return dict(found)


def refused(call, *parts):
    """The call must be refused in one line that holds all `parts`."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def without(monkeypatch, name: str):
    """As if a package were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda asked: None if asked == name else find(asked))


# --- with and without -------------------------------------------------------------------------------------------------


def test_without_it_nothing_is_different(tmp_path):
    run = train(tmp_path / "run", 4)
    assert sorted(path.name for path in run.folder.iterdir()) == ["metrics.jsonl", "run.json", "samples.jsonl"]
    assert read_run(run.folder)["arguments"]["log"] == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, name):
    train(tmp_path / "old", 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    without(monkeypatch, name)
    cure = f"pip install 'minirlhf[{name}]'"
    refused(lambda: train(tmp_path / "run", 1, log=(name,)), f"--log {name}", cure)
    refused(lambda: train(tmp_path / "old", 1, log=(name,), overwrite=True), f"--log {name}", cure)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    assert importlib.util.find_spec("wandb") is not None, "Python takes it for one"
    refused(lambda: train(tmp_path / "run", 1, log=("wandb",)), "pip install 'minirlhf[wandb]'")


@pytest.mark.parametrize(
    ("arguments", "log"),
    [
        ([], ()),
        (["--log", "wandb"], ("wandb",)),
        (["--log", "tensorboard", "wandb", "--lr", "1"], ("tensorboard", "wandb")),
    ],
)
def test_it_is_read_from_the_command_line(monkeypatch, arguments, log):
    monkeypatch.setattr(sys, "argv", ["train_x.py", *arguments])
    seen = []
    cli(seen.append, Args)
    assert seen[0].log == log


def test_a_tracker_that_does_not_exist_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_x.py", "--log", "mlflow"])
    with pytest.raises(SystemExit) as stop:
        cli(print, Args)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "mlflow" in said and "tensorboard" in said and len(said.splitlines()) == 1


def test_every_training_script_has_it(commands, monkeypatch, capsys):
    for name in ("train_sft", "train_rm", "train_ppo", "train_dpo"):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        with pytest.raises(SystemExit):
            cli(print, commands[name].Args)
        assert "--log" in capsys.readouterr().out


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def events(folder: Path):
    """What TensorBoard reads in a run's folder: numbers by name, and texts by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    read.Reload()
    tags = read.Tags()
    numbers = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in tags["scalars"]}
    assert tags["tensors"] in ([], ["samples/text_summary"])
    texts = [
        (event.step, event.tensor_proto.string_val[0].decode())
        for tag in tags["tensors"]
        for event in read.Tensors(tag)
    ]
    return numbers, texts


def check_events(folder: Path):
    numbers, texts = events(folder)
    wanted = expected(folder)
    assert set(numbers) == set(wanted) == {"loss", "gold", "updates"}
    for key, points in wanted.items():
        assert [step for step, _ in numbers[key]] == [step for step, _ in points]
        assert [value for _, value in numbers[key]] == pytest.approx([value for _, value in points], rel=1e-6)  # fp32
    assert [step for step, _ in texts] == sorted({row["step"] for row in rows(folder, "samples.jsonl")})


@needs_tensorboard
def test_tensorboard_holds_what_was_logged(tmp_path):
    folder = tmp_path / "run"
    train(folder, 7, log=("tensorboard",))  # and nothing is closed: every step is there when it is done
    check_events(folder)
    for _, text in events(folder)[1]:
        assert "    a | b" in text and "    <b>é</b>\n    \n    # two\u2028lines" in text, "texts as they are"
        assert text.index("**prompt**") < text.index("**response**") < text.index("**reward**\n\n    0.5")


@needs_tensorboard
@pytest.mark.parametrize("first", [("tensorboard",), ()])
@pytest.mark.parametrize("stop", [2, 6, 7])
def test_a_resumed_run_has_each_point_once(tmp_path, first, stop):
    """Killed before its first checkpoint, and 2 or 3 steps after it; with --log from the beginning or only now."""
    folder = tmp_path / "run"
    train(folder, 12, stop=stop, log=first)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 9')
    train(folder, 12, resume=True, log=("tensorboard",))
    assert len(rows(folder)) == 12
    check_events(folder)
    for key, points in events(folder)[0].items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), key


@needs_tensorboard
def test_a_viewer_that_looks_on_forgets_what_is_sent_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    train(folder, 12, stop=7, log=("tensorboard",))
    viewer = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    viewer.Reload()
    assert len(viewer.Scalars("loss")) == 7
    train(folder, 12, resume=True, log=("tensorboard",))
    viewer.Reload()
    assert [event.step for event in viewer.Scalars("loss")] == list(range(12))


@needs_tensorboard
def test_a_part_that_ran_without_it_is_filled_in(tmp_path):
    folder = tmp_path / "run"
    train(folder, 12, stop=5, log=("tensorboard",))
    train(folder, 12, stop=9, resume=True)
    train(folder, 12, resume=True, log=("tensorboard",))
    check_events(folder)


@needs_tensorboard
def test_an_overwritten_run_leaves_no_events(tmp_path):
    folder = tmp_path / "run"
    train(folder, 9, log=("tensorboard",))
    train(folder, 3, log=("tensorboard",), overwrite=True)
    assert len(rows(folder)) == 3
    check_events(folder)
    assert len(list((folder / "tensorboard").iterdir())) == 1


@needs_tensorboard
def test_it_changes_nothing_else(tmp_path, tiny_tokenizer):
    model = GPT(GPTConfig(tiny_tokenizer.vocab_size, n_positions=16, n_layer=1, n_head=2, n_embd=8))
    init_weights(model, 0)
    folders, states = [tmp_path / "a", tmp_path / "b"], []
    for folder, log in zip(folders, [(), ("tensorboard",)]):
        torch.manual_seed(5)
        run = train(folder, 5, log=log)
        states.append(torch.get_rng_state())
        run.finish(model, tiny_tokenizer)
        assert read_run(folder)["finished"] and not (folder / "state").exists()
    assert torch.equal(*states), "no random number is drawn"
    for name in ("metrics.jsonl", "samples.jsonl", "model.safetensors"):
        assert folders[0].joinpath(name).read_bytes() == folders[1].joinpath(name).read_bytes()


@needs_tensorboard
def test_nothing_is_written_before_the_first_step(tmp_path):
    run = Run(Args(out=tmp_path / "run", log=("tensorboard",)), "train_x.py", 3)
    run.restore()
    run.samples(0, [])
    assert list(tmp_path.iterdir()) == []


# --- Weights & Biases -------------------------------------------------------------------------------------------------


class FakeServer:
    """Stands in for the package and its server: pages by id, whose history takes no step that is past."""

    def __init__(self, mode: str = "online"):
        self.mode, self.pages, self.inits, self.ignored = mode, {}, [], []
        module = types.ModuleType("wandb")
        module.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="made up")
        module.Error = type("Error", (Exception,), {})
        module.login = lambda: True
        module.init = self.init
        module.Settings = lambda **settings: settings
        module.Table = lambda columns, data, allow_mixed_types: {"columns": columns, "data": data}
        module.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))
        self.module = module

    def init(self, **given):
        self.inits.append(given)
        assert given["resume"] == "allow"
        Path(given["dir"], "wandb").mkdir(exist_ok=True)
        known = self.pages.setdefault(given["id"], {}) if self.mode == "online" else {}
        if self.mode == "offline":
            self.pages.setdefault(given["id"], []).append(known)
        now = max(known, default=-1)
        finished = []

        def log(row, step):
            nonlocal now
            if step < now or (step == now and step < page.starting_step):
                self.ignored.append(step)
                return
            now = step
            known.setdefault(step, {}).update(row)

        page = types.SimpleNamespace(starting_step=now + 1, log=log, finish=lambda: finished.append(True))
        page.finished = finished
        self.page = page
        return page


@pytest.fixture
def server(monkeypatch):
    fake = FakeServer()
    monkeypatch.setitem(sys.modules, "wandb", fake.module)
    return fake


def check_page(folder: Path, page: dict[int, dict]):
    wanted = expected(folder)
    for key in ("loss", "gold", "updates"):
        assert [(step, row[key]) for step, row in page.items() if key in row] == wanted[key]
    assert all(value is not None for row in page.values() for value in row.values())
    shown = [(step, row["samples"]) for step, row in page.items() if "samples" in row]
    assert [step for step, _ in shown] == sorted({row["step"] for row in rows(folder, "samples.jsonl")})
    for _, table in shown:
        assert table == {"columns": list(SAMPLES[0]), "data": [list(row.values()) for row in SAMPLES]}


def test_a_page_holds_what_was_logged(tmp_path, server, tiny_tokenizer, monkeypatch):
    folder = tmp_path / "mine"
    run = train(folder, 7, log=("wandb",), lr=0.5)
    (page,) = server.pages.values()
    check_page(folder, page)
    (given,) = server.inits
    assert (given["project"], given["name"], given["dir"]) == ("minirlhf", "mine", str(folder))
    assert given["config"]["lr"] == 0.5 and given["config"]["script"] == "train_x.py"
    assert not server.page.finished
    model = GPT(GPTConfig(tiny_tokenizer.vocab_size, n_positions=16, n_layer=1, n_head=2, n_embd=8))
    run.finish(model, tiny_tokenizer)
    assert server.page.finished
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    train(tmp_path / "other", 1, log=("wandb",))
    assert server.inits[-1]["project"] == "theirs"
    assert len(server.pages) == 2


@pytest.mark.parametrize("first", [("wandb",), ()])
@pytest.mark.parametrize("stop", [2, 6, 7])
def test_a_resumed_run_goes_on_with_its_page(tmp_path, server, first, stop):
    folder = tmp_path / "run"
    train(folder, 12, stop=stop, log=first)
    train(folder, 12, resume=True, log=("wandb",))
    (page,) = server.pages.values()
    check_page(folder, page)
    assert not server.ignored, "no step is sent that the page has: the client would complain about each"
    assert len({json.dumps(given["config"]) for given in server.inits}) == 1, "not a word of how it was resumed"


def test_what_the_server_never_got_is_sent_again(tmp_path, server):
    folder = tmp_path / "run"
    train(folder, 12, stop=6, log=("wandb",))
    (page,) = server.pages.values()
    for step in (2, 3, 4, 5):
        del page[step]
    train(folder, 12, resume=True, log=("wandb",))
    check_page(folder, page)


def test_an_overwritten_run_is_another_page(tmp_path, server):
    for flags in ({}, {"overwrite": True}):
        train(tmp_path / "run", 5, log=("wandb",), **flags)
    assert [len(page) for page in server.pages.values()] == [5, 5]


def test_offline_a_resumed_run_begins_a_whole_page(tmp_path, server):
    server.mode = "offline"
    folder = tmp_path / "run"
    train(folder, 12, stop=6, log=("wandb",))
    train(folder, 12, resume=True, log=("wandb",))
    first, last = server.pages.values()
    assert [len(first), len(last)] == [1, 1], "no page is written to twice, so that none has a step twice"
    check_page(folder, last[0])


@pytest.mark.parametrize("when", ["login", "init"])
def test_a_client_that_gives_up_is_one_line(tmp_path, server, monkeypatch, when):
    def fails(**given):
        raise server.module.Error("No key.\nUse one.")

    monkeypatch.setattr(server.module, when, fails)
    refused(lambda: train(tmp_path / "run", 2, log=("wandb",)), "--log wandb: No key. Use one;", "WANDB_MODE=offline")
    if when == "login":
        assert list(tmp_path.iterdir()) == [], "before anything is written"
    else:
        assert len(rows(tmp_path / "run")) == 1


def test_both_at_once(tmp_path, server):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    folder = tmp_path / "run"
    train(folder, 12, stop=6, log=("wandb", "tensorboard"))
    train(folder, 12, resume=True, log=("tensorboard", "wandb"))
    (page,) = server.pages.values()
    check_page(folder, page)
    check_events(folder)


# What the client itself wrote, offline: blocks of 32 KiB, in which 7 bytes stand before each piece of a record.
READ_OFFLINE = """
import json, struct, sys
from wandb.proto.wandb_internal_pb2 import Record
data, at, piece, found = open(sys.argv[1], "rb").read(), 7, b"", []
while at + 7 <= len(data):
    if 32768 - at % 32768 < 7:
        at += 32768 - at % 32768
        continue
    length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
    piece += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):
        record, piece = Record.FromString(piece), b""
        if record.HasField("history"):
            items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            found.append({"step": record.history.step.num, **items})
print(json.dumps(found))
"""


@needs_wandb
def test_the_real_client_offline(tmp_path):
    """In processes of their own, since the client starts a service."""
    program = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/..', sys.argv[1] + '/../helpers']\n"
        "from pathlib import Path\n"
        "import conftest, test_trackers\n"
        "run = test_trackers.train(Path(sys.argv[2]), 12, stop=int(sys.argv[3]), resume=sys.argv[4] == 'resume',"
        " log=('wandb',))\n"
        "run.trackers.close()\n"
    )
    folder = tmp_path / "run"
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for stop, how in (("6", "begin"), ("12", "resume")):
        command = [sys.executable, "-c", program, str(Path(__file__).parent), str(folder), stop, how]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    pages = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(pages) == 2 and len({page.name for page in pages}) == 2, "a page for each part"
    read = subprocess.run([sys.executable, "-c", READ_OFFLINE, pages[-1]], capture_output=True, text=True)
    history = json.loads(read.stdout)
    for key, points in expected(folder).items():
        assert [(row["step"], row[key]) for row in history if key in row] == points
    assert [row["step"] for row in history if any(key.startswith("samples") for key in row)] == [2, 5, 8, 11]
