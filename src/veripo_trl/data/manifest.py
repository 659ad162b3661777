"""The manifest that the check command writes: which rows are bad, and why."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from veripo_trl.data.files import read_file
from veripo_trl.data.schema import SHOWN, RowError, is_id, show
from veripo_trl.files.tables import printable

logger = logging.getLogger(__name__)


def read_manifest(path: str) -> dict[str, dict[str, Any]]:
    """{question_id: its line} of a manifest: JSONL, first line {"manifest": 1, …}, then {"question_id", "ok", "reason"
    (of bad rows), "content" (of good ones), …} a row. Of two lines for one id the bad one counts."""
    records = [record for _, _, record in read_file(Path(path))]
    if not isinstance(records[0], dict) or records[0].get("manifest") != 1:
        raise RowError(
            f'{path}: not a manifest (expected the first line {{"manifest": 1, …}}, came {show(records[0])}).'
        )
    verdicts: dict[str, dict[str, Any]] = {}
    for number, record in enumerate(records[1:], start=2):
        if not (isinstance(record, dict) and is_id(record.get("question_id")) and isinstance(record.get("ok"), bool)):
            raise RowError(f"{path}, entry {number}: expected {{question_id, ok, reason}}, came {show(record)}.")
        question_id = str(record["question_id"])
        if not record["ok"]:
            verdicts[question_id] = {**record, "reason": str(record.get("reason") or "no reason given")}
        else:
            verdicts.setdefault(question_id, {**record, "reason": None})
    return verdicts


def report_dropped(manifest: str, unknown: list, dropped: Counter, kept: int) -> None:
    if unknown:
        ids = ", ".join(map(repr, unknown[:5]))
        raise RowError(
            f"{manifest} does not know {len(unknown)} rows ({ids}, …), and knows {kept + dropped.total()}. If it is the "
            f"manifest of this data, run the check command again."
        )
    if dropped:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in dropped.most_common(SHOWN))
        logger.warning("%s: kept %d rows, dropped %d (%s)", manifest, kept, dropped.total(), printable(reasons))
