"""bug_zoo: every bug is caught by its named test, which is green without it; the page says what was measured."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import NamedTuple

import bug_zoo
import pytest
import torch
from bug_zoo import BUGS, PAGE, ROOT, SEEDS, TIMES, WORLDS, healthy, infect

from minirlhf.algorithms.losses import whiten

BY_NAME = {bug.name: bug for bug in BUGS}


class Seen(NamedTuple):
    """What became of a test: of its call, or of its fixtures where these failed."""

    nodeid: str
    when: str
    outcome: str
    error: type | None
    message: str


class Recorder:
    """A plugin that keeps what became of the tests."""

    def __init__(self):
        self.seen: list[Seen] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "call" or report.failed:
            error = None if call.excinfo is None else call.excinfo.type
            message = "" if call.excinfo is None else call.excinfo.exconly()
            self.seen.append(Seen(item.nodeid, report.when, report.outcome, error, message))
        return report


def run_tests(folder: Path, nodeids: list[str], *options: str) -> tuple[int, list[Seen]]:
    """Run tests inside this one; return the exit code and what became of them.

    Such a run imports conftest.py anew, with its import hook: both are put back. The plugins that are left out here
    watch the whole process, as those of the run around this one already do.
    """
    recorder, finders, conftest = Recorder(), list(sys.meta_path), sys.modules["conftest"]
    without = ("cacheprovider", "faulthandler", "unraisableexception", "threadexception")
    try:
        code = pytest.main(
            [
                *(str(ROOT / nodeid) for nodeid in nodeids),
                f"--rootdir={ROOT}",
                f"--basetemp={folder}",
                *(f"-pno:{plugin}" for plugin in without),
                *options,
            ],
            plugins=[recorder],
        )
    finally:
        sys.meta_path[:] = finders
        sys.modules["conftest"] = conftest
    return code, recorder.seen


# --- bugs and tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
@pytest.mark.slow
def test_a_bug_is_caught_by_its_test(bug, tmp_path):
    with infect(bug):
        code, seen = run_tests(tmp_path / "inside", [bug.test], "-x", "--tb=no")
    what = f"{bug.name} ({bug.title}): {bug.test}"
    assert seen, f"{what} did not run"
    failed = [one for one in seen if one.outcome == "failed"]
    assert failed, f"{what} stays green with the bug in the code; it survives"
    for one in failed:
        assert one.when == "call" and one.error is AssertionError, f"{what} crashes and asserts nothing: {one}"
    assert code == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("mean = 1.0 * masked_mean(x, mask)", "test_whitening_by_hand stays green"),
        ("mean = masked_mean(x)", "test_whitening_by_hand crashes"),
    ],
    ids=["harmless", "wrong call"],
)
def test_what_is_not_caught_is_told(after, message, tmp_path):
    bug = dataclasses.replace(BY_NAME["whiten-keeps-mean"], before="mean = masked_mean(x, mask)", after=after)
    with pytest.raises(AssertionError, match=message):
        test_a_bug_is_caught_by_its_test(bug, tmp_path)


@pytest.mark.slow
def test_without_a_bug_all_of_these_tests_are_there_and_green(tmp_path):
    named = sorted({bug.test for bug in BUGS})
    code, seen = run_tests(tmp_path / "inside", named)
    assert code == pytest.ExitCode.OK, [one for one in seen if one.outcome != "passed"]
    ran = {one.nodeid for one in seen} | {one.nodeid.partition("[")[0] for one in seen}
    assert set(named) <= ran
    assert all(one.outcome == "passed" for one in seen)  # skipped is not green


# --- infecting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_leaves_nothing_behind(bug):
    function = healthy(bug.where)
    code = function.__code__
    with infect(bug):
        assert function.__code__ is not code
        assert function.__code__.co_code != code.co_code or function.__code__.co_consts != code.co_consts
    assert function.__code__ is code
    with pytest.raises(ZeroDivisionError), infect(bug):
        _ = 1 / 0
    assert function.__code__ is code


def test_whoever_imported_the_function_has_the_bug():
    x, mask = torch.tensor([[5.0, 6.0, 7.0]]), torch.ones(1, 3, dtype=torch.bool)
    with infect(BY_NAME["whiten-keeps-mean"]):
        assert whiten(x, mask).mean().item() == pytest.approx(6.0, abs=1e-5)
    assert whiten(x, mask).mean().item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("before", "times"), [("variance = 0", 0), ("mask", 6)])
def test_code_that_has_moved_is_noticed(before, times):
    bug = dataclasses.replace(BY_NAME["whiten-keeps-mean"], before=before)
    with pytest.raises(ValueError, match=f"{times} times, not once"), infect(bug):
        pass


# --- the table and the page -------------------------------------------------------------------------------------------


def test_every_bug_is_complete():
    assert len(BY_NAME) == len(BUGS) >= 20
    for bug in BUGS:
        assert bug.look and bug.world in WORLDS
        assert all(spec.rpartition(" ")[2] in TIMES for spec in bug.look)
        assert bug.before != bug.after and bug.title and bug.why.endswith(".") and bug.symptom.endswith(".")


def test_the_page_is_what_the_table_and_the_figures_give():
    observed, measured = bug_zoo.read()
    again = "; measure it with python tests/bug_zoo.py --write"
    assert list(measured) == list(BY_NAME), again
    for bug in BUGS:
        assert measured[bug.name] == json.loads(json.dumps(bug_zoo.edit(bug))), f"{bug.name} is another bug now{again}"
        assert tuple(observed[bug.name].figures) == bug.look, f"{bug.name} looks at other figures now{again}"
    assert PAGE.read_text() == bug_zoo.page(observed), "python tests/bug_zoo.py --page writes it again"


def test_figures_are_measured(capsys):
    assert bug_zoo.main(["ties-win"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "win_rate" in line)
    healthy_rate, sick_rate = (float(number) for number in row.split()[-2:])
    assert healthy_rate == pytest.approx(0.5, abs=3 * 0.5 / (3000 * len(SEEDS)) ** 0.5)
    assert sick_rate > healthy_rate + 0.1
    assert [healthy_rate, sick_rate] == pytest.approx(bug_zoo.read()[0]["ties-win"].figures["win_rate last"], abs=0.01)


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_script_can_be_run_with_a_bug(tmp_path, monkeypatch, capsys):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nimport torch\nfrom minirlhf.commands.measures import wins\n"
        "print(sys.argv[1:], wins(torch.ones(2), torch.ones(2)))\n"
    )
    monkeypatch.setattr(sys, "argv", [])
    assert bug_zoo.main(["ties-win", "--", str(script), "--steps", "5"]) == 0
    assert capsys.readouterr().out == "['--steps', '5'] tensor([1., 1.])\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unicorn"], "there is no bug 'unicorn'; there are mask-off-by-one, "),
        (["--test"], "one bug at a time"),
        (["kl-sign", "--", "train_unicorn.py"], "there is no script 'train_unicorn.py'"),
        (["ties-win", "kl-sign", "--", str(ROOT / "train_ppo.py")], "one bug at a time"),
        (["ties-win", "--write"], "--write and --page are for all bugs"),
        (["--page", "ties-win"], "--write and --page are for all bugs"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        bug_zoo.main(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err
