"""Tables on the screen and JSON on the disk."""

import json
import math
import re
import sys
from pathlib import Path

from veripo_trl.files.disk import write_whole

# All but line ends and tabs: a terminal would obey what a file's name, a row or a model brings along.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# What a URL may hold of a secret: a login, and the signature or token of its query.
_LOGIN, _QUERY = re.compile(r"(?<=://)[^/?#\s]*@"), re.compile(r"(https?://[^\s?'\"]*\?)[^\s'\"]+", re.IGNORECASE)


def printable(text: str) -> str:
    """A text for the screen: control characters spelled out, as `\\x1b`, and the secrets of URLs left out."""
    text = _QUERY.sub(r"\1…", _LOGIN.sub("…@", text))
    return CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def write_json(path: str | Path, content) -> None:
    """Write JSON whole or not at all, to the disk itself; NaN becomes null."""
    write_whole(path, (json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n").encode())


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
    if (value := finite(value)) is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return printable(str(value))
