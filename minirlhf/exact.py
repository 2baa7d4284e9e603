"""`python -m minirlhf.exact`; the code is in minirlhf/commands: exact.py (the worlds), convergence.py (the command)."""

from minirlhf.commands.exact import *  # noqa: F403

if __name__ == "__main__":
    from minirlhf.commands.convergence import run

    run()
