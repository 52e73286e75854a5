"""Holds the ratios of a run against those that were accepted last.

    python -m benchmarks.guard                    compare the last run's ratios once more
    python -m benchmarks.guard --accept [NAME …]  accept them, all or those named

A change is told when it is over 30 %, or over 15 % where all of at least five rounds agree on it.
Less is better for every ratio.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.figures import Section, Table

ACCEPTED = Path(__file__).parent / "accepted.json"
LAST_RUN = Path(__file__).parent / "out" / "ratios.json"

LARGE = 1.30
AGREED = 1.15
AGREEING_ROUNDS = 5

Rounds = Mapping[str, Sequence[float]]

_METHOD = """\
Ratios of this run beside those in `benchmarks/accepted.json`, of {date}. A change is told when it
is over 30 %, or over 15 % where all of at least five rounds agree. `make bench-accept` accepts the
ratios of the last run."""


class Verdict(StrEnum):
    """What has become of a ratio."""

    SAME = "as accepted"
    WORSE = "WORSE"
    BETTER = "better"
    NEW = "not accepted yet"


@dataclass(frozen=True)
class Finding:
    """One ratio beside the accepted one."""

    name: str
    accepted: float | None
    measured: float
    verdict: Verdict

    def cells(self) -> list[str]:
        if self.accepted is None:
            return [self.name, "", f"{self.measured:.2f}", "", self.verdict]
        change = self.measured / self.accepted - 1
        accepted, measured = f"{self.accepted:.2f}", f"{self.measured:.2f}"
        return [self.name, accepted, measured, f"{change:+.0%}", self.verdict]


def judge(accepted: Mapping[str, float], measured: Rounds) -> list[Finding]:
    """Compare each measured ratio with the accepted one of its name, in their order."""
    findings = []
    for name, rounds in measured.items():
        before = accepted.get(name)
        verdict = Verdict.NEW if before is None else _verdict(before, rounds)
        findings.append(Finding(name, before, median(rounds), verdict))
    return findings


def _verdict(accepted: float, rounds: Sequence[float]) -> Verdict:
    now = median(rounds) / accepted
    agree = len(rounds) >= AGREEING_ROUNDS
    if now > LARGE or (agree and min(rounds) / accepted > AGREED):
        return Verdict.WORSE
    if now < 1 / LARGE or (agree and max(rounds) / accepted < 1 / AGREED):
        return Verdict.BETTER
    return Verdict.SAME


def compare(measured: Rounds, path: Path = ACCEPTED) -> tuple[Section, bool]:
    """Give what is to be said about a run, and whether something has become worse."""
    book = _read(path)
    findings = judge(book.get("ratios", {}), measured)
    table = Table(["ratio", "accepted", "measured", "change", ""])
    table.rows = [finding.cells() for finding in findings]
    section = Section("guard", "Beside the accepted ratios", "", tables=[table])
    section.method = _METHOD.format(date=book.get("date", "no run so far"))
    worse = [finding.name for finding in findings if finding.verdict is Verdict.WORSE]
    if worse:
        section.notes.append("Worse than accepted: " + ", ".join(worse) + ".")
    return section, bool(worse)


def remember(measured: Rounds, path: Path = LAST_RUN) -> None:
    """Keep a run's ratios for ``--accept``; those of measurements that were left out stay."""
    path.parent.mkdir(exist_ok=True)
    kept = _read(path)
    kept.update({name: list(rounds) for name, rounds in measured.items()})
    path.write_text(json.dumps(kept, indent=2) + "\n")


def accept(
    names: Sequence[str] = (), *, last_run: Path = LAST_RUN, path: Path = ACCEPTED
) -> list[str]:
    """Take over the last run's ratios, all of them or those named.

    Returns:
        The names that were accepted.

    Raises:
        KeyError: The last run has no ratio of a name, or there was none.
    """
    measured: Rounds = _read(last_run)
    if not measured:
        raise KeyError("there was no run; `make bench` makes one")
    unknown = sorted(set(names) - set(measured))
    if unknown:
        raise KeyError(f"the last run has no {', '.join(unknown)}")
    chosen = list(names) or list(measured)
    ratios = _read(path).get("ratios", {}) if names else {}
    ratios.update({name: round(median(measured[name]), 3) for name in chosen})
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    book = {"date": date, "ratios": dict(sorted(ratios.items()))}
    path.write_text(json.dumps(book, indent=2) + "\n")
    return chosen


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__)
    parser.add_argument("--accept", nargs="*", metavar="NAME", help="accept the last run's ratios")
    options = parser.parse_args()
    if options.accept is None:
        section, is_worse = compare(_read(LAST_RUN))
        print(section.markdown())
        return 1 if is_worse else 0
    try:
        names = accept(options.accept)
    except KeyError as error:
        print(f"Error: {error.args[0]}.", file=sys.stderr)
        return 1
    print(f"Accepted: {', '.join(names)}. Written: {ACCEPTED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
