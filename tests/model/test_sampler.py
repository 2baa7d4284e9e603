"""Steps of sampling that are captured and replayed. Without a GPU their bookkeeping is tested: what stands in for a
CUDA graph remembers the step and runs it. With one, the graphs themselves.
"""

import copy
import math

import pytest
import torch

from minirlhf.algorithms.logprobs import response_stats, scatter_counted
from minirlhf.kernels import graphs
from minirlhf.model import decoding as decode
from minirlhf.model.generate import generate
from minirlhf.model.gpt import GPT, GPTConfig, init_weights
from minirlhf.model.sampling import Sampling

CONFIG = GPTConfig(61, n_positions=160, n_layer=2, n_head=2, n_embd=32)
EOT = 60
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13], [23, 3], [7] * 50]
LIMITS = [70, 5, 25, 70, 9, 40]  # rows leave one after another, and two pass the first 64 slots
OPTIONS = {
    "plain": Sampling(),
    "never ends early": Sampling(temperature=1.2, min_new_tokens=70),
    "cut": Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
    "penalised": Sampling(repetition_penalty=1.3, min_new_tokens=4),
    "most likely": Sampling(temperature=0.0, min_new_tokens=30),
}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA graphs are stood in for here, not run")


def made(seed: int = 0, scale: float = 1.0) -> GPT:
    model = GPT(CONFIG)
    init_weights(model, seed)
    with torch.no_grad():
        model.wte.weight.mul_(scale)
    return model.eval()


class Recorder:
    """In place of CUDA graphs: what is recorded runs when it is replayed, and not before."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, step, pool):
        self.recorded += 1
        return step


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(graphs, "can_capture", lambda device, kernel: True)
    monkeypatch.setattr(graphs, "record", recorder)
    return recorder


def kept(model: GPT) -> decode.Decoder:
    (decoder,) = decode._decoders[model].values()
    return decoder


def same(got, want) -> None:
    assert got.rows == want.rows
    for a, b in zip(got, want):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIONS)
def test_replayed_steps_draw_the_same_bits(recorder, name):
    """On a CPU a row's bits depend on no other row, so that steps of more rows and slots give those of plain ones."""
    given = PROMPTS, EOT, LIMITS, 2, OPTIONS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "can_capture", lambda device, kernel: False)
        want = generate(made(), *given, entropy=True)
    model = made()
    for _ in range(2):  # the second time, over what the first has left behind
        same(generate(model, *given, entropy=True), want)
    steps = kept(model).captured
    assert steps.replays > 60 or name != "never ends early"
    assert 0 < recorder.recorded <= len(steps.kept)
    assert all(rows in (1, 2, 4, 8) and reach in (64, 128) for rows, reach, *_ in steps.kept)


def test_each_key_is_recorded_once_and_weights_may_change(recorder):
    model, given = made(), (PROMPTS, EOT, LIMITS, 2, Sampling(min_new_tokens=70))
    first = generate(model, *given)
    generate(model, *given)
    recorded, replays = recorder.recorded, kept(model).captured.replays
    model.load_state_dict(made(seed=3).state_dict())  # in place, as an optimiser changes them
    third = generate(model, *given)
    assert recorder.recorded == recorded, "nothing new to record"
    assert kept(model).captured.replays == replays + 70, "every step was replayed"
    assert third.rows != first.rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "can_capture", lambda device, kernel: False)
        same(third, generate(made(seed=3), *given))


def test_what_lies_elsewhere_is_recorded_anew(recorder):
    model = made()
    generate(model, PROMPTS, EOT, LIMITS, 2)
    generate(model, PROMPTS, EOT, LIMITS, 2)
    before = recorder.recorded
    got = generate(model, PROMPTS * 3, EOT, LIMITS * 3, 2)  # more rows than there was room for
    assert recorder.recorded > before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "can_capture", lambda device, kernel: False)
        same(got, generate(made(), PROMPTS * 3, EOT, LIMITS * 3, 2))
    before = recorder.recorded
    generate(model, PROMPTS, EOT, LIMITS, 2)
    generate(model, PROMPTS, EOT, LIMITS, 2)  # fewer rows stay in the larger tables
    after = recorder.recorded
    generate(model, PROMPTS * 3, EOT, LIMITS * 3, 2)
    assert recorder.recorded == after >= before
    model.h[0].attn_proj.weight.data = model.h[0].attn_proj.weight.data.clone()
    generate(model, PROMPTS, EOT, LIMITS, 2)
    assert not kept(model).captured.refused


def test_a_watch_ends_rows_between_replays(recorder):
    def watch(row, tokens):
        return row == 2 and len(tokens) == 6

    given = {"sampling": Sampling(min_new_tokens=40), "watch": watch}
    got = generate(made(), PROMPTS, EOT, LIMITS, 2, **given)
    assert [len(row) for row in got.rows][2] == 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "can_capture", lambda device, kernel: False)
        same(got, generate(made(), PROMPTS, EOT, LIMITS, 2, **given))


def test_a_capture_that_fails_is_said_once_and_changes_nothing(recorder, monkeypatch, capsys):
    def fails(step, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs, "record", fails)
    model = made()
    got = [generate(model, PROMPTS, EOT, LIMITS, 2) for _ in range(2)]
    said = "steps of sampling are not captured, and take longer: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().err == said
    assert kept(model).captured.replays == 0
    monkeypatch.setattr(graphs, "can_capture", lambda device, kernel: False)
    for one in got:
        same(one, generate(made(), PROMPTS, EOT, LIMITS, 2))


