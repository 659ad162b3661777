"""The evaluation's engine over vLLM: prompts as `PromptEncoder` made them, so that training and evaluation agree."""

from .encoding import EncodedPrompt, PromptEncoder, vision_token_ids
from .evaluate import Decoding

BANNED = -100.0  # added to a logit; vLLM has no list of suppressed tokens


class VLLMEngine:
    """Completes encoded prompts with vLLM.

    Args:
        model_path: weights as vLLM loads them: merge an adapter first. dtype: a torch dtype.
        rows: what will be asked, for the longest prompt and the most media of one. llm_options: further arguments of
            `vllm.LLM`.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
    """

    def __init__(
        self, model_path: str, encoder: PromptEncoder, decoding: Decoding, *, dtype, rows: list[dict], **llm_options
    ):
        from vllm import LLM

        from .vllm_rollouts import engine_options, longest_prompt

        self.tokenizer, self.decoding = encoder.processor.tokenizer, decoding
        images, videos = (max(1, *(len(row[kind]) for row in rows)) for kind in ("images", "videos"))
        columns = {name: [row[name] for row in rows] for name in ("problem", "options", "videos", "images")}
        context = encoder.config.get_text_config().max_position_embeddings
        self.llm = LLM(
            model=model_path,
            seed=decoding.seed,
            max_model_len=min(context, longest_prompt(encoder, [columns]) + decoding.max_new_tokens),
            **engine_options(encoder, dtype=dtype, max_images=images, max_videos=videos),
            **llm_options,
        )
        self.banned = vision_token_ids(encoder.processor, encoder.config)
        self.ends = [self.tokenizer.eos_token_id]

    def complete(self, prompts: list[EncodedPrompt], places: list[int], *, samples: int = 1) -> list[list[int]]:
        """As `evaluate.TransformersEngine.complete`; each row's sampling has a seed of its own."""
        from vllm import SamplingParams

        from .vllm_rollouts import generate_with_vllm, vllm_inputs

        decoding = self.decoding
        params = [
            SamplingParams(
                n=samples,
                max_tokens=decoding.max_new_tokens,
                temperature=0.0 if decoding.greedy else decoding.temperature,
                top_p=1.0 if decoding.greedy else decoding.top_p,
                repetition_penalty=decoding.repetition_penalty,
                seed=None if decoding.greedy else decoding.seed_of(place),
                logit_bias={token: BANNED for token in self.banned},
                stop_token_ids=self.ends,
            )
            for place in places
        ]
        outputs = generate_with_vllm(self.llm, vllm_inputs(self.llm, prompts), params)
        return [list(completion.token_ids) for output in outputs for completion in output.outputs]
