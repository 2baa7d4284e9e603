"""GPT-2, and everything that runs it: the network, its head's statistics, sampling, files.

Entry points: `gpt.GPT`, `gpt.ScalarModel`, `token_stats.token_stats`, `generate.generate`, `checkpoints.load_model`.

May be imported by: run, algorithms, commands, scripts. Imports: data, kernels, and what is below.
"""

from minirlhf.model.gpt import GPT, GPTConfig, ScalarModel, clone, init_weights

__all__ = ["GPT", "GPTConfig", "ScalarModel", "clone", "init_weights"]
