"""What test_kernel_op.py asks of the op under torch.compile: `python compiled.py DEVICE`, exit status 0 if it holds."""

import sys

import torch

from minirlhf.model.token_stats import linear_token_stats, token_stats


def loss(x, t, y):
    stats = token_stats(x * 1.5, t, y, temperature=0.7, kernel="fused")
    return (stats.logprobs * 2 - stats.entropy + stats.kl.clamp(max=5) - stats.ref_logprobs.exp()).sum()


def linear_loss(x, w, t, y, vocab_size):
    stats = linear_token_stats(x * 1.5, w, t, y, w.detach(), vocab_size=vocab_size, temperature=0.7, kernel="fused")
    return (stats.logprobs * 2 - stats.entropy + stats.kl).sum()


def inputs(rows, device, vocab=33):
    g = torch.Generator().manual_seed(rows)
    x, y = (torch.randn(2, rows, vocab, generator=g) for _ in range(2))
    t = torch.randint(vocab, (2, rows), generator=g)
    t[0, 1] = -100
    return x.to(device), t.to(device), y.to(device)


def same(function, compiled, leaves, others):
    results = []
    for f in (function, compiled):
        copies = [leaf.clone().requires_grad_() for leaf in leaves]
        value = f(*copies[:1], *others[:1], *copies[1:], *others[1:])
        results.append([value.detach(), *torch.autograd.grad(value, copies)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def one_graph(device, backend):
    """No break in the graph, and the same values and gradients as without compilation."""
    x, t, y = inputs(3, device)
    same(loss, torch.compile(loss, fullgraph=True, backend=backend), [x, y], [t])


def rows(device):
    """One compilation serves any number of rows."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for n in (5, 7, 11, 64):
        x, t, y = inputs(n, device)
        same(loss, compiled, [x, y], [t])
    assert counter.frame_count == 1, counter.frame_count


def refusal(device):
    """A target out of range is an error on the CPU, and NaN on a GPU, compiled or not."""
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, t, y = inputs(3, device, vocab=5)
    t[1, 1] = 7
    if device == "cuda":
        assert compiled(x, t, y).isnan()
        return
    try:
        compiled(x, t, y)
    except ValueError as error:
        assert "target 7 is outside the vocabulary [0, 5)" in str(error), error
    else:
        raise AssertionError("target 7 of 5 was taken")


def linear(device):
    x, t, y = inputs(3, device, vocab=8)
    weight = torch.randn(101, 8, generator=torch.Generator().manual_seed(1)).to(device)

    for vocab_size in (None, 97):  # 97: the last four rows are padding

        def function(x, t, w, vocab_size=vocab_size):
            return linear_loss(x, w, t, y, vocab_size)

        same(function, torch.compile(function, fullgraph=True, backend="aot_eager"), [x, weight], [t])


if __name__ == "__main__":
    device = sys.argv[1]
    for check in (
        lambda: one_graph(device, "aot_eager"),
        lambda: one_graph(device, "inductor"),
        lambda: rows(device),
        lambda: refusal(device),
        lambda: linear(device),
    ):
        torch._dynamo.reset()
        check()
