"""The communication benchmark: its sizes, its bandwidths and its table, and that it looks at what arrives."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from longtake.bench import comm
from longtake.bench.comm import Setting, bus_bandwidth, format_row, main, measure, messages, sizes
from longtake.bench.peaks import LINK_GBS, TFLOPS, peak
from torch import Tensor

from tests.ranks import run_ranks


def test_sizes_go_up_to_the_largest() -> None:
    assert sizes(1024) == [1024]
    assert sizes(2**20) == [2**10, 2**12, 2**14, 2**16, 2**18, 2**20]
    assert sizes(2**30)[-1] == 2**30


@pytest.mark.parametrize(("operation", "expected"), [("all_to_all", 75.0), ("exchange", 100.0)])
def test_a_share_of_an_all_to_all_stays_at_home(operation: str, expected: float) -> None:
    assert bus_bandwidth(operation, 100.0, num_ranks=4) == expected


@pytest.mark.parametrize("operation", ["all_to_all", "exchange"])
@pytest.mark.parametrize("num_ranks", [2, 5])
def test_what_is_sent_is_what_is_expected(operation: str, num_ranks: int) -> None:
    pairs = [messages(operation, 12, rank, num_ranks, torch.device("cpu")) for rank in range(num_ranks)]
    for rank, (send, expected) in enumerate(pairs):
        assert len(send) == len(expected) == (12 if operation == "exchange" else 12 // num_ranks * num_ranks)
        if operation == "exchange":
            assert torch.equal(expected, pairs[rank - 1][0])
        else:
            arriving = [sent.chunk(num_ranks)[rank] for sent, _ in pairs]
            assert torch.equal(expected, torch.cat(arriving))


def test_every_size_has_a_row_of_each_contender(tmp_path: Path) -> None:
    main(
        ["--world", "3", "--max-bytes", "4096", "--repeats", "1", "--link-gbs", "2", "--json", str(tmp_path / "c.json")]
    )
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    cases = [(row["operation"], row["who"], row["bytes"]) for row in rows]
    all_to_all, exchange = ([1023, 4095], [1024, 4096])  # in three equal shares
    assert cases == [
        *(("all_to_all", who, size) for size in all_to_all for who in ("torch", "library")),
        *(("exchange", who, size) for size in exchange for who in ("torch", "library")),
    ]
    for row in rows:
        assert row["alg_gbs"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert row["bus_gbs"] == pytest.approx(bus_bandwidth(row["operation"], row["alg_gbs"], 3))
        assert row["peak"] == pytest.approx(row["bus_gbs"] / 2)


@pytest.mark.parametrize(("share", "cell"), [(0.4567, ["45.7", "%"]), (None, ["-"])])
def test_a_row_of_the_table(share: float | None, cell: list[str]) -> None:
    row = {"operation": "exchange", "who": "nccl", "bytes": 4096, "us": 12.34, "alg_gbs": 0.5, "bus_gbs": 0.25}
    expected = ["exchange", "nccl", "4096", "12.3", "0.500", "0.250", *cell]
    assert format_row(row | {"peak": share}).split() == expected


def measure_with_a_thief(rank: int, operation: str, who: str) -> None:
    def robbed(make: Callable[..., Callable[[], None]]) -> Callable[..., Callable[[], None]]:
        def made(contender: str, mesh: object, send: Tensor, recv: Tensor) -> Callable[[], None]:
            call = make(contender, mesh, send, recv)

            def call_and_take() -> None:
                call()
                if contender == who and rank == 1:
                    recv[-1] += 1

            return call_and_take

        return made

    comm.OPERATIONS[operation] = robbed(comm.OPERATIONS[operation])
    measure(operation, 1024, comm.make_meshes(*((1, 2) if operation == "all_to_all" else (2, 1))), Setting(1024, 1))


@pytest.mark.parametrize(("operation", "who"), [("all_to_all", "torch"), ("exchange", "library")])
def test_other_bytes_than_were_sent_are_named(operation: str, who: str) -> None:
    with pytest.raises(RuntimeError, match=f"{operation} of 1024 bytes by {who}: rank 1 received other bytes"):
        run_ranks(measure_with_a_thief, 2, operation, who)


@pytest.mark.parametrize(("flags", "max_bytes"), [([], 2**30), (["--share-gpu"], 2**24)])
def test_ranks_that_share_a_gpu_send_less(flags: list[str], max_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[Setting] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(comm, "launch", lambda body, setting, *rest, **options: settings.append(setting))
    main(["--world", "2", *flags])
    assert settings[0].max_bytes == max_bytes


@pytest.mark.parametrize(
    ("name", "tflops", "link_gbs"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0, 450.0),
        ("NVIDIA H200", 989.0, 450.0),
        ("NVIDIA H100 PCIe", 756.0, None),
        ("NVIDIA A100-SXM4-80GB", 312.0, 300.0),
        ("x86_64", None, None),
    ],
)
def test_peaks_by_name(name: str, tflops: float | None, link_gbs: float | None) -> None:
    assert (peak(TFLOPS, name), peak(LINK_GBS, name)) == (tflops, link_gbs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--world 1", "--world must be at least 2 (nothing travels otherwise), got 1"),
        ("--max-bytes 1000", "max_bytes must be at least 1024 and repeats at least 1, got 1000 and 5"),
        ("--repeats 0", "repeats at least 1, got"),
        ("--link-gbs 0", "link_gbs must be more than 0, got 0.0"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        main(arguments.split())
