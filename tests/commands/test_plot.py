"""plot: the house style, and training curves from what runs logged, one or several, whole or going on."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from minirlhf import InputError
from minirlhf.commands import plot
from minirlhf.commands.plot import PANELS, Args, choose_panels, main, read_curves, running_mean
from minirlhf.commands.style import DARK, LIGHT, MID, band, figure_panels, right_axis, series_style

LOGGED = {  # what each script logs at a step t of 1, and at every tenth step besides
    "train_ppo.py": (
        lambda t: {"reward": 3 * t, "gold": t, "kl_k1": 8 * t, "kl_k1_se": 1 + t, "kl_exact": 7 * t, "entropy": 3 - t,
                   "length": 20 + t, "eot_rate": t, "explained_variance": t, "clip_fraction": 0.1, "lr": 1e-4,
                   "updates": 16, "rollout_seconds": 2.0},
        lambda t: {},
    ),
    "train_dpo.py": (
        lambda t: {"loss": 0.7 - t / 2, "accuracy": t, "chosen_reward": t, "rejected_reward": -t, "chosen_logps": -30.0,
                   "rejected_logps": -30 - t, "lr": 1e-4},
        lambda t: {"held_out_loss": 0.7 - t / 3, "held_out_accuracy": t / 2},
    ),
    "train_rm.py": (
        lambda t: {"loss": 2 - t, "best_over_worst": t, "lr": 1e-4},
        lambda t: {"held_out_accuracy": t / 2},
    ),
    "train_sft.py": (lambda t: {"loss": 5 - t, "tokens": 999}, lambda t: {"held_out_loss": 5 - t / 2}),
}  # fmt: skip


def logged(folder: Path, script: str = "train_ppo.py", steps: int = 100, **changes) -> Path:
    """A made-up run's folder; `changes` are columns that hold something else, at every step."""
    folder.mkdir(parents=True)
    every, tenth = LOGGED[script]
    rows = []
    for step in range(steps):
        t = step / steps
        rows.append({"step": step} | every(t) | (tenth(t) if step % 10 == 9 else {}) | changes)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps({"script": script, "arguments": {}}))
    return folder


