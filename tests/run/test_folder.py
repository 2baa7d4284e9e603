"""runs: the life of a run's folder, resuming to the bit, the command line's refusals, seeds, tables."""

import io
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from minirlhf import InputError, devices
from minirlhf.algorithms.training import adamw, cosine_lr, decay_groups, is_due, schedule
from minirlhf.checks import check_at_least, check_positive, check_share
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.devices import pick_device
from minirlhf.model.checkpoints import load_model, save_model
from minirlhf.model.gpt import GPT, GPTConfig, ScalarModel, init_weights
from minirlhf.run import arguments, terminal
from minirlhf.run import folder as folder_module
from minirlhf.run.arguments import RunArgs
from minirlhf.run.command_line import LEAN, cli
from minirlhf.run.folder import Run, ensure_run, load_run, read_run, require_same_tokenizer
from minirlhf.run.terminal import show_samples
from minirlhf.run.threads import beside
from minirlhf.seeds import seeded

TEXT = "My order hasn't arrived. What should I do? Please check your tracking number."


@dataclass(frozen=True)
class Inner:
    """A part of the arguments with a check of its own."""

    beta: float = 0.1
    """Must be positive."""

    def __post_init__(self):
        check_positive(beta=self.beta)


@dataclass(frozen=True)
class Args(RunArgs):
    """Arguments of a made-up script."""

    out: Path = Path("runs/made-up")
    """The run's folder."""
    lr: float = 1e-3
    """Learning rate."""
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        super().__post_init__()
        check_positive(lr=self.lr)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 270)


@pytest.fixture(scope="module")
def tiny(tokenizer):
    """A model and its tokenizer."""
    model = GPT(GPTConfig(tokenizer.vocab_size, n_positions=16, n_layer=1, n_head=2, n_embd=8))
    init_weights(model, 0)
    return model, tokenizer


def files(folder):
    """Every file under a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n") if line]


def refused(call, *parts):
    """The call must be refused in one line that holds all `parts`."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# --- a folder's life --------------------------------------------------------------------------------------------------


def test_nothing_is_written_before_the_first_step(tmp_path, tiny):
    out = tmp_path / "deep" / "run"
    run = Run(Args(out=out, seed=7, checkpoint_every=1), "train_x.py", 2)
    assert run.restore(model=tiny[0]) == 0
    run.require_finite(0, loss=1.0)
    assert list(tmp_path.iterdir()) == []
    run.log(0, {"loss": torch.tensor(1.5), "kl": 0.25, "broken": math.nan})
    assert sorted(files(out)) == ["metrics.jsonl", "run.json"]
    info = read_run(out)
    assert (info["script"], info["seed"], info["finished"]) == ("train_x.py", 7, False)
    assert info["arguments"]["inner"] == {"beta": 0.1}
    assert info["versions"]["torch"] == torch.__version__
    assert rows(out) == [{"step": 0, "loss": 1.5, "kl": 0.25, "broken": None}]
    assert not run.finished
    run.samples(0, [{"prompt": "a", "response": "é\u2028b", "reward": 0.5}])
    assert rows(out, "samples.jsonl") == [{"step": 0, "prompt": "a", "response": "é\u2028b", "reward": 0.5}]
    run.samples(1, [])
    assert len(rows(out, "samples.jsonl")) == 1
    run.checkpoint(1, model=tiny[0])
    assert (out / "state" / "checkpoint.safetensors").exists()
    run.finish(*tiny)
    assert read_run(out)["finished"]
    assert run.finished
    assert not (out / "state").exists()
    assert not list(out.glob("*.partial"))
    model, tokenizer = load_run(out)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny[0].parameters()))
    assert tokenizer == tiny[1]


def finished_run(out, tiny, script="train_x.py", **arguments):
    run = Run(Args(out=out, **arguments), script, 1)
    run.log(0, {"loss": 1.0})
    run.finish(*tiny)
    return out


def test_a_folder_in_use_is_refused(tmp_path, tiny):
    out = finished_run(tmp_path / "run", tiny)
    before = files(out)
    refused(lambda: Run(Args(out=out), "train_x.py", 1), str(out), "--resume", "--overwrite")
    assert files(out) == before


