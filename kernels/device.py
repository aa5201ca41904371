"""What a kernel's host side asks about the device. CPU tensors stand for a GPU under the interpreter."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def multiprocessors(device: torch.device) -> int:
    """Number of SMs; for the CPU that of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def architecture(device: torch.device) -> str:
    """The family whose candidates run there: "hopper", "ampere" for every other GPU, "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    return "hopper" if torch.cuda.get_device_capability(device)[0] == 9 else "ampere"


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded, when nothing may be read back."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. What goes from the CPU to a GPU goes by way of pinned memory: the host does not wait.

    Raises ValueError where a CUDA graph is being recorded: it would copy again from memory that is gone by then.
    """
    if x.is_cpu and device.type == "cuda":
        if is_capturing(device):
            raise ValueError(f"a graph cannot record a copy to {device}: make this call once before it is recorded")
        x = x.pin_memory()
    return x.to(device, non_blocking=x.is_cpu)


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
