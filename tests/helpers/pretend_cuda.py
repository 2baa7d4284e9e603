"""Tensors that say they are on a GPU and lie on the CPU: where Python would wait for a GPU is counted without one.

Importing this changes torch for the whole process, so that programs of their own do it (tests/helpers/host_syncs.py).

A wait is what `torch.cuda.set_sync_debug_mode` warns of on a real GPU: a number or a table that is read; a tensor whose
size depends on values (`nonzero`, a mask as an index); a copy between the host and the GPU, unless it goes through
pinned memory with `non_blocking=True`. An operation on tensors of both kinds raises, as it would there.
"""

import collections
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.utils.clip_grad
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda:0")
PACKAGE = str(Path(__file__).resolve().parents[2] / "minirlhf")
READS = {"_local_scalar_dense", "is_nonzero", "equal"}
SIZED_BY_VALUES = {"nonzero", "masked_select", "unique", "_unique", "_unique2", "unique_dim", "bincount"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}

waits: collections.Counter[str] = collections.Counter()  # by what it was, and the line of the package


def waited(what: str) -> None:
    """Count a wait at the package's line that asked for it."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    where = "backward or optimiser"
    if frame is not None:
        where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
    waits[f"{what} at {where}"] += 1


def on_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU. torch's C++ takes it for one of the CPU, and so runs its gradients there."""

    @staticmethod
    def __new__(cls, here: torch.Tensor, requires_grad: bool = False):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            layout=here.layout, device="cpu", requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, here: torch.Tensor, requires_grad: bool = False):
        self.here = here

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self, **options) -> str:
        return f"OnGPU({self.here})"

    def cpu(self) -> torch.Tensor:
        waited("cpu")
        return self.detach().here

    def tolist(self) -> list:
        waited("tolist")
        return self.detach().here.tolist()

    def numpy(self, *args, **options):
        raise TypeError("a tensor on a GPU has no numpy array")

    def to(self, *args, **options) -> torch.Tensor:
        devices = [x for x in (*args, options.get("device")) if isinstance(x, (torch.device, str))]
        rest = [x for x in args if not isinstance(x, (torch.device, str))]
        patient = options.pop("non_blocking", False)
        options.pop("device", None)
        cast = torch.Tensor.to(self, *rest, **options) if rest or options else self
        if not devices or on_gpu(devices[0]):
            return cast
        return cast.detach().here.clone() if patient else cast.cpu()


def run(func, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation, on the tensors as they lie; what it gives is on the GPU if an input is, or if that is asked for."""
    name = func._schema.name.partition("::")[2]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [isinstance(x, OnGPU) for x in tensors]
    if name in PYTHON_OPS and any(there):
        with Pretending():
            return PYTHON_OPS[name](*args, **kwargs)
    asked = kwargs.get("device")
    if any(there):
        look(name, args, kwargs, tensors, there)
    elif on_gpu(asked) and tensors and not (kwargs.get("non_blocking") and getattr(tensors[0], "pinned", False)):
        waited(f"copy to the GPU ({name})")
    if isinstance(asked, (torch.device, str)):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    bare = tree_map(lambda x: x.here if isinstance(x, OnGPU) else x, (args, kwargs))
    if name == "_fused_sdp_choice":
        return 0  # plain operations
    if func._overloadname in ("dtype_out", "dtype") and name in ("mm", "addmm"):
        out = wide_product(name, *bare[0], **bare[1])
    else:
        out = func(*bare[0], **bare[1])
    result_there = (any(there) and not (name == "copy_" and not there[0])) or on_gpu(asked)
    out = tree_map(lambda x: OnGPU(x) if isinstance(x, torch.Tensor) and result_there else x, out)
    keeps = any(there) and not (name == "copy_" and not there[0])
    return return_and_correct_aliasing(func, args, kwargs, out) if keeps else out


def look(name: str, args: tuple, kwargs: dict[str, Any], tensors: list[torch.Tensor], there: list[bool]) -> None:
    """Count what waits, and refuse what mixes."""
    if name in READS or name in SIZED_BY_VALUES:
        waited(name)
    if name == "repeat_interleave" and kwargs.get("output_size") is None and there[0]:
        waited(name)
    strangers = [x for x, own in zip(tensors, there) if not own and x.dim() > 0]
    if name in INDEXING:
        indices = [x for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            waited(f"mask as an index ({name})")
        elif any(not isinstance(x, OnGPU) and x.dim() > 0 for x in indices):
            waited(f"index from the CPU ({name})")
        return
    if name == "copy_":
        host = tensors[0] if there[1] else tensors[1]
        if there[0] != there[1] and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            waited("copy_")
        elif there[0] != there[1] and not getattr(host, "pinned", False):
            waited("copy_ of memory that is not pinned")
    elif strangers:
        raise RuntimeError(f"{name}: a tensor on the CPU, {tuple(strangers[0].shape)}, beside one on the GPU")


def wide_product(name: str, *args, beta=1, alpha=1, out=None) -> torch.Tensor:
    """aten::mm and addmm with a dtype for their result: on a GPU only."""
    *added, a, b, dtype = args
    product = alpha * (a.to(dtype) @ b.to(dtype))
    total = product + beta * added[0].to(dtype) if name == "addmm" else product
    return total if out is None else out.copy_(total)


class Pretending(TorchDispatchMode):
    """While it lasts, `device="cuda"` gives such tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Event:
    """Of a stream that is always done."""

    def __init__(self, *args, **options):
        pass

    def record(self, *args) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


PYTHON_OPS: dict[str, Callable] = {}  # operations written in Python, which run on these tensors as they would on a GPU


def pretend() -> None:
    """Change torch and the package for this process."""
    from minirlhf.kernels import build as kernels
    from minirlhf.kernels import graphs
    from minirlhf.kernels import ops as fused

    for op in (fused.linear_token_stats, fused.linear_token_stats_backward):
        PYTHON_OPS[op._opoverload._schema.name.partition("::")[2]] = op._init_fn
    load = kernels.load
    kernels.load = lambda cuda=False: load()
    graphs.can_capture = lambda device, kernel: False  # there is nothing to be captured
    torch._C._set_only_lift_cpu_tensors(True)
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.Event = Event
    torch.cuda.synchronize = lambda *args: waited("synchronize")

    make = torch.tensor

    def tensor(data, *, device=None, **options):
        made = make(data, **options)
        if not on_gpu(device):
            return made
        waited("tensor of Python's numbers")
        return OnGPU(made)

    def pinned(self, *args):
        same = self.detach()
        same.pinned = True
        return same

    def module_to(self, *args, **options):
        for module in self.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and not isinstance(parameter, OnGPU):
                    moved = OnGPU(parameter.data.clone())
                    module._parameters[name] = torch.nn.Parameter(moved, requires_grad=parameter.requires_grad)
        return self

    def by_device(tensors, *args, **options):
        groups = group(tensors, *args, **options)
        return {(GPU, dtype): values for (_, dtype), values in groups.items()}

    torch.tensor = tensor
    torch.Tensor.pin_memory = pinned
    torch.nn.Module.to = module_to
    group = torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype
    torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype = by_device

    cast, enabled, cast_type = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

    class Autocast(cast):
        def __init__(self, device_type, *args, **options):
            super().__init__("cpu", *args, **options)

    torch.autocast = Autocast
    torch.is_autocast_enabled = lambda device="cpu": enabled("cpu")
    torch.get_autocast_dtype = lambda device: cast_type("cpu")
