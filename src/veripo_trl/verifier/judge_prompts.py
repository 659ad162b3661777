"""What a language model is asked about a rollout, and what of its reply is believed.

The prompts are files of `verifier_prompts/`. The rollout is untrusted text: it stands between tags with a code that it
cannot know, and nothing in it can be a special token of the judge's chat template. The reply has one form; any other is
an unknown verdict.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from veripo_trl.answers.score import PROBLEM_TYPES, answers_match
from veripo_trl.errors import VeripoError
from veripo_trl.verifier.conclusions import in_own_form, same_text
from veripo_trl.verifier.judges import Judge, verdict

PROMPTS = Path(__file__).resolve().parents[3] / "verifier_prompts"
# About 5,000 tokens; of a longer thinking the judge sees the end, where it concludes.
MAX_THINK_CHARS = 20_000
MAX_ANSWER_CHARS = 2_000
MAX_REASON_CHARS = 300
_KINDS = {"concluded_answer": str | None, "consistent": bool | None, "reason": str}
# What is asked, by the placeholders of a prompt and their tags, and the judge's own names of `_KINDS`.
_ASKED = {
    "consistency": ({"thinking": "thinking", "answer": "given-answer", "options": "options"}, tuple(_KINDS)),
    "correctness": (
        {"question": "question", "truth": "right-answer", "answer": "given-answer"},
        ("extracted_answer", "correct", "reason"),
    ),
}


def reply_schema(asks: str = "consistency") -> dict:
    text, said, reason = _ASKED[asks][1]
    types = {text: ["string", "null"], said: ["boolean", "null"], reason: "string"}
    return {
        "type": "object",
        "properties": {name: {"type": type_} for name, type_ in types.items()},
        "required": list(types),
        "additionalProperties": False,
    }


_RENDERING = 1  # part of the version: raise it when `judge_messages` renders a prompt differently
# Begins a tag or a special token in some chat template: <|im_end|>, </s>, <start_of_turn>, <｜User｜>, [/INST].
_TAG = re.compile(r"<(?=[A-Za-z/|!｜▁])|\[(?=/?[A-Z_]{3,}\])")
_SURROGATE = re.compile("[\ud800-\udfff]")


class JudgePromptError(VeripoError):
    """A judge's prompt file that cannot be used."""


class ReplyError(ValueError):
    """A judge's reply without a readable verdict. `cause`: a few words to count it under."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


@dataclass(frozen=True)
class JudgePrompt:
    """A parsed prompt file. `version`: 16 hex digits over the content, without the file's comments. `asks`:
    "consistency" of thinking and answer, or "correctness" of an answer beside the truth, by its placeholders."""

    system: str
    user: str
    version: str
    asks: str = "consistency"


def load_judge_prompt(name: str | Path) -> JudgePrompt:
    """Read a prompt file: a path, or one of `verifier_prompts/` by its name.

    Raises:
        JudgePromptError: no such file, not YAML, or keys and placeholders other than expected.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        path = PROMPTS / f"{str(path).removesuffix('.yaml')}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JudgePromptError(
            f"judge prompt {path}: expected a YAML file such as consistency.yaml: {error}"
        ) from error
    fits = isinstance(content, dict) and all(isinstance(text, str) for text in content.values())
    fits = fits and content.keys() == {"system", "user"}
    asks = "correctness" if fits and "{truth}" in content["user"] else "consistency"
    tags = _ASKED[asks][0]
    if not fits or any(content["user"].count(f"{{{part}}}") != 1 for part in tags):
        raise JudgePromptError(
            f"judge prompt {path}: expected two texts, system and user, and in user exactly once each of "
            f"{', '.join(f'{{{part}}}' for part in tags)}; came {content!r:.200}."
        )
    versioned = {"rendering": _RENDERING, "schema": reply_schema(asks), **content}
    version = hashlib.sha256(json.dumps(versioned, sort_keys=True).encode()).hexdigest()[:16]
    return JudgePrompt(content["system"].strip(), content["user"].strip(), version, asks)


# ------------------------------------------------------------------------------------------------------- asking


