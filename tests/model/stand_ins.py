"""What stands for the ranks and the kernels of a GPU where there is none: tensors on "meta", and nobody to talk to."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from longtake.comm.mesh import Mesh
from longtake.kernels import backend, cuda
from longtake.kernels.visibility import Visibility
from torch import Tensor

META = torch.device("meta")


class SilentTransport:
    """Takes what is sent and fills nothing; everything must be on the device."""

    def __init__(self) -> None:
        self.num_calls = 0

    def all_to_all(self, axis: str, send: Sequence[Sequence[Tensor]], recv: Sequence[Sequence[Tensor]]) -> None:
        self._see([x for peer in (*send, *recv) for x in peer])

    def exchange(self, axis: str, *, send: Sequence[Tensor], recv: Sequence[Tensor], **peers: int | None) -> Any:
        self._see([*send, *recv])
        return SimpleNamespace(wait=lambda: None)

    def _see(self, tensors: list[Tensor]) -> None:
        assert all(x.device == META for x in tensors)
        self.num_calls += 1


def meta_mesh(rank: int, *, ring: int, ulysses: int) -> Mesh:
    """The place of sp rank `rank`, with META for its GPU."""
    ring_rank, ulysses_rank = divmod(rank, ulysses)
    place = SimpleNamespace(
        ring=ring,
        ulysses=ulysses,
        data=1,
        sp_size=ring * ulysses,
        sp_rank=rank,
        ring_rank=ring_rank,
        ulysses_rank=ulysses_rank,
        device=META,
        transport=SilentTransport(),
    )
    return cast(Mesh, place)


def _stand_in(q: Tensor, *rest: Any, config: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """A kernel that asks of the mask what the real ones do, and computes nothing."""
    [visibility] = [x for x in rest if isinstance(x, Visibility)]
    tensors = [x for x in (q, *rest, *options.values()) if isinstance(x, Tensor)]
    for mask, size in ((visibility, config.rows), (visibility.transposed, config.keys)):
        tensors += [mask.start, mask.end, mask.longest_first(size)]
    assert all(x.device == META for x in tensors)
    return options.get("state") or cuda.nothing_seen(q)


def stand_in_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """META has the backend of CUDA, which chooses its kernels as ever; then stand-ins are called."""
    monkeypatch.setitem(backend.DEFAULT_BACKENDS, "meta", "tuned")
    for name in cuda.FORWARD:
        monkeypatch.setitem(cuda.FORWARD, name, _stand_in)
    for name in ("dkdv", "dq"):
        monkeypatch.setattr(cuda.flash_backward, name, _stand_in)
    monkeypatch.setattr(cuda.flash_prepare, "prepare", lambda out, lse, dout, dlse: (lse, lse))
