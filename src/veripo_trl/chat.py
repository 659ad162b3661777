"""Ask a policy about videos and images.

    python -m veripo_trl.chat --model outputs/tiny_grpo --video clip.mp4 "What is happening?"

Without a question it reads one per line. Each question stands alone (the policies are trained on single questions):
the videos and images are given with every one of them, nothing that was said before is.

    from veripo_trl.chat import ask
    print(ask("What is happening?", model="outputs/tiny_grpo", video="clip.mp4").answer)

Prompts are made by the encoder of training, evaluation and rollouts: the same ids, pixels and positions.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, TextStreamer

from veripo_trl.answers.score import PROBLEM_TYPES, split_completion
from veripo_trl.data.prompts import PromptError
from veripo_trl.errors import VeripoError
from veripo_trl.evaluate.generate import end_ids
from veripo_trl.files.tables import CONTROL_CHARACTERS
from veripo_trl.media.video import MediaError
from veripo_trl.model.encoding import vision_token_ids
from veripo_trl.model.policy import SEEING, load_policy
from veripo_trl.recipe import stages
from veripo_trl.shared_prompt.rollout import cut_at_end, sample_completions

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Of one question, not of the session.
REFUSED = (VeripoError, torch.OutOfMemoryError)
SECTION = {"<think>": "thinking", "</think>": "", "<answer>": "answer", "</answer>": ""}


@dataclass
class Reply:
    """What a policy answered.

    completion: all it wrote. thinking, answer: what it put in the tags, None where a tag is missing or doubled.
    finish_reason: "stop", or "length" at `max_new_tokens`. media: a line per video and image, frames and tokens.
    prompt_tokens: with the vision tokens. encode_s, generate_s: seconds.
    """

    completion: str
    thinking: str | None
    answer: str | None
    finish_reason: str
    media: list[str]
    prompt_tokens: int
    completion_tokens: int
    encode_s: float
    generate_s: float


class Chat:
    """A loaded policy that answers questions.

    Args:
        model: a Qwen2.5-VL or Qwen3-VL model, or a LoRA adapter of one: a folder or a name on the Hub.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1". dtype: "auto" is bfloat16 on a GPU, float32
            on a CPU.
        load_in_4bit: quantize the weights while loading (needs bitsandbytes).
        encoding: fields of `stages.DataArguments` that say how prompts are made: `fps, min_frames, max_frames,
            min_pixels, max_pixels, max_image_pixels, prompt_template`, by default as the policy was trained;
            `max_prompt_tokens, frame_cache, …`.

    Raises:
        FileNotFoundError: no such model. ValueError: a model of another family, or a limit that makes no sense.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        load_in_4bit: bool = False,
        attn_implementation: str | None = None,
        **encoding,
    ):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device {device!r}: torch sees no GPU here. Use device 'cpu', or a torch build with CUDA.")
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        quantization = None
        if load_in_4bit:
            quantization = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
            )
        # Whoever asks names the media, so that a URL is meant.
        arguments = stages.DataArguments(**{"allow_urls": True, **encoding})
        stages.see_as_trained(arguments, model, revision)
        self.model, self.processor = load_policy(
            model,
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=quantization,
            device_map={"": device},
            trainable=False,
        )
        self.model.eval()
        self.encoder = stages.make_encoder(self.model, self.processor, arguments)

    def ask(
        self,
        question: str,
        *,
        videos: Sequence[str | Path] = (),
        images: Sequence[str | Path] = (),
        options: Sequence[str] = (),
        problem_type: str | None = None,
        max_new_tokens: int = 4096,
        temperature: float = 0.0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        on_prompt: Callable[..., None] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """Answer one question.

        Args:
            videos, images: files (or URLs), in the order in which the model gets them, videos first.
            options: of a multiple-choice question; lettered here unless they are ("A. red").
            problem_type: what kind of answer the prompt asks for; by default "multiple choice" with options and
                "free-form" without.
            temperature: 0 is greedy decoding. seed: of the sampling; None leaves the generators alone.
            on_prompt: called with the `EncodedPrompt` before the first token. on_text: called with each new piece of
                the completion, tags included.

        Raises:
            MediaError, RowError: a file is missing or cannot be read. PromptError: a question that no prompt can hold.
            PromptTooLongError: over `max_prompt_tokens`.
        """
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or not repetition_penalty > 0:
            raise PromptError(
                f"Expected max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and repetition_penalty > 0, came "
                f"{max_new_tokens}, {temperature}, {top_p} and {repetition_penalty}."
            )
        prompt = self.encoder.encode(
            self._row(question, videos=videos, images=images, options=options, problem_type=problem_type)
        )
        if on_prompt is not None:
            on_prompt(prompt)
        tokenizer = self.processor.tokenizer
        ends = end_ids(self.model.generation_config.eos_token_id, tokenizer)
        sampling = {"do_sample": False, "temperature": None, "top_p": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if seed is not None:
            torch.manual_seed(seed)
        started = time.perf_counter()
        tokens = sample_completions(
            self.model,
            [prompt],
            pad_token_id=tokenizer.pad_token_id,
            config=self.encoder.config,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            suppress_tokens=vision_token_ids(self.processor, self.encoder.config),
            repetition_penalty=repetition_penalty,
            top_k=0 if temperature > 0 else None,
            streamer=None if on_text is None else _Pieces(tokenizer, on_text),
            **sampling,
        )
        (ids,) = cut_at_end(tokens, ends)
        completion = tokenizer.decode(ids, skip_special_tokens=True)
        thinking, answer = split_completion(completion)
        return Reply(
            completion=completion,
            thinking=thinking,
            answer=answer,
            finish_reason="stop" if ids[-1] in ends else "length",
            media=prompt.media,
            prompt_tokens=len(prompt),
            completion_tokens=len(ids),
            encode_s=prompt.load_s + prompt.encode_s,
            generate_s=time.perf_counter() - started,
        )

    def _row(self, question, *, videos, images, options, problem_type) -> dict:
        if not question.strip():
            raise PromptError("The question is empty.")
        if options and not all(re.match(r"[A-Z][.):]\s*\S", option) for option in options):
            if len(options) > 26:
                raise PromptError(f"There are letters for 26 options, came {len(options)}. Leave some out.")
            options = [f"{letter}. {option}" for letter, option in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options)]
        problem_type = problem_type or ("multiple choice" if options else "free-form")
        return {
            "question_id": "question",
            "problem": question,
            "options": list(options),
            "problem_type": problem_type,
            "videos": [_from_root(path) for path in videos],
            "images": [_from_root(path) for path in images],
            "data_source": "chat",
            "media_root": os.sep,
        }


def ask(
    question: str,
    *,
    model: str,
    video: str | Path | Sequence[str | Path] = (),
    image: str | Path | Sequence[str | Path] = (),
    options: Sequence[str] = (),
    loading: dict | None = None,
    **sampling,
) -> Reply:
    """Load a policy and answer one question; `Chat` loads it once for many.

    Args:
        video, image: a file, or several. loading: arguments for `Chat`. sampling: arguments for `Chat.ask`.
    """
    videos, images = ([item] if isinstance(item, (str, Path)) else list(item) for item in (video, image))
    return Chat(model, **(loading or {})).ask(question, videos=videos, images=images, options=options, **sampling)


def _from_root(path: str | Path) -> str:
    """A path as a row has it, relative to the media root: here the root of the file system, links resolved."""
    if "://" in str(path):
        return str(path)
    path = Path(path).expanduser()
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file" if path.exists() else "no such file"
        raise MediaError(f"{path}: {kind} (looked from {Path.cwd()}). Expected the file of a video or image.")
    return os.path.relpath(os.path.realpath(path), os.sep)


class _Pieces(TextStreamer):
    """Hands each finished piece of the completion to a function."""

    def __init__(self, tokenizer, on_text):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False):
        if text:
            self.on_text(text)


