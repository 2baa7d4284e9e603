"""How often a step waits for the GPU: `python host_syncs.py CASE` prints each step's waits as JSON.

Steps of training through the shipped loops and a real run's folder, on tensors of pretend_cuda.py. The first
step, with its checks, and the last, which looks at all weights, are left out.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from pretend_cuda import GPU, Pretending, pretend, waits

from minirlhf import devices
from minirlhf.algorithms import dpo, ppo, reward_model, sft
from minirlhf.algorithms.rewards import RewardModelScorer
from minirlhf.data.records import Demonstration, Ranking
from minirlhf.data.tokenizer import Tokenizer, TokenText
from minirlhf.kernels import ops as fused
from minirlhf.model.generate import generate
from minirlhf.model.gpt import GPT, GPTConfig, ScalarModel, clone, init_weights
from minirlhf.model.sampling import Sampling
from minirlhf.model.token_stats import linear_token_stats
from minirlhf.run import arguments, terminal
from minirlhf.run.arguments import RunArgs
from minirlhf.run.folder import Run

STEPS = 4
TOKENIZER = Tokenizer({bytes([i]): i for i in range(256)})
CONFIG = GPTConfig(TOKENIZER.vocab_size, 160, n_layer=2, n_head=2, n_embd=32)
G = torch.Generator().manual_seed(0)


def text(n: int) -> TokenText:
    return TokenText("", torch.randint(97, 122, (n,), generator=G).tolist())


def network(scalar: bool = False, seed: int = 0, dtype: str = "fp32") -> GPT | ScalarModel:
    model = ScalarModel(CONFIG) if scalar else GPT(CONFIG)
    init_weights(model, seed)
    (model.trunk if scalar else model).run_with(dtype=dtype)
    return model.to("cuda:0")


class Counted(Run):
    """A run that keeps what each of its steps waited for."""

    def __init__(self, steps: int = STEPS):
        out = Path(tempfile.mkdtemp()) / "run"
        super().__init__(RunArgs(out=out, device="cpu", checkpoint_every=10**9), "host_syncs.py", steps)
        self.waits: list[dict[str, int]] = []

    def range(self, start: int):
        for step in super().range(start):
            waits.clear()
            yield step
            if 0 < step < self.steps - 1:
                self.waits.append(dict(waits))


def rankings(n: int, k: int) -> list[Ranking]:
    return [Ranking(text(10 + i % 4), tuple(text(6 + j + i % 3) for j in range(k)), tuple(range(1, k + 1)), "")
            for i in range(n)]  # fmt: skip


def run_sft(run: Run, **options) -> None:
    records = [Demonstration(text(10 + i % 5), text(8 + i % 7)) for i in range(64)]
    config = sft.SFTConfig(steps=run.steps, batch_size=16, held_out=0.0, **options)
    data = sft.batches(records, TOKENIZER, CONFIG.n_positions, config, 0)
    sft.train(network(), data, config, run)


def run_dpo(run: Run, **options) -> None:
    config = dpo.DPOConfig(steps=run.steps, batch_size=12, held_out=0.0, **options)
    model = network()
    dpo.train(model, dpo.batches(rankings(64, 3), [], TOKENIZER, clone(model), config, 0), config, run)


def run_rm(run: Run, **options) -> None:
    config = reward_model.RewardModelConfig(steps=run.steps, batch_size=8, held_out=0.0, **options)
    data = reward_model.batches(rankings(64, 3), [], TOKENIZER, CONFIG.n_positions, config, 0)
    reward_model.train(network(scalar=True), data, config, run)


def run_ppo(run: Run, dtype: str = "fp32", **options) -> None:
    reward = RewardModelScorer.__new__(RewardModelScorer)
    reward.name, reward.batch_size, reward.tokenizer = "rm", 16, TOKENIZER
    reward.model = network(scalar=True, seed=5, dtype=dtype).eval().requires_grad_(False)
    policy = network(dtype=dtype)
    shared = options.get("critic") == "shared"
    critic = ScalarModel(CONFIG, trunk=policy).to("cuda:0") if shared else network(scalar=True, seed=6, dtype=dtype)
    given = {"batch_size": 16, "minibatches": 2, "microbatch_size": 4, "epochs": 2, "response_tokens": "18"}
    config = ppo.PPOConfig(steps=run.steps, sample_every=10**9, lr=1e-5, critic_lr=1e-5, **given | options)
    prompts = [text(10 + i % 5).tokens for i in range(config.batch_size)]
    networks = ppo.Networks(policy, clone(policy), critic)
    ppo.train(networks, reward, lambda step: prompts, TOKENIZER, config, run, 0)


def run_generate(run: Run, tokens: int = 24, sampling: Sampling | None = None, dtype: str = "fp32") -> None:
    model, prompts = network(dtype=dtype), [text(10 + i % 5).tokens for i in range(12)]
    for step in run.range(0):
        generate(model, prompts, TOKENIZER.eot, tokens, step, sampling, entropy=True)


CASES = {
    "sft": lambda run: run_sft(run),
    "sft in microbatches": lambda run: run_sft(run, microbatch_size=4),
    "dpo": lambda run: run_dpo(run),
    "dpo in microbatches": lambda run: run_dpo(run, microbatch_size=4),
    "rm": lambda run: run_rm(run),
    "rm alone": lambda run: run_rm(run, sft_coef=0.0),
    "rm in microbatches": lambda run: run_rm(run, microbatch_size=2),
    "ppo": lambda run: run_ppo(run),
    "ppo, whole minibatches": lambda run: run_ppo(run, microbatch_size=0, epochs=1),
    "ppo, long and steered": lambda run: run_ppo(
        run, response_tokens="30:50", minibatches=4, kl_target=1.0, normalise_reward=True
    ),
    "ppo, shared critic": lambda run: run_ppo(run, critic="shared"),
    "ppo, exact KL in the loss": lambda run: run_ppo(run, kl_in="both", kl_estimator="exact"),
    "ppo, bf16": lambda run: run_ppo(run, dtype="bf16"),
    "generate": lambda run: run_generate(run),
    "generate, longer": lambda run: run_generate(run, tokens=96),
    "generate, bf16": lambda run: run_generate(run, dtype="bf16"),
    "generate, cut and penalised": lambda run: run_generate(
        run, 40, Sampling(0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2, min_new_tokens=3)
    ),
}


def each_kind() -> dict[str, int]:
    """One wait of each kind, and what is none."""
    x = torch.arange(6, device="cuda:0").view(2, 3)
    waits.clear()
    x.sum().item()
    bool(x.any())
    x.tolist()
    x.cpu()
    x.nonzero()
    x[x > 2]
    x[torch.tensor([0])]
    torch.tensor([1.0], device="cuda:0")
    torch.ones(3).to("cuda:0")
    x.float().copy_(torch.ones(2, 3))
    torch.ones(2, 3).copy_(x)
    x.unique()
    counted = {name.partition(" at ")[0]: n for name, n in waits.items()}
    waits.clear()
    up = torch.ones(2, 3).pin_memory().to("cuda:0", non_blocking=True)
    down = torch.empty(2, 3).pin_memory().copy_(up, non_blocking=True)
    assert down.sum() == 6
    torch.where(x > 2, x, 0).masked_fill(x > 3, 1).index_select(0, torch.zeros(1, dtype=torch.long, device="cuda:0"))
    up.masked_scatter(x > 2, up)
    counted["none"] = sum(waits.values())
    for mixed in (lambda: up + torch.ones(2, 3), lambda: torch.cat([up, torch.ones(2, 3)])):
        try:
            mixed()
        except RuntimeError as error:
            counted[str(error)] = 1
    up + torch.tensor(1.0)  # a number may come from the CPU
    return counted


def head() -> dict[str, float]:
    """The head fused with its loss as a GPU runs it, rows that are ignored included: how far it is from the CPU's."""
    g = torch.Generator().manual_seed(1)
    hidden, weight, ref_hidden, ref_weight = (torch.randn(n, 24, generator=g) for n in (40, 331, 40, 331))
    targets = torch.randint(301, (40,), generator=g)
    targets[[3, 17]] = -100
    upstream = torch.randn(4, 40, generator=g)
    hidden[3], ref_hidden[17] = float("nan"), float("inf")
    fused.TILE_ROWS, fused.TILE_LEAST = {"cpu": 16, "cuda": 16}, 1  # several tiles each way
    fused.TILE_ELEMENTS = {"cpu": 16 * 256, "cuda": 16 * 256}
    found = []
    for device in ("cpu", "cuda:0"):
        for dtype in (torch.float32, torch.bfloat16):
            leaves = [x.to(dtype).to(device).requires_grad_() for x in (hidden, weight)]
            rest = [targets.to(device), *(x.to(dtype).to(device) for x in (ref_hidden, ref_weight))]
            g_there = upstream.to(device)
            waits.clear()
            stats = linear_token_stats(*leaves, *rest, vocab_size=301, temperature=0.7, kernel="fused")
            grads = torch.autograd.grad(stats, leaves, list(g_there))
            waited = sum(waits.values())
            found.append(([x.detach().cpu().float() for x in (*stats, *grads)], waited))
            assert all(x.isfinite().all() for x in found[-1][0])
    far = {}
    for name, here, there in (("fp32", found[0], found[2]), ("bf16", found[1], found[3])):
        far[name] = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(here[0], there[0]))
        far[f"{name} waits"] = there[1]
    return far


def main() -> None:
    torch.set_num_threads(1)
    terminal.console.quiet = True
    devices.pick_device = arguments.pick_device = lambda name: GPU
    pretend()
    with Pretending():
        if sys.argv[1] in ("each kind", "head"):
            print(json.dumps(each_kind() if sys.argv[1] == "each kind" else head()))
            return
        found = {}
        for case in sys.argv[1:]:
            run = Counted()
            CASES[case](run)
            found[case] = run.waits
    print(json.dumps(found))


if __name__ == "__main__":
    main()
