"""What a run logs, shown elsewhere too: `--log tensorboard`, `--log wandb` (Weights & Biases), or both.

    RUN/tensorboard/    event files; look at them with `tensorboard --logdir runs`
    RUN/wandb/          what the wandb client keeps, and `id`, by which a resumed run finds its page again

Both only read: metrics.jsonl and samples.jsonl are written as they always are.
"""

import importlib.util
import json
import os
import secrets
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from minirlhf import InputError


class Trackers:
    """Sends every new row of metrics.jsonl and samples.jsonl to the trackers that --log names; of none, does nothing.

    They follow the files, which stay the record. A resumed run tells its trackers the whole record again, so that in
    the end they hold what the files hold: no step twice, and none missing though an earlier part ran without --log.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: dict[str, Any]):
        self.names, self.folder, self.config = names, folder, config
        self.read = {"metrics.jsonl": 0, "samples.jsonl": 0}  # bytes
        self.started = False
        self.events = None  # TensorBoard's writer
        self.page = None  # wandb's run
        self.page_step = 0  # the first step that the page lacks
        for name in names:
            found = importlib.util.find_spec(name)
            if found is None or found.origin is None:  # a mere folder of that name is no package
                raise InputError(f"--log {name}: the package {name} is missing; pip install 'minirlhf[{name}]'")
        if "wandb" in names:
            import wandb

            try:
                wandb.login()  # now, since the page is only made when there is something to show
            except wandb.Error as error:
                raise _refusal(error) from error

    def follow(self) -> None:
        """Send the rows that the files have gained."""
        rows = []
        for name, known in self.read.items():
            path = self.folder / name
            if self.names and path.is_file():
                with open(path, "rb") as file:
                    file.seek(known)
                    rows += [(json.loads(line), name) for line in file]
                    self.read[name] = file.tell()

        if not rows:
            return
        if not self.started:
            self._start()

        def place(pair: tuple[dict[str, Any], str]) -> tuple[int, str]:
            return pair[0]["step"], pair[1]

        for (step, name), pairs in groupby(sorted(rows, key=place), key=place):  # wandb takes no step that is past
            new = [{key: value for key, value in row.items() if key != "step"} for row, _ in pairs]
            self._send_events(step, name, new)
            self._send_page(step, name, new)
        if self.events is not None:
            self.events.flush()  # whoever is looking need not wait, and a killed run loses nothing

    def close(self) -> None:
        """The run is finished."""
        if self.events is not None:
            self.events.close()
        if self.page is not None:
            self.page.finish()

    def _start(self) -> None:
        self.started = True
        if "tensorboard" in self.names:
            from torch.utils.tensorboard import SummaryWriter

            # What an earlier part of this run has sent is sent again, all of it. A viewer that has read it is told by
            # purge_step to forget it, and one that comes later must not find it: files are emptied, not removed, since
            # the first would wait at a removed one forever, and since purging leaves texts as they are.
            for path in (self.folder / "tensorboard").glob("events.out.tfevents.*"):
                path.write_bytes(b"")
            self.events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=0)
        if "wandb" in self.names:
            import wandb

            path = self.folder / "wandb" / "id"
            # No page can be gone on with unless it can be asked what it holds: offline, every part begins its own.
            if not path.is_file() or wandb.setup().settings.mode == "offline":
                path.parent.mkdir(exist_ok=True)
                path.write_text(secrets.token_hex(8))  # no seed and no folder's name: an overwritten run is another run
            try:
                self.page = wandb.init(
                    project=os.environ.get("WANDB_PROJECT", "minirlhf"),
                    name=self.folder.resolve().name,
                    id=path.read_text(),
                    resume="allow",
                    dir=str(self.folder),
                    config=self.config,
                    settings=wandb.Settings(console="off"),
                )
            except wandb.Error as error:
                raise _refusal(error) from error
            self.page_step = self.page.starting_step

    def _send_events(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        if self.events is None:
            return
        if name == "metrics.jsonl":
            for key, value in _numbers(rows[-1]).items():
                self.events.add_scalar(key, value, step)
        else:  # as Markdown, where four spaces keep a text as it is
            parts = [(key, str(value).replace("\n", "\n    ")) for row in rows for key, value in row.items()]
            self.events.add_text("samples", "\n\n".join(f"**{key}**\n\n    {text}" for key, text in parts), step)

    def _send_page(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        if self.page is None or step < self.page_step:
            return
        if name == "metrics.jsonl":
            self.page.log(_numbers(rows[-1]), step=step)
        else:
            import wandb

            data = [[row.get(key) for key in rows[0]] for row in rows]
            table = wandb.Table(columns=list(rows[0]), data=data, allow_mixed_types=True)
            self.page.log({"samples": table}, step=step)


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if value is not None}


def _refusal(error: Exception) -> InputError:
    what = " ".join(str(error).split()).rstrip(".")
    return InputError(f"--log wandb: {what}; or set WANDB_MODE=offline, and `wandb sync` later")
