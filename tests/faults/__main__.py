"""`python -m tests.faults [FAMILY ...]`: family, tried, survived; exit code 1 where one was not."""

import sys

from tests.faults import FAULTS
from tests.faults.catalogue import load


def main(chosen: list[str]) -> int:
    """Run the faults, all or those of the chosen families, and print the table."""
    load()
    table: dict[str, list[int]] = {}
    failed = []
    for each in FAULTS:
        if chosen and each.family not in chosen:
            continue
        lost = each.run()
        failed += lost
        row = table.setdefault(each.family, [0, 0])
        row[0] += each.tries
        row[1] += each.tries - len(lost)
    width = max(map(len, [*table, "Family"]))
    sys.stdout.write(f"{'Family':<{width}}  Tried  Survived\n")
    for family, (tried, survived) in table.items():
        sys.stdout.write(f"{family:<{width}}  {tried:>5,}  {survived:>8,}\n")
    for line in failed:
        sys.stderr.write(f"{line}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
