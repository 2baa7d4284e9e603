"""`python -m minirlhf.rewards`; the code is in minirlhf/commands/score.py."""

from minirlhf.algorithms.rewards import Reward, load_reward, score  # noqa: F401
from minirlhf.commands.score import Args, main
from minirlhf.run.command_line import cli

if __name__ == "__main__":
    cli(main, Args, prog="python -m minirlhf.rewards")
