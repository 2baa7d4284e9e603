"""The compiled kernels of csrc/ seen from Python, and what else is there for speed alone.

Entry points: `choice.use_fused` (which implementation runs), `build.load`, `ops` (what torch sees), `network`
(attention and GELU), `graphs` and `flex` (on a GPU). `python -m minirlhf.kernels` builds ahead.

May be imported by: model, run, commands. Imports: nothing of the package but `checks` and `devices`.
"""

from minirlhf.kernels.build import KernelUnavailable, facts, load

__all__ = ["KernelUnavailable", "facts", "load"]
