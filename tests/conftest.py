"""What the tests share: signatures checked against shapes, one thread, the commands, and two tiny runs."""

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook

HELPERS = Path(__file__).resolve().parent / "helpers"  # modules and programs that several tests use
sys.path.insert(0, str(HELPERS))

# Before anything of minirlhf is imported: every annotated function then checks what it gets and what it returns.
# As everywhere in Python's own typing (PEP 484), an int will do where a float is asked for.
typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
hook = install_import_hook("minirlhf", "conftest.typecheck")

import torch  # noqa: E402

from minirlhf.data.tokenizer import Tokenizer  # noqa: E402
from minirlhf.model.checkpoints import save_model  # noqa: E402
from minirlhf.model.gpt import GPT, GPTConfig, ScalarModel, init_weights, named_weights  # noqa: E402


def python_path(*folders: Path | str) -> dict[str, str]:
    """For the environment of a command: modules are looked for in these folders first, then where they were before."""
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])}


# For the commands that tests start: one thread, and this checkout's package, which need not be installed.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ |= python_path(Path(__file__).resolve().parent.parent)
torch.set_num_threads(1)

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

TEXTS = [
    "Customer: My order hasn't arrived. What should I do?\nAgent: I'm sorry to hear that. Please check your tracking.",
    "Customer: The lamp I bought is broken!\nAgent: That must be annoying. Please send us a photo of the damage.",
    "Customer: I was charged twice for my kettle.\nAgent: I apologise. We will refund the second payment.",
]

MODULES = ("generate", "rewards", "evaluate", "best_of_n", "reward_report")


@pytest.fixture(scope="session")
def commands():
    """By name: four scripts, which are no package, and five modules."""
    found = {}
    for name in ("train_sft", "train_rm", "train_ppo", "train_dpo"):
        spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parent.parent / f"{name}.py")
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)  # where help texts are looked for
        spec.loader.exec_module(found[name])
    return found | {name: importlib.import_module(f"minirlhf.{name}") for name in MODULES}


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """About 300 tokens, learned from three conversations."""
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="session")
def make_run(tiny_tokenizer):
    """Write a finished run of random weights: 2 layers, width 32, context 64 unless another is asked for."""

    def write(
        folder: Path, *, scalar: bool = False, seed: int = 0, n_positions: int = 64, tokenizer=tiny_tokenizer
    ) -> Path:
        config = GPTConfig(tokenizer.vocab_size, n_positions, n_layer=2, n_head=2, n_embd=32)
        model = ScalarModel(config) if scalar else GPT(config)
        init_weights(model, seed)
        for name, weight in named_weights(model).items():
            if weight.dim() > 1:  # whatever fresh weights are like, these tell texts apart and are sure of nothing
                deviation = 0.7 if name == "score.weight" else 0.04 if name.endswith("proj.weight") else 0.08
                weight.mul_(deviation / weight.std())
        save_model(model, folder, tokenizer.eot)
        tokenizer.save(folder)
        info = {"script": "train_rm" if scalar else "train_sft", "arguments": {}, "seed": seed, "finished": True}
        (folder / "run.json").write_text(json.dumps(info))
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, make_run) -> Path:
    """The folder of a tiny finished policy. Read it, do not write into it."""
    return make_run(tmp_path_factory.mktemp("policy") / "sft")


@pytest.fixture(scope="session")
def tiny_reward_run(tmp_path_factory, make_run) -> Path:
    """The folder of a tiny finished reward model with the same tokenizer. Read it, do not write into it."""
    return make_run(tmp_path_factory.mktemp("reward") / "rm", scalar=True, seed=1)
