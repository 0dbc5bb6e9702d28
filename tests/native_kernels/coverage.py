"""Which lines of the C kernels each path runs, by gcov. `make native-coverage` publishes the table.

python -m native_kernels.coverage
"""

import gzip
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from native_kernels.paths import PATHS, SOURCES, KernelPath

REPORT = Path(__file__).resolve().parents[2] / "benchmarks/results/native-coverage.md"


@dataclass(frozen=True)
class Coverage:
    """Of each file of kernels that a path compiles: its lines, and those that were not run."""

    lines: dict[str, int]
    missed: dict[str, list[int]]

    @property
    def percent(self) -> float:
        missed = sum(map(len, self.missed.values()))
        return 100 * (1 - missed / sum(self.lines.values()))

    def of(self, name: str) -> str:
        """The percentage of one file; "" where the path compiles none of it."""
        if name not in self.lines:
            return ""
        return f"{100 * (1 - len(self.missed[name]) / self.lines[name]):.0f}"

    def missed_lines(self) -> list[str]:
        """The lines that were not run, as FILE:LINE, the text."""
        return [
            f"{name}:{line}: {(SOURCES / name).read_text().splitlines()[line - 1].strip()}"
            for name, lines in sorted(self.missed.items())
            for line in lines
        ]


def measured(path: KernelPath, folder: Path) -> tuple[list[str], Coverage]:
    """Run all cases of a path in `folder`. Returns the failures, and what was covered."""
    driver = path.build(folder, "-O0", "--coverage", "-fprofile-update=atomic")
    failures = list(path.failures(driver, folder))
    data = sorted(str(file) for file in folder.glob("*.gcda"))
    command = [path.gcov, "--json-format", "--stdout", *data]
    done = subprocess.run(command, check=True, capture_output=True, cwd=folder)
    return failures, _merged(done.stdout)


def _merged(reports: bytes) -> Coverage:
    """One report a source file: a line of a header was run if it was in any of them."""
    counts: dict[str, dict[int, int]] = {}
    text = gzip.decompress(reports) if reports[:2] == b"\x1f\x8b" else reports
    for report in text.splitlines():
        for file in json.loads(report)["files"]:
            path = Path(file["file"])
            if path.parent != SOURCES:
                continue
            of_file = counts.setdefault(path.name, {})
            for line in file["lines"]:
                number = line["line_number"]
                of_file[number] = of_file.get(number, 0) + line["count"]
    missed = {
        name: [number for number, count in sorted(lines.items()) if not count]
        for name, lines in counts.items()
    }
    return Coverage({name: len(lines) for name, lines in counts.items()}, missed)


def table(found: dict[str, Coverage]) -> str:
    """Markdown: a row for each file, a column for each path."""
    names = sorted({name for coverage in found.values() for name in coverage.lines})
    rows = [["", *found], ["---", *("--:" for _ in found)]]
    rows += [[name, *(coverage.of(name) for coverage in found.values())] for name in names]
    rows.append(["lines", *(str(sum(one.lines.values())) for one in found.values())])
    rows.append(["covered, %", *(f"{one.percent:.1f}" for one in found.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report(found: dict[str, Coverage], skipped: Sequence[KernelPath]) -> str:
    missed = [f"- {name}: `{line}`" for name, one in found.items() for line in one.missed_lines()]
    emulated = [path.name for path in PATHS if path.name in found and not path.is_here]
    return "\n".join(
        [
            "# Line coverage of the C kernels",
            "",
            f"{date.today()}, `make native-coverage`: percent of the lines that a path compiles",
            "and that the cases of `tests/native_kernels` run, by gcov. Empty: it does not compile",
            f"the file. Run by qemu-user: {', '.join(emulated) or 'none'}.",
            *(f"Not run: {path.name} ({path.missing})." for path in skipped),
            "",
            table(found),
            "",
            "Lines that no case runs:" if missed else "No line is left.",
            "",
            *missed,
            "",
        ]
    ).replace("\n\n\n", "\n\n")


def main() -> None:
    found = {}
    skipped = [path for path in PATHS if path.missing]
    for path in PATHS:
        if path in skipped:
            print(f"{path.name}: skipped: {path.missing}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            failures, found[path.name] = measured(path, Path(folder))
        print(f"{path.name}: {found[path.name].percent:.1f} %", *failures, sep="\n  ")
    REPORT.write_text(report(found, skipped).rstrip("\n") + "\n")
    print(f"written: {REPORT}")


if __name__ == "__main__":
    main()
