"""`longtake tune` by a fake clock: wrong candidates are refused and named, and what was measured is what is chosen."""

import pickle
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from longtake.bench import attention_check, races, tune, tune_show
from longtake.bench.attempts import directly, in_processes
from longtake.bench.attention_check import Verdict
from longtake.bench.clock import Call, Clock, fake_stopwatch, medians
from longtake.kernels import reference, table
from longtake.kernels.candidates import Config
from longtake.kernels.table import Entry, cache_file, choose, read_entries
from longtake.kernels.visibility import Visibility
from torch import Tensor

from tests.kernels.masks import shard_visibility

CPU = torch.device("cpu")
LENGTHS = (32, 256)
PLAIN, SMALL = Config("flash_forward", 32, 32, 8, 2), Config("flash_forward", 16, 16, 4, 2)
GLUON = Config("hopper_forward", 32, 32, 4, 2)
WRONG, FLAKY, BROKEN = (Config("flash_forward", 32, 32, 4, stages) for stages in (7, 8, 9))
DKDV, DQ, FUSED = (Config(name, 32, 32, 8, 2) for name in ("flash_dkdv", "flash_dq", "hopper_backward"))
DKDV_SMALL = Config("flash_dkdv", 16, 16, 4, 2)
DIRECTIONS = {DKDV: "dkdv", DKDV_SMALL: "dkdv", DQ: "dq", FUSED: "backward"}
FORWARD_KERNELS = frozenset({"flash_forward", "hopper_forward"})
TURN = count()
RIGHT, BAD = Verdict(1e-7, ""), Verdict(None, "is off")

Milliseconds = dict[Config, Sequence[float]]  # at each of LENGTHS


def candidate(config: Config, head_dim: int = 64, dtype: str = "float32") -> Entry:
    return Entry(DIRECTIONS.get(config, "forward"), head_dim, dtype, 0, config, 1.0, "checked in")


