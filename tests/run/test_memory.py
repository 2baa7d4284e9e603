"""What a run will take is said beforehand; running out of memory says what helps; checkpointing changes no gradient."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import HELPERS

from minirlhf import InputError
from minirlhf.algorithms.logprobs import response_stats
from minirlhf.model.gpt import GPT, GPTConfig, ScalarModel, clone, init_weights, places
from minirlhf.run import memory as fits
from minirlhf.run.arguments import RunArgs
from minirlhf.run.command_line import cli

CONFIGS = [
    (GPTConfig(512, 128, n_layer=4, n_head=4, n_embd=128), fits.Shape(16, 47, 752)),
    (GPTConfig(512, 1024, n_layer=3, n_head=4, n_embd=128), fits.Shape(8, 512, 4096)),  # attention in one operator
    (GPTConfig(512, 128, n_layer=2, n_head=2, n_embd=64), fits.Shape(64, 100, 6400)),
    (
        GPTConfig(512, 512, n_layer=4, n_head=4, n_embd=128),
        fits.Shape(2, 400, 800),
    ),  # most of it is attention's weights
]


def fresh(config, scalar=False):
    model = ScalarModel(config) if scalar else GPT(config)
    init_weights(model, 0)
    return model


def kept_bytes(model, shape, dtype):
    """What autograd keeps for the gradient, measured: each memory once, the weights themselves not."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen, alive = {}, []

    def keep(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, model.config.vocab_size, (shape.rows, shape.width))
    model.run_with(dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(tokens, at=torch.arange(tokens.numel()))
    assert hidden.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("config", "shape"), CONFIGS)
def test_the_estimate_of_activations_is_near_what_is_kept(config, shape, dtype):
    model = fresh(config)
    gradient = 12 * (2 if dtype == "bf16" else 4) * config.n_embd * shape.rows * shape.width
    estimated = fits.activation_bytes(config, shape, dtype, False, "cpu") - gradient
    assert 0.75 < estimated / kept_bytes(model, shape, dtype) < 1.25


def test_checkpointing_keeps_a_fraction_and_changes_no_gradient():
    config, shape = CONFIGS[0]
    plain, checked = fresh(config), fresh(config)
    checked.checkpointing = True
    assert kept_bytes(checked, shape, "fp32") < 0.2 * kept_bytes(plain, shape, "fp32")
    tokens = torch.randint(0, config.vocab_size, (4, 20), generator=torch.Generator().manual_seed(0))
    counted = torch.zeros_like(tokens, dtype=torch.bool)
    counted[:, 7:] = True
    for model in (plain, checked):
        (-response_stats(model, tokens, counted).logprobs.sum()).backward()
    for one, other in zip(plain.parameters(), checked.parameters()):
        assert torch.equal(one.grad, other.grad)
    small = fits.activation_bytes(config, shape, "fp32", True, "cpu")
    assert small < 0.5 * fits.activation_bytes(config, shape, "fp32", False, "cpu")


def test_only_the_states_asked_for_and_the_same():
    model = fresh(CONFIGS[0][0])
    tokens = torch.randint(0, 512, (5, 23), generator=torch.Generator().manual_seed(1))
    wanted = torch.rand(5, 23, generator=torch.Generator().manual_seed(2)) < 0.4
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            everything, some = model(tokens), model(tokens, at=places(wanted))
            torch.testing.assert_close(some, everything[wanted], rtol=0, atol=1e-5)
    assert model(tokens, at=places(wanted & False)).shape == (0, 128)


def test_parameters_are_counted_once():
    policy = fresh(CONFIGS[2][0])
    own = sum(p.numel() for p in policy.parameters())
    shape = fits.Shape(2, 10, 10)
    shared = fits.footprint([policy, ScalarModel(policy.config, trunk=policy)], [], [shape], 20)
    assert (shared.trained, shared.frozen) == (own + 64, 0)
    apart = fits.footprint([policy, fresh(policy.config, scalar=True)], [clone(policy)], [shape], 20)
    assert (apart.trained, apart.frozen) == (2 * own + 64, own)
    assert apart.peak > 16 * apart.trained + 4 * apart.frozen
    assert fits.footprint([policy], [], [shape, fits.Shape(8, 60, 60)], 20).peak > shared.peak - 16 * 64


def test_tiles_are_those_of_the_fused_head():
    from minirlhf.kernels import ops as fused

    assert {device: 4 * elements for device, elements in fused.TILE_ELEMENTS.items()} == fits.TILES


def test_the_largest_microbatch_is_the_first_half_that_fits(monkeypatch):
    def needs(rows):
        asked.append(rows)
        return fits.Footprint(0, 0, 0, 100 + 10 * rows)

    for memory, rows, tried in ((1000, 32, [32]), (420, 32, [32]), (419, 16, [32, 16]), (50, 1, [32, 16, 8, 4, 2])):
        asked = []
        assert (fits.largest(32, needs, memory), asked) == (rows, tried)
    assert fits.largest(5, lambda rows: fits.Footprint(0, 0, 0, rows), 3) == 3, "halves are rounded up"
    properties = type("Properties", (), {"total_memory": 80 << 30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert fits.memory(torch.device("cuda")) == 72 << 30


def test_what_is_said(capsys):
    fits.say(fits.Footprint(960_000, 0, 4096, 300 << 20), 1024)
    fits.say(fits.Footprint(124_400_000, 124_400_000, 4096, 5 << 30), 4096)
    assert capsys.readouterr().out.replace("\n", "") == (
        "  0.96 M parameters, 4,096 tokens per step, 1,024 at a time, about 300 MiB"
        "  124 M parameters and 124 M frozen ones, 4,096 tokens per step, about 5.0 GiB"
    )


# --- the command line -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nothing:
    """No arguments."""


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "CUDA out of memory. Tried to"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "DefaultCPUAllocator"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_out_of_memory_names_what_helps(raised, said, monkeypatch, capsys):
    def main(args):
        raise raised

    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit) as stop:
        cli(main, Nothing)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory ran out (")
    assert said in line
    for cure in ("--microbatch-size", "--checkpointing", "--dtype bf16"):
        assert cure in line


def test_another_error_is_no_lack_of_memory(monkeypatch):
    def main(args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(RuntimeError, match="shapes do not match"):
        cli(main, Nothing)


def test_compile_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"--compile needs a C\+\+ compiler, and there is no"):
        RunArgs(Path("runs/none"), compile=True, device="cpu")


@pytest.mark.slow
def test_compiled_blocks_give_the_same(tmp_path):
    """In a process of its own: what checks the shapes here would be traced along."""
    script = HELPERS / "compiled_blocks.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_what_the_sampler_keeps_is_counted():
    policy, shape, drawn = fresh(CONFIGS[2][0]), fits.Shape(2, 10, 10), fits.Shape(64, 30, 0)
    kept = 2 * 4 * 2 * 64 * 30 * 64  # keys and values of two layers
    for dtype, kernel, own in (("fp32", "auto", 4), ("bf16", "auto", 2), ("fp32", "reference", 1)):  # bytes a weight
        policy.run_with(kernel, dtype)
        plain = fits.footprint([policy], [], [shape], 20)
        both = fits.footprint([policy], [], [shape], 20, sampled=drawn)
        assert both.peak - plain.peak == kept + own * plain.trained
