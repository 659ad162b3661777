"""TRL's vLLM backend with encoded prompts: what `VideoGRPOTrainer` adds to it.

TRL is changed where it looks up `LLM`, `VLLMClient` and `VLLMGeneration`, nowhere else: its weight sync, sleep mode,
gathering over tensor-parallel groups and server protocol stay its own. Encoded prompts travel through it as "images".
"""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from veripo_trl.errors import VeripoError
from veripo_trl.model.encoding import EncodedPrompt, PromptEncoder
from veripo_trl.shared_prompt.rollout import distinct_neighbours
from veripo_trl.vllm.inputs import (
    BAN,
    EngineMismatchError,
    check_length,
    engine_options,
    generate_with_vllm,
    longest_prompt,
    server_features,
    vllm_inputs,
)

logger = logging.getLogger(__name__)

HEALTH_S = 5  # at least, for a server to say that it is up
MOST_REQUESTS = 64  # of a process to a server at a time, as TRL's client has it

# What vLLM's log-probabilities contain.
DRAWN_BY = ("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs")

# Bounds on the gap between the engine's and the trainer's log-probabilities (`prompt_gaps`), by the weights' dtype.
# On the tiny model it is 1e-6 in float32. Real bfloat16 models are reported to have 0.03 to 0.04 nats a token on
# average, and single tokens up to 0.5, by rounding alone (huggingface/trl#6789, ServiceNow/Fast-LLM#525).
GAP_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def engine_config(config, encoder: PromptEncoder, *, banned: list[int], datasets: list) -> dict:
    """What a `VideoGRPOConfig` leaves open about vLLM: its options that change.

    Banned tokens join the user's own `logit_bias` in `generation_kwargs` (vLLM refuses `suppress_tokens`).
    """
    if config.vllm_model_impl != "vllm":
        raise ValueError(
            f"vllm_model_impl: expected 'vllm', whose positions and vision towers are checked against the trainer's, "
            f"got {config.vllm_model_impl!r}."
        )
    given = config.generation_kwargs or {}
    bias = {int(token): float(value) for token, value in (given.get("logit_bias") or {}).items()}
    bias = {token: min(100.0, max(-100.0, value)) for token, value in bias.items()}  # as vLLM clips them
    changes = {"generation_kwargs": {**given, "logit_bias": bias | dict.fromkeys(banned, BAN)}}
    if config.vllm_mode == "colocate" and config.vllm_max_model_length is None:
        # The model's own length (128k) would ask for more memory for keys and values than most GPUs have left.
        needed = longest_prompt(encoder, datasets) + config.max_completion_length
        changes["vllm_max_model_length"] = min(needed, encoder.config.get_text_config().max_position_embeddings)
        logger.info("vllm_max_model_length: %d tokens", changes["vllm_max_model_length"])
    return changes


def engine_dtype(config, model) -> torch.dtype:
    """What the engine computes in: as the trainer does, the policy's dtype or, under autocast, that one."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else model.dtype


def bias_logits(model, bias: dict[int, float]) -> None:
    """Give a model's output head the biases that the engine samples with, so that both renormalise alike.

    A buffer that is neither trained, saved nor sent to the engine.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head._parameters.get("bias") is not None:
        raise ValueError(
            f"use_vllm: expected a plain output head without bias, which is not adapted or quantized, got {head}. "
            f"Take lm_head out of lora_target_modules and modules_to_save."
        )
    values = torch.zeros(head.out_features, dtype=head.weight.dtype, device=head.weight.device)
    values[list(bias)] = torch.tensor(list(bias.values()), dtype=values.dtype, device=values.device)
    head._parameters.pop("bias", None)
    head.register_buffer("bias", values, persistent=False)


