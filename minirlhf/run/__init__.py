"""One run: its folder, its command line, its memory.

Entry points: `folder.Run`, `folder.load_run`, `arguments.RunArgs`, `command_line.cli`, `memory.say_fit`.

May be imported by: algorithms, commands, scripts. Imports: model, data, and what is below.
"""

from minirlhf.run.arguments import RunArgs, prepare
from minirlhf.run.command_line import cli
from minirlhf.run.folder import Run, ensure_run, load_run
from minirlhf.run.memory import fit_rollout, say_fit
from minirlhf.run.terminal import console

__all__ = ["Run", "RunArgs", "cli", "console", "ensure_run", "fit_rollout", "load_run", "prepare", "say_fit"]
