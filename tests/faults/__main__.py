"""The fault campaign by hand:

python -m tests.faults --faults 200 --seed 0              so many faults over all commands; a table in Markdown
python -m tests.faults --only mtt podd --kinds kill flip  of these methods and kinds
python -m tests.faults --again mtt/distill/flip/17        one fault of that seed once more, and all that is known of it
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.campaign import BAD, FAULTS, Campaign, Outcome, quiet_threads
from tests.faults.table import collect, document, table
from tests.faults.worlds import WORLDS, cases


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=WORLDS, default=[*WORLDS], help="methods")
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=[*FAULTS])
    parser.add_argument("--again", default="", help="a fault by its name, method/verb/kind/number")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no fault after so long")
    parser.add_argument("--rows", type=Path, help="add what came of each fault to this file")
    parser.add_argument("--write", nargs="+", type=Path, metavar="FILE", help="write docs/faults.md from such files")
    args = parser.parse_args(words)
    if args.write:
        document(collect(args.write))
        return 0
    outcomes = campaign(args)
    print("\n" + table([(one.case.method, one.case.verb, one.kind, one.result) for one in outcomes]))
    return int(any(one.result in BAD for one in outcomes))


def campaign(args: argparse.Namespace) -> list[Outcome]:
    began, outcomes = time.monotonic(), []
    method, label, kind, number = args.again.split("/") if args.again else ("", "", "", 0)
    wanted = [case for case in cases() if case.method in ([method] if method else args.only)]
    with tempfile.TemporaryDirectory(prefix="faults") as folder, quiet_threads():
        Path(folder).chmod(0o755)
        fleet = Campaign(Path(folder), args.seed)
        ready = list(fleet.prepare(wanted))
        print(f"{len(ready)} commands, prepared in {time.monotonic() - began:.0f} s", flush=True)
        if method:
            (one,) = (one for one in ready if one.case.name == f"{method}/{label}")
            outcomes.append(fleet.trial(one, kind, int(number)))
            print(outcomes[-1].result, outcomes[-1].note)
            return outcomes
        for number in range(args.faults):
            if time.monotonic() - began > 60 * args.minutes:
                break
            turn, one = divmod(number, len(ready))
            # The kinds begin elsewhere for each command, so that a short campaign has some of all.
            kind = args.kinds[(turn + one) % len(args.kinds)]
            outcomes.append(fleet.trial(ready[one], kind, turn))
            note(outcomes[-1], args)
    return outcomes


def note(one: Outcome, args: argparse.Namespace) -> None:
    print(f"{one.name}: {one.result}{' ' + one.note if one.result in BAD else ''}", flush=True)
    if one.result in BAD:
        print(f"  once more: python -m tests.faults --seed {args.seed} --again {one.name}", flush=True)
    if args.rows:
        with open(args.rows, "a", encoding="utf-8") as file:
            row = (
                args.seed,
                one.name,
                one.case.method,
                one.case.verb,
                one.kind,
                one.result,
                " ".join(one.note.split()),
            )
            file.write("\t".join(map(str, row)) + "\n")


if __name__ == "__main__":
    sys.exit(main())