def pixels(path: Path) -> np.ndarray:
    """A picture in grayscale, from 0 to 1."""
    assert path.read_bytes().startswith(b"\x89PNG")
    return np.asarray(Image.open(path).convert("L")) / 255


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures, save = [], Figure.savefig

    def saved(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", saved)
    return figures


def lines_of(figure: Figure) -> dict[str, list[str]]:
    """By title, the labels of a figure's lines; a right axis counts with the panel under it."""
    found: dict[str, list[str]] = {}
    titles = {axes.get_subplotspec(): axes.get_title(loc="left") for axes in reversed(figure.axes)}
    for axes in figure.axes:
        title = titles[axes.get_subplotspec()]
        found.setdefault(title, []).extend(line.get_label() for line in axes.lines if line.get_label() != "_")
    return found


def refused(call, *parts):
    """The call must be refused in one line that holds all `parts`."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# --- the style --------------------------------------------------------------------------------------------------------


def test_colours_stay_apart_in_grayscale():
    grays = sorted(float(np.dot(to_rgb(color), (0.299, 0.587, 0.114))) for color in (DARK, MID, LIGHT))
    assert min(b - a for a, b in itertools.pairwise(grays)) > 0.18
    assert grays[-1] < 0.75, "on white"


def test_eight_looks_differ_without_any_colour():
    looks = [series_style(i) for i in range(8)]
    assert len({one["marker"] for one in looks}) == 8, "by the marker alone"
    faces = [one["markerfacecolor"] == "white" for one in looks]
    assert sum(faces) == 4, "half of the markers are open"
    without = [(one["marker"], face, one["linestyle"]) for one, face in zip(looks, faces)]
    for a, b in itertools.pairwise(without):
        assert all(x != y for x, y in zip(a, b)), "neighbours differ in shape, face and dash"
    assert series_style(8), "more may be asked for"


def test_eight_looks_differ_as_they_are_drawn(tmp_path):
    """Two series in turn at one place, in grayscale: the pictures must differ by more than a line's edge."""
    pictures = []
    for i in range(8):
        with figure_panels(tmp_path / "one.png", width=2, height=1) as (axes,):
            axes.plot(range(5), [0] * 5, **{**series_style(i), "color": DARK}, markeredgecolor=DARK)
        pictures.append(pixels(tmp_path / "one.png"))
    for a, b in itertools.combinations(pictures, 2):
        assert (abs(a - b) > 0.3).sum() > 50


def test_drawing_saves_what_was_drawn(tmp_path):
    before = dict(rcParams)
    path = tmp_path / "deep" / "a.png"
    with figure_panels(path, columns=3, rows=2, width=2.0, height=1.0) as panels:
        assert len(panels) == 6
        panels[0].plot([0, 1], [0, 1], **series_style(0))
        assert not path.exists(), "only when it is whole"
    assert pixels(path).shape == (2 * 150, 6 * 150), "inches times dots"
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    assert dict(rcParams) == before, "no style is left behind"


def test_drawing_that_fails_writes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_text("older")
    with pytest.raises(ZeroDivisionError), figure_panels(path):
        raise ZeroDivisionError

    def half(self, file, **kwargs):
        Path(file).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError), figure_panels(path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert path.read_text() == "older"


def test_a_right_axis_and_a_band(tmp_path):
    with figure_panels(tmp_path / "a.png") as (axes,):
        axes.set_axis_off()
    empty = pixels(tmp_path / "a.png")
    with figure_panels(tmp_path / "a.png") as (axes,):
        axes.set_axis_off()
        band(axes, [0, 1], [0, 0], [1, 1], **series_style(0))
    filled = pixels(tmp_path / "a.png")
    changed = filled[filled != empty]
    assert changed.size > 0.3 * empty.size and changed.min() > 0.75, "large and light"
    with figure_panels(tmp_path / "a.png") as (axes,):
        other = right_axis(axes, "share")
        assert other.get_ylabel() == "share"
        assert other.spines["right"].get_visible() and not axes.spines["right"].get_visible()


def test_running_means():
    assert running_mean([1.0, 5.0, 3.0, 7.0], 1) == [1.0, 5.0, 3.0, 7.0]
    assert running_mean([1.0, 5.0, 3.0, 7.0], 3) == [3.0, 3.0, 5.0, 5.0]
    assert running_mean([2.0], 11) == [2.0]


# --- curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "train_ppo.py",
            [["reward", "gold"], ["kl_exact", "kl_k1 ± 2 se"], ["entropy"], ["length", "eot_rate (right)"],
             ["explained_variance"], ["clip_fraction"]],
        ),
        (
            "train_dpo.py",
            [["loss", "held_out_loss"], ["accuracy", "held_out_accuracy"], ["chosen_reward", "rejected_reward"],
             ["chosen_logps", "rejected_logps"]],
        ),
        ("train_rm.py", [["loss"], ["best_over_worst"], ["held_out_accuracy"]]),
        ("train_sft.py", [["loss", "held_out_loss"]]),
    ],
)  # fmt: skip
def test_a_run_alone(tmp_path, drawn, capsys, script, expected):
    folder = logged(tmp_path / "mine", script)
    before = (folder / "metrics.jsonl").read_bytes()
    main(Args(runs=(folder,)))
    (figure,) = drawn
    assert list(lines_of(figure).values()) == expected
    assert figure.get_suptitle() == f"mine ({script})"
    picture = pixels(folder / "plot.png")
    assert 0.01 < (picture < 0.5).mean() < 0.5, "not blank"
    assert (folder / "metrics.jsonl").read_bytes() == before
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith("100 steps of mine")


def test_lines_hold_what_was_logged_and_say_their_mean(tmp_path, drawn):
    main(Args(runs=(logged(tmp_path / "mine", "train_dpo.py"),)))
    axes = drawn[0].axes[0]
    raw, smooth, held_out = axes.lines
    loss = [0.7 - step / 200 for step in range(100)]
    assert list(raw.get_xdata()) == list(range(100)) and list(raw.get_ydata()) == pytest.approx(loss)
    assert list(smooth.get_ydata()) == pytest.approx(running_mean(loss, 5))
    assert axes.get_xlabel() == "step (line: mean of 5 neighbouring steps)"
    assert raw.get_alpha() < 0.5 and raw.get_linewidth() < smooth.get_linewidth()
    assert list(held_out.get_xdata()) == list(range(9, 100, 10)), "points where it was measured"
    assert held_out.get_marker() == series_style(1)["marker"]


def test_the_band_is_two_standard_errors_of_each_step(tmp_path, drawn):
    main(Args(runs=(logged(tmp_path / "mine", steps=20),)))
    axes = next(axes for axes in drawn[0].axes if "KL" in axes.get_title(loc="left"))
    (filled,) = axes.collections
    corners = {(x, y) for x, y in filled.get_paths()[0].vertices.round(6)}
    for step in range(20):
        t = step / 20
        assert (step, round(8 * t - 2 * (1 + t), 6)) in corners
        assert (step, round(8 * t + 2 * (1 + t), 6)) in corners


