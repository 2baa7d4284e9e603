"""What test_fits.py asks of --compile: `python compiled_blocks.py`, exit status 0 if it holds."""

from pathlib import Path

import torch

from minirlhf.algorithms.logprobs import response_stats
from minirlhf.model.gpt import GPT, GPTConfig, clone, init_weights
from minirlhf.run.arguments import RunArgs, prepare

CONFIG = GPTConfig(96, 64, n_layer=3, n_head=2, n_embd=16)


def batch(width):
    g = torch.Generator().manual_seed(width)
    tokens = torch.randint(0, 96, (3, width), generator=g)
    return tokens, torch.rand(3, width, generator=g) < 0.6


def check(backend, widths):
    """The same losses and gradients, the same names, few graphs and none that breaks."""
    compiled = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **options: compiled(self, backend=backend, **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = GPT(CONFIG)
    init_weights(plain, 0)
    made = clone(plain).requires_grad_(True)
    prepare(RunArgs(Path("runs/none"), device="cpu", compile=True), made)
    torch.nn.Module.compile = compiled
    assert made.state_dict().keys() == plain.state_dict().keys()
    for width in widths:
        losses = [-response_stats(model, *batch(width)).logprobs.sum() for model in (made, plain)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        for loss in losses:
            loss.backward()
    for one, other in zip(made.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    # One graph for all blocks and lengths but the last block's, which gives some of the states only, and has a second
    # one where a size agrees with another by chance.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3, torch._dynamo.utils.counters["stats"]
    assert not torch._dynamo.utils.counters["graph_break"], torch._dynamo.utils.counters["graph_break"]


if __name__ == "__main__":
    check("aot_eager", (12, 17, 33))
    check("inductor", (12, 20))