def forward(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, config: Config, final: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """What a forward kernel does, with the planted errors."""
    if config == BROKEN:
        raise RuntimeError("out of resource: shared memory\nand more")
    out, lse = reference.forward(q, k, v, visibility, **options)
    out *= 1.01 if config == WRONG else 1
    out *= 1 + 5e-7 * (next(TURN) % 2) if config == FLAKY else 1
    return (out.to(q.dtype) if final else out), lse


def clock(times: Milliseconds) -> Callable[[torch.device], Clock]:
    """Makes a clock that tells these times of calls by `launches`; it fails for a candidate that has none."""

    def read(calls: Sequence[Call]) -> list[float]:
        named = cast(list[tuple[Config, int]], [call() for call in calls])
        return [times[config][LENGTHS.index(length)] for config, length in named]

    return lambda device: read


def launches(race: races.Race, device: torch.device) -> list[Call]:
    """Calls that do no more than to say what they are."""
    return [partial(lambda *what: what, entry.config, race.length) for entry in race.entries]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short lengths, forward kernels that need no interpreter, and calls for the fake clock."""
    for module in (races, tune, tune_show):
        monkeypatch.setattr(module, "LENGTHS", LENGTHS)
    monkeypatch.setattr(races, "TOKENS", 64)
    monkeypatch.setattr(races, "launches", launches)
    for name in FORWARD_KERNELS:
        monkeypatch.setitem(attention_check.KERNELS, name, forward)


def verdict(monkeypatch: pytest.MonkeyPatch, judge: Callable[[str], Verdict]) -> None:
    """What the check says of a direction."""
    monkeypatch.setattr(tune, "check_candidate", lambda direction, *rest: judge(direction))


@pytest.fixture
def all_right(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict(monkeypatch, lambda direction: RIGHT)


def tuned(times: Milliseconds) -> list[Entry]:
    entries = [candidate(config) for config in times]
    *_, found = tune.tune(entries, CPU, together=directly, alone=directly, make_clock=clock(times))
    return found


@pytest.fixture
def gpu(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """gpu(times): a machine with a GPU on which these candidates take so long. Returns the file of its table."""

    def make(times: Milliseconds, head_dims: Sequence[int] = (64,)) -> Path:
        entries = tuple(candidate(config, head_dim) for config in times for head_dim in head_dims)
        monkeypatch.setattr(tune, "checked_in", lambda arch: entries)
        monkeypatch.setattr(tune, "clock_of", clock(times))
        monkeypatch.setattr(tune, "entries_for", lambda device: (*read_entries(cache_file("Some GPU")), *entries))
        return cache_file("Some GPU")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "find_gpu", lambda: CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(tune, "in_processes", lambda count, seconds: directly)
    read_entries.cache_clear()
    return make


def run(*argv: str) -> int:
    """The exit code."""
    try:
        tune.main(["--dtype", "float32", *argv])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


# What is refused


def test_wrong_candidates_are_refused_and_named_and_the_right_one_serves(
    gpu: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = gpu({PLAIN: (2, 2), WRONG: (1, 1), FLAKY: (1, 1), BROKEN: (1, 1)})
    assert run() == 0
    printed = capsys.readouterr()
    whys = {
        7: r"out is off by 1\.0e-02.* limit .*e-06\b.*",
        8: "out differs between two runs",
        9: "RuntimeError: out of resource: shared memory",
    }
    for line, (stages, why) in zip(printed.err.splitlines(), whys.items(), strict=True):
        name = f"head_dim 64  float32   forward   flash_forward 32x32, 4 warps, {stages} stages"
        assert re.fullmatch(rf"longtake tune: {name} refused: full, heads 2:2, whole: {why}", line)
    assert sum("2 ms with" in line for line in printed.out.splitlines()) == len(LENGTHS)
    assert "1 ms" not in printed.out
    costs = {(entry.config, entry.length): entry.cost for entry in read_entries(file)}
    assert costs.keys() == {(config, length) for config in (PLAIN, WRONG, FLAKY, BROKEN) for length in LENGTHS}
    assert {config for (config, _), cost in costs.items() if cost is not None} == {PLAIN}


def test_a_direction_without_a_right_candidate_ends_with_1(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = gpu({WRONG: (1, 1)}, head_dims=(64, 80))
    assert run() == 1
    kinds = ["head_dim 64  float32   forward  ", "head_dim 80  float32   forward  "]
    lines = capsys.readouterr().err.splitlines()[-2:]
    assert lines == [f"longtake tune: {kind} has no right candidate" for kind in kinds]
    assert [entry.cost for entry in read_entries(file)] == [None] * 4  # so that the wrong one does not serve


@pytest.mark.parametrize(("wrong", "code"), [("backward", 0), ("dkdv", 1), ("dq", 1)])
def test_only_the_fused_backward_can_be_done_without(
    wrong: str, code: int, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu({DKDV: (1, 1), DQ: (1, 1), FUSED: (1, 1)})
    verdict(monkeypatch, lambda direction: BAD if direction == wrong else RIGHT)
    assert run() == code


def test_one_that_fails_in_a_race_is_refused_there_alone(small: None, all_right: None) -> None:
    found = {(entry.config, entry.length): entry for entry in tuned({PLAIN: (2, 2), GLUON: (1,)})}
    assert len(found) == 4
    assert [which for which, entry in found.items() if entry.cost is None] == [(GLUON, LENGTHS[1])]
    assert found[GLUON, LENGTHS[1]].why.startswith("refused: IndexError")


def test_one_that_lacked_memory_in_company_is_checked_again_alone(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [Verdict(None, "causal: RuntimeError: Triton Error [CUDA]: out of memory"), RIGHT]
    verdict(monkeypatch, lambda direction: verdicts.pop(0))
    assert all(entry.cost for entry in tuned({PLAIN: (1, 1)}))
    assert verdicts == []


def test_what_a_race_launches_was_launched_in_the_check(
    small: None, all_right: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[int] = []
    monkeypatch.setattr(races, "launches", lambda race, device: [partial(launched.append, race.length)])
    entries = [candidate(PLAIN)]
    list(tune.tune(entries, CPU, together=directly, alone=directly, make_clock=lambda device: lambda calls: [1.0]))
    assert launched == [LENGTHS[0]]


def test_what_breaks_off_keeps_what_was_measured(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times: Milliseconds = dict.fromkeys((PLAIN, DKDV, DKDV_SMALL, DQ, FUSED), (1, 1))
    file = gpu(times)
    wrong = DKDV_SMALL, FUSED
    monkeypatch.setattr(tune, "check_candidate", lambda direction, config, *rest: BAD if config in wrong else RIGHT)
    told = iter([clock(times)(CPU)] * 2)  # for the forward's lengths; then Ctrl-C

    def until_broken(device: torch.device) -> Clock:
        found = next(told, None)
        if found is None:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(tune, "clock_of", until_broken)
    with pytest.raises(KeyboardInterrupt):
        run()
    kept = {(entry.direction, entry.length, entry.cost is not None) for entry in read_entries(file)}
    forward = {("forward", length, True) for length in LENGTHS}
    assert kept == forward | {("backward", length, False) for length in LENGTHS}, "nothing right of dkdv is known yet"


# What is chosen then


def test_the_fastest_serves_at_each_length(small: None, all_right: None, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = tuple(tuned({PLAIN: (2.0, 1.0), SMALL: (1.0, 2.0), GLUON: (3.0, 0.9)}))
    monkeypatch.setattr(table, "entries_for", lambda device: entries)

    def picked(length: int, kernels: frozenset[str]) -> Config | None:
        given: Any = {"head_dim": 64, "dtype": torch.float32, "device": CPU, "kernels": kernels}
        choice = choose("forward", shard_visibility(length), **given)
        return choice and choice.config

    assert [picked(length, FORWARD_KERNELS) for length in LENGTHS] == [SMALL, GLUON]
    assert [picked(length, frozenset({"flash_forward"})) for length in LENGTHS] == [SMALL, PLAIN]


def test_costs_of_all_directions_are_of_one_unit(small: None, all_right: None) -> None:
    times: Milliseconds = {DKDV: (2.0, 3.0), DQ: (1.5, 2.5), FUSED: (3.0, 5.0), PLAIN: (0.5, 0.25)}
    entries = tuned(times)
    assert len(entries) == 8
    for entry in entries:
        assert entry.cost is not None
        visited = table.pairs(entry.direction, races.mask(entry.direction, entry.length, CPU), entry.config)
        nanoseconds = entry.cost * races.HEADS * visited / 1e6
        assert nanoseconds / 1e6 == pytest.approx(times[entry.config][LENGTHS.index(entry.length)])


def test_what_is_not_tuned_now_stays(gpu: Any, all_right: None) -> None:
    file = gpu({PLAIN: (2, 2), DKDV: (1, 1), DQ: (1, 1)}, head_dims=(64, 80))
    assert run() == 0
    kept = [entry for entry in read_entries(file) if (entry.head_dim, entry.direction) != (80, "forward")]
    gpu({PLAIN: (1, 1), SMALL: (3, 3)}, head_dims=(64, 80))
    assert run("--head-dim", "80", "--direction", "forward") == 0
    after = read_entries(file)
    assert list(after[: len(kept)]) == kept
    new = {(entry.head_dim, entry.config, entry.length) for entry in after[len(kept) :]}
    assert new == {(80, config, length) for config in (PLAIN, SMALL) for length in LENGTHS}


def test_a_corrupt_table_is_told_and_replaced(gpu: Any, all_right: None) -> None:
    file = gpu({PLAIN: (1, 1)})
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert run() == 0
    assert len(read_entries(file)) == 2


def test_kernels_are_timed_on_the_shapes_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[int], list[int], int]] = []
    written = {"flash_dkdv": {"dk", "dv"}, "flash_dq": {"dq"}, "hopper_backward": {"dq", "dk", "dv"}}

    def launch(name: str, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> None:
        visibility = next(x for x in rest if isinstance(x, Visibility))
        calls.append((name, list(q.shape), list(k.shape), visibility.area))
        assert options.keys() - {"scale", "config", "add"} == written.get(name, {"final"})
        assert not options.get("dq", torch.zeros(1)).any() or name == "flash_dq"  # the fused one adds to zeros

    for name in ("flash_forward", "decode", *written):
        monkeypatch.setitem(attention_check.KERNELS, name, partial(launch, name))
    monkeypatch.setitem(attention_check.KERNELS, "prepare", lambda out, lse, dout, dlse: (lse, lse))
    monkeypatch.setattr(races, "LENGTHS", LENGTHS)
    monkeypatch.setattr(races, "TOKENS", 64)
    decode = Entry("decode", 64, "float16", 0, Config("decode", 1, 32, 4, 2), 1.0)
    entries = [*(candidate(config, dtype="float16") for config in (PLAIN, DKDV, DQ, FUSED)), decode]
    for race in races.races(entries):
        for call in races.launches(race, CPU):
            call()
    causal = [([64, 16, 64], [64, 4, 64], 2 * 32 * 33 // 2), ([256, 16, 64], [256, 4, 64], 256 * 257 // 2)]
    row = [([1, 16, 64], [32, 4, 64], 32), ([1, 16, 64], [256, 4, 64], 256)]
    assert calls == [
        *(("flash_forward", *shapes) for shapes in causal),  # two sequences of 32, one of 256
        *((name, *shapes) for shapes in causal for name in written),
        *(("decode", *shapes) for shapes in row),
    ]


# The kernels themselves, and processes


@pytest.mark.slow
def test_the_kernels_are_checked_and_timed_through_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (races, tune):
        monkeypatch.setattr(module, "LENGTHS", (16,))
    monkeypatch.setattr(races, "TOKENS", 32)
    monkeypatch.setattr(tune, "check_candidate", partial(attention_check.check_candidate, quick=True))
    entries = [e for e in table.checked_in("interpreter") if (e.head_dim, e.dtype) == (64, "float16")]
    *_, found = tune.tune(entries, CPU, together=directly, alone=directly, make_clock=lambda _: medians(fake_stopwatch))
    assert [entry.direction for entry in found] == ["forward", "decode", "dkdv", "dq"]
    assert all(entry.cost and re.fullmatch(r"measured on [\d-]+: 1 ms", entry.why) for entry in found)


def test_what_the_processes_get_can_be_sent() -> None:
    race = races.Race(1024, (candidate(PLAIN),))
    work = partial(races.measure, device=CPU, make_clock=races.clock_of), race
    assert pickle.loads(pickle.dumps(work))[1] == race
    unknown = candidate(Config("no_such_kernel", 32, 32, 4, 2))
    (outcome,) = in_processes(1, seconds=60)(partial(tune.check, device=CPU), [unknown])
    assert outcome == (unknown, None, "full, heads 2:2, whole: KeyError: 'no_such_kernel'")


# What is shown


def test_show_tells_what_runs_and_why(gpu: Any, all_right: None, capsys: pytest.CaptureFixture[str]) -> None:
    plain, gluon = "flash_forward 32x32, 8 warps, 2 stages", "hopper_forward 32x32, 4 warps, 2 stages"
    dkdv, dq, fused = (f"{name} 32x32, 8 warps, 2 stages" for name in ("flash_dkdv", "flash_dq", "hopper_backward"))
    file = gpu({PLAIN: (2, 2), GLUON: (1, 4), DKDV: (1, 1), DQ: (1, 1), FUSED: (1, 4)})
    assert run("--show") == 0
    unmeasured = capsys.readouterr().out
    assert f"not there: {file}. `longtake tune` writes it\n" in unmeasured
    assert f"forward   any length  {plain} (checked in); not measured, so not used: {gluon}\n" in unmeasured
    assert f"backward  any length  dkdv and dq; not measured, so not used: {fused}\n" in unmeasured

    assert run() == 0
    assert capsys.readouterr().out.endswith(f"wrote {file}\n")
    assert run("--show") == 0
    header, read, *lines = capsys.readouterr().out.splitlines()
    assert (header, read) == (f"Some GPU, Triton {tune.triton.__version__}", f"read {file}")
    measured = f"measured on {races.date.today().isoformat()}"
    place = "head_dim 64  float32   {:<9} {:>10}  "
    assert lines == [
        place.format("forward", "32 keys") + f"{gluon} ({measured}: 1 ms); next: {plain}, 2.00 x as much",
        place.format("forward", "256 keys") + f"{plain} ({measured}: 2 ms); next: {gluon}, 2.00 x as much",
        place.format("dkdv", "any length") + f"{dkdv} ({measured}: 1 ms)",
        place.format("dq", "any length") + f"{dq} ({measured}: 1 ms)",
        place.format("backward", "32 keys") + f"{fused} ({measured}: 1 ms); dkdv and dq: 2.00 x as much",
        place.format("backward", "256 keys") + f"dkdv and dq; {fused} ({measured}: 4 ms) takes 2.00 x as much",
    ]


def test_show_names_what_is_refused(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gpu({WRONG: (1, 1)})
    assert run() == 1
    capsys.readouterr()
    assert run("--show") == 0
    first, second = capsys.readouterr().out.splitlines()[2:]
    assert first.endswith("any length  nothing: no candidate is right")
    assert "flash_forward 32x32, 4 warps, 7 stages refused: full, heads 2:2, whole: out is off by 1.0e-02" in second


@pytest.mark.parametrize("arch", ["hopper", "ampere"])
def test_show_needs_no_gpu(arch: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tune, "find_gpu", lambda: None)
    tune.main(["--show", "--arch", arch, "--head-dim", "64", "--dtype", "bfloat16"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == f"checked in for {arch} GPUs, which runs where nothing is measured"
    listed = {e.direction for e in table.checked_in(arch) if (e.head_dim, e.dtype) == (64, "bfloat16")}
    shown = {line.split()[3]: line for line in lines if line.startswith("head_dim 64  bfloat16 ")}
    assert shown.keys() == listed
    assert not any("hopper_" in line.partition(";")[0] for line in shown.values())  # Gluon waits to be measured


# How it ends where it cannot start


def test_without_a_gpu_it_says_what_it_would_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "find_gpu", lambda: None)
    with pytest.raises(SystemExit) as ended:
        tune.main(["--head-dim", "64", "--dtype", "bfloat16", "--direction", "forward"])
    assert ended.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    wanted = "forward", 64, "bfloat16"
    number = sum((entry.direction, entry.head_dim, entry.dtype) == wanted for entry in table.checked_in("hopper"))
    work = f"{number} candidates to check, and to time on 1024, 8192, 65536 keys"
    assert f"no CUDA GPU here. On a hopper one: {work}; the table goes to {cache_file('').parent}" in first
    assert "`longtake tune --show`" in second


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--head-dim", "64,65"], "'65' is not one of 64, 72, 80, 96, 128, 256"),
        (["--direction", "dq"], "'dq' is not one of forward, decode, backward"),
        (["--arch", "hopper"], "--arch goes with --show"),
    ],
)
def test_bad_flags_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    assert message in capsys.readouterr().err


def test_nothing_to_tune_is_an_error(gpu: Any) -> None:
    gpu({PLAIN: (1, 1)})
    with pytest.raises(ValueError, match="no candidate on interpreter GPUs for what is asked"):
        run("--head-dim", "128")
