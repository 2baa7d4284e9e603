"""The benchmarks run, measure what they say, and their baselines compute the same as the op."""

import dataclasses
import importlib
import itertools
import json
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import python_path

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = ("--rows", "8", "--vocab", "101", "--linear", "8", "4", "101", "--rounds", "2", "--threads", "1", "--no-build")


@pytest.fixture
def bench(monkeypatch):
    """A module of benchmarks/, which is no package, by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, FOLDER / script, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
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


@pytest.mark.slow
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
def test_tiles_of_several_sizes_are_timed_and_the_fastest_within_the_promise_is_named(bench, monkeypatch):
    """On the CPU, with a clock that likes large tiles and a memory that knows the promise."""
    op_gpu = bench("op_gpu")
    monkeypatch.setattr(op_gpu, "DEVICE", "cpu")
    before = op_gpu.fused.TILE_ROWS, op_gpu.fused.TILE_ELEMENTS, op_gpu.fused.TILE_SHARE
    promised = 4 * 2048 * 3000 // 16
    runs = []

    class Clock:
        def seconds(self, call):
            call.run(call.prepare())
            runs.append((op_gpu.fused.TILE_ROWS["cpu"], op_gpu.fused.TILE_ELEMENTS["cpu"]))
            return 1.0 / runs[-1][1]

        def extra_bytes(self, call):
            return promised * op_gpu.fused.TILE_ELEMENTS["cpu"] // 2**20

    args = op_gpu.Args(linear=(2048, 16, 3000), dtypes=("fp32",), rounds=4, tiles=True)
    found = op_gpu.sweep(args, Clock())
    assert {one.rows for one in found} == {1024, 2048} and {one.elements for one in found} > {2**19, 2**20, 2**21}
    assert len(runs) == 2 * len(found)
    assert before == (op_gpu.fused.TILE_ROWS, op_gpu.fused.TILE_ELEMENTS, op_gpu.fused.TILE_SHARE)
    best = op_gpu.show_sweep(args, found)
    assert best.elements == 2**20, "larger ones are faster, and take more than was promised"


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


# --- beside other people's steps --------------------------------------------------------------------------------------

SMALL = ("--shape", "1", "32", "2", "300", "24", "--batch", "4", "--tokens", "6", "8")
ROUNDS = ("--settings", "fp32", "--rounds", "2", "--warm-up", "1", "--threads", "1")


@pytest.fixture
def bare_python(tmp_path):
    """A Python in which nothing is installed."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    path.chmod(0o755)
    return str(path)


def shown(results: dict, stdout: str) -> None:
    """The table has a line for each row, with what the JSON has."""
    for row in results["rows"]:
        lines = [line for line in stdout.splitlines() if row["implementation"] in line]
        what = row["note"] if row["seconds"] is None else f"{row['seconds']:.4f}"
        assert any(what in line for line in lines), (row, lines)


@pytest.mark.slow
def test_vs_peers_samples_beside_transformers(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "results.json"
    done = run("vs_peers.py", "--only", "sampling", *SMALL, *ROUNDS, "--json", str(path))
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text())
    rows = {row["implementation"]: row for row in results["rows"]}
    assert list(rows) == ["ours, fp32", "transformers"]
    for row in rows.values():
        assert len(row["rounds"]) == 2
        assert row["seconds"] == pytest.approx(sum(row["rounds"]) / 2)
        assert row["peak_bytes"] > row["growth_bytes"] >= 0
        assert 0 < row["floor_share"] < 1.5
        assert row["to_best"] is row["syncs"] is None
        assert row["tokens_per_second"] == pytest.approx(4 * 8 / row["seconds"])
        times, (low, high) = row["to_fp32"]
        assert low <= times <= high
        assert times == pytest.approx(row["seconds"] / rows["ours, fp32"]["seconds"])
    same = [bound for bound in results["bounds"] if bound["asked"].startswith("same greedy tokens")]
    assert [bound["measured"] for bound in same] == ["4 of 4"]
    assert "transformers" in results["peers"]
    shown(results, done.stdout)


