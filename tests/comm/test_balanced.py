"""`balanced` against a yardstick: a greedy with random swaps (blocks of 512), recorded on the same documents."""

import timeit

import pytest
import torch
from longtake.bench.layout import measure, mixes
from longtake.comm.layout import Layout, balanced, zigzag

# mix and ring degree: (area, rows) of the greedy with swaps. Zigzag is measured beside it.
YARDSTICK = {
    ("short", 4): (1.0030, 0.0288),
    ("short", 8): (1.0157, 0.0235),
    ("short", 16): (1.0301, 0.0243),
    ("mixed", 4): (1.0001, 0.4820),
    ("mixed", 8): (1.0003, 0.4721),
    ("mixed", 16): (1.0023, 0.4645),
    ("long", 4): (1.0824, 0.4503),
    ("long", 8): (1.0824, 0.4823),
    ("long", 16): (1.0842, 0.4665),
    ("single", 4): (1.0000, 0.9258),
    ("single", 8): (1.0000, 0.8951),
    ("single", 16): (1.0005, 0.9128),
}
AREA = 1.03


@pytest.mark.parametrize(("mix", "ring"), YARDSTICK)
def test_as_even_as_the_yardstick_with_no_more_rows(mix: str, ring: int) -> None:
    cu_seqlens = mixes()[mix]
    area, rows = measure(balanced(cu_seqlens, ring=ring), cu_seqlens)
    zigzag_area, zigzag_rows = measure(zigzag(int(cu_seqlens[-1]), ring=ring), cu_seqlens)
    assert area <= AREA
    assert rows <= YARDSTICK[mix, ring][1]
    if zigzag_area <= AREA:
        assert rows <= zigzag_rows


@pytest.mark.parametrize("mix", ["short", "mixed", "long"])
def test_a_layout_takes_less_than_100_ms(mix: str) -> None:
    cu_seqlens = mixes()[mix]
    seconds = min(timeit.repeat(lambda: balanced(cu_seqlens, ring=16), number=1, repeat=5))
    assert seconds < 0.1


def test_documents_that_fit_stay_whole() -> None:
    cu_seqlens = torch.arange(9) * 4096  # eight equal documents, two for each rank
    area, rows = measure(balanced(cu_seqlens, ring=4), cu_seqlens)
    assert (area, rows) == (1.0, 0.0)


def test_measure_counts_pairs_and_rows_as_a_mask_does() -> None:
    cu_seqlens = torch.tensor([0, 40, 41, 41, 130, 257])
    layout = balanced(cu_seqlens, ring=3)
    position = torch.arange(257)
    document = torch.searchsorted(cu_seqlens, position, right=True)
    visible = (document[:, None] == document) & (position[:, None] >= position)
    areas, rows = [], 0
    for queries in layout.parts:
        areas.append(int(visible[queries].sum()))
        needed = visible[queries].any(0)
        needed[queries] = False
        rows += int(needed.sum())
    area = max(areas) * 3 / sum(areas)
    assert measure(layout, cu_seqlens) == pytest.approx((area, rows / (2 * 257)))


def test_areas_stay_even_on_random_documents() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(1, 12_000, (int(torch.randint(3, 30, (), generator=generator)),), generator=generator)
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        area, _ = measure(_checked(balanced(cu_seqlens, ring=4)), cu_seqlens)
        num_blocks = int(cu_seqlens[-1]) / 4 / 128
        assert area <= AREA + 1 / num_blocks  # one block more or less


def _checked(layout: Layout) -> Layout:
    assert torch.equal(torch.cat(layout.parts).sort().values, torch.arange(layout.num_tokens))
    return layout
