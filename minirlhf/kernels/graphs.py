"""Steps of a GPU, captured once and then replayed: CUDA graphs.

A step of decoding is a few hundred small operations, and a GPU does each of them sooner than Python can ask for it. So
there a step is recorded as one CUDA graph: the network, the token that is sampled, the statistics and the tables they
go into. A graph holds addresses, not tensors: all that a step reads or writes stays where it is from call to call.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from minirlhf.kernels.choice import use_fused


def can_capture(device: torch.device, kernel: str) -> bool:
    """Whether steps are captured there; plain PyTorch's statistics look at their targets, which no graph can do."""
    return device.type == "cuda" and use_fused(kernel, "cuda")


def record(step: Callable[[], None], pool: Any) -> Callable[[], None]:
    """A step as a CUDA graph, which is captured and not run; what it needs for itself comes out of `pool`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


class Steps:
    """A step for each key: run as it is the first time, captured the second, and replayed from then on.

    The first run also does what must not happen in a capture: libraries are loaded, workspaces made.
    """

    def __init__(self) -> None:
        self.kept: dict[Any, Callable[[], None] | None] = {}
        self.addresses: tuple[int, ...] | None = None
        self.pool: Any = None
        self.replays = 0
        self.refused = False

    def at(self, addresses: tuple[int, ...]) -> None:
        """What steps read and write lies there; those that were captured elsewhere are dropped."""
        if addresses != self.addresses:
            self.kept.clear()
            self.addresses = addresses

    def __call__(self, key: Any, step: Callable[[], None]) -> None:
        """Take the step that this key stands for."""
        if self.refused or key not in self.kept:
            self.kept[key] = None
            step()
            return
        replay = self.kept[key]
        if replay is None:
            try:
                if self.pool is None and torch.cuda.is_available():
                    self.pool = torch.cuda.graph_pool_handle()
                replay = self.kept[key] = record(step, self.pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.refused = True
                reason = str(error).strip().partition("\n")[0][:200]
                print(f"steps of sampling are not captured, and take longer: {reason}", file=sys.stderr)
                step()
                return
        replay()
        self.replays += 1
