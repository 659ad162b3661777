"""Tables on the screen and JSON on the disk."""

import json
import math
import os
import sys
from pathlib import Path


def write_json(path: str | Path, content) -> None:
    """Write JSON whole or not at all; NaN becomes null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def finite(value):
    """The value with null for what JSON has no form of: NaN and infinities, anywhere in it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(title: str, rows: list[dict]) -> None:
    """Print dicts of one shape as a table, the first column at the left."""
    columns = list(rows[0])
    cells = [columns] + [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    print(f"\n{title}")
    for number, line in enumerate(cells):
        first, rest = line[0].ljust(widths[0]), [cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([first, *rest]))
        if number == 0:
            print("  ".join("-" * width for width in widths))
    sys.stdout.flush()


def _cell(value) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)
