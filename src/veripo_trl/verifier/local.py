"""A judge in this process: any causal language model of transformers with a chat template."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .judge_prompts import MAX_THINK_CHARS, JudgePrompt, ReplyError, judge_messages, read_reply, settle
from .judges import shown_model

DTYPES = ("auto", "float32", "bfloat16", "float16")


class LocalJudge:
    """Asks a model that it loads, with greedy decoding, by the prompt and the parser of `ServerJudge`."""

    caches = True

    def __init__(
        self,
        model_name_or_path: str,
        prompt: JudgePrompt,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int = 16,
        max_new_tokens: int = 512,
        max_think_chars: int = MAX_THINK_CHARS,
    ):
        """
        Args:
            revision: of the model on the Hub.
            dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
            device: "cuda", "cpu", …; a GPU if there is one by default.
            batch_size: prompts at once. max_new_tokens: of a reply; one that is cut off there is unknown.

        Raises:
            ValueError: a model without a chat template, or options that make no sense. OSError: no such model.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
        for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a whole number from 1, got {value!r}.")
        self.device = _device(device)
        self.prompt, self.batch_size, self.max_new_tokens = prompt, batch_size, max_new_tokens
        self.max_think_chars = max_think_chars
        self.tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, revision=revision, padding_side="left")
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{model_name_or_path!r} has no chat template, so it cannot be a judge: choose a model that was tuned "
                "for chat."
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(
            model_name_or_path, revision=revision, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )
        self.model.to(self.device).eval()
        # All that another reply is to be expected from. A path stands in it only as its digest.
        identity = [model_name_or_path, revision, dtype, max_new_tokens, max_think_chars]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
        shown = shown_model(model_name_or_path, is_path=Path(model_name_or_path).exists())
        self.name = f"local:{shown}@{revision or 'main'}:{digest}"
        self.prompt_version = prompt.version
        self.requests, self.retries, self.failures = 0, 0, Counter()

    def judge_stream(self, items: Iterable[dict | None]) -> Iterator[tuple[int | None, dict | None]]:
        """See `RulesJudge`. Some batches are collected and sorted by length, so that little is padded."""
        collected = []
        for item in items:
            if item is not None:
                collected.append(item)
                if len(collected) < 8 * self.batch_size:
                    continue
            elif not collected:
                yield None, None
            yield from self._judge(collected)
            collected = []
        yield from self._judge(collected)

    def _judge(self, items: list[dict]) -> Iterator[tuple[int, dict]]:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        prompts = []
        for item in items:
            messages = judge_messages(self.prompt, item, max_think_chars=self.max_think_chars)
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            if limit is not None and len(ids) + self.max_new_tokens > limit:
                cause = ReplyError("too long", f"{len(ids)} + {self.max_new_tokens} tokens, the model takes {limit}")
                yield item["place"], self._unknown(cause)
            else:
                prompts.append((ids, item))
        prompts.sort(key=lambda prompt: len(prompt[0]))
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            for (_, item), text in zip(batch, self._generate([ids for ids, _ in batch]), strict=True):
                yield item["place"], self._verdict(item, text)

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]]) -> list[str | None]:
        """The replies' texts; None for one that was cut off."""
        self.requests += len(prompts)
        inputs = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.device)
        output = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        declared = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])}
        replies = output[:, inputs["input_ids"].size(1) :].tolist()
        return [
            self.tokenizer.decode(ids, skip_special_tokens=True) if ends & set(ids) else None for ids in replies
        ]

    def _verdict(self, item: dict, text: str | None) -> dict:
        try:
            if text is None:
                raise ReplyError("cut off", f"the reply reached {self.max_new_tokens} tokens")
            reply = read_reply(text)
        except ReplyError as error:
            return self._unknown(error)
        verdict = settle(reply, item)
        if verdict["consistency"] == "unknown" and verdict["reason"].startswith("contradiction:"):
            self.failures["contradiction"] += 1
        return {**verdict, "reply": reply}

    def _unknown(self, error: ReplyError) -> dict:
        self.failures[error.cause] += 1
        return {"consistency": "unknown", "concluded_answer": None, "reason": str(error), "reply": None}

    def summary(self) -> str:
        """One line: prompts, and verdicts that are unknown because of the judge, by cause."""
        if not self.failures:
            return f"{self.requests:,} prompts; every reply was readable."
        causes = ", ".join(f"{cause} {count:,}" for cause, count in self.failures.most_common())
        return f"{self.requests:,} prompts; without a usable verdict: {causes}."


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected cuda, cuda:1, cpu, …, got {name!r}: {error}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one that is here, got {name!r}; GPUs here: {torch.cuda.device_count()}.")
    return device
