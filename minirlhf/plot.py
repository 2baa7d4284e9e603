"""`python -m minirlhf.plot`; the code is in minirlhf/commands/plot.py."""

from minirlhf.commands.plot import Args, main
from minirlhf.run.command_line import cli

if __name__ == "__main__":
    cli(main, Args, prog="python -m minirlhf.plot")
