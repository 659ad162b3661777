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

from veripo_trl.answers.choice import read_choice
from veripo_trl.answers.numbers import read_number
from veripo_trl.answers.score import answers_match
from veripo_trl.errors import VeripoError
from veripo_trl.verifier.conclusions import same_text
from veripo_trl.verifier.judges import Judge

MAX_THINK_CHARS = 20_000  # about 5,000 tokens; of a longer thinking the judge sees the end, where it concludes
MAX_ANSWER_CHARS = 2_000
MAX_REPLY_CHARS = 20_000
MAX_REASON_CHARS = 300
REPLY_SCHEMA = {
    "type": "object",
    "properties": {
        "concluded_answer": {"type": ["string", "null"]},
        "consistent": {"type": ["boolean", "null"]},
        "reason": {"type": "string"},
    },
    "required": ["concluded_answer", "consistent", "reason"],
    "additionalProperties": False,
}
_PARTS = {"thinking": "thinking", "answer": "given-answer", "options": "options"}  # placeholder: tag
_RENDERING = 1  # part of the version: raise it when `judge_messages` renders a prompt differently
# Begins a tag or a special token in some chat template: <|im_end|>, </s>, <start_of_turn>, <｜User｜>, [/INST].
_TAG = re.compile(r"<(?=[A-Za-z/|!｜▁])")
_SURROGATE = re.compile("[\ud800-\udfff]")
_BRACKET_TAG = re.compile(r"\[(?=/?[A-Z_]{3,}\])")


class JudgePromptError(VeripoError):
    """A judge's prompt file that cannot be used."""


class ReplyError(ValueError):
    """A judge's reply without a readable verdict. `cause`: a few words to count it under."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


@dataclass(frozen=True)
class JudgePrompt:
    """A parsed prompt file. `version`: 16 hex digits over the content, without the file's comments."""

    system: str
    user: str
    version: str


