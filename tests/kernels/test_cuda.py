"""Training on a GPU beside the CPU: the same curves to rounding, the same bits after resuming where that is asked for.

Without a GPU these tests are skipped, each by its name. `MINIRLHF_TEST_DEVICE=cpu` runs them with the CPU in its place,
to see that they themselves are right. Captured sampling is in test_sampler.py, the kernels in test_kernel_*.py.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import HELPERS, python_path
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from minirlhf.algorithms import dpo, ppo, reward_model, sft
from minirlhf.algorithms.rewards import RewardModelScorer
from minirlhf.commands.certificate import certificate
from minirlhf.data.batches import Example, pack
from minirlhf.data.records import Demonstration, Ranking
from minirlhf.data.tokenizer import Tokenizer, TokenText
from minirlhf.kernels import flex
from minirlhf.model.generate import generate
from minirlhf.model.gpt import GPT, GPTConfig, ScalarModel, clone, init_weights
from minirlhf.model.packed import packed_layout
from minirlhf.run import memory as fits
from minirlhf.run.arguments import RunArgs, prepare
from minirlhf.run.folder import Run
from minirlhf.seeds import seeded

DEVICE = os.environ.get("MINIRLHF_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU: MINIRLHF_TEST_DEVICE=cpu runs these on the CPU"
)
TOKENIZER = Tokenizer({bytes([i]): i for i in range(256)})
CONFIG = GPTConfig(TOKENIZER.vocab_size, 96, n_layer=2, n_head=2, n_embd=32)
STEPS = 10
# Both sum in float32, in another order: 1e-6 a step, which ten small steps let grow a little.
CLOSE = {"rel": 2e-3, "abs": 2e-4}


def network(device: str, scalar: bool = False, seed: int = 0, **how: str) -> GPT | ScalarModel:
    """Fresh weights; how: the kernel and dtype they run with."""
    model = ScalarModel(CONFIG) if scalar else GPT(CONFIG)
    init_weights(model, seed)
    (model.trunk if scalar else model).run_with(**how)
    return model.to(device)


def text(n: int, seed: int) -> TokenText:
    generator = torch.Generator().manual_seed(seed)
    return TokenText("", torch.randint(97, 122, (n,), generator=generator).tolist())


def rankings(k: int) -> list[Ranking]:
    """Ragged: prompts and responses of many lengths."""
    return [
        Ranking(text(3 + i % 9, i), tuple(text(2 + (5 * i + 3 * j) % 11, 100 * i + j) for j in range(k)),
                tuple(range(1, k + 1)), "")
        for i in range(40)
    ]  # fmt: skip


def run_sft(run: Run, device: str, **given) -> None:
    records = [Demonstration(text(3 + i % 9, i), text(2 + 5 * i % 13, 1000 + i)) for i in range(40)]
    config = sft.SFTConfig(steps=run.steps, batch_size=8, held_out=0.0, lr=3e-4, microbatch_size=3)
    data = sft.batches(records, TOKENIZER, CONFIG.n_positions, config, 0)
    sft.train(network(device, **given), data, config, run)


def run_rm(run: Run, device: str, **given) -> None:
    config = reward_model.RewardModelConfig(steps=run.steps, batch_size=8, lr=3e-4, eval_every=5)
    data = reward_model.batches(rankings(3), rankings(2)[:9], TOKENIZER, CONFIG.n_positions, config, 0)
    reward_model.train(network(device, scalar=True, **given), data, config, run)


def run_dpo(run: Run, device: str, **given) -> None:
    config = dpo.DPOConfig(steps=run.steps, batch_size=8, lr=3e-4, eval_every=5, microbatch_size=3)
    model = network(device, **given)
    data = dpo.batches(rankings(3), rankings(2)[:9], TOKENIZER, clone(model), config, 0)
    dpo.train(model, data, config, run)


def run_ppo(run: Run, device: str, critic: str = "separate", **how: str) -> None:
    reward = RewardModelScorer.__new__(RewardModelScorer)
    reward.name, reward.batch_size, reward.tokenizer = "rm", 8, TOKENIZER
    reward.model = network(device, scalar=True, seed=5, **how).eval().requires_grad_(False)
    policy = network(device, **how)
    apart = critic == "separate"
    value = network(device, True, seed=6, **how) if apart else ScalarModel(CONFIG, trunk=policy).to(device)
    if critic == "shared":
        value.score.weight.data.zero_()
    config = ppo.PPOConfig(
        steps=run.steps, batch_size=16, minibatches=2, epochs=2, response_tokens="4:20", lr=1e-4, critic_lr=1e-4,
        sample_every=10**9, critic=critic,
    )  # fmt: skip
    prompts = [text(3 + i % 7, i).tokens for i in range(16)]
    networks = ppo.Networks(policy, clone(policy), value)
    ppo.train(networks, reward, lambda step: prompts, TOKENIZER, config, run, 0)


LOOPS = {
    "sft": run_sft,
    "rm": run_rm,
    "dpo": run_dpo,
    "ppo": run_ppo,
    "ppo-shared": lambda run, device, **given: run_ppo(run, device, critic="shared", **given),
}
SHOWN = ("loss", "held_out_loss", "accuracy", "margin", "best_nll", "grad_norm", "reward", "kl_k1", "kl_exact",
         "entropy", "length", "value_loss", "explained_variance")  # fmt: skip


def curve(folder: Path, name: str, device: str, **given) -> list[dict]:
    run = Run(RunArgs(out=folder, device="cpu", checkpoint_every=10**9), "test_cuda.py", STEPS)
    LOOPS[name](run, device, **given)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("name", LOOPS)
def test_cuda_ten_steps_are_the_cpu_s(tmp_path, name, kernel):
    here, there = (
        curve(tmp_path / where, name, device, kernel=kernel) for where, device in (("here", "cpu"), ("there", DEVICE))
    )
    assert len(here) == len(there) == STEPS
    compared = 0
    for a, b in zip(here, there):
        for key in SHOWN:
            if a.get(key) is not None:
                compared += 1
                assert b[key] == pytest.approx(a[key], **CLOSE), (a["step"], key)
    assert compared >= 2 * STEPS
    assert here[0]["grad_norm"] != here[-1]["grad_norm"], "the weights moved"


@pytest.mark.parametrize("name", LOOPS)
def test_cuda_in_bf16_stays_near(tmp_path, name):
    """Eight bits of a number: the losses of ten small steps to a few hundredths."""
    here, there = (curve(tmp_path / dtype, name, DEVICE, dtype=dtype) for dtype in ("fp32", "bf16"))
    key = "loss" if "loss" in here[0] else "entropy"
    for a, b in zip(here, there):
        assert b[key] == pytest.approx(a[key], rel=0.05, abs=0.05)


class Kept(Run):
    """A run that keeps its last weights; `killed` ends it in the middle."""

    killed = False

    def range(self, start: int):
        for step in super().range(start):
            yield step
            if self.killed and step == 5:
                raise KeyboardInterrupt

    def checkpoint(self, done: int, **parts) -> None:
        super().checkpoint(done, **parts)
        modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
        self.weights = {
            f"{name}.{key}": value.cpu().clone()
            for name, module in modules.items()
            for key, value in module.state_dict().items()
        }


def resumed_and_not(folder: Path, name: str) -> None:
    """Write the weights that ten steps end with, at once and with a stop in between."""

    def train(out: str, killed: bool = False, resume: bool = False) -> Kept:
        args = RunArgs(out=folder / out, device="cpu", checkpoint_every=3, deterministic=True, resume=resume)
        prepare(args)
        run = Kept(args, "test_cuda.py", STEPS)
        run.killed = killed
        with suppress(KeyboardInterrupt):
            LOOPS[name](run, DEVICE)
        return run

    save_file(train("once").weights, folder / "once.safetensors")
    train("twice", killed=True)
    save_file(train("twice", resume=True).weights, folder / "twice.safetensors")


@pytest.mark.parametrize("name", LOOPS)
def test_cuda_resumes_to_the_bit_if_it_is_deterministic(tmp_path, name):
    """In a process of its own, whose cuBLAS has made no product yet."""
    program = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1); import test_cuda; "
        "test_cuda.resumed_and_not(Path(sys.argv[1]), sys.argv[2])"
    )
    environment = os.environ | python_path(Path(__file__).parent, HELPERS.parent, HELPERS)
    command = [sys.executable, "-c", program, str(tmp_path), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "from 6" in done.stdout
    once, twice = (load_file(tmp_path / f"{kind}.safetensors") for kind in ("once", "twice"))
    assert once.keys() == twice.keys() and once
    assert all(torch.equal(weight, twice[key]) for key, weight in once.items())


# --- attention and memory ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE != "cuda", reason="flash attention is CUDA's")
def test_cuda_rows_without_a_mask_reach_flash_attention():
    """In bfloat16, forward and backward: nothing else is allowed here."""
    model = GPT(GPTConfig(300, 256, n_layer=2, n_head=2, n_embd=128)).cuda()
    init_weights(model, 0)
    tokens = torch.randint(300, (4, 200), device="cuda")
    model.run_with(dtype="bf16")
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        model(tokens).sum().backward()
    assert model.wte.weight.grad.isfinite().all()


def test_cuda_packed_rows_in_blocks_are_those_under_a_dense_mask():
    """Rows long enough for FlexAttention, values and gradients; on a CPU both are the dense mask."""
    config = GPTConfig(300, 1024, n_layer=2, n_head=2, n_embd=128)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(1, 300, (n,), generator=generator).tolist()  # noqa: E731
    groups = [
        [Example([*prompt, k, *draw(150 + 9 * k)], len(prompt)) for k in range(3)] for prompt in map(draw, (90, 40))
    ]
    packed = pack(groups, 0)
    found = []
    for kernel in ("reference", "auto"):
        model = GPT(config)
        init_weights(model, 0)
        model.to(DEVICE).run_with(kernel)
        layout = packed_layout(model, packed)
        assert torch.is_tensor(layout["attend"]) == (kernel == "reference" or DEVICE != "cuda")
        states = model(**layout, at=packed.predictors)
        (states * torch.randn(states.shape, generator=seeded(1)).to(DEVICE)).sum().backward()
        found.append((states.detach(), *(p.grad for p in model.parameters())))
    for dense, blocks in zip(*found):
        scale = float(dense.abs().max())
        torch.testing.assert_close(blocks / scale, dense / scale, rtol=1e-3, atol=1e-4)
    assert not flex._verdicts or all(flex._verdicts.values())


@pytest.mark.skipif(DEVICE != "cuda", reason="the CPU has no such limit")
def test_cuda_memory_is_known_and_a_microbatch_is_found():
    memory = fits.memory(torch.device("cuda"))
    assert 1 << 30 < memory < torch.cuda.get_device_properties(0).total_memory
    assert fits.largest(64, lambda rows: fits.Footprint(0, 0, 0, rows * memory // 20), memory) == 16


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs are CUDA's")
def test_cuda_compiled_blocks_train_alike_and_skip_no_graph(tmp_path):
    """--compile: blocks through torch.compile, which captures nothing by itself; sampling is captured anyway."""
    counters.clear()
    losses = []
    for compiled in (False, True):
        model = network("cuda")
        prepare(RunArgs(out=tmp_path / "none", device="cuda", compile=compiled), model)
        tokens = torch.randint(97, 122, (4, 40), generator=seeded(0)).cuda()
        losses.append([])
        for _ in range(3):
            loss = model(tokens).square().mean()
            loss.backward()
            losses[-1].append(loss.item())
        model.compiled = compiled
        generate(model, [[97, 98]] * 3, TOKENIZER.eot, 12, 0)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_cuda_certificate():
    rows, passed = certificate(DEVICE)
    assert passed and len(rows) > 50, [row for row in rows if not row.ok][:5]
