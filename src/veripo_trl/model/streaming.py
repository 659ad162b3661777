"""A row's prompts, turn by turn: its video is decoded and encoded once, the memory is put in when it is known."""

import time
from dataclasses import dataclass, field

from veripo_trl.data.prompts import PromptError
from veripo_trl.data.streaming import NOTES, Memory, turn_row, window_time, windows
from veripo_trl.errors import ConfigError
from veripo_trl.model.encoding import EncodedPrompt, PromptEncoder, PromptTooLongError, as_shown

CLIP_TOKENS, MAX_MEMORY_TOKENS = 5000, 4096  # the defaults; the first is VST's


@dataclass(eq=False)
class Stream:
    """A row in turns, as far as they have been asked.

    Attributes:
        turns: (time, row, prompt) of each, without a memory. memory: of the thoughts so far.
        thoughts: what was written so far, a dict each with `time` and `completion`.
    """

    row: dict
    turns: list[tuple[str, dict, EncodedPrompt]]
    memory: Memory
    thoughts: list[dict] = field(default_factory=list)

    def again(self) -> "Stream":
        """From the first turn, with prompts shared: for another rollout."""
        return Stream(self.row, self.turns, Memory(self.memory.max_tokens))

    @property
    def time(self) -> str:
        return self.turns[len(self.thoughts)][0]

    @property
    def is_last(self) -> bool:
        return len(self.thoughts) == len(self.turns) - 1

    def __len__(self) -> int:
        """The most tokens that a prompt of it may have."""
        memory = self.memory.max_tokens + 2 * len(NOTES) if len(self.turns) > 1 else 0
        return memory + max(len(prompt) for *_, prompt in self.turns)

    def prompt(self, encoder: PromptEncoder) -> EncodedPrompt:
        """The prompt of this turn."""
        time, asked, prompt = self.turns[len(self.thoughts)]
        if not self.memory.text:
            return prompt
        after = turn_row(self.row, time, self.memory.text, last=self.is_last)
        return encoder.with_text(prompt, asked, after)

    def add(self, thought: dict, tokenizer) -> None:
        """Go on to the next turn, with this one's `completion` in the memory."""
        self.memory.add(self.time, thought["completion"], tokenizer)
        self.thoughts.append({"time": self.time, **thought})

    def record(self, encoder: PromptEncoder) -> dict:
        """What the answer was made with: of an evaluation's record."""
        prompt = self.prompt(encoder)
        return {
            "prompt_tokens": len(prompt),
            "media": [line for *_, shown in self.turns for line in shown.media],
            "thoughts": self.thoughts,
            "memory": self.memory.text,
            "memory_evicted": self.memory.evicted,
            "memory_cut": self.memory.cut,
        }


@dataclass(eq=False)
class StreamEncoder:
    """Encodes rows as streams, in place of a `PromptEncoder` where rows are asked.

    Args:
        clip_tokens: visual tokens of a turn; a video of no more is asked about in one.
        max_memory_tokens: see `Memory`.
    """

    encoder: PromptEncoder
    clip_tokens: int = CLIP_TOKENS
    max_memory_tokens: int = MAX_MEMORY_TOKENS

    def __post_init__(self):
        if self.clip_tokens < 1 or self.max_memory_tokens < 0:
            limits = {"clip_tokens": self.clip_tokens, "max_memory_tokens": self.max_memory_tokens}
            raise ConfigError(f"expected clip_tokens >= 1 and max_memory_tokens >= 0; got {limits}")

    @property
    def template(self):
        return self.encoder.template

    def encode(self, row: dict) -> Stream:
        """Raises PromptError for a row of several videos, and what `PromptEncoder.encode` does: for a prompt that is too
        long with a full memory, too. Images come with the question; a row without a video is asked in one turn, as it
        is."""
        encoder, memory = self.encoder, Memory(self.max_memory_tokens)
        started = time.perf_counter()
        clips, images = encoder.read_media(row)
        load_s = time.perf_counter() - started
        row = {**as_shown(row), "shown": None}  # its frames are the clip's now, its text the last turn's
        if len(clips) > 1:
            raise PromptError(
                f"row {row['question_id']!r}: expected one video, came {len(clips)}: streaming shows one clip by clip."
            )
        if not clips:
            return Stream(row, [("", row, encoder.encode_media(row, clips, images, load_s=load_s))], memory)
        (clip,) = clips
        frames, height, width, _ = clip.frames.shape
        pair_tokens = height * width // encoder.loader.settings.size_factor**2
        seconds = [index / clip.fps for index in clip.frames_indices] + [clip.total_num_frames / clip.fps]
        turns = []
        for first, end in windows(frames, clip_tokens=self.clip_tokens, pair_tokens=pair_tokens):
            first, end, last = 2 * first, min(2 * end, frames), 2 * end >= frames
            window = window_time(seconds[first], seconds[end])
            asked = turn_row(row, window, "", last=last)
            shown = clip.part(first, end)
            turns.append((window, asked, encoder.encode_media(asked, [shown], images if last else [])))
        turns[0][2].load_s, turns[0][2].encode_s = load_s, sum(prompt.encode_s for *_, prompt in turns)
        stream, limit = Stream(row, turns, memory), encoder.max_prompt_tokens
        if limit is not None and len(stream) > limit:
            raise PromptTooLongError(
                f"Row {row['question_id']!r}: with a full memory a turn has {len(stream)} tokens, the limit is "
                f"max_prompt_tokens={limit}. Raise it, or lower clip_tokens or max_memory_tokens."
            )
        return stream
