"""From a row to what the model reads (chat messages) and, for SFT, to what it shall write.

One template file serves every stage, evaluation and chat; its hash is recorded with everything generated from it.
A template is YAML:

    layout: the text of the user's message. {problem} and {options} stand in it once each, {instruction} once (or not
        at all if every instruction is empty). A line whose placeholders are all empty is left out.
    instructions: a text for each of `score.PROBLEM_TYPES`. One that is missing is the default template's (none, where
        the layout has no {instruction}).
    option_separator: between two options; a newline by default.
    target_joiner: between </think> and <answer> of an SFT target; a newline by default.
    layouts: {problem type: a layout of its own}, for prompts that put a type's question between other words. That of a
        "thought" (`data.streaming`) is the problem and the instruction alone, unless the template's has no {instruction}.
    media_order: [image, video, image] for rows with just these; by default the videos come first, then the images.
    target: what SFT teaches. "thinking", the default: the row's `process` in think tags, then the answer. "process": the
        `process` as it is, tags and all, then the answer unless it holds an answer span itself.

The hash is of what can make a prompt of VerIPO's six types differ, and of what a file says of later types that the
default does not: so that a type that is added changes no template's hash, and what was made with one stays usable.
"""

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from veripo_trl.answers.score import PROBLEM_TYPES, extract_answer
from veripo_trl.answers.spans import WITH_DURATION, without_duration
from veripo_trl.errors import VeripoError

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_NAMES = ("problem", "options", "instruction")
_DEFAULTS = {"option_separator": "\n", "target_joiner": "\n"}
_LATER = {"layouts": {}, "media_order": [], "target": "thinking"}  # in the hash where they are set
_KEYS = ("layout", "instructions", *_DEFAULTS, *_LATER)
_FIRST_TYPES = ("multiple choice", "numerical", "regression", "math", "OCR", "free-form")  # in every hash
_THOUGHT = "{problem}\n{options}\n{instruction}"  # the layout of a type that has no answer to ask for
_TAG = re.compile(r"</?(?:think|answer)>")
_RENDERING = 2  # part of the hash: raise it when `build_messages` or `build_target` renders a template differently


class PromptError(VeripoError):
    """A template that cannot be used, or a row that it has no place for."""


@dataclass(frozen=True)
class PromptTemplate:
    """A parsed template file. `hash`: 16 hex digits over the content; the name and YAML comments are not in it."""

    name: str
    layout: str
    instructions: dict[str, str]
    option_separator: str
    target_joiner: str
    hash: str
    layouts: dict[str, str] = field(default_factory=dict)
    media_order: list[str] = field(default_factory=list)
    target: str = "thinking"


def load_template(name_or_path: str | PromptTemplate) -> PromptTemplate:
    """A template of the package by its name ("default", "tiny"), or any .yaml or .yml file by its path; the one that a
    policy carries is there already."""
    if isinstance(name_or_path, PromptTemplate):
        return name_or_path
    shipped = files("veripo_trl.data") / "prompt_templates"
    if str(name_or_path).endswith((".yaml", ".yml")):
        file = Path(name_or_path).expanduser()
        name = file.stem
    else:
        name = str(name_or_path)
        file = shipped / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(Path(f.name).stem for f in shipped.iterdir() if f.name.endswith(".yaml")))
        raise PromptError(
            f"no prompt template {str(name_or_path)!r}: give one of {known}, or the path of a .yaml file."
        )
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PromptError(f"prompt template {file}: not readable YAML: {error}") from error
    return _parse(content, name, str(file))


