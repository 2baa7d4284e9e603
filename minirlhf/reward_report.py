"""`python -m minirlhf.reward_report`; the code is in minirlhf/commands/reward_report.py."""

from minirlhf.commands.reward_report import Args, main
from minirlhf.run.command_line import cli

if __name__ == "__main__":
    cli(main, Args, prog="python -m minirlhf.reward_report")
