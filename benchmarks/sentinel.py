"""Compile the programs of benchmarks/pods.json again and fail where memory, cycles or bytes sent changed by over 2 %.

    make sentinel                                                  # about two minutes a program on two cores
    JAX_PLATFORMS=cpu python benchmarks/sentinel.py [--only NAME] [--update] [--fresh]

--update writes the new figures into the file; --fresh reads no programs that were compiled before.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from rlhf.plan.sentinel import as_json, changes, figures, read
from rlhf.plan.verdict import ask
from sharding.chips import CHIPS
from sharding.described import compiler_version, missing_compiler
from sharding.disk.directory import write_json
from sharding.errors import UserError

FILE = Path(__file__).with_name("pods.json")
CACHE = Path("~/.cache/glm-jax/programs").expanduser()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names that contain this")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args()
    if compiler_version(CHIPS["v5e"]) is None:
        raise UserError(f"{missing_compiler(CHIPS['v5e'])}: make sentinel brings it")
    watched, failed = read(FILE), False
    with tempfile.TemporaryDirectory() as fresh:
        for name, (what, kept) in watched.items():
            if args.only and args.only not in name:
                continue
            began = time.time()
            now = figures(ask(what.request(), Path(fresh) if args.fresh else CACHE))
            found = list(changes(kept, now))
            print(
                f"{name}: {'changed' if found else 'as it was'} ({time.time() - began:.0f} s)",
                flush=True,
            )
            for line in found:
                print(f"  {line}")
            failed = failed or bool(found)
            if args.update:
                watched[name] = (what, now)
                write_json(FILE, as_json(watched))
    return int(failed and not args.update)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"sentinel: {error}")
