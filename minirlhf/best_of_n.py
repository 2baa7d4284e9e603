"""`python -m minirlhf.best_of_n`; the code is in minirlhf/commands/best_of_n.py."""

from minirlhf.commands.best_of_n import Args, main
from minirlhf.run.command_line import cli

if __name__ == "__main__":
    cli(main, Args, prog="python -m minirlhf.best_of_n")
