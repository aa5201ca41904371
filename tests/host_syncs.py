"""Which operations would make the host wait for a GPU: seen without one, on a device that stands for it.

"meta" shows where things are: its tensors hold no data, and none is known to be on the CPU. "cpu" shows a real run:
nothing is in the wrong place there, but what is read is seen.
"""

from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {  # into a Python number, or into the shape of the result
    aten._local_scalar_dense,
    aten._unique2,
    aten.bincount,
    aten.equal,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten.unique_consecutive,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class HostData(TorchFunctionMode):
    """Notes in `found` where Python's own numbers are copied to `device`: operations that dispatch does not show."""

    def __init__(self, device: torch.device, found: list[str]) -> None:
        super().__init__()
        self.device, self.found = device, found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == self.device:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found += [f"an index that is a {type(i).__name__}" for i in index if isinstance(i, list | range)]
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            self.found += [f"torch.{func.__name__} on {self.device}"] * (torch.device(kwargs["device"]) == self.device)
        return func(*args, **kwargs)


class HostSyncs(TorchDispatchMode):
    """Notes in `found` what would be a wait of the host if `device` were a GPU."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.found: list[str] = []
        self.host_data = HostData(self.device, self.found)

    def __enter__(self) -> Self:
        self.host_data.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.host_data.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reason = self.why_it_waits(func.overloadpacket, args, kwargs)
        if reason is not None:
            self.found.append(f"{func}: {reason}")
        return func(*args, **kwargs)

    def why_it_waits(self, operation: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device for x in tensors if x.dim()} or {x.device for x in tensors}  # numbers of the CPU go along
        if operation is aten._to_copy and kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]))
        if self.device not in devices:
            return None
        if len(devices) > 1:
            copies = operation is aten._to_copy or operation is aten.copy_
            if copies and tensors[-1].is_cpu and (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                return None  # by to_device, from pinned memory
            return "between " + " and ".join(sorted(map(str, devices)))
        if operation in READS:
            return "its result is read, or has as many rows as it says"
        if operation in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1]):
            return "as many rows as a mask holds"
        return None