def test_a_folder_of_other_files_is_refused_whatever_the_flags(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        refused(lambda flags=flags: Run(Args(out=tmp_path, **flags), "train_x.py", 1), str(tmp_path))
    refused(lambda: Run(Args(out=tmp_path / "thesis.txt"), "train_x.py", 1), "thesis.txt is a file")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_is_taken(tmp_path, tiny):
    finished_run(tmp_path, tiny)
    assert read_run(tmp_path)["finished"]


def test_overwriting_waits_for_the_first_step(tmp_path, tiny):
    out = finished_run(tmp_path / "run", tiny)
    (out / "samples.jsonl").write_text('{"step": 0}\n')
    before = files(out)
    run = Run(Args(out=out, seed=1, overwrite=True), "train_other.py", 1)
    assert not run.finished
    assert run.restore(model=tiny[0]) == 0
    with pytest.raises(InputError):
        run.require_finite(0, loss=math.nan)
    assert files(out) == before  # bad input found before the first step costs nothing
    run.log(0, {"loss": 2.0})
    assert sorted(files(out)) == ["metrics.jsonl", "run.json"]
    assert rows(out) == [{"step": 0, "loss": 2.0}]
    run.log(1, {"loss": 1.0})
    assert len(rows(out)) == 2
    assert read_run(out)["script"] == "train_other.py"


@pytest.mark.parametrize("moment", ["renamed", "half removed", "removed"])
def test_killed_while_overwriting_it_leaves_no_half_of_a_run(tmp_path, tiny, monkeypatch, moment):
    out = finished_run(tmp_path / "run", tiny)
    (tmp_path / "other.txt").write_text("not ours")
    before = files(out)
    rmtree, calls = shutil.rmtree, []

    def killed(folder, *args, **kwargs):
        if not Path(folder).exists():
            return
        calls.append(folder)
        if moment == "half removed":
            (Path(folder) / "model.safetensors").unlink()
        if moment == "removed":
            rmtree(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            Run(Args(out=out, overwrite=True), "train_x.py", 1).log(0, {"loss": 1.0})
    assert len(calls) == 1 and calls[0] != out
    assert not out.exists() or files(out) == before

    finished_run(out, tiny, seed=1)  # the name is free again, for a run without any flag
    assert read_run(out)["seed"] == 1
    finished_run(out, tiny, seed=2, overwrite=True)  # and what the killed run left goes with the next that is replaced
    assert read_run(out)["seed"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "run"]


def test_overwriting_through_a_link_replaces_what_it_points_to(tmp_path, tiny):
    target = finished_run(tmp_path / "disk" / "run", tiny)
    (target / "samples.jsonl").write_text('{"step": 0}\n')
    link = tmp_path / "latest"
    link.symlink_to(Path("disk") / "run")
    finished_run(link, tiny, seed=1, overwrite=True)
    assert link.readlink() == Path("disk") / "run"
    assert read_run(target)["seed"] == read_run(link)["seed"] == 1
    assert not (target / "samples.jsonl").exists()
    assert list((tmp_path / "disk").iterdir()) == [target]
    shutil.rmtree(target)
    finished_run(link, tiny, seed=2)  # what it points to is made where there is none
    assert read_run(target)["seed"] == 2


def test_the_current_directory_is_not_overwritten(tmp_path, tiny, monkeypatch):
    out = finished_run(tmp_path / "run", tiny)
    (out / "plots").mkdir()
    (tmp_path / "link").symlink_to(out)
    before = files(tmp_path)
    for here, names in ((out, (".", out, "../run", "../link")), (out / "plots", ("..", out))):
        monkeypatch.chdir(here)
        for name in names:
            args = Args(out=Path(name), overwrite=True)
            refused(lambda args=args: Run(args, "train_x.py", 1), f"--out {name} ", "name a folder of its own")
    monkeypatch.chdir(out)
    assert run_cli(monkeypatch, ["--out", ".", "--overwrite"], lambda args: Run(args, "train_x.py", 1)) == 2
    assert Run(Args(out=Path("."), resume=True), "train_x.py", 1).finished
    assert files(tmp_path) == before


def test_a_folder_that_cannot_be_renamed_is_not_overwritten(tmp_path, tiny, monkeypatch):
    out = finished_run(tmp_path / "run", tiny)
    before = files(tmp_path)

    def rename(self, target):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", rename)
    run = Run(Args(out=out, overwrite=True), "train_x.py", 1)
    refused(lambda: run.log(0, {"loss": 1.0}), str(out), "Device or resource busy", "name a folder of its own")
    assert files(tmp_path) == before


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_every_file_has_the_mode_of_a_new_file(tmp_path, tiny, umask):
    """safetensors writes 0600 on its own."""
    run = Run(Args(out=tmp_path / "run", checkpoint_every=1), "train_x.py", 3)
    before = os.umask(umask)
    try:
        run.log(0, {"loss": 1.0})
        (run.folder / "state").mkdir()
        for name in ("state/checkpoint.safetensors.partial", "model.safetensors.partial"):  # left by a killed run
            (run.folder / name).touch(0o600)
        run.checkpoint(1, model=tiny[0])
        assert (run.folder / "state" / "checkpoint.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
        run.finish(*tiny)
    finally:
        os.umask(before)
    names = {path.name: path.stat().st_mode & 0o777 for path in run.folder.iterdir()}
    assert "model.safetensors" in names and set(names.values()) == {0o666 & ~umask}, names


def test_a_finished_run_has_nothing_to_resume(tmp_path, tiny):
    out = finished_run(tmp_path / "run", tiny)
    before = files(out)
    assert Run(Args(out=out, resume=True), "train_x.py", 1).finished
    assert files(out) == before


def test_resuming_nothing_starts_afresh(tmp_path, tiny):
    run = Run(Args(out=tmp_path / "run", resume=True), "train_x.py", 1)
    assert not run.finished
    assert run.restore(model=tiny[0]) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 2e-3}, "lr was 0.001"),
        ({"seed": 3}, "seed was 0"),
        ({"inner": Inner(beta=0.2)}, "inner was {'beta': 0.1}"),
        ({"dtype": "bf16"}, "dtype was 'fp32'"),
    ],
)
def test_resuming_with_other_arguments_names_the_argument(tmp_path, change, named):
    out = tmp_path / "run"
    Run(Args(out=out), "train_x.py", 5).log(0, {})
    refused(lambda: Run(Args(out=out, resume=True, **change), "train_x.py", 5), str(out), named, "--overwrite")
    refused(lambda: Run(Args(out=out, resume=True), "train_y.py", 5), "is a run of train_x.py, not train_y.py")