def build_messages(row: dict[str, Any], template: PromptTemplate) -> list[dict[str, Any]]:
    """One user message: a part for each video, then each image (or in the template's `media_order`), then the text. No
    system message.

    Options are not written again where the problem lists them already, see `lists_options`.
    """
    if row["problem_type"] not in template.instructions:
        known = ", ".join(template.instructions)
        raise PromptError(
            f"row {row.get('question_id')!r}: problem_type {row['problem_type']!r} has no instruction in prompt "
            f"template {template.name!r}; it has {known}."
        )
    problem, options = row["problem"], row["options"] or []
    values = {
        "problem": problem.strip(),
        "options": "" if lists_options(problem, options) else template.option_separator.join(options),
        "instruction": template.instructions[row["problem_type"]],
    }
    media = ["video"] * len(row["videos"] or []) + ["image"] * len(row["images"] or [])
    if template.media_order:
        if Counter(media) != Counter(template.media_order):
            raise PromptError(
                f"row {row.get('question_id')!r}: prompt template {template.name!r} expects {template.media_order}, came "
                f"{media}. Give other rows a template without media_order."
            )
        media = template.media_order
    text = _fill(_layout_of(row["problem_type"], template.layout, template.layouts), values)
    return [{"role": "user", "content": [*({"type": kind} for kind in media), {"type": "text", "text": text}]}]


def lists_options(problem: str, options: list[str]) -> bool:
    """Whether the options stand in the problem word for word and one after the other, each with its letter or on a
    line of its own. Texts that merely occur in it ("How many of the 12 cats", options "1" and "2") are no list."""
    if len(options) < 2:
        return False
    letter = r"[(\[]?[A-Za-z][.):\]]+\s*"
    listed = [
        rf"(?<!\S)(?:{letter})?{re.escape(option)}" if re.match(letter, option) else rf"(?:{letter}|^){re.escape(option)}"
        for option in map(str.strip, options)
    ]
    return re.search(r"[.,;]*\s+".join(listed) + r"[.,;]*\s*?$", problem, re.M) is not None


def build_target(row: dict[str, Any], template: PromptTemplate) -> str:
    """What SFT teaches for the row: its thinking and its solution, in tags, or its `process` as it is (`target`), which
    alone is what a thought is.

    A solution's duration (" of 33.75") is for comparisons: it is not taught.
    """
    process = row.get("process")
    if not process:
        raise PromptError(
            f"row {row.get('question_id')!r} of {row.get('data_source')!r}: expected `process`, the thinking that SFT "
            "teaches; came nothing. Train on rows that have it."
        )
    if row["problem_type"] == "thought":
        return process
    solution = row["solution"]
    if row["problem_type"] in WITH_DURATION:
        solution = without_duration(solution)
    if template.target == "process":
        if "<answer>" not in process:
            return f"{process}{template.target_joiner}<answer>{solution}</answer>"
        if extract_answer(process) is None:
            raise PromptError(
                f"row {row.get('question_id')!r}: process: expected one answer span or none, came several. Correct it."
            )
        return process
    if tag := _TAG.search(process):
        raise PromptError(
            f"row {row.get('question_id')!r}: process: expected the bare thinking, came one with {tag[0]}: prompt "
            f"template {template.name!r} puts the tags. Write it without, or set `target: process` in the template."
        )
    return f"<think>{process}</think>{template.target_joiner}<answer>{solution}</answer>"


def without_thinking(template: PromptTemplate) -> str:
    """How a completion begins whose thinking is closed empty. The answer's own tags are the model's to write."""
    return f"<think></think>{template.target_joiner}" if template.target == "thinking" else "<answer>"


def check_targets(rows: Iterable[dict[str, Any]], template: PromptTemplate) -> None:
    """Raise PromptError, with the row's id, for the first that the template can make no SFT target of."""
    for row in rows:
        build_target(row, template)


def _layout_of(kind: str, layout: str, layouts: dict[str, str]) -> str:
    return layouts.get(kind, _THOUGHT if kind == "thought" and "{instruction}" in layout else layout)


def _fill(layout: str, values: dict[str, str]) -> str:
    """Each placeholder replaced once, in one pass: braces in a question are text, never placeholders."""
    lines = []
    for line in layout.split("\n"):
        names = _PLACEHOLDER.findall(line)
        if not names or any(values[name] for name in names):
            lines.append(_PLACEHOLDER.sub(lambda match: values[match[1]], line))
    return "\n".join(lines).strip()


