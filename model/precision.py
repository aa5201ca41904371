"""The dtype of a model's computation."""

from typing import Literal

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def usual_dtype(device_type: str) -> Literal["bfloat16", "float32"]:
    """Where nobody says which: bfloat16 on a GPU, whose tensor cores multiply it, float32 on a CPU."""
    return "bfloat16" if device_type == "cuda" else "float32"