def load_judge_prompt(path: str | Path) -> JudgePrompt:
    """Read a prompt file.

    Raises:
        JudgePromptError: no such file, not YAML, or keys and placeholders other than expected.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JudgePromptError(f"judge prompt {path}: expected a YAML file such as consistency.yaml: {error}") from error
    texts = isinstance(content, dict) and all(isinstance(text, str) for text in content.values())
    if not texts or set(content) != {"system", "user"} or any(content["user"].count(f"{{{p}}}") != 1 for p in _PARTS):
        raise JudgePromptError(
            f"judge prompt {path}: expected two texts, system and user, and in user exactly once each of "
            f"{', '.join(f'{{{part}}}' for part in _PARTS)}; came {content!r:.200}."
        )
    canonical = json.dumps({"rendering": _RENDERING, "schema": REPLY_SCHEMA, **content}, sort_keys=True)
    version = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    return JudgePrompt(system=content["system"].strip(), user=content["user"].strip(), version=version)


# ------------------------------------------------------------------------------------------------------- asking


def judged_text(item: dict) -> str:
    """All that a judge may see of an item, in one canonical text: what verdicts are cached by."""
    think = item["think"]
    parts = [think[-MAX_THINK_CHARS:], max(len(think) - MAX_THINK_CHARS, 0), item["answer"], list(item["options"] or ())]
    return json.dumps(parts, ensure_ascii=False)


def harmless(text: str) -> str:
    """`text` without anything that opens or closes a tag or is a special token: "<|im_end|>" becomes "‹|im_end|>"."""
    return _BRACKET_TAG.sub("［", _TAG.sub("‹", text))


def judge_messages(prompt: JudgePrompt, item: dict) -> list[dict[str, str]]:
    """The chat messages for one item: `think`, `answer` (texts) and `options` (list or None)."""
    # The code depends on the text alone, so that the same text is the same request.
    code = hashlib.sha256(judged_text(item).encode("utf-8", "replace")).hexdigest()[:16]
    think, options = item["think"], "\n".join(item["options"] or ())
    left_out = len(think) - MAX_THINK_CHARS
    if left_out > 0:
        think = f"[The first {left_out} characters are left out here.]\n{think[-MAX_THINK_CHARS:]}"
    texts = {"thinking": think, "answer": item["answer"], "options": options}
    values = {
        name: f"<{tag}-{code}>\n{harmless(texts[name])}\n</{tag}-{code}>" if texts[name] else ""
        for name, tag in _PARTS.items()
    }
    lines = [line for line in prompt.user.split("\n") if options or line.strip() != "{options}"]
    values["code"] = code
    # One pass: braces in a rollout are text, never placeholders.
    text = re.sub(r"\{(thinking|answer|options|code)\}", lambda match: values[match[1]], "\n".join(lines))
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": text}]


# ------------------------------------------------------------------------------------------------------ reading


def _no_double_keys(pairs: list[tuple]) -> dict:
    if len(dict(pairs)) != len(pairs):
        raise ReplyError("wrong schema", "a key occurs twice")
    return dict(pairs)


def read_reply(text: str | None) -> dict:
    """The reply as `{"concluded_answer", "consistent", "reason"}`: the whole text must be that one JSON object.

    White space, one code fence and a leading `<think>…</think>` around it are accepted.

    Raises:
        ReplyError: anything else, with the cause "no text", "not JSON" or "wrong schema".
    """
    text = (text or "").strip()
    if not text:
        raise ReplyError("no text")
    if len(text) > MAX_REPLY_CHARS:
        raise ReplyError("not JSON", f"{len(text)} characters")
    body = re.sub(r"^<think>.*?</think>\s*", "", text, flags=re.S)
    body = re.sub(r"^```(?:json)?\s*\n(.*)\n\s*```$", r"\1", body, flags=re.S)
    try:
        reply = json.loads(body, object_pairs_hook=_no_double_keys)
    except ReplyError:
        raise
    except (ValueError, RecursionError) as error:  # a plain ValueError: an integer of more digits than Python converts
        raise ReplyError("not JSON", f"{error} in {text!r:.80}") from None
    return check_reply(reply)


def check_reply(reply: object) -> dict:
    """A parsed reply, its reason on one line and not too long; what this returns passes unchanged.

    Raises:
        ReplyError: other keys or types than the schema's, or text that is no Unicode, with the cause "wrong schema".
    """
    if not isinstance(reply, dict) or reply.keys() != REPLY_SCHEMA["properties"].keys():
        raise ReplyError("wrong schema", f"expected the keys {', '.join(REPLY_SCHEMA['properties'])}, came {reply!r:.80}")
    kinds = {"concluded_answer": str | None, "consistent": bool | None, "reason": str}
    for key, kind in kinds.items():
        # JSON may spell half of a surrogate pair; no file of verdicts could hold it.
        if not isinstance(reply[key], kind) or _SURROGATE.search(str(reply[key])):
            raise ReplyError("wrong schema", f"{key} is {ascii(reply[key]):.80}")
    if len(reply["concluded_answer"] or "") > MAX_ANSWER_CHARS:
        raise ReplyError("wrong schema", f"concluded_answer has {len(reply['concluded_answer'])} characters")
    reason = " ".join(reply["reason"].split())
    if len(reason) > MAX_REASON_CHARS:
        reason = f"{reason[:MAX_REASON_CHARS]}…"
    return {**reply, "reason": reason}


def settle(reply: dict, item: dict) -> dict:
    """The verdict `{"consistency", "concluded_answer", "reason"}` on an item from a judge's readable reply.

    The judge says what the thinking concludes; whether that is the given answer is compared here, as the reward compares
    (`score.answers_match`). Where the judge's own `consistent` says otherwise, it contradicts itself and the verdict
    is unknown. A reason begins with the cause, up to a colon, unless the verdict is known.
    """
    concluded, said, reason = reply["concluded_answer"], reply["consistent"], reply["reason"]
    kind, options, answer = item["problem_type"], item["options"], item["answer"]

    def unknown(cause: str) -> dict:
        return {"consistency": "unknown", "concluded_answer": concluded, "reason": f"{cause}: {reason}"}

    concluded = (concluded or "").replace("‹", "<").replace("［", "[").strip() or None
    if concluded is None:
        return unknown("no conclusion" if said is None else "contradiction")
    if said is None:
        return unknown("undecided")
    if kind == "multiple choice" and options and read_choice(concluded, options) is None:
        return unknown("unreadable conclusion")
    if kind in ("numerical", "regression") and read_number(concluded) is None:
        return unknown("unreadable conclusion")
    if kind in ("OCR", "free-form"):
        same = same_text(concluded, answer, exact=kind == "OCR")
        same = said if same is None else same  # the same in other words is what the comparison cannot see
    else:
        same = answers_match(concluded, answer, problem_type=kind, options=options)
    if same != said:
        return unknown("contradiction")
    return {"consistency": "consistent" if same else "inconsistent", "concluded_answer": concluded, "reason": reason}


class ModelJudge(Judge):
    """What the judges that are language models share: their prompt, and how a reply becomes a verdict."""

    caches = True

    def __init__(self, prompt: JudgePrompt):
        super().__init__()
        self.prompt, self.prompt_version = prompt, prompt.version

    def messages(self, item: dict) -> list[dict[str, str]]:
        return judge_messages(self.prompt, item)

    def read(self, item: dict, text: str | None) -> dict:
        """The verdict from a reply's text."""
        try:
            reply = read_reply(text)
        except ReplyError as error:
            return self.unknown(error)
        verdict = settle(reply, item)
        if verdict["consistency"] == "unknown" and verdict["reason"].startswith("contradiction:"):
            self.failures["contradiction"] += 1
        return {**verdict, "reply": reply}

    def unknown(self, error: ReplyError) -> dict:
        """The verdict without a readable reply: counted, not cached, and so asked for again by the next run."""
        self.failures[error.cause] += 1
        return {"consistency": "unknown", "concluded_answer": None, "reason": str(error), "reply": None}

    def summary(self) -> str:
        """One line: prompts, and verdicts that are unknown because of the judge, by cause."""
        return f"{self.requests:,} prompts; {self.unusable()}"

    def unusable(self) -> str:
        causes = ", ".join(f"{cause} {count:,}" for cause, count in self.failures.most_common())
        return f"without a usable verdict: {causes}." if causes else "every reply was readable."