@contextmanager
def trl_engine(config, encoder: PromptEncoder, *, model, datasets: list):
    """While this is entered, TRL's vLLM backend is ours, with engines and clients that take encoded prompts as "images".

    Args:
        config: with what `engine_config` changes. model: the policy.
    """
    from trl.import_utils import is_vllm_available

    if not is_vllm_available():
        raise ImportError("use_vllm=true needs vLLM, which is not installed: pip install 'veripo_trl[vllm]'")
    from trl.generation import vllm_generation
    from trl.trainer import grpo_trainer

    options = engine_options(encoder, dtype=engine_dtype(config, model), datasets=datasets)
    # What the policy was loaded from on the Hub (`load_policy` says it); TRL passes no revision.
    engine = engine_class(vllm_generation.LLM, {**options, "revision": getattr(encoder.config, "_commit_hash", None)})
    client = client_class(vllm_generation.VLLMClient, encoder.config, options, timeout_s=config.ddp_timeout)
    backend = backend_class(grpo_trainer.VLLMGeneration, vllm_generation)
    with (
        patch.object(vllm_generation, "LLM", engine),
        patch.object(vllm_generation, "VLLMClient", client),
        patch.object(grpo_trainer, "VLLMGeneration", backend),
    ):
        yield


def backend_class(base: type, module) -> type:
    """TRL's `VLLMGeneration`, in whose server mode each process posts its own prompts.

    TRL's would gather the prompts of all processes on each of them, with their pixels in the GPU's memory, for the first
    one to post. Weights still go through the first one's client, the only one with a communicator.

    Args:
        module: where `base` looks up what it exchanges objects with.
    """
    alone = SimpleNamespace(is_main_process=True, process_index=0)
    exchange = {"gather_object": lambda own: own, "broadcast_object_list": lambda own, from_process: own}

    class OwnPrompts(base):
        def _init_vllm(self):
            super()._init_vllm()
            if self.mode == "server" and not self.accelerator.is_main_process:
                self.vllm_client = module.VLLMClient(
                    base_url=self.server_base_url,
                    host=self.server_host,
                    server_port=self.server_port,
                    connection_timeout=self.server_timeout,
                )
            elif self.mode == "colocate" and self.tensor_parallel_size > 1:
                # Only prompts go through it: each process needs all of them, but not on its GPU.
                self.tp_group, _ = dist.new_subgroups(self.tensor_parallel_size, backend="gloo")

        def sync_weights(self):
            super().sync_weights()
            if self.mode == "server":  # none samples before the server has the weights
                self.accelerator.wait_for_everyone()

        def generate(self, prompts, images, num_generations, profiler=None):
            """TRL's; in server mode as if this process were the only one, with a prompt for each completion, since groups
            may be divided between processes, and these have unequally many rollouts."""
            if self.mode != "server":
                return super().generate(prompts, images, num_generations, profiler)
            with patch.object(self, "accelerator", alone), patch.multiple(module, **exchange):
                return super().generate(prompts, images, 1, profiler)

    return OwnPrompts


def engine_class(base: type, options: dict) -> type:
    """`vllm.LLM`, for TRL's colocate mode."""

    class VideoLLM(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, **options})

        def generate(self, prompts, sampling_params, use_tqdm=False):
            """TRL's call, with one entry per completion and our encoded prompt as its image.

            Neighbours that share a prompt become one request for as many samples. In the order of the completions.
            """
            rows = [row["multi_modal_data"]["image"] for row in prompts]
            unique, index = distinct_neighbours(rows)
            params = []
            for count in np.bincount(index).tolist():
                params.append(sampling_params.clone())
                params[-1].n = count
            return generate_with_vllm(self, vllm_inputs(self, unique), params)

        def reset_prefix_cache(self, *args, **kwargs):
            # TRL calls this after each weight sync. Features of the old vision weights are kept elsewhere, by name.
            self.llm_engine.reset_encoder_cache()
            return super().reset_prefix_cache(*args, **kwargs)

    return VideoLLM


