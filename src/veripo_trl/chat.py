"""Ask a policy one question about videos and images.

    python -m veripo_trl.chat --model outputs/tiny_grpo --video clip.mp4 "What is happening?"

    from veripo_trl.chat import Chat
    print(Chat("outputs/tiny_grpo").ask("What is happening?", videos=["clip.mp4"]).answer)

Each question stands alone, as the policies are trained on single questions. Prompts are made by the encoder of training,
evaluation and rollouts: the same ids, pixels and positions.
"""

if __name__ == "__main__":
    from veripo_trl.start import start

    start()

import argparse
import os
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

import torch
from transformers import BitsAndBytesConfig, TextStreamer

from veripo_trl.answers.score import PROBLEM_TYPES, split_completion
from veripo_trl.data.prompts import PromptError
from veripo_trl.errors import ConfigError, run, settings_checked
from veripo_trl.evaluate.generate import Decoding, TransformersEngine, describe_completion
from veripo_trl.files.tables import CONTROL_CHARACTERS
from veripo_trl.media.video import MediaError
from veripo_trl.model.encoding import EncodedPrompt
from veripo_trl.model.policy import SEEING, load_policy
from veripo_trl.model.streaming import CLIP_TOKENS, MAX_MEMORY_TOKENS, Stream, StreamEncoder
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.build import make_encoder, see_as_trained


@dataclass
class Reply:
    """What a policy answered.

    completion: all it wrote. thinking, answer: what it put in the tags, None where a tag is missing or doubled.
    finish_reason: "stop", or "length" at `max_new_tokens`. seconds: of generating.
    """

    completion: str
    thinking: str | None
    answer: str | None
    finish_reason: str
    completion_tokens: int
    seconds: float


