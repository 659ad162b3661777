"""A judge in this process: any causal language model of transformers with a chat template."""

import asyncio
import math
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from veripo_trl.hub.locate import is_local
from veripo_trl.verifier.judge_prompts import JudgePrompt, ModelJudge, ReplyError, judge_messages
from veripo_trl.verifier.judges import shown_model


@dataclass(eq=False)
class LocalJudge(ModelJudge):
    """Asks a model that it loads, with greedy decoding, by the prompt and the parser of `ServerJudge`.

    Args:
        revision: of the model on the Hub.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: "cuda", "cpu", …; a GPU if there is one by default.
        batch_size: prompts at once. max_new_tokens: of a reply; one that is cut off there is unknown.

    Raises:
        ValueError: a model without a chat template, or options that make no sense. OSError: no such model. Otherwise
            what torch and transformers raise for an option that they do not know.
    """

    model_name_or_path: str
    prompt: JudgePrompt
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    batch_size: int = 16
    max_new_tokens: int = 512

    def __post_init__(self):
        super().__init__(self.prompt)
        name, revision = self.model_name_or_path, self.revision
        if (least := min(self.batch_size, self.max_new_tokens)) < 1:
            raise ValueError(f"batch_size, max_new_tokens: expected 1 or more, got {least}.")
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.concurrency = 8 * self.batch_size  # to be sorted by length
        self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, padding_side="left")
        if self.tokenizer.chat_template is None:
            raise ValueError("it has no chat template: choose a model that was tuned for chat.")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=self.dtype)
        self.model = model.to(device).eval()
        shown = shown_model(name, is_path=is_local(name))
        options = [self.dtype, self.max_new_tokens]
        self.identify(f"local:{shown}@{revision or 'main'}", name, revision, *options)
        self._asked, self._judged = [], {}

    async def __call__(self, item: dict) -> dict:
        self._asked.append(item)
        await asyncio.sleep(0)  # what is asked in one turn of the event loop is judged together
        if self._asked:
            asked, self._asked = self._asked, []
            self._judge(asked)
        return self._judged.pop(id(item))

    def _judge(self, items: list[dict]) -> None:
        """Verdicts by the ids of their items; sorted by length, so that little is padded."""
        tokenizer, config = self.tokenizer, self.model.config.get_text_config()
        limit = (getattr(config, "max_position_embeddings", None) or math.inf) - self.max_new_tokens
        prompts = []
        for item in items:
            messages = judge_messages(self.prompt, item)
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) > limit:
                error = ReplyError(
                    "too long", f"{len(ids)} tokens, the model takes {limit} and its reply"
                )
                self._judged[id(item)] = self.unknown(error)
            else:
                prompts.append((ids, item))
        prompts.sort(key=lambda prompt: len(prompt[0]))
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            replies = self._generate([ids for ids, _ in batch])
            for (_, item), (text, cut_off) in zip(batch, replies, strict=True):
                self._judged[id(item)] = self.read(item, text, cut_off=cut_off)

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]]) -> list[tuple[str, bool]]:
        """For each prompt (text of the reply, whether it was cut off)."""
        self.requests += len(prompts)
        inputs = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(
            self.model.device
        )
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        pad = self.tokenizer.pad_token_id
        output = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, pad_token_id=pad, **greedy
        )
        declared = self.model.generation_config.eos_token_id
        ends = {
            self.tokenizer.eos_token_id,
            *(declared if isinstance(declared, list) else [declared]),
        }
        replies = output[:, inputs["input_ids"].size(1) :].tolist()
        texts = self.tokenizer.batch_decode(replies, skip_special_tokens=True)
        return [(text, not ends & set(ids)) for text, ids in zip(texts, replies, strict=True)]