def test_some_arguments_may_change_when_resuming(tmp_path, monkeypatch):
    out = tmp_path / "run"
    Run(Args(out=out), "train_x.py", 5).log(0, {})
    Run(Args(out=out, resume=True, checkpoint_every=7), "train_x.py", 5)
    monkeypatch.chdir(tmp_path)
    Run(Args(out=Path("run"), resume=True), "train_x.py", 5)  # the same folder by another name
    out.rename(tmp_path / "moved")
    Run(Args(out=tmp_path / "moved", resume=True), "train_x.py", 5)


def test_an_argument_that_an_earlier_version_did_not_have_is_no_change(tmp_path):
    out = tmp_path / "run"
    Run(Args(out=out), "train_x.py", 5).log(0, {})
    info = json.loads((out / "run.json").read_text())
    assert info["arguments"].pop("deterministic") is False
    (out / "run.json").write_text(json.dumps(info))
    Run(Args(out=out, resume=True), "train_x.py", 5)


def test_a_damaged_run_json_is_no_run(tmp_path):
    for content in (b"{", b"\xff\xfe\x00", b"[]", b'{"script": "x"}', b""):
        (tmp_path / "run.json").write_bytes(content)
        assert read_run(tmp_path) is None
        refused(lambda: Run(Args(out=tmp_path, resume=True), "train_x.py", 1), "holds no run to resume")
    assert read_run(tmp_path / "nowhere") is None
    assert read_run(tmp_path / "run.json") is None


def test_numbers_that_are_no_numbers_stop_the_run(tmp_path, tiny):
    run = Run(Args(out=tmp_path / "run", checkpoint_every=2), "train_x.py", 9)
    run.require_finite(3, loss=torch.tensor(0.5), grad_norm=1e30)
    for value in (math.nan, math.inf, torch.tensor(-math.inf)):
        refused(
            lambda value=value: run.require_finite(3, loss=1.0, grad_norm=value), "grad_norm", "step 3", "no checkpoint"
        )
    run.checkpoint(2, model=tiny[0])
    kept = files(tmp_path / "run")
    refused(lambda: run.require_finite(3, loss=math.nan), "loss became nan at step 3", "checkpoint of step 2", "state")
    assert files(tmp_path / "run") == kept


# --- checkpoints ------------------------------------------------------------------------------------------------------


def toy(seed=0):
    """A module with parameters of 1 and 2 dimensions and a buffer."""
    module, generator = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)), seeded(seed)
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    return module


def optimizer_of(module, fused):
    groups = [{**group, "peak": 0.05} for group in decay_groups(module, 0.1)]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=fused)


