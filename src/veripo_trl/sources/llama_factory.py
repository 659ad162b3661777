"""Rows in the forms of LLaMA-Factory: sharegpt (also as OpenAI's messages) and alpaca, with videos.

Form: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md: conversations [{from: human or gpt,
value}] or messages [{role, content}], or instruction, input, output, history; system; videos and images,
marked by <video> and <image> in the text. What becomes of them, and the traps: `ms_swift`.
"""

from veripo_trl.sources.ms_swift import records, row_of_turns
from veripo_trl.sources.record import one_of, text

__all__ = ["convert", "records"]
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
ROLES |= {"observation": "tool", "function_call": "tool"}


def convert(record: dict, *, file: str) -> list[dict | str]:
    if "instruction" in record:
        asked = "\n".join(
            part for part in (text(record, "instruction"), record.get("input")) if part
        )
        turns = [
            pair
            for old in record.get("history") or []
            for pair in zip(("user", "assistant"), old, strict=True)
        ]
        turns += [("user", asked), ("assistant", record.get("output") or "")]
    elif "conversations" in record:
        turns = [
            (ROLES[one_of(turn, "from", ROLES)], turn["value"]) for turn in record["conversations"]
        ]
    else:
        turns = [
            (ROLES[one_of(turn, "role", ROLES)], turn["content"]) for turn in record["messages"]
        ]
    if record.get("system"):
        turns = [("system", record["system"]), *turns]
    return row_of_turns(turns, record)
