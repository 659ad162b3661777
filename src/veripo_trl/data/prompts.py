"""From a row to what the model reads (chat messages) and, for SFT, to what it shall write.

One template file serves every stage, evaluation and chat; its hash is recorded with everything generated from it.
A template is YAML:

    layout: the text of the user's message. {problem} and {options} stand in it once each, {instruction} once (or not
        at all if every instruction is empty). A line whose placeholders are all empty is left out.
    instructions: one text for each of `score.PROBLEM_TYPES`.
    option_separator: between two options; a newline by default.
    target_joiner: between </think> and <answer> of an SFT target; a newline by default.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from veripo_trl.answers.score import PROBLEM_TYPES
from veripo_trl.errors import VeripoError

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_NAMES = ("problem", "options", "instruction")
_DEFAULTS = {"option_separator": "\n", "target_joiner": "\n"}
_KEYS = ("layout", "instructions", *_DEFAULTS)
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
    """One user message: a part for each video, then each image, then the text. No system message.

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
    media = [{"type": "video"} for _ in row["videos"] or []] + [{"type": "image"} for _ in row["images"] or []]
    return [{"role": "user", "content": [*media, {"type": "text", "text": _fill(template.layout, values)}]}]


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
    """What SFT teaches for the row: its thinking and its solution, in tags."""
    if not row.get("process"):
        raise PromptError(
            f"row {row.get('question_id')!r} of {row.get('data_source')!r}: expected `process`, the thinking that SFT "
            "teaches; came nothing. Train on rows that have it."
        )
    return f"<think>{row['process']}</think>{template.target_joiner}<answer>{row['solution']}</answer>"


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
    content = _DEFAULTS | content
    instructions = content["instructions"]
    if not isinstance(instructions, dict) or set(instructions) != set(PROBLEM_TYPES):
        came = ", ".join(map(str, instructions)) if isinstance(instructions, dict) else repr(instructions)
        raise PromptError(
            f"prompt template {file}: expected one instruction for each of {', '.join(PROBLEM_TYPES)}, came {came}."
        )
    texts = {key: content[key] for key in ("layout", *_DEFAULTS)}
    texts |= {f"instructions: {key}": text for key, text in instructions.items()}
    if wrong := [key for key, text in texts.items() if not isinstance(text, str)]:
        raise PromptError(f"prompt template {file}: expected a text under {', '.join(wrong)}; put it in quotes.")
    content["instructions"] = {key: instructions[key].strip() for key in PROBLEM_TYPES}
    _check_layout(content["layout"], content["instructions"], file)
    canonical = json.dumps({"rendering": _RENDERING, **content}, sort_keys=True, ensure_ascii=False)
    return PromptTemplate(name=name, hash=hashlib.sha256(canonical.encode()).hexdigest()[:16], **content)


def _check_layout(layout: str, instructions: dict[str, str], file: str) -> None:
    found = _PLACEHOLDER.findall(layout)
    needed = _NAMES if any(instructions.values()) else _NAMES[:2]
    if set(found) - set(_NAMES) or len(set(found)) != len(found) or set(needed) - set(found):
        raise PromptError(
            f"prompt template {file}: layout needs {' '.join(f'{{{n}}}' for n in needed)} once each and no other "
            f"placeholder, came {' '.join(f'{{{n}}}' for n in found) or 'none'}."
        )