def step_of(module, optimizer, step):
    schedule(optimizer, step, 20, 3)
    x = torch.randn(8, 3, generator=seeded(0, step))
    loss = (module(x) - x.sum(-1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def train(run, module, optimizer, until, numbers):
    """What every algorithm does: restore, then log, step, checkpoint."""
    start = run.restore(module=module, optimizer=optimizer, numbers=numbers)
    for step in range(start, until):
        numbers["total"] += step_of(module, optimizer, step)
        run.log(step, {"total": numbers["total"]})
        if step % 2 == 0:
            run.samples(step, [{"response": f"{step}\x85\u2028\u2029\x1c"}])
        run.checkpoint(step + 1, module=module, optimizer=optimizer, numbers=numbers)
    return start


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("killed_after", [0, 1, 2, 3, 4, 7, 9, 10])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, fused, killed_after):
    whole, numbers = toy(), {"total": 0.0}
    whole_optimizer = optimizer_of(whole, fused)
    train(Run(Args(out=tmp_path / "whole", checkpoint_every=3), "t.py", 10), whole, whole_optimizer, 10, numbers)

    out = tmp_path / "killed"
    killed, lost = toy(), {"total": 0.0}
    train(Run(Args(out=out, checkpoint_every=3), "t.py", 10), killed, optimizer_of(killed, fused), killed_after, lost)
    for name in ("metrics.jsonl", "samples.jsonl"):
        if killed_after:  # the last line was being written, and stopped within a character
            with open(out / name, "ab") as file:
                file.write(b'{"step": 99, "response": "\xe2\x80')

    resumed, again = toy(seed=99), {"total": -1.0}  # everything must come from the checkpoint
    if killed_after < 3:
        resumed, again = toy(), {"total": 0.0}  # there is none yet: from the start
    optimizer = optimizer_of(resumed, fused)
    run = Run(Args(out=out, checkpoint_every=3, resume=True), "t.py", 10)
    start = train(run, resumed, optimizer, 10, again)
    assert start == min(killed_after // 3 * 3, 9)

    assert again == numbers
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name
    for a, b in zip(whole_optimizer.state_dict()["state"].values(), optimizer.state_dict()["state"].values()):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert (out / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert (out / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()


def test_checkpoints_come_every_so_many_steps_but_not_at_the_end(tmp_path):
    run = Run(Args(out=tmp_path / "run", checkpoint_every=3), "t.py", 9)
    path = tmp_path / "run" / "state" / "checkpoint.safetensors"
    seen = []
    for done in range(1, 10):
        run.checkpoint(done, module=toy())
        if path.exists():
            seen.append(done)
            path.unlink()
    assert seen == [3, 6]  # at 9 the result itself is written


def test_a_checkpoint_is_a_copy_of_its_moment(tmp_path):
    module = toy()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run = Run(Args(out=tmp_path / "run", checkpoint_every=1), "t.py", 9)
    run.checkpoint(1, module=module, numbers={"beta": 0.1 + 0.2})
    with torch.no_grad():
        module[0].weight.add_(1)
    numbers = {}
    assert Run(Args(out=tmp_path / "run", resume=True), "t.py", 9).restore(module=module, numbers=numbers) == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert numbers == {"beta": 0.1 + 0.2}


def test_two_models_in_one_checkpoint_do_not_mix(tmp_path):
    one, two = toy(1), toy(2)
    Run(Args(out=tmp_path / "run", checkpoint_every=1), "t.py", 9).checkpoint(1, policy=one, policy_old=two)
    a, b = toy(3), toy(4)
    Run(Args(out=tmp_path / "run", resume=True), "t.py", 9).restore(policy=a, policy_old=b)
    assert torch.equal(a[0].weight, one[0].weight)
    assert torch.equal(b[0].weight, two[0].weight)


def test_a_failed_checkpoint_leaves_the_old_one(tmp_path, monkeypatch):
    out = tmp_path / "run"
    run = Run(Args(out=out, checkpoint_every=1), "t.py", 9)
    module = toy(1)
    run.checkpoint(1, module=module)
    kept = (out / "state" / "checkpoint.safetensors").read_bytes()

    def fail(tensors, path, metadata):
        Path(path).write_bytes(kept[: len(kept) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr("minirlhf.model.checkpoints.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        run.checkpoint(2, module=toy(2))
    assert (out / "state" / "checkpoint.safetensors").read_bytes() == kept
    again = toy(3)
    assert Run(Args(out=out, resume=True), "t.py", 9).restore(module=again) == 1
    assert torch.equal(again[0].weight, module[0].weight)


@pytest.mark.parametrize("damage", ["empty", "cut off", "no metadata", "another file", "broken metadata"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    out = tmp_path / "run"
    Run(Args(out=out, checkpoint_every=1), "t.py", 9).checkpoint(1, module=toy())
    path = out / "state" / "checkpoint.safetensors"
    content = path.read_bytes()
    if damage in ("no metadata", "broken metadata"):
        save_file(load_file(path), path, metadata=None if damage == "no metadata" else {"info": "{"})
    else:
        path.write_bytes({"empty": b"", "cut off": content[:-10], "another file": b"x" * 500}[damage])
    run = Run(Args(out=out, resume=True), "t.py", 9)
    refused(lambda: run.restore(module=toy()), str(path), "--overwrite")


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), "size mismatch for 2."),
        (lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), "Unexpected key(s) in state_dict"),
        (lambda: nn.Sequential(*toy(), nn.Linear(1, 1)), 'Missing key(s) in state_dict: "3.weight"'),
    ],
    ids=["another width", "a layer less", "a layer more"],
)
def test_a_checkpoint_of_another_shape_is_refused(tmp_path, other, what):
    out = tmp_path / "run"
    Run(Args(out=out, checkpoint_every=1), "t.py", 9).checkpoint(1, policy=toy())
    run = Run(Args(out=out, resume=True), "t.py", 9)
    path = out / "state" / "checkpoint.safetensors"
    refused(lambda: run.restore(policy=other()), f"{path}: does not fit the policy of this run", what, "--overwrite")
    assert run.restore(policy=toy()) == 1


def test_killed_before_its_first_checkpoint_starts_again(tmp_path):
    out = tmp_path / "run"
    run = Run(Args(out=out), "t.py", 9)
    run.log(0, {"loss": 1.0})
    run.log(1, {"loss": 0.5})
    again = Run(Args(out=out, resume=True), "t.py", 9)
    assert again.restore(module=toy()) == 0
    assert rows(out) == []
    again.log(0, {"loss": 1.0})
    assert rows(out) == [{"step": 0, "loss": 1.0}]


def test_killed_before_its_first_file_was_whole_starts_again(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json.partial").write_text('{"scr')
    for flags in ({}, {"resume": True}):
        run = Run(Args(out=out, **flags), "t.py", 9)
        assert run.restore(module=toy()) == 0
    run.log(0, {"loss": 1.0})
    assert sorted(files(out)) == ["metrics.jsonl", "run.json"]


def test_progress_shows_the_chosen_metrics_to_a_terminal(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(folder_module, "console", Console(file=screen, force_terminal=True, width=200))
    run = Run(Args(out=tmp_path / "run"), "t.py", 3)
    for step in run.range(0):
        metrics = {"loss": 1.25, "kl": torch.tensor(0.5), "gold": None, "none": math.nan, "other": 7.0}
        run.log(step, metrics, show=("loss", "kl", "gold", "none"))
        run.progress.refresh()
    assert "loss 1.250  kl 0.500" in screen.getvalue()
    assert "7.000" not in screen.getvalue()
    assert "gold" not in screen.getvalue() and "none" not in screen.getvalue() and "nan" not in screen.getvalue()
    assert rows(tmp_path / "run")[2] == {"step": 2, "loss": 1.25, "kl": 0.5, "gold": None, "none": None, "other": 7.0}


def test_steps_come_in_order_and_are_announced(tmp_path, capsys):
    out = tmp_path / "[bold]run[/y]"  # not markup
    run = Run(Args(out=out), "t.py", 5)
    assert list(run.range(2)) == [2, 3, 4]
    printed = "".join(capsys.readouterr().out.split())  # a long path is broken anywhere
    assert "[bold]run[/y]:5steps,from2" in printed


# --- runs as input ----------------------------------------------------------------------------------------------------


def test_an_unfinished_run_is_no_input(tmp_path, tiny):
    out = finished_run(tmp_path / "run", tiny)
    info = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**info, "finished": False}))
    refused(lambda: load_run(out), str(out), "train_x.py is not finished", "--resume")


def test_any_gpt2_folder_is_input(tmp_path, tiny):
    model, tokenizer = tiny
    save_model(model, tmp_path, tokenizer.eot)
    tokenizer.save(tmp_path)
    loaded, _ = load_run(str(tmp_path), device=torch.device("cpu"))
    assert not loaded.training
    refused(lambda: load_run(tmp_path, scalar=True), "not a reward model")


def test_a_reward_model_run_is_input(tmp_path, tokenizer):
    model = ScalarModel(GPTConfig(tokenizer.vocab_size, n_positions=16, n_layer=1, n_head=2, n_embd=8))
    init_weights(model, 0)
    finished_run(tmp_path / "rm", (model, tokenizer), script="train_rm.py")
    loaded, _ = load_run(tmp_path / "rm", scalar=True)
    assert torch.equal(loaded.score.weight, model.score.weight)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tiny):
    out = finished_run(tmp_path / "run", tiny)
    larger = Tokenizer.train([TEXT, "And a larger vocabulary of quite other words, learned from this."], 290)
    assert larger.vocab_size > tiny[1].vocab_size
    larger.save(out)
    refused(lambda: load_run(out), str(out), f"{larger.vocab_size} tokens", f"only {tiny[1].vocab_size}")
    require_same_tokenizer(larger, "a", larger, "b")
    refused(lambda: require_same_tokenizer(larger, "runs/a", tiny[1], "runs/b"), "runs/a", "runs/b", "tokenizers")


def test_a_run_without_its_tokenizer_is_refused(tmp_path, tiny):
    out = finished_run(tmp_path / "run", tiny)
    (out / "tokenizer.json").unlink()
    refused(lambda: load_run(out), "tokenizer.json")


FAKE_SCRIPT = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
(folder / "arguments").write_text(" ".join(sys.argv[1:]))
(folder / "run.json").write_text(json.dumps({"script": "fake", "arguments": {}, "finished": True}))
sys.exit(3 if "fail" in sys.argv else 0)
"""


def test_a_missing_default_input_is_trained_first(tmp_path, capfd):
    script, folder = tmp_path / "fake.py", tmp_path / "runs" / "sft"
    script.write_text(FAKE_SCRIPT)
    assert ensure_run(folder, str(script), str(folder), "--seed", "4") == folder
    assert (folder / "arguments").read_text() == f"{folder} --seed 4"
    said = "".join(capfd.readouterr().out.split())
    assert f"{folder}doesnotexistyet:runningpython{script}{folder}--seed4" in said

    (folder / "arguments").unlink()
    assert ensure_run(folder, str(script), str(folder)) == folder  # it is there now: nothing runs
    assert not (folder / "arguments").exists()
    assert capfd.readouterr().out == ""

    (folder / "run.json").write_text(json.dumps({"script": "fake", "arguments": {}, "finished": False}))
    ensure_run(folder, str(script), str(folder))
    assert (folder / "arguments").read_text() == f"{folder} --resume"
    assert "is not finished" in " ".join(capfd.readouterr().out.split())


def test_the_script_of_a_default_input_is_found_beside_the_one_that_runs(tmp_path, monkeypatch, capfd):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "fake.py").write_text(FAKE_SCRIPT)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "argv", ["../scripts/train_x.py"])
    ensure_run(Path("runs/one"), "fake.py", "runs/one")
    assert Path("runs/one/arguments").exists()
    assert "runs/one does not exist yet: running python ../scripts/fake.py runs/one" in " ".join(
        capfd.readouterr().out.split()
    )

    Path("fake.py").write_text(FAKE_SCRIPT.replace("arguments", "nearer", 1))  # the one at hand comes first
    ensure_run(Path("runs/two"), "fake.py", "runs/two")
    assert Path("runs/two/nearer").exists()
    assert "running python fake.py runs/two" in " ".join(capfd.readouterr().out.split())


def test_a_default_input_that_cannot_be_trained_is_an_error(tmp_path):
    script, folder = tmp_path / "fake.py", tmp_path / "sft"
    script.write_text(FAKE_SCRIPT)
    refused(lambda: ensure_run(folder, str(script), str(folder), "fail"), str(folder), "code 3")


# --- the command line -------------------------------------------------------------------------------------------------


def run_cli(monkeypatch, arguments, main=lambda args: None):
    """Exit code of `cli` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["train_x.py", *arguments])
    try:
        cli(main, Args)
    except SystemExit as stop:
        return stop.code
    return 0


def test_arguments_arrive(monkeypatch):
    seen = []
    assert run_cli(monkeypatch, ["--out", "a/b", "--lr", "0.5", "--beta", "2", "--resume"], seen.append) == 0
    assert seen == [Args(out=Path("a/b"), lr=0.5, inner=Inner(beta=2.0), resume=True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "-1"], "--lr must be a positive number, got -1.0"),
        (["--lr", "nan"], "--lr must be a positive number, got nan"),
        (["--beta", "0"], "--beta must be a positive number, got 0.0"),  # in a nested config
        (["--checkpoint-every", "0"], "--checkpoint-every must be at least 1, got 0"),
        (["--resume", "--overwrite"], "--resume and --overwrite contradict each other; give one of them"),
        (["--kernel", "fast"], "--kernel must be one of auto, fused, reference, got 'fast'"),
        (["--device", "tpu9"], "--device 'tpu9' is not a device; use auto, cpu, cuda or cuda:N"),
    ],
)
def test_an_argument_refused_by_its_config_is_one_line_and_code_two(monkeypatch, capsys, arguments, message):
    assert run_cli(monkeypatch, arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {message}\n")


def test_a_mistake_found_later_is_one_line_and_code_two(monkeypatch, capsys):
    def main(args):
        raise InputError("data.jsonl:3: not valid JSON; fix or delete this line")

    assert run_cli(monkeypatch, [], main) == 2
    assert capsys.readouterr().err == "error: data.jsonl:3: not valid JSON; fix or delete this line\n"


@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--overwite"], ["--overwite", "--overwrite"]),
        (["--lr", "much"], ["--lr", "'much'", "FLOAT"]),
        (["--lr"], ["--lr"]),
        (["--dtype", "fp8"], ["--dtype", "'fp8'", "'fp32', 'bf16'"]),
        (["--seed", "1.5"], ["--seed", "'1.5'", "INT"]),
        (["two\nlines"], ["two lines"]),
    ],
)
def test_what_the_parser_refuses_is_one_line_and_code_two(monkeypatch, capsys, arguments, parts, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert run_cli(monkeypatch, arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.endswith(" train_x.py --help\n")
    assert len(err.splitlines()) == 1 and err.isascii()
    for part in parts:
        assert part in err


def test_what_else_is_said_while_arguments_are_read_is_kept(monkeypatch, capsys):
    monkeypatch.setattr(arguments, "pick_device", lambda name: print("the driver is old", file=sys.stderr))
    assert run_cli(monkeypatch, []) == 0
    assert capsys.readouterr().err == "the driver is old\n"
    assert run_cli(monkeypatch, ["--lr", "-1"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "the driver is old"


def test_help_names_every_flag(monkeypatch, capsys):
    assert run_cli(monkeypatch, ["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for flag in ("--out", "--seed", "--device", "--dtype", "--checkpoint-every", "--resume", "--overwrite", "--beta"):
        assert flag in out


def test_usage_names_the_command_as_it_is_called(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["module.py", "--help"])
    for prog, name in ((None, "usage: module.py "), ("python -m pkg.module", "usage: python -m pkg.module ")):
        with pytest.raises(SystemExit):
            cli(lambda args: None, Args, prog=prog)
        assert capsys.readouterr().out.startswith(name)


def test_other_errors_are_not_hidden(monkeypatch):
    def main(args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_cli(monkeypatch, [], main)


def test_an_interruption_is_code_130(monkeypatch, capsys):
    def main(args):
        raise KeyboardInterrupt

    assert run_cli(monkeypatch, [], main) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_process_itself_ends_with_code_two(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from dataclasses import dataclass\nfrom pathlib import Path\n"
        "from minirlhf.run import RunArgs, cli\n"
        '@dataclass(frozen=True)\nclass Args(RunArgs):\n    """x"""\n    out: Path = Path("x")\n'
        'cli(lambda args: print("ran"), Args)\n'
    )
    done = subprocess.run([sys.executable, script, "--checkpoint-every", "0"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --checkpoint-every must be at least 1, got 0\n"


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (lambda x: check_at_least(1, batch_size=x), [1, 5, math.inf], [0, -1, 0.5, math.nan]),
        (lambda x: check_positive(batch_size=x), [1e-9, 3], [0, -1, math.nan, math.inf, -math.inf]),
        (lambda x: check_share(batch_size=x), [0, 0.5, 1], [-0.1, 1.1, math.nan]),
    ],
)
def test_checks(check, good, bad):
    for value in good:
        check(float(value))
    for value in bad:
        refused(lambda value=value: check(float(value)), "--batch-size must", f"got {float(value)}")


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    refused(lambda: pick_device("cuda:97"), "--device cuda:97: this machine has")
    for name in ("gpu", "", "cuda:x", "cpu!"):
        refused(lambda name=name: pick_device(name), f"--device {name!r} is not a device")
    for name in ("meta", "mps"):
        refused(lambda name=name: pick_device(name), f"--device {name!r} is not supported")


def test_a_gpu_asked_for_and_absent_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    refused(lambda: pick_device("cuda"), "--device cuda: this machine has 0", "--device cpu")


# --- learning rate, seeds, tables -------------------------------------------------------------------------------------


def test_the_learning_rate_rises_falls_and_ends_at_a_tenth():
    rates = [cosine_lr(step, 100, 2.0, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])  # the first step already moves
    assert max(rates) == rates[10] == 2.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half-way down
    assert rates[100] == pytest.approx(0.2)
    assert cosine_lr(0, 100, 2.0, 0) == 2.0
    assert all(0 < cosine_lr(step, 5, 2.0, 10) <= 2.0 for step in range(5))  # a run shorter than its warm-up
    assert cosine_lr(100, 100, 2.0, 10, floor=0.0) == pytest.approx(0.0)


def test_the_schedule_reaches_every_group_from_its_own_peak():
    optimizer = adamw(0.1, (toy(), 2.0), (toy(), 0.5))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0] * 2
    for step in (0, 3, 19):
        lr = schedule(optimizer, step, 20, 3)
        expected = [cosine_lr(step, 20, peak, 3) for peak in (2.0, 2.0, 0.5, 0.5)]
        assert [group["lr"] for group in optimizer.param_groups] == expected
        assert lr == expected[0]


def test_what_comes_every_so_many_steps_comes_after_the_last_too():
    assert [step for step in range(10) if is_due(step, 4, 10)] == [3, 7, 9]
    assert [step for step in range(8) if is_due(step, 4, 8)] == [3, 7]


def first_draws(*keys):
    return tuple(torch.randint(2**40, (4,), generator=seeded(*keys)).tolist())


@settings(deadline=None, max_examples=50)
@given(keys=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4))
def test_a_seeded_generator_is_a_pure_function_of_its_keys(keys):
    torch.rand(1, generator=seeded(1))
    one = first_draws(*keys)
    assert first_draws(*keys) == one
    assert first_draws(*keys, 0) != one  # a further key counts even if it is 0
    assert first_draws(keys[0] + 1, *keys[1:]) != one
    assert first_draws(*keys[:-1], keys[-1] + 1) != one
    if keys != keys[::-1]:
        assert first_draws(*keys[::-1]) != one


def test_neighbouring_keys_give_different_streams():
    draws = [first_draws(seed, step) for seed in range(40) for step in range(40)]
    assert len(set(draws)) == 1600
    # Uniform numbers across keys are as good as along one stream.
    u = torch.tensor([torch.rand((), generator=seeded(0, step)).item() for step in range(4000)])
    assert abs(u.mean().item() - 0.5) < 5 / math.sqrt(12 * 4000)
    correlation = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(4000)


def test_seeds_are_those_of_splitmix64():
    # The published generator's first numbers from the states 0 and 1234567; a seed has one bit less.
    assert seeded(0).initial_seed() == 0xE220A8397B1DCDAF & (2**63 - 1)
    assert seeded(1234567).initial_seed() == 6457827717110365317 & (2**63 - 1)


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setattr(terminal.console, "width", 200)


def test_samples_are_printed_as_they_are(capsys, wide):
    texts = ["[red]not a colour[/red]", "[/] [b", ":smile: :warning:", "back\\slash\\", "\\[x]", "a < b & c"]
    show_samples("step 3", [{"prompt": text, "reward": 0.125, "rank": 2} for text in texts])
    out = capsys.readouterr().out
    assert "step 3" in out
    for text in texts:
        assert f" {text} " in out
    assert out.count("0.12") == len(texts)
    show_samples("nothing", [])
    assert capsys.readouterr().out == ""


def test_a_run_may_be_copied(tmp_path, tiny):
    out = finished_run(tmp_path / "run", tiny)
    shutil.copytree(out, tmp_path / "copy")
    assert torch.equal(load_model(tmp_path / "copy").wte.weight, tiny[0].wte.weight)


# --- memory and threads -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc",
    reason="glibc's allocator alone takes the advice",
)
@pytest.mark.slow
def test_freed_memory_is_kept():
    """Tensors of a step, made and freed again and again, map no new pages; each way in a process of its own."""
    program = (
        "import ctypes, resource, sys, torch\n"
        "from minirlhf.run.arguments import RunArgs, prepare\n"
        "from minirlhf.run.command_line import keep_memory\n"
        "how, size = sys.argv[1], int(sys.argv[2])\n"
        "ctypes.CDLL(None).mallopt(-3, 1 << 17)  # as glibc begins; it adapts, by what was freed before\n"
        "if how != 'as it comes': keep_memory()\n"
        "prepare(RunArgs('none', device='cpu', checkpointing=how == 'lean'))\n"
        "def step(): tensors = [torch.ones(size // 4) for _ in range(12)]\n"
        "for _ in range(5): step()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): step()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )

    def faults(how: str, size: int) -> int:
        command = [sys.executable, "-c", program, how, str(size)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    small, large = LEAN // 2, 2 * LEAN
    assert 10 * faults("kept", small) < faults("as it comes", small)
    assert 10 * faults("kept", large) < faults("lean", large), "with checkpointing, large tensors are given back"
    assert 10 * faults("lean", small) < faults("lean", large), "and small ones are kept"


def test_two_pieces_of_work_beside_each_other():
    x, y = (torch.tensor(value, requires_grad=True) for value in (2.0, 3.0))
    seen = []

    def square(z):
        seen.append((torch.get_num_threads(), threading.get_ident()))
        return z.square(), None, z.detach()

    def go(apart=True):
        seen.clear()
        (a, none, plain), (b, *_) = beside(lambda: square(x), lambda: square(y), apart)
        assert none is None and plain.item() == 2.0
        if torch.is_grad_enabled():
            assert [g.item() for g in torch.autograd.grad(5 * a, [x])] == [20.0] if not apart else True
        return a, b

    here, threads = threading.get_ident(), torch.get_num_threads()
    go()
    assert seen == [(1, here)] * 2, "one thread has no two halves"
    torch.set_num_threads(4)
    try:
        go(apart=False)
        assert seen == [(4, here)] * 2
        with torch.no_grad():
            assert not any(z.requires_grad for z in go())
        a, b = go()
        assert sorted(count for count, _ in seen) == [2, 2] and len({ident for _, ident in seen}) == 2
        (5 * a + 7 * b).backward()
        assert (x.grad.item(), y.grad.item()) == (20.0, 42.0)
        assert torch.get_num_threads() == 4
        with pytest.raises(KeyError):
            beside(lambda: {}["f"], lambda: (y,), True)
        with pytest.raises(KeyError):
            beside(lambda: (x,), lambda: {}["g"], True)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)


def test_numbers_are_read_as_they_are():
    """Bits of float32 and float64, None and Python's own numbers; order kept."""
    third = torch.tensor(1 / 3, requires_grad=True)
    given = {"a": third, "b": None, "c": 2, "d": torch.tensor(1 / 3, dtype=torch.float64), "e": torch.tensor(math.inf)}
    found = devices.read(given)
    assert list(found) == list("abcde")
    assert found == {"a": third.item(), "b": None, "c": 2, "d": 1 / 3, "e": math.inf}
    assert all(not isinstance(value, torch.Tensor) for value in found.values())


def test_tf32_is_for_a_gpu(monkeypatch):
    with pytest.raises(InputError, match="--matmul high is for a GPU"):
        RunArgs(Path("runs/none"), matmul="high", device="cpu")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [devices.products(gpu, dtype) for dtype in ("fp32", "bf16")] == ["fp32", "bf16"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert [devices.products(gpu, dtype) for dtype in ("fp32", "bf16")] == ["tf32", "bf16"]
    assert devices.products(cpu, "fp32") == "fp32"


def test_prepare_sets_torch_s_own_switches():
    """In a process of its own: the switches are the process's."""
    program = (
        "import os, sys, torch\n"
        "from minirlhf.run.arguments import RunArgs, prepare\n"
        "args = RunArgs('none', device='cpu', deterministic='--deterministic' in sys.argv)\n"
        "object.__setattr__(args, 'matmul', 'high')  # as on a GPU\n"
        "prepare(args)\n"
        "print(torch.are_deterministic_algorithms_enabled(), os.environ.get('CUBLAS_WORKSPACE_CONFIG'),"
        " torch.get_float32_matmul_precision())"
    )
    for flags, said in (([], "False None high"), (["--deterministic"], "True :4096:8 high")):
        done = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, timeout=300)
        assert done.stdout.strip() == said, done.stderr


def test_deterministic_changes_no_bit_on_a_cpu(tmp_path, tiny_run, tiny_reward_run):
    """Every operation of PPO has a deterministic form here, and it is the one that runs anyway."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"Customer: {word}\nAgent:"}) + "\n" for word in ("Hi", "No", "So"))
    )
    script = Path(__file__).resolve().parents[2] / "train_ppo.py"
    common = [sys.executable, str(script), "--prompts", str(prompts), "--init", str(tiny_run)]
    common += ["--reward", str(tiny_reward_run), "--steps", "2", "--batch-size", "8", "--response-tokens", "6"]
    weights = []
    for name, flags in (("plain", []), ("same", ["--deterministic"])):
        out = tmp_path / name
        done = subprocess.run([*common, "--out", str(out), *flags], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
