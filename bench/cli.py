"""The `longtake` command: each subcommand is the `main(argv)` of the module that does the work."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": ("longtake.bench.demo", "train a tiny model through all five stages and find needles, on this machine"),
    "train": ("longtake.train.command", "train one stage from a TOML file"),
    "pack": ("longtake.train.pack", "text, raw or tokenised, into one file for stage 4"),
    "generate": ("longtake.infer.generate", "ask about a video"),
    "needle": ("longtake.infer.needle_command", "needle in a haystack: frames x depths"),
    "convert": ("longtake.infer.convert", "between official LongVILA checkpoints and ours"),
    "doctor": ("longtake.bench.doctor", "whether training would run on this machine; if not, what cures it"),
    "tune": ("longtake.bench.tune", "find out which attention kernels are right and fastest on this GPU, once"),
    "bench": (None, "one microbenchmark: attention, ring, comm, step, loader, layout, compiled, decode"),
}
BENCHMARKS = ("attention", "ring", "comm", "step", "loader", "layout", "compiled", "decode")


def usage() -> str:
    """What `longtake --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: longtake COMMAND [--help]\n\n" + "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand. Exit codes: 1 and one line on stderr for a user's mistake, 2 for bad usage, 130 for Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] in (["--help"], ["-h"]):
        print(usage())
        return
    if not args or args[0] not in COMMANDS:
        sys.exit(_bad_usage(f"unknown command {args[0]!r}" if args else "no command", usage()))
    command, *rest = args
    module = COMMANDS[command][0]
    if module is None:
        if not rest or rest[0] not in BENCHMARKS:
            names = f"usage: longtake bench NAME [--json FILE], NAME one of {', '.join(BENCHMARKS)}"
            if rest[:1] in (["--help"], ["-h"]):
                print(names)
                return
            sys.exit(_bad_usage(f"unknown benchmark {rest[0]!r}" if rest else "no benchmark", names))
        module, rest = f"longtake.bench.{rest[0]}", rest[1:]
    try:
        importlib.import_module(module).main(rest)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"longtake {command}: {error}", file=sys.stderr)
        sys.exit(1)


def _bad_usage(problem: str, text: str) -> int:
    print(f"longtake: {problem}\n{text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
