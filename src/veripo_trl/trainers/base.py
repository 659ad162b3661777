"""What the trainers of SFT, DPO and GRPO have in common: options, start-up, the first batch's checks, scoring, times."""

import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import ClassVar

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers.integrations import is_deepspeed_zero3_enabled

from veripo_trl.errors import ConfigError
from veripo_trl.model.encoding import EncodedPrompt, PromptEncoder
from veripo_trl.model.features import media_kinds, tower_is_frozen
from veripo_trl.model.inputs import check_vision_tokens, vision_inputs
from veripo_trl.model.pieces import mlp_in_pieces
from veripo_trl.model.policy import copy_adapter_to_reference
from veripo_trl.options import option
from veripo_trl.shared_prompt.scoring import prefix_can_be_shared, score_completions, why_not_shared
from veripo_trl.trainers.checkpoints import CheckpointMixin, with_changes
from veripo_trl.trainers.engines import check_engine, check_media_alike, shares_out_towers, whole_towers
from veripo_trl.trainers.guards import check_frames_matter, show_resolved_media


@dataclass
class VideoConfig:
    """For a config of TRL's: put before it among the bases.

    Attributes:
        UNUSED: options of TRL's that would have no effect here, or a wrong one, each with the values that are accepted.
        BECAUSE: a sentence that says why.
    """

    hub_private_repo: bool | None = option("Whether a pushed repository is private.", True)
    hub_license: str = option("Licence in the cards, by the Hub's identifier.", "unknown")
    hub_strategy: str = option("A run is pushed when it is finished: end.", "end")
    shared_prefix: bool = option("Compute a prompt once for all of its completions, wherever they are scored.", True)
    prompt_parallel: int = option(
        "Neighbouring processes that compute one prompt together; in GRPO they hold its completions. 1: each its own.", 1
    )

    UNUSED: ClassVar[dict[str, tuple]] = {}
    BECAUSE: ClassVar[str] = ""

    def __post_init__(self):
        super().__post_init__()
        for name, accepted in self.UNUSED.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not supported. {self.BECAUSE} Leave it out.")


