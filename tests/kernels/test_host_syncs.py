"""A step waits for the GPU a few times at most: counted without one, on the tensors of pretend_cuda.py."""

import ast
import json
import os
import subprocess
import sys

import pytest
from conftest import HELPERS, python_path

PROGRAM = HELPERS / "host_syncs.py"
# Waits a step: one to read its numbers, and room for two more. Of PPO, a step of each minibatch, and a rollout.
BOUNDS = {"sft": 3, "dpo": 3, "rm": 3, "generate": 4}
MINIBATCH, ROLLOUT = 3, 10
MINIBATCH_STEPS = {"ppo, whole minibatches": 2, "ppo, long and steered": 8}  # else 4


def ask(*cases: str) -> dict:
    environment = os.environ | python_path(PROGRAM.parent.parent)
    command = [sys.executable, str(PROGRAM), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def names() -> list[str]:
    """The keys of CASES, which cannot be imported here: what it imports changes torch for the whole process."""
    (cases,) = (
        node.value
        for node in ast.parse(PROGRAM.read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CASES"
    )
    return [ast.literal_eval(key) for key in cases.keys]


@pytest.fixture(scope="module")
def counted() -> dict[str, list[dict[str, int]]]:
    return ask(*names())


@pytest.mark.parametrize("case", names())
def test_a_step_waits_a_few_times_at_most(counted, case):
    kind = case.replace(",", "").split()[0]
    bound = BOUNDS.get(kind) or ROLLOUT + MINIBATCH * MINIBATCH_STEPS.get(case, 4)
    assert len(counted[case]) == 2
    for waits in counted[case]:
        assert 0 < sum(waits.values()) <= bound, waits


def test_every_kind_of_wait_is_counted_once_and_nothing_else():
    found = ask("each kind")
    assert found.pop("none") == 0
    refused = {name: n for name, n in found.items() if "beside one on the GPU" in name}
    assert [name.partition(":")[0] for name in refused] == ["add", "cat"]
    assert {name: n for name, n in found.items() if name not in refused} == {
        "_local_scalar_dense": 2, "tolist": 1, "cpu": 1, "nonzero": 1, "mask as an index (index)": 1,
        "index from the CPU (index)": 1, "tensor of Python's numbers": 1, "copy to the GPU (_to_copy)": 1, "copy_": 2,
        "_unique2": 1,
    }  # fmt: skip


def test_the_fused_head_is_the_cpu_s_and_waits_for_nothing():
    far = ask("head")
    assert far["fp32"] < 1e-6
    assert far["bf16"] < 0.02, "sums over tiles are rounded once instead of tile by tile"
    assert far["fp32 waits"] == far["bf16 waits"] == 0