def test_memory_is_compared_like_for_like(bench):
    b = bench("vs_peers")

    def row(name, mebibytes, **settings):
        return b.Row("gpt2 dpo", name, 1.0, peak_bytes=mebibytes * b.MiB, settings=settings)

    rows = [row("ours, fp32", 50), row("ours, lean", 30, checkpointing=True), row("TRL", 100)]
    rows += [row("TRL, bf16", 60, dtype="bf16"), row("TRL, gradient checkpointing", 45, checkpointing=True)]

    def found(rows):
        bounds = [bound for bound in b.compare(rows) if "memory" in bound.asked]
        return {(bound.what, bound.asked.split("of ")[1]): (bound.measured, bound.met) for bound in bounds}

    assert found(rows) == {
        ("gpt2 dpo, fp32", "TRL"): ("50%", True),
        ("gpt2 dpo, lean", "TRL, gradient checkpointing"): ("67%", False),
    }
    assert found([rows[0], *rows[2:]])["gpt2 dpo, fp32", "TRL, gradient checkpointing"] == ("111%", False)


@pytest.mark.slow
def test_vs_peers_leaves_out_by_name_who_is_not_there(tmp_path, bare_python):
    path = tmp_path / "results.json"
    peers = "--peer-python", bare_python, "--ppo-peer-python", bare_python
    done = run("vs_peers.py", "--only", "dpo", "ppo", "pretrain", *SMALL, *ROUNDS, *peers, "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    found = {(row["case"], row["implementation"]): row for row in rows}
    assert {key for key, row in found.items() if row["seconds"] is None} == {
        ("dpo", "TRL"), ("dpo", "TRL, reference known"), ("ppo", "TRL"), ("pretrain", "nanoGPT and ours"),
    }  # fmt: skip
    assert "No module named 'torch'; pip install 'minirlhf[bench]'" in found["dpo", "TRL"]["note"]
    assert "trl==1.10.0" in found["ppo", "TRL"]["note"]
    assert all(row["skipped"] for row in rows if row["seconds"] is None)
    ours = found["ppo", "ours, fp32"]
    assert ours["parts"]["rollout"] + ours["parts"]["update"] == pytest.approx(ours["seconds"], rel=0.5)
    assert 0 < found["dpo", "ours, fp32"]["parts"]["reference"] < found["dpo", "ours, fp32"]["seconds"]
    shown({"rows": rows}, done.stdout)


def test_vs_peers_refuses_what_makes_no_sense(bench, tmp_path):
    vs_peers = bench("vs_peers")
    for arguments, message in (
        ({"peer_python": tmp_path / "none"}, "--peer-python .*none: no such program"),
        ({"nanogpt": tmp_path}, "--nanogpt .*: no train.py there"),
        ({"text": tmp_path / "none.txt"}, "--text .*none.txt: no such file"),
        ({"rounds": 0}, "--rounds must be at least 1"),
        ({"settings": ()}, "--settings needs at least one name"),
        ({"tokens": (100, 100), "only": ("dpo",)}, "dpo: a prompt of 100 tokens .* exceed the context of 128"),
        ({"batch": 6, "only": ("ppo",)}, "--batch 6 must be a multiple"),
    ):
        with pytest.raises(vs_peers.InputError, match=message):
            vs_peers.main(vs_peers.Args(**arguments))
    done = run("vs_peers.py", "--only", "nothing")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


TOY = """
import sys, time
from _rounds import Turns

turns = Turns()
print("what a library says")
turns.ready(who=sys.argv[1])
kept = []
while True:
    turns.begin()
    begun = time.time()
    kept.append(bytearray(b"x") * 2**24)
    time.sleep(0.02)
    turns.end(begun=begun, ended=time.time())
"""


@pytest.fixture
def toy(bench, tmp_path, monkeypatch):
    """Workers that keep 16 MiB more in each round, and what `_rounds` has."""
    monkeypatch.setenv("PYTHONPATH", python_path(FOLDER)["PYTHONPATH"])
    path, rounds = tmp_path / "toy.py", bench("_rounds")
    path.write_text(TOY)
    workers = {name: rounds.Worker(sys.executable, path, name, 1) for name in "ab"}
    for worker in workers.values():
        worker.ready()
    yield rounds, workers
    for worker in workers.values():
        worker.stop()


def test_only_one_worker_works_at_a_time(toy):
    rounds, workers = toy
    assert rounds.compete(workers, warm_up=1, rounds=3) == {}
    spans = sorted((about["begun"], about["ended"]) for worker in workers.values() for about in worker.about)
    assert len(spans) == 8
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    for name, worker in workers.items():
        assert worker.facts == {"who": f'"{name}"'}
        assert len(worker.seconds) == len(worker.counted) == 3
        assert all(0.02 <= seconds < 1 for seconds in worker.seconds)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_growth_of_the_memory_is_what_came_after_set_up(toy):
    rounds, workers = toy
    rounds.compete(workers, warm_up=2, rounds=2)
    assert all(4 * 2**24 <= worker.peak - worker.resting < 6 * 2**24 for worker in workers.values())


def test_a_worker_that_dies_leaves_its_last_words_and_the_others_go_on(bench, toy, tmp_path):
    rounds, workers = toy
    path = tmp_path / "mortal.py"
    path.write_text(TOY.replace("time.sleep(0.02)", "raise MemoryError('no more')"))
    workers["c"] = rounds.Worker(sys.executable, path, "c", 1)
    workers["c"].ready()
    (failed,) = rounds.compete(workers, warm_up=0, rounds=2).items()
    assert (failed[0], str(failed[1])) == ("c", "MemoryError: no more")
    assert len(workers["a"].seconds) == len(workers["b"].seconds) == 2
    path.write_text("from _rounds import Turns\nTurns().skip('no such module')")
    workers["d"] = rounds.Worker(sys.executable, path, "d", 1)
    with pytest.raises(rounds.Skipped, match="no such module"):
        workers["d"].ready()


def test_who_answers_too_late_is_left_out_and_rounds_end_at_the_deadline(toy, tmp_path):
    rounds, workers = toy
    assert rounds.compete(workers, warm_up=1, rounds=500, deadline=time.monotonic() + 1) == {}
    assert 1 < len(workers["a"].seconds) == len(workers["b"].seconds) < 30
    path = tmp_path / "slow.py"
    path.write_text("import time\ntime.sleep(60)")
    workers["c"] = rounds.Worker(sys.executable, path, "c", 1, deadline=time.monotonic() + 0.5)
    begun = time.monotonic()
    with pytest.raises(rounds.Late):
        workers["c"].ready()
    workers["c"].stop()
    assert time.monotonic() - begun < 5


DEVICE = """
class Device:
    device, used = "toy", []

    def __getattr__(self, name):  # wait, rest, peak, watch, watched: in which order?
        return lambda: self.used.append(name) or len(self.used)

    def since(self):
        return [self.used.pop(0) for _ in range(len(self.used))]


turns = Turns()
turns.meter = Device()
"""


def test_a_round_goes_from_idle_to_idle_and_one_more_counts_synchronisations(toy, tmp_path):
    rounds, workers = toy
    path = tmp_path / "device.py"
    path.write_text(TOY.replace("turns = Turns()\n", DEVICE).replace("ended=time.time()", "used=turns.meter.since"))
    worker = workers["c"] = rounds.Worker(sys.executable, path, "c", 1)
    worker.ready()
    assert rounds.compete({"c": worker}, warm_up=1, rounds=2, syncs=True) == {}
    assert len(worker.seconds) == len(worker.counted) == 2
    assert [about["used"] for about in worker.about] == [
        ["rest", "wait", "wait"], ["peak", "wait", "watch", "watched", "wait"], *2 * [["peak", "wait", "wait"]],
    ]  # fmt: skip
    assert (worker.syncs, worker.resting, worker.peak) == (4, 1, 1)


class FakeCuda:
    """torch.cuda without a GPU: says what it is asked for, and warns while it is told to."""

    def __init__(self):
        self.mode, self.asked = "default", []

    def __getattr__(self, name):
        return lambda: self.asked.append(name) or 5

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def read(self):
        if self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation (Triggered internally …)", stacklevel=2)


def test_the_gpu_is_waited_for_and_its_synchronisations_are_counted(bench, monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    meter = bench("_rounds").METERS["cuda"]()
    meter.wait()
    assert (meter.rest(), meter.peak()) == (5, 5)
    assert cuda.asked == [
        "synchronize", "empty_cache", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated",
    ]  # fmt: skip
    cuda.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as peers' processes have it
        meter.watch()
        for _ in range(3):  # from one line, of which Python would show one warning
            cuda.read()
        warnings.warn("synchronizing is slow", stacklevel=1)
        assert meter.watched() == 3
    assert cuda.mode == "default"


def test_ratio_is_of_medians_and_its_range_of_pairs(bench):
    assert bench("_rounds").ratio([2.0, 4.0, 6.0], [1.0, 2.0, 6.0]) == (2.0, (1.0, 2.0))


def test_fitting_sizes_leaves_the_rest(bench):
    vs_peers = bench("vs_peers")
    case = vs_peers.CASES["dpo"][0]
    assert vs_peers.fit(case, None, 0, None) == case
    fitted = vs_peers.fit(case, (1, 32, 2, 300, 24), 3, (6, 8))
    assert (fitted.batch, fitted.prompt, fitted.response) == (3, 6, 8)
    assert dataclasses.asdict(fitted.config) == {
        "vocab_size": 300, "n_positions": 24, "n_layer": 1, "n_head": 2, "n_embd": 32,
    }  # fmt: skip


def test_what_takes_much_memory_runs_beside_one_peer_at_a_time(bench):
    vs_peers = bench("vs_peers")
    names = ["ours, fp32", "ours, best", "TRL", "TRL, bf16"]
    assert vs_peers.heats(vs_peers.CASES["dpo"][0], names) == [names]
    assert vs_peers.heats(vs_peers.CASES["gpt2"][1], names) == [[*names[:2], "TRL"], [*names[:2], "TRL, bf16"]]
    assert vs_peers.heats(vs_peers.CASES["gpt2"][1], names[:2]) == [names[:2]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["vs_peers.py", "scaling.py"])
def test_asked_for_a_gpu_that_is_not_there(script):
    done = run(script, "--device", "cuda")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --device cuda: this machine has 0 such GPUs; use --device cpu\n"


def test_cases_on_a_gpu_have_the_shape_of_gpt2(bench):
    vs_peers = bench("vs_peers")
    small, medium = (vs_peers.Args(device="cuda", model=model).cases for model in ("small", "medium"))
    assert list(small) == list(medium) == ["sampling", "dpo", "ppo", "sft", "rm"]
    shape = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
    for cases, sizes in ((small, (12, 12, 768, 50257, 1024)), (medium, (24, 16, 1024, 50257, 1024))):
        for (case,) in cases.values():
            assert tuple(getattr(case.config, name) for name in shape) == sizes
            assert case.asked.keys() <= case.peers.keys()
            assert not any("TRL" in name and settings.get("compile") for name, settings in case.peers.items())
    (sampling,) = small["sampling"]
    assert (sampling.batch, sampling.prompt, sampling.response, sampling.tokens) == (64, 48, 64, 64 * 64)
    assert sampling.asked == {"transformers, bf16": 5, "transformers, bf16, compiled": 2}
    assert small["dpo"][0].asked == small["ppo"][0].asked == {"TRL, bf16": 2}
    assert small["dpo"][0].tokens == 16 * (128 + 2 * 128)
    assert not any(case.asked for cases in medium.values() for case in cases)
    compiled = vs_peers.Args(device="cuda", compile=True, only=("dpo",), batch=8).cases
    assert list(compiled) == ["dpo"]
    assert "TRL, bf16, compiled" in compiled["dpo"][0].peers
    assert (compiled["dpo"][0].batch, compiled["dpo"][0].asked) == (8, {})
    with pytest.raises(vs_peers.InputError, match="--only pretrain: on a GPU there are sampling, dpo, ppo, sft, rm"):
        _ = vs_peers.Args(device="cuda", only=("dpo", "pretrain")).cases
    assert list(vs_peers.Args().cases) == ["sampling", "ppo", "dpo", "rm", "sft", "pretrain", "gpt2"]


def test_peers_are_told_the_device(bench):
    common = bench("_theirs").common
    job = {"folder": ".", "batch": 4, "steps": 3, "settings": {"dtype": "bf16"}}
    on = {device: common(job | {"device": device}) for device in ("cpu", "cuda")}
    assert on["cpu"]["use_cpu"] and not on["cpu"]["dataloader_pin_memory"]
    assert not on["cuda"]["use_cpu"] and on["cuda"]["dataloader_pin_memory"]
    assert on["cpu"]["bf16"] and on["cuda"]["bf16"]


def test_what_is_asked_on_a_gpu(bench):
    vs_peers = bench("vs_peers")
    case = vs_peers.Args(device="cuda").cases["ppo"][0]
    row = vs_peers.Row(
        "ppo", "TRL, bf16", 1.0, to_fp32=(9.0, (9.0, 9.0)), to_best=(1.9, (1.5, 2.5)), settings=vs_peers.BF16
    )
    (bound,) = vs_peers.promised(case, [row])
    assert dataclasses.astuple(bound) == ("ppo, best", "≥ 2× as fast as TRL, bf16", "1.90×", False)

    def asked(task, syncs, **about):
        workers = {name: SimpleNamespace(syncs=syncs, about=[about]) for name in ("ours, best", "TRL")}
        bounds = vs_peers.synchronisations(dataclasses.replace(case, name=task, task=task), workers)
        return [(bound.what, bound.asked, bound.met) for bound in bounds]

    assert asked("ppo", 58, updates=16) == [("ppo, ours, best", "≤ 58 host synchronisations", True)]
    assert asked("ppo", 59, updates=16) == [("ppo, ours, best", "≤ 58 host synchronisations", False)]
    assert asked("sft", 4) == [("sft, ours, best", "≤ 3 host synchronisations", False)]
    assert asked("sampling", 1000) == asked("sft", None) == []


def test_what_would_end_too_late_is_left_out_and_named(bench, tmp_path, monkeypatch):
    """The first case takes all the time there is: it stands in the file before the second is left out."""
    vs_peers, path = bench("vs_peers"), tmp_path / "results.json"
    row = vs_peers.Row("dpo", "ours, fp32", 0.5)
    wrote = []

    def run_case(case, args, information, deadline):
        assert 0 < deadline - time.monotonic() <= 60
        wrote.append((case.name, path.exists()))
        monkeypatch.setattr(time, "monotonic", lambda: deadline - 1)
        return [row], [], []

    monkeypatch.setattr(vs_peers, "run_case", run_case)
    vs_peers.main(vs_peers.Args(only=("dpo", "rm"), minutes=1, json=path))
    assert wrote == [("dpo", False)]
    rows = json.loads(path.read_text())["rows"]
    assert [(row["case"], row["seconds"]) for row in rows] == [("dpo", 0.5), ("rm", None)]
    assert rows[1]["note"] == "left out, since it would end after 1 minutes"


def test_nobody_is_waited_for_beyond_the_minutes(tmp_path):
    path = tmp_path / "results.json"
    done = run("vs_peers.py", "--only", "sft", *SMALL, *ROUNDS, "--minutes", "0.01", "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert all(row["seconds"] is None and row["skipped"] for row in rows)
    assert "left out" in done.stdout


def test_settings_go_where_they_mean_something(bench):
    ours = bench("_ours")
    model, scorer = (ours.make_model(ours.GPTConfig(300, 16, 1, 1, 8), 0, scalar) for scalar in (False, True))
    settings = {"dtype": "bf16", "compile": True, "checkpointing": True}
    assert ours.run_with(settings, model, scorer) == {"dtype": "bf16"}
    assert [(trunk.kernel, trunk.dtype, trunk.compiled) for trunk in (model, scorer.trunk)] == [
        ("auto", "bf16", False)
    ] * 2
    assert ours.run_with(settings, model, compiled=True) == {"dtype": "bf16", "compile": True}
    assert model.compiled


def test_endless_samples_reach_their_limit(bench):
    ours = bench("_ours")
    model = ours.make_model(ours.GPTConfig(300, 40, 2, 2, 32), seed=0, endless=True)
    drawn = ours.generate(model, [[1, 2]] * 64, 299, 32, 0)
    assert drawn.mask.all()
    assert len(drawn.responses.unique()) > 200  # and the others are drawn as ever


def test_pretraining_is_timed_without_evaluations(bench):
    ours, vs_peers = bench("_ours"), bench("vs_peers")
    points = ours.curve([1.0, 1.0, 9.0, 1.0, 9.0], {0: 5.0, 3: 3.0, 5: 2.0}, {2, 4})
    assert points == [(0, 5.0), (3.0, 3.0), (5.0, 2.0)]
    assert vs_peers.reached(points, 3.5) == 3.0
    assert vs_peers.reached(points, 1.9) is None


PREPARE = """
from pathlib import Path

folder = Path("data/shakespeare_char")
(folder / "prepared").write_text((folder / "input.txt").read_text()[:5])
"""
NANOGPT = """
import sys

flags = dict(flag[2:].split("=") for flag in sys.argv[2:])
assert open("data/shakespeare_char/prepared").read() == "To be"
for i in range(int(flags["max_iters"]) + 1):
    evaluates = i % int(flags["eval_interval"]) == 0
    if evaluates:
        print(f"step {i}: train loss 5.0000, val loss {99 - i:.4f}")
    print(f"iter {i}: loss 5.0000, time {7000 if evaluates else 1000:.2f}ms, mfu 0.00%")
"""


@pytest.mark.slow
def test_pretraining_beside_a_checkout(bench, tmp_path, monkeypatch):
    """A stand-in that prints as nanoGPT does: a second an iteration, and six for each evaluation."""
    vs_peers = bench("vs_peers")
    checkout, text = tmp_path / "nanoGPT", tmp_path / "text.txt"
    (checkout / "data" / "shakespeare_char").mkdir(parents=True)
    (checkout / "data" / "shakespeare_char" / "prepare.py").write_text(PREPARE)
    (checkout / "train.py").write_text(NANOGPT)
    text.write_text("To be, or not to be, that is the question. " * 100)
    monkeypatch.setattr(vs_peers, "STEPS", 8)
    rows, _, bounds = vs_peers.run_pretrain(
        vs_peers.Args(only=("pretrain",), settings=("fp32",), nanogpt=checkout, text=text)
    )
    theirs, ours = rows
    assert (theirs.implementation, theirs.seconds) == ("nanoGPT", 8.0)
    assert ours.implementation == "ours, fp32"
    assert 0 < ours.seconds < 8  # its first loss is below theirs
    assert bounds[0].met
    assert not (checkout / "data" / "shakespeare_char" / "prepared").exists()


@pytest.mark.slow
def test_profile_steps_end_to_end(tmp_path):
    path = tmp_path / "profile.json"
    done = run("profile_steps.py", *SMALL, "--steps", "1", "--threads", "1", "--top", "2", "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == ["sft", "rm", "ppo", "dpo", "sampling"]
    for row in rows:
        kinds = row["kinds"]
        assert sum(kinds.values()) == pytest.approx(row["profiled"], rel=0.05)
        assert kinds["matrix products"] > 0
        assert (kinds["optimiser"] > 0) == (row["case"] != "sampling")
        assert (kinds["decoding steps"] > 0) == (row["case"] in ("sampling", "ppo"))
        assert 0 < row["floor"] < row["plain"]
    assert "Python and other" in done.stdout


def test_operators_have_their_kind(bench):
    kind_of = bench("profile_steps").kind_of
    for operator, kind in (
        ("aten::addmm", "matrix products"), ("aten::bmm", "attention"), ("aten::_fused_adamw_", "optimiser"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"), ("aten::copy_", "copies"),
        ("minirlhf::linear_token_stats", "fused op"), ("minirlhf::decode_step_", "decoding steps"),
        ("minirlhf::attention_backward", "attention"), ("minirlhf::packed_linear", "matrix products"),
        ("minirlhf::gelu", "elementwise and norms"), ("aten::gelu_backward", "elementwise and norms"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "matrix products"), ("ProfilerStep#1", None),
    ):  # fmt: skip
        assert kind_of(operator) == kind, operator


@pytest.mark.slow
def test_scaling_end_to_end(tmp_path):
    path, picture = tmp_path / "scaling.json", tmp_path / "pictures" / "scaling.png"
    sizes = ("--length", "8", "16", "--vocabulary", "300", "--batch", "2", "--layers", "1", "--width", "32")
    done = run(
        "scaling.py", "--axes", "length", "batch", *sizes, "--rounds", "2", "--threads", "1", "--out", str(picture),
        "--json", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(row["axis"], row["value"], row["what"]) for row in rows] == [
        ("length", 8, "train"), ("length", 16, "train"), ("length", 8, "sample"), ("length", 16, "sample"),
        ("batch", 2, "train"), ("batch", 2, "sample"),
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["floor"] < row["fastest"] <= row["seconds"]
        assert f"{1e3 * row['seconds']:.1f}" in done.stdout
        assert row["peak_bytes"] is row["syncs"] is None
    assert rows[0]["tokens_per_second"] == pytest.approx(2 * 8 / rows[0]["seconds"])
    assert rows[2]["tokens_per_second"] == pytest.approx(2 * 6 / rows[2]["seconds"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    done = run("scaling.py", "--width", "48")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --width 48 must be a multiple of 32, the width of a head\n"


def test_scaling_on_a_gpu_is_around_gpt2_small(bench, tmp_path, capsys):
    scaling = bench("scaling")
    sizes = scaling.Args(device="cuda", length=(64,)).sizes
    size = scaling.Size(**{axis: values[0] for axis, values in sizes.items()})
    assert (size.config.n_layer, size.config.n_head, size.config.n_embd, size.config.vocab_size) == (12, 12, 768, 50257)
    assert size.length == 64
    assert scaling.Size(64, 300, 1, 1, 256).config.n_head == 8
    assert scaling.measure("batch", scaling.Args(minutes=1), deadline=time.monotonic() - 1) == []
    assert "left out, since it would end after 1 minutes: sample, batch 128" in capsys.readouterr().out


def test_rounds_warm_up_count_and_are_timed(bench):
    scaling, used = bench("scaling"), []
    meter = SimpleNamespace(**{name: partial(used.append, name) for name in ("rest", "wait", "watch")})
    meter.watched = lambda: used.append("watched") or 7
    rounds = scaling.Rounds(meter)
    for i in range(3):
        with rounds.one():
            used.append(i)
    assert used == ["rest", "wait", 0, "wait", "wait", "watch", 1, "watched", "wait", "wait", 2, "wait"]
    assert (len(rounds.seconds), rounds.syncs) == (1, 7)


# --- floating-point operations ----------------------------------------------------------------------------------------


def test_operations_are_those_that_torch_counts(bench):
    """The forward and the backward of a small model, attention written out so that torch counts all its pairs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from minirlhf.model.gpt import GPT, GPTConfig

    flops = bench("_flops")
    config = GPTConfig(vocab_size=320, n_positions=16, n_layer=3, n_head=4, n_embd=32)
    B, T = 5, 12
    model, tokens = GPT(config), torch.randint(320, (B, T))
    model.run_with("reference")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        hidden = model(tokens)
    assert forward.get_total_flops() == flops.trunk(config, B * T, B * T * T)
    with FlopCounterMode(display=False) as head:
        logits = model.logits(hidden)
    assert head.get_total_flops() == flops.head(config, B * T)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    whole = forward.get_total_flops() + head.get_total_flops()
    assert whole + backward.get_total_flops() == flops.TRAINED * whole


def test_operations_of_a_step_add_up(bench):
    flops = bench("_flops")
    config = bench("vs_peers").SMALL

    def total(works):
        return sum(work.flops for work in works)

    def plain(length):
        return flops.trunk(config, length, flops.causal(length))

    assert flops.causal(3) == 1 + 2 + 3
    assert flops.causal(2, before=3) == 4 + 5
    # Sampling with a cache reads each token once, and the last one never.
    assert total(flops.generation(config, 2, 5, 4)) == 2 * (plain(8) + flops.head(config, 4))
    assert total(flops.sft_step(config, 2, 5, 4)) == 3 * 2 * (plain(8) + flops.head(config, 4))
    # Two responses of 4 behind a prompt of 5: the prompt counts once, and beyond it each has what it has alone.
    both = plain(5) + 2 * (plain(8) - plain(5))
    assert total(flops.dpo_step(config, 1, 5, 4)) == 3 * (both + flops.head(config, 8))
    assert total(flops.dpo_step(config, 1, 5, 4, reference=True)) == 4 * (both + flops.head(config, 8))
    assert total(flops.rm_step(config, 1, 5, 4)) == 3 * (plain(5) + 2 * (plain(9) - plain(5)))
    step = flops.ppo_step(config, 8, 5, 4, epochs=2, micro=4)
    once = 8 * (2 * plain(8) + flops.head(config, 4))  # policy or reference, and critic
    assert total(step["update"]) == 3 * 2 * once
    assert total(step["rollout"]) == total(flops.generation(config, 8, 5, 4)) + 8 * plain(9) + once


def test_the_floor_is_operations_over_the_rate(bench):
    flops = bench("_flops")
    config = bench("vs_peers").SMALL
    rate = flops.matrix_rate(config, 64, torch.float32, False, "cpu")
    assert rate > 1e8
    work = flops.Work(5 * rate, 64)
    begun = time.perf_counter()
    assert flops.floor_seconds([work, work.times(2)], config, torch.float32) == pytest.approx(15)
    assert time.perf_counter() - begun < 0.05  # measured once