class Sections:
    """Splits a stream of text at the tags: `feed` gives (section, text), the section "thinking", "answer" or ""."""

    def __init__(self):
        self.section, self._held = "", ""

    def feed(self, text: str, *, last: bool = False) -> Iterable[tuple[str, str]]:
        self._held += text
        while match := re.search("|".join(TAGS), self._held):
            if match.start():
                yield self.section, self._held[: match.start()]
            self.section, self._held = SECTION[match[0]], self._held[match.end() :]
        # The beginning of a tag waits for the rest of it.
        keep = 0 if last else _beginning_of_a_tag(self._held)
        ready = len(self._held) - keep
        if ready:
            yield self.section, self._held[:ready]
        self._held = self._held[ready:]


def _beginning_of_a_tag(text: str) -> int:
    """Length of the longest end of `text` that is the beginning of a tag."""
    lengths = range(min(len(text), max(map(len, TAGS)) - 1), 0, -1)
    return next((length for length in lengths if any(tag.startswith(text[-length:]) for tag in TAGS)), 0)


class Printer:
    """Writes a completion as it comes, thinking and answer apart: dim and bold in a terminal, labelled everywhere."""

    STYLE = {"thinking": "\x1b[2m", "answer": "\x1b[1m", "": ""}

    def __init__(self, stream, *, styled: bool):
        self.stream, self.styled = stream, styled
        self.sections, self.shown, self.started = Sections(), None, False

    def write(self, text: str, *, last: bool = False) -> None:
        for section, piece in self.sections.feed(text, last=last):
            if section != self.shown:
                if not piece.strip():
                    continue
                self._end_section()
                self.stream.write(f"{section}: " if section else "")
                self.stream.write(self.STYLE[section] if self.styled else "")
                piece = piece.lstrip()
                self.shown = section
            self.stream.write(CONTROL_CHARACTERS.sub("\ufffd", piece))
        if last:
            self._end_section()
        self.stream.flush()

    def _end_section(self) -> None:
        if self.shown is not None:
            self.stream.write("\x1b[0m\n" if self.styled else "\n")
        self.shown = None


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m veripo_trl.chat", description="Ask a policy about videos and images."
    )
    parser.add_argument("question", nargs="?", help="One question; without it, one is read per line.")
    parser.add_argument("--model", required=True, help="A model or LoRA adapter: a folder or a name on the Hub.")
    parser.add_argument("--revision", help="Revision of a model on the Hub.")
    parser.add_argument("--video", action="append", default=[], help="A file or URL; give it again for more.")
    parser.add_argument("--image", action="append", default=[], help="A file or URL; give it again for more.")
    parser.add_argument(
        "--options", nargs="+", default=[], help='Of a choice question: --options "A. red" "B. blue" --video clip.mp4 …'
    )
    parser.add_argument("--problem_type", choices=PROBLEM_TYPES, help="What kind of answer the prompt asks for.")
    defaults = stages.DataArguments()
    encoding = parser.add_argument_group("how videos and images are read")
    for name, kind in (
        ("fps", float), ("min_frames", int), ("max_frames", int), ("min_pixels", int), ("max_pixels", int),
        ("max_image_pixels", int), ("max_prompt_tokens", int), ("prompt_template", str), ("video_backend", str),
        ("decode_timeout_s", float), ("frame_cache", str),
    ):  # fmt: skip
        described = stages.DataArguments.__dataclass_fields__[name].metadata["help"]
        default = getattr(defaults, name)
        described += "" if name in SEEING else f" (default: {default})"
        encoding.add_argument(f"--{name}", type=kind, default=default, help=described)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max_new_tokens", type=int, default=4096, help="(default: 4096)")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding (the default).")
    sampling.add_argument("--top_p", type=float, default=1.0)
    sampling.add_argument("--repetition_penalty", type=float, default=1.0)
    sampling.add_argument("--seed", type=int, help="Of the sampling.")
    loading = parser.add_argument_group("loading")
    loading.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    loading.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    loading.add_argument("--load_in_4bit", action="store_true", help="Quantize the weights (bitsandbytes).")
    loading.add_argument("--attn_implementation", help="sdpa, flash_attention_2, …")
    arguments = parser.parse_args(argv)
    arguments.encoding = {action.dest: getattr(arguments, action.dest) for action in encoding._group_actions}
    return arguments