class Chat:
    """A loaded policy that answers questions.

    Args:
        model: of a family in `policy.SUPPORTED`, or a LoRA adapter of one: a folder or a name on the Hub.
        device: "cpu", "cuda", "cuda:1"; by default a GPU if there is one. Weights are bfloat16 on it, float32 on a CPU.
        load_in_4bit: quantize the weights while loading (needs bitsandbytes).
        encoding: fields of `DataArguments` that say how prompts are made: `fps, min_frames, max_frames,
            min_pixels, max_pixels, max_image_pixels, prompt_template`, by default as the policy was trained;
            `max_prompt_tokens, frame_cache, …`.

    Raises:
        ConfigError: no such model, a model of another family, or a limit that makes no sense.
    """

    @settings_checked()
    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        device: str | None = None,
        load_in_4bit: bool = False,
        **encoding,
    ):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(
                f"device {device!r}: torch sees no GPU here. Use 'cpu', or a torch build with CUDA."
            )
        dtype = "float32" if device == "cpu" else "bfloat16"
        quantized = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
        # Whoever asks names the media, so that a URL is meant.
        arguments = see_as_trained(
            DataArguments(**{"allow_urls": True, **encoding}), model, revision
        )
        self.model, self.processor = load_policy(
            model,
            revision=revision,
            dtype=dtype,
            quantization_config=quantized if load_in_4bit else None,
            device_map={"": device},
            trainable=False,
        )
        self.model.eval()
        self.encoder = make_encoder(self.model, self.processor, arguments)

    def ask(self, question: str, *, decoding: dict | None = None, **content) -> Reply:
        """Answer one question. Args: `content` as of `encode`, `decoding` as of `complete`."""
        return self.complete(self.encode(question, **content), **(decoding or {}))

    def watch(
        self, question: str, *, clip_tokens: int = CLIP_TOKENS, max_memory_tokens: int = MAX_MEMORY_TOKENS, **content
    ) -> Stream:
        """A question about a video that is shown clip by clip, for `think`. Args: as of `StreamEncoder` and `encode`."""
        with settings_checked():
            encoder = StreamEncoder(self.encoder, clip_tokens, max_memory_tokens)
        return self.encode(question, encoder=encoder, **content)

    def think(
        self, stream: Stream, *, before: Callable[[str], None] = lambda line: None, seed: int | None = None, **decoding
    ) -> Reply:
        """Answer a question that `watch` gave: thoughts on each clip, then the answer. `stream` holds the thoughts then.

        Args:
            before: called before each turn with a line about it. decoding, seed: as of `complete`, of each turn.
        """
        seed = random.randrange(2**31) if seed is None else seed
        while True:
            prompt = stream.prompt(self.encoder)
            gone = f", {stream.memory.evicted} left" if stream.memory.evicted else ""
            before(f"{stream.time or 'no video,'} prompt: {len(prompt)} tokens, {len(stream.memory.entries)} notes{gone}")
            reply = self.complete(prompt, seed=seed + len(stream.thoughts), **decoding)
            if stream.is_last:
                return reply
            thought = {"completion": reply.completion, "finish_reason": reply.finish_reason}
            stream.add(thought, self.processor.tokenizer)

    def encode(
        self,
        question: str,
        *,
        videos: Sequence[str | Path] = (),
        images: Sequence[str | Path] = (),
        options: Sequence[str] = (),
        problem_type: str | None = None,
        encoder: StreamEncoder | None = None,
    ) -> EncodedPrompt | Stream:
        """The prompt of a question; with a `StreamEncoder` its stream.

        Args:
            videos, images: files (or URLs), in the order in which the model gets them, videos first.
            options: of a multiple-choice question; lettered here unless they are ("A. red").
            problem_type: what kind of answer the prompt asks for; by default "multiple choice" with options and
                "free-form" without.

        Raises:
            MediaError, RowError: a file is missing or cannot be read. PromptError: a question that no prompt can hold.
            PromptTooLongError: over `max_prompt_tokens`.
        """
        if not question.strip():
            raise PromptError("The question is empty.")
        if options and not all(re.match(r"[A-Z][.):]\s*\S", option) for option in options):
            if len(options) > len(ascii_uppercase):
                raise PromptError(
                    f"There are letters for 26 options, came {len(options)}. Leave some out."
                )
            options = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options)]
        return (encoder or self.encoder).encode(
            {
                "question_id": "question",
                "problem": question,
                "options": list(options),
                "problem_type": problem_type or ("multiple choice" if options else "free-form"),
                "videos": [_from_root(path) for path in videos],
                "images": [_from_root(path) for path in images],
                "data_source": "chat",
                "media_root": os.sep,
            }
        )

    def complete(
        self, prompt: EncodedPrompt, *, streamer=None, seed: int | None = None, **decoding
    ) -> Reply:
        """Answer an encoded question.

        Args:
            streamer: of transformers, like `TextStreamer(chat.processor.tokenizer, skip_prompt=True)`.
            seed: of the sampling; another one each time by default.
            decoding: `max_new_tokens` (4096), `temperature` (0 is greedy, and the default), `top_p`,
                `repetition_penalty`, as in `Decoding`.

        Raises:
            ConfigError: decoding that makes no sense.
        """
        seed = random.randrange(2**31) if seed is None else seed
        with settings_checked():
            decoding = Decoding(**{"max_new_tokens": 4096, **decoding}, seed=seed)
        engine = TransformersEngine(self.model, self.encoder, decoding)
        engine.options["streamer"] = streamer
        (ids,) = engine.complete([prompt], [0])
        told = describe_completion(ids, tokenizer=self.processor.tokenizer, ends=engine.ends)
        del told["think_tokens"]
        thinking, answer = split_completion(told["completion"])
        return Reply(thinking=thinking, answer=answer, seconds=engine.busy_s, **told)


def _from_root(path: str | Path) -> str:
    """A path as a row has it, relative to the media root: here the root of the file system, links resolved."""
    if "://" in str(path):
        return str(path)
    path = Path(path).expanduser()
    if not path.is_file():
        kind = (
            "a folder" if path.is_dir() else "no regular file" if path.exists() else "no such file"
        )
        raise MediaError(
            f"{path}: {kind} (looked from {Path.cwd()}). Expected the file of a video or image."
        )
    return os.path.relpath(os.path.realpath(path), os.sep)