class VideoMixin(CheckpointMixin):
    """For a trainer of TRL's: put before it among the bases.

    Args:
        encoder: turns a row into ids, positions and vision tensors; the trainer sees prompts through it only.

    Attributes:
        args: a copy of the settings that were given, with what was left open filled in.
        held_out_encoder: with which held-out rows are asked; a method may ask them otherwise.
        shares_prompts: whether a prompt is computed once for its completions; None until the first batch decides it.
        prompt_group: in training, the processes that share out a prompt (`prompt_parallel`); None: each computes its own.
    """

    ref_model = None  # SFT has none
    step_name = "step"  # of a training step in `seconds`

    def __init__(self, *args, encoder: PromptEncoder, **kwargs):
        kwargs["args"] = with_changes(kwargs["args"], remove_unused_columns=False)
        super().__init__(*args, **kwargs)
        check_engine(self.accelerator, self._unwrapped(self.model), self.ref_model)
        self.encoder = self.held_out_encoder = encoder
        self.shares_prompts: bool | None = None
        self.prompt_group, self._group_checked = None, False
        self._checked = False
        if isinstance(self.model, PeftModel):
            copy_adapter_to_reference(self.model)
        if self.ref_model is not None:
            self.ref_model.requires_grad_(False)  # its vision tower is frozen: it takes the policy's features
            mlp_in_pieces(self._unwrapped(self.ref_model))
        mlp_in_pieces(self._unwrapped(self.model))

    def _share_out_prompts(self, **layout) -> None:
        """Make `prompt_group` of `args.prompt_parallel` neighbours. Entered by every process.

        Args:
            layout: settings, and what they have to be for the processes of a group to hold the same prompt.

        Raises:
            ConfigError: what keeps prompts from being shared out, and what to set instead.
        """
        count, processes, model = self.args.prompt_parallel, self.args.world_size, self._unwrapped(self.model)
        if count == 1:
            return
        problems = []
        if count < 1 or processes % count:
            problems.append(f"expected a number of processes that divides those of the run, {processes}")
        if is_deepspeed_zero3_enabled() or self.is_fsdp_enabled:
            problems.append("weights are sharded, which was not tried; use accelerate/ddp.yaml or accelerate/zero2.yaml")
        if not tower_is_frozen(model.model.visual):
            problems.append("features are shared out once, by a frozen vision tower; set train_vision_tower: false")
        if obstacle := why_not_shared(model):
            problems.append(obstacle)
        if "linear_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
            problems.append("linear attention's state, handed from token to token, is not shared out; set it to 1")
        for name, value in {"shared_prefix": True, **layout}.items():
            if getattr(self.args, name) != value:
                problems.append(f"set {name}: {value} (now {getattr(self.args, name)})")
        if problems:
            raise ConfigError(f"prompt_parallel: {count}: {'; '.join(problems)}.")
        timeout = timedelta(seconds=self.args.ddp_timeout)
        self.prompt_group, _ = dist.new_subgroups(group_size=count, timeout=timeout)
        self._tp_size = count  # of SFT's and DPO's `num_tokens`: a group's processes are given the same rows

    # The first batch

    def training_step(self, *args, **kwargs):
        if not self._checked:
            self._checked = True
            self._check_first_rows()
        with self._timed(self.step_name):
            loss = super().training_step(*args, **kwargs)
            if self.accelerator.device.type == "cuda":  # else the clock stops before the kernels do
                torch.cuda.synchronize()
        return loss

    def _check_first_rows(self) -> None:
        """Show what the first rows became, and stop where the order of frames changes nothing. Entered by all."""
        if self.accelerator.is_main_process:
            show_resolved_media(self.encoder, self.train_dataset)
        unwrapped = self._unwrapped(self.model)
        check_frames_matter(
            self.model_wrapped, unwrapped, self.encoder, self.train_dataset, accelerator=self.accelerator
        )

    def _decide_sharing(self, model, prompt: EncodedPrompt) -> None:
        """Before the first scoring: does a prompt computed once give what plain rows give? Entered by every process."""
        group = self._group()
        if self.shares_prompts is None or (group is not None and not self._group_checked):
            self._group_checked = group is not None
            prompt = replace(prompt)  # what is kept with it is made in the update's own batch: resumed, to the last bit
            check_media_alike(self.accelerator, self._unwrapped(model), media_kinds([prompt]))
            self.shares_prompts = self.args.shared_prefix and prefix_can_be_shared(
                model,
                self._unwrapped(model),
                prompt,
                pad_token_id=self._tokenizer.pad_token_id,
                accelerator=self.accelerator,
                group=group,
            )

    # Vision features

    def _make_features(self, pieces: list[list[EncodedPrompt]]) -> None:
        """Vision features of prompts under ZeRO-3, with the tower of policy and reference whole. Entered by all.

        Elsewhere they are made where they are first needed.

        Args:
            pieces: the prompts of this process, in the tower's batches; other processes may have more, or none.
        """
        models = [self._unwrapped(model) for model in (self.model, self.ref_model) if model is not None]
        if not shares_out_towers(self.accelerator, models[0]):
            return
        with whole_towers([model.model.visual for model in models]):
            for model in models:
                for piece in pieces:
                    vision_inputs(model, piece, self.accelerator.device)

    # Scoring

    def _group(self):
        """`prompt_group` in training. An evaluation may deal out its rows otherwise: there, every process for itself."""
        return self.prompt_group if self.model.training else None

    def _score(self, model, prompts: list[EncodedPrompt], input_ids, attention_mask, width: int):
        """TRL's fused output for the last `width` tokens of each row, see `score_completions`.

        Args:
            model: wrapped for its backend. prompts: one per row of `input_ids`, `attention_mask` (rows, length).
        """
        check_vision_tokens(input_ids, prompts, self.encoder.config)
        check_media_alike(self.accelerator, self._unwrapped(model), media_kinds(prompts))
        with self.accelerator.autocast():
            return score_completions(
                model,
                self._unwrapped(model),
                prompts,
                input_ids[:, -width:],
                attention_mask[:, -width:],
                pad_token_id=self._tokenizer.pad_token_id,
                shared=self.shares_prompts,
                group=self._group(),
            )

    def _unwrapped(self, model) -> torch.nn.Module:
        """A model without the wrappers of its backend and of PEFT."""
        unwrapped = self.accelerator.unwrap_model(model)
        return unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped

    # Times

    @contextmanager
    def _timed(self, part: str):
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

    def get_batch_samples(self, *args, **kwargs):
        with self._timed("wait for data"):
            return super().get_batch_samples(*args, **kwargs)
