"""Clock, power and temperature of a GPU while something runs on it, from nvidia-smi."""

import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from types import TracebackType

FIELDS = ("clocks.sm", "power.draw", "temperature.gpu")
PAUSE = 0.1  # seconds between two readings


@dataclass(frozen=True)
class Reading:
    """Medians of a time. None: not known."""

    clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None


def summarise(samples: Sequence[tuple[float, tuple[float, ...]]], began: float, ended: float) -> Reading:
    """Of samples (time, values of FIELDS) between two times."""
    inside = [values for when, values in samples if began <= when <= ended]
    return Reading(*(median(column) for column in zip(*inside, strict=True))) if inside else Reading()


def parse(line: str) -> tuple[float, ...] | None:
    """The values of FIELDS in a line of nvidia-smi; None where the driver does not tell them all."""
    try:
        values = tuple(float(cell) for cell in line.split(","))
    except ValueError:
        return None
    return values if len(values) == len(FIELDS) else None


class Sensors:
    """Reads on a thread of its own, in a `with` block; knows nothing where there is no nvidia-smi.

    gpu: a UUID or index, as nvidia-smi names it. It is asked anew each time: what it writes to a pipe may come late.
    """

    def __init__(self, gpu: str) -> None:
        tool = shutil.which("nvidia-smi")
        query = ["-i", gpu, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
        self.command = [tool, *query] if tool else None
        self.samples: list[tuple[float, tuple[float, ...]]] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "Sensors":
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self.thread.join()

    def _read(self) -> None:
        while self.command and not self.over.wait(PAUSE):
            line = subprocess.run(self.command, capture_output=True, text=True, check=False).stdout
            values = parse(line)
            if values is not None:
                self.samples.append((time.perf_counter(), values))

    def since(self, began: float) -> Reading:
        """From then, by time.perf_counter, until now."""
        return summarise(self.samples, began, time.perf_counter())