def client_class(base: type, config, options: dict, *, timeout_s: float) -> type:
    """TRL's `VLLMClient`, for its server mode.

    Args:
        timeout_s: how long an answer is waited for, once; TRL waits for ever.
    """
    import requests
    from trl.generation import vllm_client
    from urllib3.exceptions import ReadTimeoutError
    from urllib3.util.retry import Retry

    class OnceTimedOut(Retry):
        """TRL's retries, but none where no answer came: what the server is still at work on would be posted again."""

        def increment(self, method=None, url=None, response=None, error=None, *args, **kwargs):
            if isinstance(error, ReadTimeoutError):
                raise error
            return super().increment(method, url, response, error, *args, **kwargs)

    class VideoVLLMClient(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.max_model_len = check_server(self.get_server_info(), options, self.base_url)

        def check_server(self, total_timeout=0.0, retry_interval=2.0):
            """TRL's, which would wait for ever: for an answer, and for a server that answers with an error."""
            self.session.request = partial(self.session.request, timeout=timeout_s)
            for adapter in self.session.adapters.values():
                adapter.max_retries.__class__ = OnceTimedOut  # with the numbers that TRL gave it
            deadline = time.monotonic() + total_timeout

            def get(url):
                answer = requests.get(url, timeout=max(HEALTH_S, deadline - time.monotonic()))
                answer.raise_for_status()
                return answer

            asked = SimpleNamespace(get=get, exceptions=requests.exceptions)
            try:
                with patch.object(vllm_client, "requests", asked):
                    super().check_server(total_timeout, retry_interval)
            except requests.ConnectionError as error:
                raise VeripoError(
                    f"The vLLM server at {self.base_url}: expected it to answer /health within {total_timeout:g} s "
                    f"(vllm_server_timeout); came {error.__cause__}. Start it, or look into its log."
                ) from error

        def _post(self, url, **kwargs):
            try:
                return super()._post(url, **kwargs)
            except Exception as error:
                # An answer other than 200 is for TRL an exception of no narrower type.
                if type(error) is not Exception and not isinstance(error, requests.RequestException):
                    raise
                raise VeripoError(
                    f"The vLLM server at {self.base_url}, asked for {url.removeprefix(self.base_url)}: {error}. Its log "
                    f"says why. Once a server runs there as before, the same command goes on from the last checkpoint."
                ) from error

        def image_features(self, images):
            """TRL's call, with `[encoded prompt]` for each completion. Neighbours that share it share its features."""
            unique, index = distinct_neighbours([prompt for (prompt,) in images])
            found = [server_features(prompt, config) for prompt in unique]
            return [found[place] for place in index]

        def generate(self, prompts, features, **kwargs):
            """TRL's call, with one entry per completion. Neighbours that share a prompt become one request for as many
            samples. In the order of the completions."""
            # Without the placeholders that TRL gave to the images: it looks for no videos.
            unique, index = distinct_neighbours([item["veripo_trl"] for item in features])
            for ids in prompts:
                check_length(len(ids), kwargs["max_tokens"], self.max_model_len)
            generate = super().generate

            def post(place: int) -> dict:
                ids, own = prompts[index.index(place)], unique[place]["features"]
                return generate(prompts=[ids], features=[own], **{**kwargs, "n": index.count(place)})

            with ThreadPoolExecutor(min(MOST_REQUESTS, len(unique))) as pool:
                answers = list(pool.map(post, range(len(unique))))
            found = {key: sum((answer[key] for answer in answers), []) for key in answers[0]}
            return {**found, "prompt_ids": prompts}

        def reset_prefix_cache(self):
            super().reset_prefix_cache()
            self.session.post(f"{self.base_url}/reset_encoder_cache").raise_for_status()

    return VideoVLLMClient


def check_server(info: dict, options: dict, url: str) -> int:
    """Raise unless a server was started with the options that an engine of ours gets; returns its context length."""
    model = info["model_config"]
    normalize = model["multimodal_config"]["mm_device_do_normalize"]
    checked = {  # what was found, what is expected
        "--dtype": (str(model["dtype"]).removeprefix("torch."), options["dtype"]),
        "--logprobs-mode": (model["logprobs_mode"], "processed_logprobs"),
        "--mm-device-do-normalize": (normalize, False),
    }
    if wrong := [f"{name} {found}, not {expected}" for name, (found, expected) in checked.items() if found != expected]:
        raise EngineMismatchError(
            f"The vLLM server at {url} runs with {', '.join(wrong)}. Start it with: VLLM_SERVER_DEV_MODE=1 "
            f"vllm serve MODEL --host 127.0.0.1 --dtype {options['dtype']} --logprobs-mode processed_logprobs "
            f"--no-mm-device-do-normalize --enable-scale-out --mm-processor-cache-gb 0 "
            """--weight-transfer-config '{"backend": "nccl"}'"""
        )
    return model["max_model_len"]


def largest_gap(engine, trained, mask, prompts: list[EncodedPrompt]) -> tuple[float, str]:
    """The largest mean difference per token between two log-probabilities of one prompt's completions.

    A mean over a prompt's completions tells a wrong input from rounding, which single tokens of a half-precision model
    do not.

    Args:
        engine, trained: (rows, C); NaN where the engine gave none. mask: (rows, C), 1 for completion tokens.
        prompts: one per row, rows of a group share one object.

    Returns:
        The gap in nats per token, and its prompt's question id.
    """
    known = mask.bool() & ~torch.isnan(engine)
    apart = (trained - engine).abs().float().masked_fill(~known, 0.0)
    unique, index = distinct_neighbours(prompts)
    index = torch.tensor(index, device=apart.device)
    sums, counts = (torch.zeros(len(unique), device=apart.device) for _ in range(2))
    sums.index_add_(0, index, apart.sum(1))
    counts.index_add_(0, index, known.sum(1).float())
    gaps = sums / counts.clamp(min=1)
    return gaps.max().item(), unique[int(gaps.argmax())].question_id


class GapWatch:
    """Stops a run at its first batch, or its first one after a weight update, where engine and trainer disagree.

    Later it warns: a policy that moves far may meet rounding of another size.

    Args:
        config: the run's `VideoGRPOConfig`. dtype: what the engine computes in.
    """

    def __init__(self, config, *, dtype: torch.dtype, accelerator):
        self.config, self.dtype, self.accelerator = config, dtype, accelerator
        self.bound = GAP_BOUNDS[dtype] if config.max_vllm_logp_gap is None else config.max_vllm_logp_gap
        self.steps: set[int] = set()

    def check(self, engine, trained, mask, prompts: list[EncodedPrompt], *, step: int) -> float:
        """Entered by every process, with its own rows; returns the largest gap of all of them."""
        own, question_id = largest_gap(engine, trained, mask, prompts)
        gap = self.accelerator.gather(torch.tensor([own], device=self.accelerator.device)).max().item()
        self.steps.add(step)
        if not gap <= self.bound:
            problem = (
                f"The log-probabilities of vLLM and of the trainer are {gap:.2g} nats a token apart at step {step}; "
                f"expected at most {self.bound:g} for {self.dtype} (max_vllm_logp_gap). Here the largest is that of "
                f"row {question_id!r}: {own:.2g}."
            )
            if len(self.steps) <= 2:
                drawn = {name: getattr(self.config, name) for name in DRAWN_BY}
                raise EngineMismatchError(
                    f"{problem} Likely causes: of {drawn} what vLLM's log-probabilities contain and the trainer's do "
                    f"not; weights, or features of the old weights, that were not replaced in the engine after an "
                    f"update; in the engine another dtype, or another frame rate, size or normalisation of pixels; a "
                    f"version of vLLM that this project was not tested with (it pins one)."
                )
            logger.warning("%s", problem)
        return gap
