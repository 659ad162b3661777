"""The evaluation's engine over vLLM: prompts as `PromptEncoder` made them, so that training and evaluation agree."""

import time

from veripo_trl.evaluate.generate import Decoding, end_ids
from veripo_trl.model.encoding import EncodedPrompt, PromptEncoder, vision_token_ids
from veripo_trl.vllm.inputs import BAN, engine_options, generate_with_vllm, longest_prompt, vllm_inputs


class VLLMEngine:
    """Completes encoded prompts with vLLM.

    Args:
        model_path: weights as vLLM loads them: merge an adapter first. dtype: a torch dtype.
        rows: what will be asked, for the longest prompt and the most media of one. more_tokens: what a prompt may have
            beyond its row, as a memory. llm_options: further arguments of `vllm.LLM`.

    Attributes:
        ends, context, busy_s: as of `evaluate.TransformersEngine`.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
    """

    def __init__(
        self,
        model_path: str,
        encoder: PromptEncoder,
        decoding: Decoding,
        *,
        dtype,
        rows: list[dict],
        more_tokens: int = 0,
        **llm_options,
    ):
        from vllm import LLM

        self.tokenizer, self.decoding = encoder.processor.tokenizer, decoding
        columns = {name: [row[name] for row in rows] for name in ("problem", "options", "videos", "images")}
        context = encoder.config.get_text_config().max_position_embeddings
        longest = longest_prompt(encoder, [columns]) + more_tokens
        self.context = min(context, longest + decoding.max_new_tokens)
        options = engine_options(encoder, dtype=dtype, datasets=[columns])
        # A question's samples are posted to the engine's process one by one, each with all pixels: it keeps one of them.
        options["mm_processor_cache_gb"] = 4  # as vLLM has it; of the engine's host memory
        self.llm = LLM(
            model=model_path, seed=decoding.seed, max_model_len=self.context, **options, **llm_options
        )
        self.banned = vision_token_ids(encoder.processor, encoder.config)
        self.ends = end_ids(self.llm.model_config.try_get_generation_config().get("eos_token_id"), self.tokenizer)
        self.busy_s = 0.0

    def complete(self, prompts: list[EncodedPrompt], indices: list[int], *, samples: int = 1) -> list[list[int]]:
        """As `evaluate.TransformersEngine.complete`; each row's sampling has a seed of its own."""
        from vllm import SamplingParams

        decoding = self.decoding
        params = [
            SamplingParams(
                n=samples,
                max_tokens=decoding.max_new_tokens,
                temperature=0.0 if decoding.greedy else decoding.temperature,
                top_p=1.0 if decoding.greedy else decoding.top_p,
                repetition_penalty=decoding.repetition_penalty,
                seed=None if decoding.greedy else decoding.seed_of(index),
                logit_bias=dict.fromkeys(self.banned, BAN),
                stop_token_ids=self.ends,
            )
            for index in indices
        ]
        inputs = vllm_inputs(self.llm, prompts)
        started = time.perf_counter()
        outputs = generate_with_vllm(self.llm, inputs, params)
        self.busy_s += time.perf_counter() - started
        return [list(completion.token_ids) for output in outputs for completion in output.outputs]