class Printer(TextStreamer):
    """Prints a completion as it comes, without what a terminal would obey."""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        super().on_finalized_text(CONTROL_CHARACTERS.sub("\ufffd", text), stream_end)


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, dict, dict]:
    """(what is asked, arguments for `Chat`, arguments for `Chat.complete`)."""
    parser = argparse.ArgumentParser(
        prog="python -m veripo_trl.chat",
        description="Ask a policy one question about videos and images.",
    )
    add = parser.add_argument
    add("question")
    add("--video", action="append", default=[], help="A file or URL; give it again for more.")
    add("--image", action="append", default=[], help="A file or URL; give it again for more.")
    add(
        "--options",
        nargs="+",
        default=[],
        help='Of a choice: --options "A. red" "B. blue" --video …',
    )
    add("--problem_type", choices=PROBLEM_TYPES, help="What kind of answer the prompt asks for.")
    loading = parser.add_argument_group("the policy, and how it sees")
    add = loading.add_argument
    add("--model", required=True, help="A model or LoRA adapter: a folder or a name on the Hub.")
    add("--revision", help="Revision of a model on the Hub.")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--load_in_4bit", action="store_true", help="Quantize the weights (bitsandbytes).")
    kinds = {name: type(value) for name, value in SEEING.items()}
    for name, kind in {**kinds, "max_prompt_tokens": int}.items():
        field = DataArguments.__dataclass_fields__[name]
        add(f"--{name}", type=kind, default=field.default, help=field.metadata["help"])
    streaming = parser.add_argument_group("streaming")
    add = streaming.add_argument
    add("--streaming", action="store_true", help="The video clip by clip, the question with the last one.")
    add("--clip_tokens", type=int, help=f"Visual tokens of a clip (default: {CLIP_TOKENS})")
    add("--max_memory_tokens", type=int, help=f"Of the thoughts (default: {MAX_MEMORY_TOKENS})")
    streaming_options = ("clip_tokens", "max_memory_tokens")
    decoding = parser.add_argument_group("decoding")
    add = decoding.add_argument
    add("--max_new_tokens", type=int, default=4096, help="(default: 4096)")
    add("--temperature", type=float, default=0.0, help="0 is greedy decoding (the default).")
    add("--top_p", type=float, default=1.0)
    add("--repetition_penalty", type=float, default=1.0)
    add("--seed", type=int, help="Of the sampling; another one each time by default.")
    given = parser.parse_args(argv)
    if not given.streaming and any(getattr(given, name) is not None for name in streaming_options):
        parser.error("--clip_tokens and --max_memory_tokens are of --streaming, which is not given")
    groups = (
        {action.dest: getattr(given, action.dest) for action in g._group_actions}
        for g in (loading, decoding)
    )
    return given, *groups


def main(argv: list[str] | None = None) -> None:
    given, loading, decoding = parse_arguments(argv)
    for path in (*given.video, *given.image):
        _from_root(path)  # before the model loads, which can take minutes
    chat = Chat(**loading)
    content = {"options": given.options, "problem_type": given.problem_type}
    content |= {"videos": given.video, "images": given.image}
    printer = Printer(chat.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    if given.streaming:
        limits = {"clip_tokens": given.clip_tokens, "max_memory_tokens": given.max_memory_tokens}
        limits = {name: value for name, value in limits.items() if value is not None}
        stream = chat.watch(given.question, **limits, **content)
        reply = chat.think(stream, before=lambda line: print(f"# {line}", flush=True), streamer=printer, **decoding)
    else:
        prompt = chat.encode(given.question, **content)
        for line in (*(prompt.media or ["no video or image"]), f"prompt: {len(prompt)} tokens"):
            print(f"# {line}", flush=True)
        reply = chat.complete(prompt, streamer=printer, **decoding)
    cut = (
        f", cut at --max_new_tokens {given.max_new_tokens}"
        if reply.finish_reason == "length"
        else ""
    )
    form = "" if reply.answer is not None else ", no single answer in <answer> tags"
    rate = reply.completion_tokens / max(reply.seconds, 1e-9)
    print(
        f"# {reply.completion_tokens} tokens in {reply.seconds:.1f} s ({rate:.0f} tokens/s){cut}{form}"
    )


if __name__ == "__main__":
    sys.exit(run(main))
