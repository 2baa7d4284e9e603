"""What vs_peers.py runs as ours: one case in one setting, in a process of its own, through the shipped functions."""

import inspect
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _rounds import METERS, Turns

from minirlhf import dpo, ppo, reward_model, sft
from minirlhf.data import Demonstration, Ranking, Text
from minirlhf.generate import Sampling, generate
from minirlhf.model import GPT, GPTConfig, ScalarModel, clone, init_weights
from minirlhf.rewards import RewardModelScorer
from minirlhf.runs import Run, RunArgs, keep_memory, load_run, prepare
from minirlhf.token_stats import token_stats
from minirlhf.tokenizer import Tokenizer, TokenText

LR = 1e-6  # the weights stay about where they are, so that every round computes the same


def accepted(function: Callable, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that the function takes."""
    return {name: value for name, value in settings.items() if name in inspect.signature(function).parameters}


class TurnRun(Run):
    """A run whose steps wait for their turn, without checkpoints; it ends with the turns.

    `before`: what a round does before the step, beside it, if anything; its seconds are told apart.
    """

    def __init__(
        self, job: dict[str, Any], turns: Turns, settings: dict[str, Any], before: Callable[[], Any] | None = None
    ):
        out = Path(tempfile.mkdtemp(dir=job["folder"])) / "run"
        super().__init__(RunArgs(out=out, device=turns.device, checkpoint_every=10**9), "vs_peers.py", job["steps"])
        self.turns, self.settings, self.before, self.metrics = turns, settings, before, {}

    def range(self, start: int) -> Iterator[int]:
        self.turns.ready(settings=self.settings)
        for step in super().range(start):
            self.turns.begin()
            begun, before = time.perf_counter(), {}
            if self.before is not None and not self.turns.counting:  # a step's synchronisations, and no other
                self.before()
                self.turns.meter.wait()
                before = {"reference_seconds": time.perf_counter() - begun}
            yield step
            self.turns.end(**self.metrics, **before)

    def log(self, step: int, metrics: dict[str, Any], show: tuple[str, ...] = ()) -> None:
        super().log(step, metrics, show)
        names = ("loss", "rollout_seconds", "update_seconds", "updates", "length")
        self.metrics = {name: metrics[name] for name in names if name in metrics}


# --- what the cases read ----------------------------------------------------------------------------------------------


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """As many ids as asked for: the 256 bytes, pairs of bytes, and end-of-text as the last."""
    tokens = [bytes([i]) for i in range(256)] + [bytes([i, j]) for i in range(256) for j in range(256)]
    return Tokenizer({token: i for i, token in enumerate(tokens[: vocab_size - 1])})


def make_model(config: GPTConfig, seed: int, scalar: bool = False, endless: bool = False) -> GPT | ScalarModel:
    """Random weights. Endless: end-of-text is practically never drawn, and every sample reaches its limit.

    The final norm's bias points one way, and the embedding of end-of-text, which is also its row of the head, the other
    way: its logit is 40 below the others', and all that is computed is as always.
    """
    model = ScalarModel(config) if scalar else GPT(config)
    init_weights(model, seed)
    if endless:
        trunk = model.trunk if scalar else model
        trunk.ln_f.bias.data[0] = 4.0
        eot = trunk.wte.weight.data[config.vocab_size - 1]
        eot.zero_()
        eot[0] = -10.0
    return model


# --- the cases --------------------------------------------------------------------------------------------------------


def sampling(job: dict[str, Any], data: dict[str, Any], turns: Turns) -> None:
    policy, tokenizer = load_run(job["folder"] / "policy", device=turns.device)
    settings = accepted(generate, job["settings"])

    def draw(temperature: float, seed: int) -> Any:
        given = (policy, data["prompts"], tokenizer.eot, job["response"], seed)
        return generate(*given, Sampling(temperature), **settings)

    turns.ready(settings=settings, greedy=draw(0.0, 0).responses.tolist())
    for step in range(job["steps"]):
        turns.begin()
        drawn = draw(1.0, step)
        turns.end(tokens=drawn.mask.sum().item)


def ppo_step(job: dict[str, Any], data: dict[str, Any], turns: Turns) -> None:
    policy, tokenizer = load_run(job["folder"] / "policy", device=turns.device)
    reward = RewardModelScorer(job["folder"] / "reward", turns.device)
    reward.dtype = job["settings"].get("dtype", "fp32")
    kind = job["settings"].get("critic", "separate")
    critic = ScalarModel(policy.config, trunk=policy) if kind == "shared" else clone(reward.model)
    critic.requires_grad_(True)
    config = ppo.PPOConfig(
        critic=kind, steps=job["steps"], batch_size=job["batch"], epochs=job["epochs"], minibatches=job["minibatches"],
        microbatch_size=job["micro"], response_tokens=str(job["response"]), lr=LR, critic_lr=LR, sample_every=10**9,
    )  # fmt: skip
    settings = accepted(ppo.train, {name: value for name, value in job["settings"].items() if name != "critic"})
    run = TurnRun(job, turns, job["settings"])
    prompts = data["prompts"]
    ppo.train(
        policy, clone(policy), critic, reward, lambda step: prompts, tokenizer, config, run, seed=0, **settings
    )  # fmt: skip


def rankings(data: dict[str, Any]) -> list[Ranking]:
    """Prompts with a chosen and a rejected response; nothing is tokenised."""
    text = lambda tokens: TokenText("", tokens)  # noqa: E731
    triples = zip(data["prompts"], data["chosen"], data["rejected"])
    return [Ranking(text(prompt), (text(better), text(worse)), (1, 2), "") for prompt, better, worse in triples]


def dpo_step(job: dict[str, Any], data: dict[str, Any], turns: Turns) -> None:
    policy, tokenizer = load_run(job["folder"] / "policy", device=turns.device)
    ref, _ = load_run(job["folder"] / "reference", device=turns.device)
    config = dpo.DPOConfig(
        steps=job["steps"], batch_size=job["batch"], lr=LR, label_smoothing=0.0, sft_coef=0.0,
        microbatch_size=job["micro"], held_out=0.0,
    )  # fmt: skip
    settings = accepted(dpo.train, job["settings"])
    ref.requires_grad_(False)
    # `train` reads the reference once, before the first step; a round does it again for the one batch there is.
    data_of = accepted(dpo.with_reference, {"dtype": "fp32", "kernel": "auto"} | job["settings"])
    records, _ = dpo.tokenise(rankings(data), tokenizer, policy.config.n_positions)
    size = job["micro"] or job["batch"]
    run = TurnRun(
        job, turns, settings, lambda: dpo.with_reference(ref, records, tokenizer.eot, size, False, **data_of)
    )  # fmt: skip
    checkpointing = job["settings"].get("checkpointing", False)
    prepare(RunArgs(run.folder, device=turns.device, checkpointing=checkpointing), policy)
    dpo.train(policy.train(), ref, rankings(data), [], tokenizer, config, run, seed=0, **settings)


def rm_step(job: dict[str, Any], data: dict[str, Any], turns: Turns) -> None:
    model, tokenizer = load_run(job["folder"] / "reward", scalar=True, device=turns.device)
    config = reward_model.RewardModelConfig(
        steps=job["steps"], batch_size=job["batch"], lr=LR, weight_decay=0.0, sft_coef=0.0, held_out=0.0
    )
    settings = accepted(reward_model.train, job["settings"])
    batch_at, rest = reward_model.batches(rankings(data), [], tokenizer, model.config.n_positions, config, 0)
    reward_model.train(model.train(), batch_at, rest, config, TurnRun(job, turns, settings), **settings)


def sft_step(job: dict[str, Any], data: dict[str, Any], turns: Turns) -> None:
    model, tokenizer = load_run(job["folder"] / "policy", device=turns.device)
    config = sft.SFTConfig(steps=job["steps"], batch_size=job["batch"], lr=LR, weight_decay=0.0, held_out=0.0)
    settings = accepted(sft.train, job["settings"])
    pairs = zip(data["prompts"], data["chosen"])
    records = [Demonstration(TokenText("", prompt), TokenText("", response)) for prompt, response in pairs]
    batch_at, rest = sft.batches(records, tokenizer, model.config.n_positions, config, 0)
    sft.train(model.train(), batch_at, rest, config, TurnRun(job, turns, settings), **settings)


class TimedRun(Run):
    """A run that keeps the seconds of its steps, and the held-out losses by step."""

    def __init__(self, args: RunArgs, steps: int):
        super().__init__(args, "vs_peers.py", steps)
        self.seconds: list[float] = []
        self.losses: dict[int, float] = {}

    def range(self, start: int) -> Iterator[int]:
        for step in super().range(start):
            begun = time.perf_counter()
            yield step
            self.seconds.append(time.perf_counter() - begun)

    def log(self, step: int, metrics: dict[str, Any], show: tuple[str, ...] = ()) -> None:
        super().log(step, metrics, show)
        if "held_out_loss" in metrics:
            self.losses[step + 1] = metrics["held_out_loss"]


def curve(seconds: list[float], losses: dict[int, float], evaluated: set[int]) -> list[tuple[float, float]]:
    """(seconds of training, loss) at each evaluation, without the evaluations.

    Args:
        seconds: of each step, from 0.
        losses: by the number of steps done before.
        evaluated: the steps whose seconds have an evaluation in them: each counts as the median of the others.
    """
    usual = statistics.median([s for i, s in enumerate(seconds) if i not in evaluated] or seconds)
    clean = [usual if i in evaluated else s for i, s in enumerate(seconds)]
    return [(sum(clean[:done]), loss) for done, loss in sorted(losses.items())]


def pretrain(job: dict[str, Any], data: dict[str, Any], turns: Turns) -> None:
    """Bytes as tokens, which are characters where the text is ASCII; nanoGPT's split: the last tenth is held out."""
    text = Path(data["text"]).read_text(encoding="utf-8")
    tokenizer = make_tokenizer(257)
    config = sft.SFTConfig(**job["recipe"], held_out=0.1)
    settings = accepted(sft.train, job["settings"])
    model = make_model(GPTConfig(tokenizer.vocab_size, **job["shape"]), job["seed"])
    batch_at, held_out = sft.batches([Text(text)], tokenizer, model.config.n_positions, config, job["seed"])
    out = Path(tempfile.mkdtemp(dir=job["folder"])) / "run"
    run = TimedRun(RunArgs(out=out, seed=job["seed"], device="cpu", checkpoint_every=10**9), config.steps)
    turns.ready(settings=settings)
    turns.begin()
    sft.train(model, batch_at, held_out, config, run, **settings)
    turns.end(curve=curve(run.seconds, run.losses, {done - 1 for done in run.losses}), steps=len(run.seconds))


CASES = {
    "sampling": sampling, "ppo": ppo_step, "dpo": dpo_step, "rm": rm_step, "sft": sft_step, "pretrain": pretrain,
}  # fmt: skip


def main() -> None:
    turns = Turns()
    job = json.loads(sys.argv[1])
    job["folder"] = Path(job["folder"])
    keep_memory()  # as every script of ours does
    torch.set_num_threads(job["threads"])
    turns.meter = METERS[job["device"]]()
    zeros = torch.zeros(1, 2, device=turns.device)
    token_stats(zeros, zeros[:, 0].long())  # builds the kernel, once for the machine
    CASES[job["task"]](job, json.loads((job["folder"] / "data.json").read_text()), turns)


if __name__ == "__main__":
    main()
