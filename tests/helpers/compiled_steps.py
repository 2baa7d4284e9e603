"""What test_generate.py asks of compiled steps, without its checks of signatures, which cannot be traced."""

import torch
from torch._dynamo.utils import counters

from minirlhf.model.generate import generate
from minirlhf.model.gpt import GPT, GPTConfig, init_weights
from minirlhf.model.sampling import Sampling

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13], [23, 3]]


def sampled(model: GPT, compiled: bool, *given):
    model.compiled = compiled
    return generate(model, *given)


if __name__ == "__main__":
    model = GPT(GPTConfig(24, n_positions=96, n_layer=2, n_head=2, n_embd=16))
    init_weights(model, 1)
    long = [70, 5, 5, 5, 70]  # two rows of five go on alone, past the first 64 slots
    given = PROMPTS, 23, long, 2, Sampling(temperature=1.2, min_new_tokens=70)
    want, got, again = (sampled(model, how, *given) for how in (False, True, True))
    assert got.mask.sum(-1).tolist() == long
    assert torch.equal(got.responses, want.responses)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.responses, again.responses) and torch.equal(got.logprobs, again.logprobs)
    init_weights(model, 3)  # other weights, in the steps that are compiled already
    want, got = (sampled(model, how, *given) for how in (False, True))
    assert torch.equal(got.responses, want.responses) and not torch.equal(got.responses, again.responses)
    assert counters["inductor"]["cudagraph_skips"] == 0
