"""What vs_peers.py runs as ours: one case in one setting, in a process of its own, through the shipped functions."""

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

from minirlhf.algorithms import dpo, ppo, reward_model, sft
from minirlhf.algorithms.rewards import RewardModelScorer
from minirlhf.data.batches import examples_of_rankings
from minirlhf.data.records import Demonstration, Ranking, Text
from minirlhf.data.tokenizer import Tokenizer, TokenText
from minirlhf.model.generate import generate
from minirlhf.model.gpt import GPT, GPTConfig, ScalarModel, clone, init_weights
from minirlhf.model.sampling import Sampling
from minirlhf.model.token_stats import token_stats
from minirlhf.run.arguments import RunArgs, prepare
from minirlhf.run.command_line import keep_memory
from minirlhf.run.folder import Run, load_run

LR = 1e-6  # the weights stay about where they are, so that every round computes the same


def run_with(settings: dict[str, Any], *models: GPT | ScalarModel, compiled: bool = False) -> dict[str, Any]:
    """Have networks run with the settings that they know; return these.

    Args:
        settings: of a case: kernel, dtype, compile, and whatever else.
        models: networks.
        compiled: whether `compile` is meant for their sampling.
    """
    names = ("kernel", "dtype", "compile") if compiled else ("kernel", "dtype")
    for model in models:
        trunk = model if isinstance(model, GPT) else model.trunk
        trunk.run_with(settings.get("kernel"), settings.get("dtype"))
        trunk.compiled = compiled and settings.get("compile", False)
    return {name: value for name, value in settings.items() if name in names}


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
    settings = run_with(job["settings"], policy, compiled=True)

    def draw(temperature: float, seed: int) -> Any:
        given = (policy, data["prompts"], tokenizer.eot, job["response"], seed)
        return generate(*given, Sampling(temperature))

    turns.ready(settings=settings, greedy=draw(0.0, 0).responses.tolist())
    for step in range(job["steps"]):
        turns.begin()
        drawn = draw(1.0, step)
        turns.end(tokens=drawn.mask.sum().item)


def ppo_step(job: dict[str, Any], data: dict[str, Any], turns: Turns) -> None:
    policy, tokenizer = load_run(job["folder"] / "policy", device=turns.device)
    reward = RewardModelScorer(job["folder"] / "reward", turns.device)
    kind = job["settings"].get("critic", "separate")
    critic = ScalarModel(policy.config, trunk=policy) if kind == "shared" else clone(reward.model)
    critic.requires_grad_(True)
    config = ppo.PPOConfig(
        critic=kind, steps=job["steps"], batch_size=job["batch"], epochs=job["epochs"], minibatches=job["minibatches"],
        microbatch_size=job["micro"], response_tokens=str(job["response"]), lr=LR, critic_lr=LR, sample_every=10**9,
    )  # fmt: skip
    networks = ppo.Networks(policy, clone(policy), critic)
    run_with(job["settings"], policy, compiled=True)
    run_with(job["settings"], networks.ref, critic, reward.model)
    policy.compiled = job["settings"].get("compile", False)
    run = TurnRun(job, turns, job["settings"])
    prompts = data["prompts"]
    ppo.train(networks, reward, lambda step: prompts, tokenizer, config, run, 0)


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
    settings = run_with(job["settings"], policy, ref)
    ref.requires_grad_(False)
    # `batches` reads the reference once, before the first step; a round does it again for the one batch there is.
    examples, _ = examples_of_rankings(tokenizer, rankings(data), policy.config.n_positions)
    records = [dpo.Compared(own, [(0, 1)]) for own in examples]
    size = job["micro"] or job["batch"]
    run = TurnRun(
        job, turns, settings, lambda: dpo.with_reference(ref, records, tokenizer.eot, size, False)
    )  # fmt: skip
    checkpointing = job["settings"].get("checkpointing", False)
    args = RunArgs(
        run.folder, device=turns.device, checkpointing=checkpointing, kernel=policy.kernel, dtype=policy.dtype
    )
    prepare(args, policy)
    batches = dpo.batches(rankings(data), [], tokenizer, ref, config, 0)
    dpo.train(policy.train(), batches, config, run)


def rm_step(job: dict[str, Any], data: dict[str, Any], turns: Turns) -> None:
    model, tokenizer = load_run(job["folder"] / "reward", scalar=True, device=turns.device)
    config = reward_model.RewardModelConfig(
        steps=job["steps"], batch_size=job["batch"], lr=LR, weight_decay=0.0, sft_coef=0.0, held_out=0.0
    )
    settings = run_with(job["settings"], model)
    batches = reward_model.batches(rankings(data), [], tokenizer, model.config.n_positions, config, 0)
    reward_model.train(model.train(), batches, config, TurnRun(job, turns, settings))


def sft_step(job: dict[str, Any], data: dict[str, Any], turns: Turns) -> None:
    model, tokenizer = load_run(job["folder"] / "policy", device=turns.device)
    config = sft.SFTConfig(steps=job["steps"], batch_size=job["batch"], lr=LR, weight_decay=0.0, held_out=0.0)
    settings = run_with(job["settings"], model)
    pairs = zip(data["prompts"], data["chosen"])
    records = [Demonstration(TokenText("", prompt), TokenText("", response)) for prompt, response in pairs]
    batches = sft.batches(records, tokenizer, model.config.n_positions, config, 0)
    sft.train(model.train(), batches, config, TurnRun(job, turns, settings))


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
    model = make_model(GPTConfig(tokenizer.vocab_size, **job["shape"]), job["seed"])
    settings = run_with(job["settings"], model)
    batches = sft.batches([Text(text)], tokenizer, model.config.n_positions, config, job["seed"])
    out = Path(tempfile.mkdtemp(dir=job["folder"])) / "run"
    run = TimedRun(RunArgs(out=out, seed=job["seed"], device="cpu", checkpoint_every=10**9), config.steps)
    turns.ready(settings=settings)
    turns.begin()
    sft.train(model, batches, config, run)
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
