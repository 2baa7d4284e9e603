"""`python -m minirlhf.generate`; the code is in minirlhf/commands/generate.py."""

from minirlhf.commands.generate import Args, main
from minirlhf.model.generate import Generation, encode_prompt, generate, sample, sample_texts  # noqa: F401
from minirlhf.run.command_line import cli

if __name__ == "__main__":
    cli(main, Args, prog="python -m minirlhf.generate")
