"""FlexAttention's blocks against the dense mask, which is the definition. Uncompiled and without gradient, so that it
runs on a CPU; tests/kernels/test_cuda.py trains with it.
"""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask, flex_attention

from minirlhf.data.batches import Example, may_look, pack
from minirlhf.kernels import flex
from minirlhf.model.gpt import GPT, GPTConfig, attention, init_weights
from minirlhf.model.packed import packed_layout
from minirlhf.seeds import seeded

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def packed_rows(seed, rows=3, longest=140):
    """Rows of two or three responses to one prompt, of any lengths."""
    g = seeded(seed)

    def tokens(n):
        return torch.randint(1, 50, (n,), generator=g).tolist()

    def number(low, high):
        return int(torch.randint(low, high, (), generator=g))

    groups = []
    for _ in range(rows):
        prompt = tokens(number(1, longest))
        responses = [[k, *tokens(number(1, longest))] for k in range(number(2, 4))]  # they differ from the first on
        groups.append([Example([*prompt, *response], len(prompt)) for response in responses])
    return pack(groups, 0)


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_attend_as_the_dense_mask_does(uncompiled, seed):
    packed = packed_rows(seed)
    B, T = packed.parts.shape
    assert T > flex.FROM // 2
    qkv = torch.randn(B, T, 3 * 64, generator=seeded(seed, 1), dtype=torch.float64)
    blocks = flex.blocks_of(packed.parts)
    assert torch.equal(create_mask(blocks.mask_mod, B, 1, T, T, device="cpu"), packed.attend)
    found = attention(qkv, 2, blocks, "reference")
    torch.testing.assert_close(found, attention(qkv, 2, packed.attend, "reference"), rtol=1e-9, atol=1e-9)
    mask = packed.attend.clone()
    mask[0, 0, T - 1, 0] ^= True  # the comparison sees a single entry
    assert not torch.allclose(found, attention(qkv, 2, mask, "reference"), rtol=1e-9, atol=1e-9)


def test_blocks_in_which_nothing_is_seen_are_left_out():
    """Two responses of 384 tokens to a prompt of 128: the second does not look into the first's three blocks."""
    parts = torch.tensor([[0] * 128 + [1] * 384 + [2] * 384])
    blocks = flex.blocks_of(parts).to_dense()[0, 0].bool()  # (queries, keys), 7 × 7
    want = may_look(parts)[0, 0].unflatten(0, (7, 128)).unflatten(2, (7, 128)).any(-1).any(1)
    assert torch.equal(blocks, want)
    assert not blocks[4:, 1:4].any()
    assert blocks.sum() == 1 + (2 + 3 + 4) * 2


def test_a_network_reads_blocks(uncompiled):
    packed = packed_rows(7)
    model = GPT(GPTConfig(50, 512, n_layer=2, n_head=2, n_embd=32))
    init_weights(model, 0)
    model.run_with("reference")
    layout = packed_layout(model, packed)
    assert layout["attend"].dtype == torch.bool
    with torch.no_grad():
        dense = model(**layout, at=packed.predictors)
        blocks = model(**layout | {"attend": flex.blocks_of(packed.parts)}, at=packed.predictors)
    torch.testing.assert_close(blocks, dense, rtol=1e-4, atol=1e-5)


@pytest.fixture
def unjudged(monkeypatch):
    monkeypatch.setattr(flex, "_verdicts", {})
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: object())


def test_only_long_rows_and_heads_of_its_sizes_go_this_way(unjudged):
    tried = []
    assert flex.usable(flex.FROM, 64, lambda: tried.append(64))
    assert flex.usable(flex.FROM + 1, 64, lambda: tried.append(64))
    assert tried == [64], "a head is tried once"
    assert not flex.usable(flex.FROM - 1, 64, lambda: tried.append(0))
    assert not flex.usable(flex.FROM, 8, lambda: tried.append(0))
    assert not flex.usable(flex.FROM, 48, lambda: tried.append(0))
    assert tried == [64]


def test_what_cannot_be_compiled_is_said_once(unjudged, capsys, monkeypatch):
    def fails():
        raise RuntimeError("no such instruction\nand much more")

    assert not flex.usable(512, 64, fails)
    assert not flex.usable(512, 64, fails)
    line = "packed rows take dense masks, FlexAttention cannot be compiled: RuntimeError: no such instruction\n"
    assert capsys.readouterr().err == line
    with pytest.raises(torch.OutOfMemoryError):
        flex.usable(512, 128, lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: None)
    assert not flex.usable(512, 32, lambda: None)
    assert capsys.readouterr().err.endswith("cannot be compiled: triton is not installed\n")
