"""The shipped loops beside the optimum, for whoever imports them; the code is in minirlhf/commands/convergence.py."""

import sys

from minirlhf.commands import convergence

sys.modules[__name__] = convergence  # the module itself: its settings may be changed from here