def test_a_step_that_is_not_static_is_not_captured():
    """On a CPU nothing changes: rows are exact, and nothing is kept in place."""
    model = made()
    generate(model, PROMPTS, EOT, LIMITS, 2)
    decoder = kept(model)
    assert not decoder.static and not decoder.kept and not decoder.captured.kept
    assert not graphs.can_capture(torch.device("cpu"), "auto")


# --- attention of one query in bfloat16, as on a GPU ------------------------------------------------------------------


def test_scores_in_fp32_are_nearer_the_truth():
    g = torch.Generator().manual_seed(0)
    N, S, d = 24, 128, 64
    q, k, v = (torch.randn(N, S, d, generator=g) * 1.5 for _ in range(3))
    qkv = torch.stack((q[:, 0], k[:, 0], v[:, 0]), dim=1).bfloat16()
    keys, values = k.bfloat16(), v.bfloat16()
    ahead = torch.full((N, 1, S), -math.inf)
    ahead[:, :, :100] = 0.0
    exact = decode._mixed(qkv.double(), keys.double(), values.double(), ahead.double())
    errors = [
        (mixed(qkv, keys, values, ahead.bfloat16()).double() - exact).abs().max().item()
        for mixed in (decode._mixed_in_fp32, decode._mixed)
    ]
    assert errors[0] < 0.012, "half a unit in the last place of the values"
    assert errors[0] < 0.5 * errors[1]
    wide = decode._mixed_in_fp32(qkv.double(), keys.double(), values.double(), ahead.double())
    torch.testing.assert_close(wide, exact)


def test_rounded_decoding_drifts_little_from_training(monkeypatch):
    """The GPU's arithmetic on a CPU: keys and values in bfloat16, scores in float32; against training's bfloat16."""
    model = made(scale=2.0)
    monkeypatch.setattr(decode, "_mixed", decode._mixed_in_fp32)
    monkeypatch.setattr(decode, "_store_dtype", lambda dtype, device: dtype)
    model.run_with("reference")
    mean, most = drift(model)
    assert mean < 5e-4
    assert most < 0.03


def drift(model: GPT) -> tuple[float, float]:
    """Of sampled log-probs from those of a second reading, in bfloat16: the mean, and the largest."""
    device = model.wte.weight.device
    prompts = [[i % 50 + 1, *range(3, 3 + i % 9)] for i in range(64)]
    model.run_with(dtype="bf16")
    drawn = generate(model, prompts, EOT, 48, 3)
    T = max(len(p) + len(r) for p, r in zip(prompts, drawn.rows))
    whole = [[*p, *r, *[EOT] * (T - len(p) - len(r))] for p, r in zip(prompts, drawn.rows)]
    tokens, places = torch.tensor(whole), torch.arange(T)
    starts = torch.tensor([len(p) for p in prompts])[:, None]
    counted = (places >= starts) & (places < starts + torch.tensor([len(r) for r in drawn.rows])[:, None])
    with torch.no_grad():
        stats = response_stats(model, tokens.to(device), counted)
    again = scatter_counted(stats.logprobs, drawn.mask)
    off = (again - drawn.logprobs)[drawn.mask]
    return abs(off.mean().item()), off.abs().max().item()


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cuda_graphs_are_replayed_and_equal_the_eager_step_to_the_bit(monkeypatch, name, dtype):
    given = {"sampling": OPTIONS[name], "entropy": True}
    model, plain = made().cuda(), made().cuda()
    for network in (model, plain):
        network.run_with(dtype=dtype)
    got = [generate(model, PROMPTS, EOT, LIMITS, 2, **given) for _ in range(2)]
    assert kept(model).captured.replays > 0 and not kept(model).captured.refused
    monkeypatch.setattr(graphs, "can_capture", lambda device, kernel: False)
    eager = generate(plain, PROMPTS, EOT, LIMITS, 2, **given)
    for one in got:
        same(one, eager)


@gpu
def test_cuda_draws_what_the_cpu_draws():
    for sampling in (Sampling(temperature=0.0, min_new_tokens=20), Sampling(min_new_tokens=20)):
        here = generate(made(), PROMPTS, EOT, LIMITS, 2, sampling)
        model = made().cuda()
        model.compiled = True
        there = generate(model, PROMPTS, EOT, LIMITS, 2, sampling)
        assert there.rows == here.rows
        torch.testing.assert_close(there.logprobs.cpu(), here.logprobs, rtol=1e-4, atol=1e-4)


@gpu
def test_cuda_graphs_follow_the_weights():
    model = made().cuda()
    for dtype in ("fp32", "bf16"):
        for seed in (0, 3):
            model.load_state_dict(made(seed).state_dict())
            for _ in range(2):
                got = generate(model, PROMPTS, EOT, LIMITS, 2, dtype=dtype)
            assert got.rows == generate(copy.deepcopy(model), PROMPTS, EOT, LIMITS, 2, dtype=dtype).rows


@gpu
def test_cuda_drift_in_bf16():
    mean, most = drift(made(scale=2.0).cuda())
    assert mean < 5e-4
    assert most < 0.03


@gpu
def test_cuda_is_waited_for_four_times_at_most():
    import warnings

    model = made().cuda()
    generate(model, PROMPTS * 8, EOT, 70, 0)
    generate(model, PROMPTS * 8, EOT, 70, 0)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            generate(model, PROMPTS * 8, EOT, 70, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in seen) <= 4