def judged_text(item: dict) -> str:
    """All that a judge may see of an item, in one canonical text: what verdicts are cached by."""
    think, options = item["think"], list(item["options"] or ())
    left_out = max(len(think) - MAX_THINK_CHARS, 0)
    own = [item["question"]] if "question" in item else []
    return json.dumps([think[left_out:], left_out, item["answer"], options, *own], ensure_ascii=False)


def harmless(text: str) -> str:
    """`text` without anything that opens or closes a tag or is a special token: "<|im_end|>" becomes "‹|im_end|>"."""
    return _TAG.sub(lambda match: {"<": "‹", "[": "［"}[match[0]], text)


def judge_messages(prompt: JudgePrompt, item: dict) -> list[dict[str, str]]:
    """The chat messages for one item: `think`, `answer` (texts) and `options` (list or None); of a prompt that asks for
    correctness `question` too, and `think` is the truth."""
    if prompt.asks == "correctness" and "question" not in item:
        raise JudgePromptError("judge prompt: expected one with {thinking}; with {truth} it asks for correctness.")
    # The code depends on the text alone, so that the same text is the same request.
    code = hashlib.sha256(judged_text(item).encode("utf-8", "replace")).hexdigest()[:16]
    think, options = item["think"], "\n".join(item["options"] or ())
    left_out = max(len(think) - MAX_THINK_CHARS, 0)
    note = f"[The first {left_out} characters are left out here.]\n" if left_out else ""
    texts = {"thinking": note + think[left_out:], "answer": item["answer"], "options": options}
    texts |= {"truth": think, "question": item.get("question", "")}
    values = {"code": code}
    for part, tag in _ASKED[prompt.asks][0].items():
        tagged = f"<{tag}-{code}>\n{harmless(texts[part])}\n</{tag}-{code}>"
        values[part] = tagged if texts[part] else ""
    lines = [line for line in prompt.user.split("\n") if options or line.strip() != "{options}"]
    # One pass: braces in a rollout are text, never placeholders.
    pattern, user = rf"\{{({'|'.join(values)})\}}", "\n".join(lines)
    user = re.sub(pattern, lambda match: values[match[1]], user)
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": user}]


# ------------------------------------------------------------------------------------------------------ reading


def _pairs(pairs: list[tuple]) -> dict | list:
    """An object; if a key occurs twice, its pairs, which no schema fits."""
    return dict(pairs) if len(dict(pairs)) == len(pairs) else pairs


def read_reply(text: object, asks: str = "consistency") -> dict:
    """The reply as `{"concluded_answer", "consistent", "reason"}`, whatever names a prompt that asks for something
    else has for them: the whole text must be that one JSON object.

    White space, one code fence and a leading `<think>…</think>` around it are accepted.

    Raises:
        ReplyError: anything else, with the cause "no text", "not JSON" or "wrong schema".
    """
    text = text.strip() if isinstance(text, str) else ""
    if not text:
        raise ReplyError("no text")
    body = re.sub(r"^<think>.*?</think>\s*", "", text, flags=re.S)
    # In a time that grows with the text alone, however many empty lines it has.
    body = re.sub(r"^```(?:json)?[^\S\n]*\n(.*)\n[^\S\n]*```$", r"\1", body, flags=re.S)
    try:
        reply = json.loads(body, object_pairs_hook=_pairs)
    # A plain ValueError: an integer of more digits than Python converts.
    except (ValueError, RecursionError) as error:
        raise ReplyError("not JSON", f"{error} in {text!r:.80}") from None
    if asks != "consistency" and isinstance(reply, dict):
        names = dict(zip(_ASKED[asks][1], _KINDS, strict=True))
        reply = {names.get(key, f"another: {key}"): value for key, value in reply.items()}
    return check_reply(reply)


def check_reply(reply: object) -> dict:
    """A parsed reply, its reason on one line and not too long; what this returns passes unchanged.

    Raises:
        ReplyError: other keys or types than the schema's, or text that is no Unicode, with the cause "wrong schema".
    """
    if not isinstance(reply, dict) or reply.keys() != _KINDS.keys():
        expected = f"expected the keys {', '.join(_KINDS)}"
        raise ReplyError("wrong schema", f"{expected}, came {reply!r:.80}")
    for key, kind in _KINDS.items():
        # JSON may spell half of a surrogate pair; no file of verdicts could hold it.
        if not isinstance(reply[key], kind) or _SURROGATE.search(str(reply[key])):
            raise ReplyError("wrong schema", f"{key} is {ascii(reply[key]):.80}")
    if (length := len(reply["concluded_answer"] or "")) > MAX_ANSWER_CHARS:
        raise ReplyError("wrong schema", f"concluded_answer has {length} characters")
    reason = " ".join(reply["reason"].split())
    if len(reason) > MAX_REASON_CHARS:
        reason = f"{reason[:MAX_REASON_CHARS]}…"
    return {**reply, "reason": reason}