def answer_one(chat: Chat, question: str, arguments: argparse.Namespace) -> None:
    """Ask, and print what the model is given, what it writes, and what that took."""

    def show_prompt(prompt):
        for line in prompt.media or ["no video or image"]:
            print(f"# {line}")
        print(f"# prompt: {len(prompt)} tokens", flush=True)

    printer = Printer(sys.stdout, styled=sys.stdout.isatty())
    try:
        reply = chat.ask(
            question,
            videos=arguments.video,
            images=arguments.image,
            options=arguments.options,
            problem_type=arguments.problem_type,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            repetition_penalty=arguments.repetition_penalty,
            seed=arguments.seed,
            on_prompt=show_prompt,
            on_text=printer.write,
        )
    finally:
        printer.write("", last=True)  # a terminal gets its own style back, after Ctrl-C too
    cut = f", cut at --max_new_tokens {arguments.max_new_tokens}" if reply.finish_reason == "length" else ""
    form = "" if reply.answer is not None else ", no single answer in <answer> tags"
    rate = reply.completion_tokens / max(reply.generate_s, 1e-9)
    print(
        f"# {reply.completion_tokens} tokens in {reply.generate_s:.1f} s ({rate:.0f} tokens/s), "
        f"reading {reply.encode_s:.1f} s{cut}{form}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    try:
        converse(arguments)
    except KeyboardInterrupt:  # Ctrl-C; in a session it ends one answer only
        print("\n# stopped", flush=True)
        raise SystemExit(130) from None


def converse(arguments: argparse.Namespace) -> None:
    """Load the policy and answer the one question, or those that are read."""
    for path in (*arguments.video, *arguments.image):  # before the model loads, which can take minutes
        try:
            _from_root(path)
        except MediaError as error:
            raise SystemExit(f"chat: {error}") from None
    with tempfile.TemporaryDirectory(prefix="veripo_chat_") as frames:
        if arguments.question is None and arguments.encoding["frame_cache"] is None:
            arguments.encoding["frame_cache"] = frames  # the same clip, question after question: decoded once
        try:
            chat = Chat(
                arguments.model,
                revision=arguments.revision,
                device=arguments.device,
                dtype=arguments.dtype,
                load_in_4bit=arguments.load_in_4bit,
                attn_implementation=arguments.attn_implementation,
                **arguments.encoding,
            )
        except (VeripoError, OSError, ValueError, ImportError) as error:
            raise SystemExit(f"chat: {error}") from None
        if arguments.question is not None:
            try:
                return answer_one(chat, arguments.question, arguments)
            except REFUSED as error:
                raise SystemExit(f"chat: {_reason(error)}") from None
        if sys.stdin.isatty():
            print("One question per line, each answered on its own; Ctrl-D ends.", flush=True)
        failed = 0
        while (line := _read_question()) is not None:
            if not line.strip():
                continue
            try:
                answer_one(chat, line.strip(), arguments)
            except REFUSED as error:
                failed += 1
                print(f"chat: {_reason(error)}", file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                print("\n# stopped", flush=True)
        if failed:
            raise SystemExit(f"chat: {failed} question{'s' if failed > 1 else ''} could not be asked.")


def _reason(error: Exception) -> str:
    if not isinstance(error, torch.OutOfMemoryError):
        return str(error)
    first = str(error).split(". ")[0]
    return f"{first}. Give fewer or smaller frames (--max_frames, --max_pixels), or load with --load_in_4bit."


def _read_question() -> str | None:
    """The next line, None at the end of the input."""
    try:
        return input("question> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


if __name__ == "__main__":
    main()
