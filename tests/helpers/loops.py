"""What the tests of the training loops share: tiny networks, a run that can be killed, plain gradient descent."""

import json
from pathlib import Path

import torch

from minirlhf.model.gpt import GPT, GPTConfig, ScalarModel, init_weights, named_weights
from minirlhf.run.arguments import RunArgs
from minirlhf.run.folder import Run


def tiny_network(tokenizer, context: int, seed: int = 0, *, scalar: bool = False, ends: float = 0.0):
    """A network of one layer that tells tokens apart.

    Args:
        tokenizer: for its vocabulary.
        context: tokens it reads.
        seed: of the weights.
        scalar: a `ScalarModel`.
        ends: how much it leans to end-of-text; at 6 about one token in ten.
    """
    model = (ScalarModel if scalar else GPT)(GPTConfig(tokenizer.vocab_size, context, n_layer=1, n_head=2, n_embd=16))
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for weight in named_weights(model).values():
        if weight.dim() > 1:
            weight.normal_(0.0, 0.2, generator=generator)
    if ends:
        model.ln_f.bias.data.copy_(ends * model.wte.weight.data[tokenizer.eot])
    return model


def weights(*models: torch.nn.Module) -> torch.Tensor:
    """All weights in one row."""
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


class Killed(Exception):
    """The run's process is gone."""


def run_in(
    folder: Path, steps: int, script: str = "train.py", *, resume: bool = False, every: int = 2, dies_at=None
) -> Run:
    """A run that can be killed: after the weights of step `dies_at` moved, before anything is written of it."""
    run = Run(RunArgs(out=folder, checkpoint_every=every, resume=resume), script, steps)
    log = run.log

    def log_or_die(step, *args, **kwargs):
        if step == dies_at:
            raise Killed
        log(step, *args, **kwargs)

    run.log = log_or_die
    return run


def rows(folder: Path) -> list[dict]:
    """The metrics that were logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def descent(_, *networks: tuple[torch.nn.Module, float]) -> torch.optim.Optimizer:
    """In `adamw`'s place, plain gradient descent: a step is its gradient."""
    groups = [{"params": list(network.parameters()), "lr": lr, "peak": lr} for network, lr in networks]
    return torch.optim.SGD(groups)


class Share:
    """A reward: the share of a response's tokens that are below 100."""

    name = "share"

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, responses, texts):
        self.asked.append((prompts, responses, texts))
        return [sum(token < 100 for token in response.tokens) / len(response.tokens) for response in responses]