def read_template(record: dict[str, Any], file: str) -> PromptTemplate:
    """A template from its own fields, as `dataclasses.asdict` gives them."""
    content = {key: text for key, text in record.items() if key not in ("name", "hash")}
    template = _parse(content, str(record.get("name")), file)
    if template.hash != record.get("hash"):
        raise PromptError(
            f"prompt template in {file}: expected the hash {template.hash}, came {record.get('hash')!r}: it was changed, "
            f"or other code wrote it. Give prompt_template."
        )
    return template


def _parse(content: Any, name: str, file: str) -> PromptTemplate:
    if not isinstance(content, dict) or set(content) - set(_KEYS) or not {"layout", "instructions"} <= set(content):
        came = ", ".join(map(str, content)) if isinstance(content, dict) else repr(content)
        raise PromptError(
            f"prompt template {file}: expected the keys layout, instructions and any of {', '.join(_DEFAULTS)}, "
            f"came {came}."
        )
    content = _DEFAULTS | _LATER | content
    given = content["instructions"]
    if not isinstance(given, dict) or set(given) - set(PROBLEM_TYPES):
        came = ", ".join(map(str, given)) if isinstance(given, dict) else repr(given)
        raise PromptError(
            f"prompt template {file}: expected an instruction for some of {', '.join(PROBLEM_TYPES)}, came {came}."
        )
    _check_values(content, file)
    layouts = {kind: _layout_of(kind, content["layout"], content["layouts"]) for kind in PROBLEM_TYPES}
    inherited = {k: text.strip() if "{instruction}" in layouts[k] else "" for k, text in _default_instructions().items()}
    content["instructions"] = {kind: given.get(kind, inherited[kind]).strip() for kind in PROBLEM_TYPES}
    for kind, layout in layouts.items():
        _check_layout(layout, content["instructions"][kind], file)
    hashed = {key: value for key, value in content.items() if key not in _LATER or value != _LATER[key]}
    hashed["instructions"] = {
        kind: text
        for kind, text in content["instructions"].items()
        if kind in _FIRST_TYPES or text != inherited[kind]
    }
    canonical = json.dumps({"rendering": _RENDERING, **hashed}, sort_keys=True, ensure_ascii=False)
    return PromptTemplate(name=name, hash=hashlib.sha256(canonical.encode()).hexdigest()[:16], **content)


@functools.cache
def _default_instructions() -> dict[str, str]:
    file = files("veripo_trl.data") / "prompt_templates" / "default.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))["instructions"]


def _check_values(content: dict, file: str) -> None:
    texts = {key: content[key] for key in ("layout", *_DEFAULTS)}
    for key in ("instructions", "layouts"):
        if not isinstance(content[key], dict):
            raise PromptError(f"prompt template {file}: {key}: expected a text for each type, came {content[key]!r}.")
        texts |= {f"{key}: {kind}": text for kind, text in content[key].items()}
    if wrong := [key for key, text in texts.items() if not isinstance(text, str)]:
        raise PromptError(f"prompt template {file}: expected a text under {', '.join(wrong)}; put it in quotes.")
    order = content["media_order"]
    fine_order = isinstance(order, list) and all(each in ("video", "image") for each in order)
    for key, fine, expected in (
        ("layouts", set(content["layouts"]) <= set(PROBLEM_TYPES), f"some of {', '.join(PROBLEM_TYPES)}"),
        ("media_order", fine_order, "a list of video and image"),
        ("target", content["target"] in ("thinking", "process"), "thinking or process"),
    ):
        if not fine:
            raise PromptError(f"prompt template {file}: {key}: expected {expected}, came {content[key]!r}.")


def _check_layout(layout: str, instruction: str, file: str) -> None:
    found = _PLACEHOLDER.findall(layout)
    needed = _NAMES if instruction else _NAMES[:2]
    if set(found) - set(_NAMES) or len(set(found)) != len(found) or set(needed) - set(found):
        raise PromptError(
            f"prompt template {file}: layout needs {' '.join(f'{{{n}}}' for n in needed)} once each and no other "
            f"placeholder, came {' '.join(f'{{{n}}}' for n in found) or 'none'}."
        )
