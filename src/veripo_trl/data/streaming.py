"""A video in turns: its windows, the memory of earlier ones, and the row that each turn asks.

At every window but the last the model writes a thought, of problem type "thought", from the window
and its memory of earlier thoughts; the question comes with the last window alone. Source:
https://github.com/1ranGuan/VST, arXiv 2603.12262. Otherwise than there, a window is of whole pairs
of frames and the last is never empty, the memory is bounded, and it stands behind the window, as
all text does here: the rollouts of a question share the window in every turn.
"""

from dataclasses import dataclass, field

NOTES = "Notes so far:"


def windows(frames: int, *, clip_tokens: int, pair_tokens: int) -> list[tuple[int, int]]:
    """(first, last excluded) of each turn, in pairs of frames: all pairs in order, as many in each
    window as `clip_tokens` have room for, at least one; the rest in the last.

    Args:
        pair_tokens: visual tokens of two frames.
    """
    pairs, size = -(-frames // 2), max(1, clip_tokens // pair_tokens)
    return [(start, min(start + size, pairs)) for start in range(0, pairs, size)]


def window_time(start_s: float, end_s: float) -> str:
    return f"Time={start_s:.1f}-{end_s:.1f}s"


@dataclass
class Memory:
    """Texts of earlier turns, the oldest out first.

    Args:
        max_tokens: of all entries together; None for no limit (and no tokenizer is needed), 0 for
            none kept.

    Attributes:
        evicted: how many entries have left. cut: how many were longer than `max_tokens` themselves
            and lost their end.
    """

    max_tokens: int | None = None
    entries: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    evicted: int = 0
    cut: int = 0

    def add(self, time: str, thought: str, tokenizer=None) -> None:
        entry = f"{time} {thought.strip()}\n"
        if self.max_tokens is None:
            self.entries.append(entry)
            return
        # as the prompt will have it: a control token that a thought spells is text
        ids = tokenizer(entry, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if len(ids) > self.max_tokens:
            self.cut += 1
            ids = ids[: self.max_tokens]
            entry = tokenizer.decode(ids).rstrip("\ufffd\n") + "\n"  # half a letter is none
        while self.entries and sum(self.sizes) + len(ids) > self.max_tokens:
            self.evicted += 1
            del self.entries[0], self.sizes[0]
        if ids:
            self.entries.append(entry)
            self.sizes.append(len(ids))

    @property
    def text(self) -> str:
        return "".join(self.entries)


def turn_row(row: dict, time: str, memory: str, *, last: bool) -> dict:
    """What a turn asks: the row itself in the last one, with time and memory before its problem;
    else a row without question, options and images, of type "thought"."""
    lines = [*([NOTES, memory.rstrip("\n")] if memory else []), time]
    if last:
        return {**row, "problem": "\n".join([*lines, row["problem"]])}
    asked = {"problem": "\n".join(lines), "options": [], "problem_type": "thought", "images": []}
    return {**row, **asked}


def taught_rows(row: dict, turns: list[tuple[str, str, dict]], *, last: str) -> list[dict]:
    """Rows of SFT, one a turn: each thought with the memory that it is written from, then the row
    with all of them.

    Args:
        turns: (time, thought, columns of its own, such as `videos`) of each window before the last.
        last: time of the last window, which is what `row` shows.
    """
    memory, rows = Memory(), []
    for time, thought, own in turns:
        asked = turn_row(row, time, memory.text, last=False)
        rows.append({**asked, "solution": thought, "process": thought, **own})
        memory.add(time, thought)
    return [*rows, turn_row(row, last, memory.text, last=True)]