def settle(reply: dict, item: dict) -> dict:
    """The verdict `{"consistency", "concluded_answer", "reason"}` on an item from a judge's readable reply.

    The judge says what the thinking concludes; whether that is the given answer is compared here, as the reward compares
    (`score.answers_match`). Where the judge's own `consistent` says otherwise, it contradicts itself and the verdict
    is unknown. A reason begins with the cause, up to a colon, unless the verdict is known.

    An item with a `question` was judged for correctness, with the truth as `think` (several are right: one a line):
    "consistent" is right.
    """
    concluded, said, reason = reply["concluded_answer"], reply["consistent"], reply["reason"]
    kind, options, answer = item["problem_type"], item["options"], item["answer"]

    if "question" in item:  # is the answer right? The judge alone decides, unless it refuses the truth's own words
        unclear = "undecided" if said is None else None
        if said is False and any(answers_match(answer, truth, problem_type=kind) for truth in item["think"].split("\n")):
            unclear = "contradiction"
        known = "consistent" if said else "inconsistent"
        return verdict("unknown", concluded, f"{unclear}: {reason}") if unclear else verdict(known, concluded, reason)
    concluded = (concluded or "").replace("‹", "<").replace("［", "[").strip() or None
    concluded, unclear = concluded and in_own_form(concluded, kind, options), None
    if concluded is None:
        unclear = "no conclusion" if said is None else "contradiction"
    elif said is None:
        unclear = "undecided"
    elif PROBLEM_TYPES[kind].read(concluded, options) is None:
        unclear = "unreadable conclusion"
    elif kind in ("OCR", "free-form"):
        same = same_text(concluded, answer, exact=kind == "OCR")
        same = said if same is None else same  # which may say the same in other words
    else:
        same = answers_match(concluded, answer, problem_type=kind, options=options)
    if unclear or same != said:
        return verdict("unknown", concluded, f"{unclear or 'contradiction'}: {reason}")
    return verdict("consistent" if same else "inconsistent", concluded, reason)


class ModelJudge(Judge):
    """What the judges that are language models share: their prompt, and how a reply becomes a verdict."""

    caches = True

    def __init__(self, prompt: JudgePrompt):
        super().__init__()
        self.prompt, self.prompt_version = prompt, prompt.version

    def identify(self, shown: str, *asked_with) -> None:
        """Set the name: `shown`, and a digest of all that another reply is to be expected from."""
        text = json.dumps([*asked_with, MAX_THINK_CHARS], sort_keys=True)
        self.name = f"{shown}:{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def read(self, item: dict, text: str | None, *, cut_off: bool) -> dict:
        """The verdict from a reply's text."""
        if cut_off:
            return self.unknown(ReplyError("cut off", "the reply reached the limit on its tokens"))
        try:
            reply = read_reply(text, self.prompt.asks)
        except ReplyError as error:
            return self.unknown(error)
        settled = settle(reply, item)
        if settled["consistency"] == "unknown" and settled["reason"].startswith("contradiction:"):
            self.failures["contradiction"] += 1
        return {**settled, "reply": reply}

    def unknown(self, error: ReplyError) -> dict:
        """The verdict without a readable reply: counted, not cached, and so asked for again by the next run."""
        self.failures[error.cause] += 1
        return {**verdict("unknown", None, str(error)), "reply": None}

    def summary(self) -> str:
        """One line: prompts, and verdicts that are unknown because of the judge, by cause."""
        causes = ", ".join(f"{cause} {count:,}" for cause, count in self.failures.most_common())
        usable = f"without a usable verdict: {causes}." if causes else "every reply was readable."
        return f"{self.asked()}; {usable}"

    def asked(self) -> str:
        return f"{self.requests:,} prompts"
