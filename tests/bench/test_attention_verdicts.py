"""The verdict on all kernels: what is wrong is named and the others are still tried; so with compute-sanitizer."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from longtake.bench import attention_verdicts
from longtake.bench.attempts import Outcome, directly
from longtake.bench.attention_check import Verdict
from longtake.bench.attention_gpu import Candidate
from longtake.bench.attention_verdicts import (
    KERNEL_NAMES,
    check_all,
    num_processes,
    outcome_of,
    sanitize,
    sanitized,
    sanitizer_prefixes,
    shipped,
)

CPU = torch.device("cpu")


def test_what_is_wrong_is_named_and_the_others_are_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def check(
        direction: str, config: object, head_dim: int, dtype: torch.dtype, device: torch.device, quick: bool
    ) -> Verdict:
        asked.append((direction, head_dim, dtype, quick))
        if direction == "dkdv" and dtype == torch.bfloat16:
            return Verdict(0.5, "causal: dk is off by 0.5")
        if direction == "dq" and len(asked) < 9:
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        return Verdict(1e-3, "")

    monkeypatch.setattr(attention_verdicts, "check_candidate", check)
    items = shipped("interpreter", (64,), ("bfloat16", "float32"))
    wrong = check_all(items, CPU, together=directly, alone=directly, quick=False)
    assert [(candidate[0], why) for candidate, why in wrong.items()] == [("dkdv", "causal: dk is off by 0.5")]
    assert len(asked) == len(items) + 2, "short of memory in company: again, alone"
    assert {quick for _, _, dtype, quick in asked if dtype == torch.bfloat16} == {False}
    assert {quick for _, _, dtype, quick in asked if dtype == torch.float32} == {True}
    printed = capsys.readouterr().out
    assert "WRONG: dkdv d64 bfloat16 flash_dkdv" in printed and "7 of 8 candidates are right" in printed
    assert "right: flash_dq, bfloat16: 1 candidates, largest error 1.0e-03" in printed


@pytest.mark.parametrize("arch", ["hopper", "interpreter"])
def test_what_ships_is_checked(arch: str) -> None:
    items = shipped(arch, (64, 72, 80, 96, 128, 256), ("bfloat16", "float16", "float32"))
    assert len(set(items)) == len(items)
    assert {item[1] for item in items} == {64, 72, 80, 96, 128, 256}
    few = sanitized(arch, (64, 72), "float16")
    assert {(item[3].kernel, item[1]) for item in few} == {
        (item[3].kernel, item[1]) for item in items if item[1] in (64, 72)
    }
    assert len(few) == len({(item[3].kernel, item[1]) for item in few})


def test_a_kernel_whose_candidates_hang_is_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def together(function: Callable[[Candidate], float], items: Iterable[Candidate]) -> Iterator[Outcome]:
        for item in items:
            hangs = item[3].kernel == "hopper_forward"
            yield Outcome(item, None, "no answer in 40 s") if hangs else Outcome(item, function(item), None)

    monkeypatch.setattr(attention_verdicts, "check_candidate", lambda *args, **options: Verdict(1e-3, ""))
    items = shipped("hopper", (64, 128), ("bfloat16",))
    hanging = [item for item in items if item[3].kernel == "hopper_forward"]
    wrong = check_all(items, CPU, together=together, alone=directly, quick=True)
    assert list(wrong) == hanging and len(hanging) > 3
    assert [why for why in wrong.values() if why != "not tried: 2 of hopper_forward gave no answer"] == [
        "no answer in 40 s"
    ] * 2
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if "checking" in line] == [
        f"checking {attention_verdicts.name_of(item)}" for item in items if item not in hanging
    ]


def test_as_many_are_checked_at_once_as_find_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_verdicts.os, "cpu_count", lambda: 64)
    assert num_processes(CPU) == 16
    for free, count in ((80e9, 16), (23e9, 4), (1e9, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (int(free), int(80e9)))
        assert num_processes(torch.device("cuda", 0)) == count


def test_the_kernels_that_a_sanitizer_watches_are_ours() -> None:
    sources = Path(attention_verdicts.__file__).parents[1].glob("kernels/*.py")
    names = {name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    assert set(KERNEL_NAMES) == names
    prefix = sanitizer_prefixes("tool")["racecheck"]
    assert all(f"--kernel-name kernel_substring={name}" in " ".join(prefix) for name in names)
    assert "--report-api-errors no" in " ".join(prefix)


SANITIZER = """#!/bin/sh
[ "$1 $3 $4" = "--tool --error-exitcode 9" ] || exit 2
[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 3
echo "========= COMPUTE-SANITIZER"
tool=$2
while [ "$1" != /bin/sh ]; do shift; done
"$@" $tool
case "$tool" in
racecheck) echo "========= Race reported between Write and Read"; exit 9 ;;
synccheck) sleep 60 ;;
esac
"""


def test_a_sanitizer_is_run_and_what_it_finds_is_told(tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    command = ["/bin/sh", "-c", f"touch {tmp_path}/$0"]
    began = time.monotonic()
    assert sanitize(command, sanitizer_prefixes(str(tool)), seconds=2.0) == {
        "memcheck": "clean",
        "racecheck": "found: Race reported between Write and Read",
        "synccheck": "not finished in 2 s",
    }
    assert time.monotonic() - began < 30, "the one that hangs was ended, with all that it started"
    assert {path.name for path in tmp_path.iterdir()} == {"compute-sanitizer", "memcheck", "racecheck", "synccheck"}


def test_outcomes_in_words() -> None:
    assert outcome_of(0, "anything", 1.0) == "clean"
    assert outcome_of(1, "a\nWRONG: dq d64: off\nb", 1.0) == "exit code 1: WRONG: dq d64: off"
    assert outcome_of(-11, "a\nb\nc\nSegmentation fault", 1.0) == "exit code -11: b; c; Segmentation fault"


def test_candidates_have_a_name() -> None:
    candidate: Candidate = shipped("hopper", (128,), ("bfloat16",))[0]
    assert attention_verdicts.name_of(candidate).startswith("forward d128 bfloat16 flash_forward 128x128, 8 warps")
