"""Reading and writing a run's folder, for whoever imports it; the code is in minirlhf/run/folder.py."""

from minirlhf.run.folder import Run, load_run, read_run  # noqa: F401