def test_a_short_run_is_drawn_as_it_is(tmp_path, drawn):
    main(Args(runs=(logged(tmp_path / "one", steps=1),)))
    main(Args(runs=(logged(tmp_path / "two", steps=59),)))
    for figure in drawn:
        assert figure.axes[0].get_xlabel() == "step"
        assert len(figure.axes[0].lines) == 2


def test_what_is_no_number_is_skipped(tmp_path, drawn):
    folder = logged(tmp_path / "mine", gold=None, eot_rate=None, entropy=None, note="text", sure=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[7])
    lines[7] = json.dumps(row | {"reward": None, "kl_k1_se": None, "length": math.nan})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    main(Args(runs=(folder,)))
    found = lines_of(drawn[0])
    assert list(found.values())[:3] == [["reward"], ["kl_exact", "kl_k1 ± 2 se"], ["length"]], "no empty panel or line"
    steps = [step for step in range(100) if step != 7]
    assert list(drawn[0].axes[0].lines[0].get_xdata()) == steps
    assert [len(axes.lines) for axes in drawn[0].axes if axes.get_title(loc="left") == "Length"] == [2]
    curves = read_curves(folder, "mine")
    assert "note" not in curves.columns and "sure" not in curves.columns
    assert [point[0] for point in curves.column("length")] == steps


@pytest.mark.parametrize("cut", ['{"step": 100, "rew', '{"step": 100', "", '{"step": 100, "note": "é'])
def test_a_run_that_goes_on_is_drawn(tmp_path, drawn, cut):
    folder = logged(tmp_path / "mine")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(cut.encode()[: -1 if "é" in cut else None])
    main(Args(runs=(folder,)))
    assert len(drawn[0].axes[0].lines[0].get_xdata()) == 100


