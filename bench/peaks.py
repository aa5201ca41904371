"""What a GPU reaches at best, by NVIDIA's data sheets, and what a measured number is held against."""

import platform
from collections.abc import Mapping

import torch

# The first name that the device's holds decides: boards of one chip differ.
TFLOPS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "A100": 312.0}  # bfloat16, dense
LINK_GBS = {
    "PCIe": None,
    "PCIE": None,
    "NVL": None,
    "H100": 450.0,
    "H200": 450.0,
    "A100": 300.0,
}  # NVLink of SXM, one direction


def device_name(device: torch.device) -> str:
    """As CUDA tells it ("NVIDIA H100 80GB HBM3"); of a CPU the architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def peak(table: Mapping[str, float | None], name: str) -> float | None:
    """Of the device with that name; None where it is not known."""
    return next((value for part, value in table.items() if part in name), None)
