"""The benchmarks run, measure what they say, and their baselines compute the same as the op."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = ("--rows", "8", "--vocab", "101", "--linear", "8", "4", "101", "--rounds", "2", "--threads", "1", "--no-build")


@pytest.fixture
def bench(monkeypatch):
    """A module of benchmarks/, which is no package, by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, FOLDER / script, *arguments], capture_output=True, text=True, timeout=300)


def test_op_cpu_end_to_end(tmp_path):
    path = tmp_path / "results" / "cpu.json"
    done = run("op_cpu.py", *TINY, "--against", "peers", "--json", str(path))
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text())
    ours = [row for row in results["rows"] if row["implementation"] == "ours"]
    assert len(ours) == 2 * 4 + 1  # two dtypes of four tasks, and linear
    for row in ours:
        assert row["difference"] < (2e-3 if row["case"].startswith("bf16") and "backward" in row["task"] else 1e-4), row
        assert row["quartiles"][0] <= row["median"] <= row["quartiles"][1]
        assert (row["share"] is None) == row["task"].startswith("linear")
    assert {row["implementation"] for row in results["rows"]} >= {"ours", "eager", "amax() over fp32"}
    asked = [bound["asked"] for bound in results["bounds"]]
    assert asked.count("≥ 10× as fast as eager") == asked.count("≥ 15× as fast as eager") == 2
    assert asked.count("≥ 70% of the bandwidth of amax() over fp32") == 2
    assert asked[-1] == "extra memory ≤ 1/16 of N·V·4"
    assert {"date", "cpu", "threads", "torch"} <= results["machine"].keys()
    for word in ("threads 1", "of read", "÷ ours", f"{len(asked)} met"):
        assert word in done.stdout


def test_op_cpu_beside_torch_compile(tmp_path):
    path = tmp_path / "cpu.json"
    done = run(
        "op_cpu.py", *TINY, "--tasks", "forward", "--dtypes", "fp32", "--against", "compile", "--json", str(path)
    )
    assert done.returncode == 0, done.stderr
    (row,) = (row for row in json.loads(path.read_text())["rows"] if row["implementation"] == "torch.compile")
    assert row["difference"] < 1e-4, row
    assert row["times_ours"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_op_gpu_without_a_gpu_says_so_in_one_line():
    done = run("op_gpu.py")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "needs a CUDA GPU" in done.stderr


def test_op_gpu_reads_columns_and_refuses_what_makes_no_sense(bench):
    op_gpu = bench("op_gpu")
    assert op_gpu.parse("50257") == (50257, 50257)
    assert op_gpu.parse("50257:50304") == (50257, 50304)
    for columns in ("", "0", "V", "5:4", "5:6:7"):
        with pytest.raises(op_gpu.InputError, match="V or V:S"):
            op_gpu.parse(columns)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_extra_memory_is_what_is_neither_input_nor_result(bench):
    clock, call = bench("op_cpu").CpuClock(), bench("_bench").Call
    megabytes = 2**18  # float32 values in a MiB

    def wasteful(_):
        scratch = torch.zeros(64 * megabytes).add_(1)
        return (scratch[: 32 * megabytes] + 1,)

    def frugal(_):
        return (torch.zeros(32 * megabytes).add_(1),)

    for function in (wasteful, frugal):  # the code's own pages count as well, when they are first touched
        function(None)
    if clock.extra_bytes(call(frugal)) is None:
        pytest.skip("this machine does not let a process reset its own VmHWM")
    for _ in range(2):  # the second time, too: what was freed does not hide what is used again
        assert abs(clock.extra_bytes(call(wasteful)) - 64 * 2**20) < 4 * 2**20
        assert abs(clock.extra_bytes(call(frugal))) < 4 * 2**20


def test_an_implementation_that_fails_is_a_row_that_says_why(bench):
    b, op_cpu = bench("_bench"), bench("op_cpu")

    def refuses(logits, targets):
        raise RuntimeError("V must be a multiple of 8\nand more")

    data = op_cpu.make_data(b.FORWARD, 4, 7, torch.float32, 0)
    functions = {"ours": b.ours(b.FORWARD, "reference"), "eager": b.eager(b.FORWARD), "peer": refuses}
    calls = {name: b.bind(b.FORWARD, function, data) for name, function in functions.items()}
    rows = {row.implementation: row for row in b.compare("case", b.FORWARD, calls, op_cpu.CpuClock(), rounds=2)}
    assert rows["peer"].note == "RuntimeError: V must be a multiple of 8"
    assert rows["peer"].median is None
    assert rows["ours"].median > 0, rows["ours"].note
    assert rows["ours"].difference < 1e-5


def test_a_wrong_result_shows(bench):
    b = bench("_bench")
    right = (torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.5]))
    assert b.largest_difference((-right[0], right[1]), right) == 0  # a loss is minus a log-prob
    assert b.largest_difference((right[0], right[1] + 0.25), right) == 0.25
    assert b.largest_difference((right[0] - 0.5,), right) == 0.5  # a peer that has the log-prob only
    with pytest.raises(ValueError, match=r"returns \[\(\), \(2,\)\], not"):
        b.largest_difference((right[0].sum(), right[1]), right)


def test_every_call_computes_the_same_gradient(bench):
    """Backward alone, and one that writes its gradient over its own copy of the logits: the data stay as they were."""
    b, op_cpu = bench("_bench"), bench("op_cpu")
    data = op_cpu.make_data(b.BACKWARD, 4, 7, torch.float32, 0)
    before = data.leaves[0].clone()
    logits = before.clone().requires_grad_()
    (want,) = torch.autograd.grad(b.logprob_entropy(logits, *data.rest), logits, data.upstream.unbind())

    def overwrites(logits, targets):
        outputs = b.logprob_entropy(logits.clone(), targets)
        logits.data.zero_()
        return outputs

    call = b.bind(b.BACKWARD, b.logprob_entropy, data)
    for _ in range(2):
        torch.testing.assert_close(call.run(call.prepare())[0], want)
    call = b.bind(b.BACKWARD, overwrites, data, own_copy=True)
    torch.testing.assert_close(call.run(call.prepare())[0], want)
    assert torch.equal(data.leaves[0], before)


def test_a_peer_is_only_put_beside_what_it_computes(bench):
    b, peers = bench("_bench"), bench("_peers")
    plain = peers.Peer("flash", logprob=b.logprob)
    assert plain.offer(b.FORWARD) == ("flash, log-prob only", b.logprob)
    assert plain.offer(b.BOTH) == ("flash", b.logprob)
    assert plain.offer(b.FORWARD_KL) is None
    assert plain.offer(b.LINEAR) is None
    full = peers.Peer("trl", logprob=b.logprob, logprob_entropy=b.logprob_entropy)
    assert full.offer(b.BACKWARD) == ("trl", b.logprob_entropy)
    summed = peers.Peer("liger", logprob=b.logprob, gradient_in_forward=True, summed=True)
    assert summed.offer(b.FORWARD) is None
    assert summed.offer(b.BACKWARD) is None
    assert summed.offer(b.BOTH) == ("liger", b.logprob)