def test_runs_over_each_other(tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long, short = logged(tmp_path / "long", steps=200), logged(tmp_path / "short", steps=30, gold=None)
    main(Args(runs=(long, short)))
    found = lines_of(drawn[0])
    assert list(found) == ["reward", "gold", "kl_exact", "kl_k1 ± 2 se", "entropy", "length", "eot_rate",
                           "explained_variance", "clip_fraction"]  # fmt: skip
    assert found["reward"] == ["long (mean of 11 steps)", "short"]
    assert found["gold"] == ["long (mean of 11 steps)"], "what one of them did not log"
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["long (mean of 11 steps)", "short"]
    looks = [(line.get_marker(), line.get_linestyle()) for line in drawn[0].axes[0].lines if line.get_label() != "_"]
    assert looks == [(series_style(i)["marker"], series_style(i)["linestyle"]) for i in range(2)]
    assert pixels(tmp_path / "plot.png").min() < 0.5
    assert not (long / "plot.png").exists()


def test_runs_of_different_scripts_share_what_both_logged(tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(Args(runs=(logged(tmp_path / "a", "train_rm.py"), logged(tmp_path / "b", "train_dpo.py"))))
    assert list(lines_of(drawn[0])) == ["loss", "lr", "held_out_accuracy"]


def test_a_folder_without_its_script_is_drawn_whole(tmp_path, drawn):
    folder = logged(tmp_path / "mine", "train_sft.py")
    (folder / "run.json").unlink()
    main(Args(runs=(folder,)))
    assert list(lines_of(drawn[0])) == ["loss", "tokens", "held_out_loss"]


def test_metrics_and_picture_by_name(tmp_path, drawn):
    folder = logged(tmp_path / "mine")
    main(Args(runs=(folder,), out=tmp_path / "new" / "b.png", metrics=("lr", "updates", "lr")))
    assert list(lines_of(drawn[0])) == ["lr", "updates"]
    assert pixels(tmp_path / "new" / "b.png").min() < 0.5
    assert not (folder / "plot.png").exists()
    main(Args(runs=(folder, logged(tmp_path / "other")), out=tmp_path / "new" / "b.png", metrics=("kl_k1",)))
    assert len(drawn[1].legends[0].get_texts()) == 2


def test_runs_of_one_name_are_told_apart_by_their_path(tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logged(tmp_path / "a" / "ppo", steps=9)
    logged(tmp_path / "b" / "ppo", steps=9)
    main(Args(runs=(Path("a/ppo"), Path("b/ppo"))))
    assert lines_of(drawn[0])["reward"] == ["a/ppo", "b/ppo"]


def test_every_column_that_is_drawn_is_one_that_a_script_logs():
    for script, panels in PANELS.items():
        every, tenth = LOGGED[script]
        names = {key for panel in panels for key in panel.columns + panel.right}
        assert names <= {*every(0.0), *tenth(0.0)}
        source = "".join((Path(plot.__file__).parent.parent / f"{name}.py").read_text() for name in SOURCES[script])
        for name in names:  # DPO puts held_out_ before the name of what it measures
            assert f'"{name}"' in source or (name.startswith("held_out_") and f'"{name[9:]}"' in source)


SOURCES = {
    "train_ppo.py": ["algorithms/ppo", "algorithms/experience", "commands/watch"],
    "train_dpo.py": ["algorithms/dpo"],
    "train_rm.py": ["algorithms/reward_model"],
    "train_sft.py": ["algorithms/sft"],
}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_folders_that_are_no_run_are_refused(tmp_path):
    refused(lambda: main(Args(runs=(tmp_path / "none",))), str(tmp_path / "none"), "name the folder of a run")
    (tmp_path / "file").write_text("")
    refused(lambda: main(Args(runs=(tmp_path / "file",))), str(tmp_path / "file"), "name the folder of a run")
    refused(lambda: main(Args(runs=(tmp_path,))), f"{tmp_path / 'metrics.jsonl'} is missing", "name the folder")


@pytest.mark.parametrize(
    "line", ['{"step": 3, "rew', "", "[1]", '"step"', '{"reward": 1}', '{"step": "3"}', '{"step": null}', "\udcff{}"]
)
def test_a_damaged_line_in_the_middle_is_refused(tmp_path, line):
    folder = logged(tmp_path / "mine", steps=9)
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[3] = line.encode(errors="surrogateescape")
    path.write_bytes(b"\n".join(lines))
    refused(lambda: main(Args(runs=(folder,))), f"{path}:4: ", "mend or delete this line")
    assert not (folder / "plot.png").exists()


@pytest.mark.parametrize("content", ["", '{"step": 0, "rew'])
def test_a_run_without_a_step_is_refused(tmp_path, content):
    folder = logged(tmp_path / "mine")
    (folder / "metrics.jsonl").write_text(content)
    refused(lambda: main(Args(runs=(folder,))), str(folder / "metrics.jsonl"), "holds no step yet")


def test_metrics_that_a_run_lacks_are_refused(tmp_path):
    a, b = logged(tmp_path / "a", "train_sft.py"), logged(tmp_path / "b", "train_rm.py", loss=None)
    refused(lambda: main(Args(runs=(a,), metrics=("loss", "reward"))), "--metrics reward", f"{a}", "loss, tokens, held")
    refused(lambda: main(Args(runs=(a, b), metrics=("loss",))), "--metrics loss", f"{b}", "best_over_worst")
    refused(lambda: main(Args(runs=(a, b))), f"{a}", f"{b}", "no metric in common", "one by one")
    bare = logged(tmp_path / "bare", "train_sft.py", loss=None, held_out_loss=None)
    refused(lambda: main(Args(runs=(bare,))), f"{bare}", "--metrics", "tokens")


def test_arguments_that_are_refused(tmp_path):
    a = logged(tmp_path / "a")
    refused(lambda: Args(runs=(a, tmp_path / "b" / ".." / "a")), "named twice")
    refused(lambda: Args(runs=tuple(tmp_path / str(i) for i in range(9))), "9 runs", "1 to 8")
    refused(lambda: Args(runs=()), "0 runs")
    refused(lambda: Args(out=tmp_path / "a.pdf"), "a.pdf", ".png")
    (tmp_path / "folder.png").mkdir()
    refused(lambda: Args(out=tmp_path / "folder.png"), "folder.png")
    refused(lambda: main(Args(runs=(a,), out=a / "run.json" / "x.png")), "x.png cannot be written", "--out")


def test_the_command_itself(tmp_path):
    folder = logged(tmp_path / "mine", "train_sft.py")
    command = [sys.executable, "-m", "minirlhf.plot", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert pixels(folder / "plot.png").min() < 0.5
    done = subprocess.run([*command, "--metrics", "nothing"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --metrics nothing: ") and len(done.stderr.splitlines()) == 1


def test_panels_are_chosen_without_drawing(tmp_path):
    runs = [read_curves(logged(tmp_path / "a"), "a")]
    assert [panel.title for panel in choose_panels(runs, [])] == [panel.title for panel in PANELS["train_ppo.py"]]
    assert "matplotlib" not in Path(plot.__file__).read_text(), "imported only to plot"
