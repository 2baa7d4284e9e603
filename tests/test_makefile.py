"""The Makefile's commands where a Python with the dependencies is at hand: nothing is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


@pytest.fixture
def make(tmp_path):
    """Call make in a folder that has the Makefile and nothing else."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "constraints.txt", tmp_path)

    # `make test` hands its own variables down.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}

    def call(*arguments):
        command = ["make", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return call


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_with_a_python_nothing_is_installed(make, target):
    planned = make("--dry-run", target, "PYTHON_BIN=/opt/python/bin/python")
    assert planned.returncode == 0, planned.stderr
    assert "/opt/python/bin/python" in planned.stdout
    assert ".venv" not in planned.stdout and "pip install --" not in planned.stdout


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_without_one_an_environment_is_made_first(make, target):
    planned = make("--dry-run", target)
    assert planned.returncode == 0, planned.stderr
    first, second, *_ = planned.stdout.splitlines()
    assert first.endswith(" -m venv .venv")
    assert second.startswith(".venv/bin/python -m pip install --quiet --constraint constraints.txt")


def test_lint_without_ruff_says_what_to_install(make, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    done = make("lint", f"PYTHON_BIN={bare}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == f"make lint needs ruff: {bare} -m pip install ruff"
