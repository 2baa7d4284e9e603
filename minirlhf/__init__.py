"""minirlhf: RLHF you can read in an afternoon, run on a laptop, and check against the closed-form optimum."""

__version__ = "0.1.0"


class InputError(Exception):
    """Something the user gave is wrong: a file, a line, a flag, a reward function.

    The message is one line that says what was wrong, where, and what to do about it. The command line
    prints it to stderr without a traceback and exits with code 2 (see ``minirlhf.run.command_line``).
    """
