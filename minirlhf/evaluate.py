"""`python -m minirlhf.evaluate`; the code is in minirlhf/commands/evaluate.py."""

from minirlhf.commands.evaluate import Args, main
from minirlhf.run.command_line import cli

if __name__ == "__main__":
    cli(main, Args, prog="python -m minirlhf.evaluate")
