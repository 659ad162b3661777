"""The GRPO update and the DPO step of the real trainers, on made-up rows: what bench_update.py and on_gpu.py measure."""

import contextlib
import os
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from models import question
from timing import wait_for_device

from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.model import inputs
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.build import make_encoder
from veripo_trl.shared_prompt.scoring import HALF_BOUND, score_completions
from veripo_trl.trainers.dpo import VideoDPOConfig, VideoDPOTrainer
from veripo_trl.trainers.grpo import VideoGRPOConfig, VideoGRPOTrainer

EVERYTHING, GIVEN = PAIRS = "everything", "features given"  # see bench_update.py
LIMITS = {"log_probs": 1e-5, "gradients": 1e-4}  # in float32


class Part:
    """One trainer, ready to be stepped with groups of completions of one prompt, on either way.

    Args:
        part: "grpo" or "dpo".
        model: with its adapter, if it is to have one.
        reference: for DPO on a model without an adapter.
        half: update under bfloat16's autocast.
    """

    def __init__(self, part: str, model, processor, *, half: bool, checkpointing: bool, reference=None):
        self.device = next(model.parameters()).device
        self.half = half
        folder = Path(tempfile.gettempdir())
        encoder = make_encoder(model, processor, DataArguments(prompt_template="tiny"))
        dataset = rows_to_dataset([question("text", folder)])  # which is not trained on
        options = {
            "output_dir": str(folder / "unused"), "per_device_train_batch_size": 2, "report_to": "none",
            "save_strategy": "no", "use_cpu": self.device.type == "cpu", "bf16": half,
            "activation_checkpointing": checkpointing, "max_steps": 1,
        }  # fmt: skip
        common = {"model": model, "processing_class": processor, "encoder": encoder}
        if part == "grpo":
            self.trainer = VideoGRPOTrainer(
                reward_funcs=[lambda completions, **kwargs: [0.0] * len(completions)],
                args=VideoGRPOConfig(num_generations=2, **options),
                train_dataset=dataset,
                **common,
            )
        else:
            for name, value in (("chosen", "yes"), ("rejected", "no"), ("rejected_finished", True)):
                dataset = dataset.add_column(name, [value])
            training = VideoDPOConfig(**options | {"per_device_train_batch_size": 1})
            self.trainer = VideoDPOTrainer(ref_model=reference, args=training, train_dataset=dataset, **common)
            if reference is not None:  # the policy has moved away from it
                with torch.no_grad():
                    self.trainer.ref_model.lm_head.weight.mul_(1.1)
        self.model = self.trainer.model
        self.model.train()
        self.base = self.trainer.accelerator.unwrap_model(self.model)
        self.base = self.base.get_base_model() if hasattr(self.base, "peft_config") else self.base
        if checkpointing:  # `train()` would do it, which this program does not call.
            kwargs = self.trainer.args.activation_checkpointing_kwargs
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
            if not self.base.is_activation_checkpointing:
                raise RuntimeError("Gradient checkpointing is not on.")
        self.tokens = self.patches = 0
        for counted in [self.base] if self.trainer.ref_model is None else [self.base, self.trainer.ref_model]:
            counted.model.language_model.register_forward_pre_hook(self._count_tokens, with_kwargs=True)
            counted.model.visual.register_forward_pre_hook(self._count_patches)

    def _count_tokens(self, module, args, kwargs):
        self.tokens += kwargs["inputs_embeds"].shape[:2].numel()

    def _count_patches(self, module, args):
        self.patches += len(args[0])

    def load(self, prompt, *, completion: int, group: int, over=None) -> None:
        """Take a prompt with `group` made-up completions, all of them `completion` tokens long.

        Args:
            over: the processes that share out the prompt; each takes its part of the completions.
        """
        self.given, self.prompt = prompt, replace(prompt)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(100, 250, (group, completion), generator=generator).to(self.device)
        self.advantages = torch.linspace(-1, 1, group, device=self.device)
        if over is not None:
            self.ids, self.advantages = (
                tensor.chunk(over.size())[over.rank()] for tensor in (self.ids, self.advantages)
            )
        self.mask = torch.ones_like(self.ids)
        self.trainer.prompt_group, self.trainer._group_checked = over, True  # compared below

    def hold_features(self) -> None:
        if self.prompt.features is None:
            inputs.vision_inputs(self.base, [self.prompt], self.device)

    def _batch(self, rows: slice) -> dict:
        ids, mask = self.ids[rows], self.mask[rows]
        group, width = ids.shape
        prompt_ids = torch.from_numpy(self.prompt.input_ids).to(self.device).expand(group, -1)
        if isinstance(self.trainer, VideoDPOTrainer):
            before = torch.zeros_like(prompt_ids)
            return {
                "input_ids": torch.cat([prompt_ids, ids], 1), "attention_mask": torch.cat([before + 1, mask], 1),
                "completion_mask": torch.cat([before, mask], 1), "completion_width": width,
                "prompts": [self.prompt] * group,
            }  # fmt: skip
        self.trainer._encoded["train"] = (1, [self.prompt] * group)
        return {
            "prompt_ids": prompt_ids, "prompt_mask": torch.ones_like(prompt_ids), "completion_ids": ids,
            "completion_mask": mask, "advantages": self.advantages[rows],
            "row_index": torch.arange(group), "generation": torch.ones(group, dtype=torch.long),
            "num_items_in_batch": mask.sum(),
        }  # fmt: skip

    def step(self, way: str, pair: str, *, rows_at_once: int | None = None) -> float:
        """One update of the whole group, forward and backward. Returns seconds.

        Args:
            way: "ours", or "plain". pair: one of PAIRS.
            rows_at_once: of a GRPO group in one forward; the gradient is the same. Default: all.
        """
        self.trainer.shares_prompts = way == "ours"  # compared below
        group, rows_at_once = len(self.ids), rows_at_once or len(self.ids)
        self.trainer.current_gradient_accumulation_steps = group // rows_at_once
        self.model.zero_grad()
        if pair == EVERYTHING:
            self.prompt = replace(self.given)  # without features; and an update lets go of its prompt's pixels
        else:
            self.hold_features()
        self.tokens = self.patches = self.loss = 0
        with self._as_stock(way, pair):
            wait_for_device()
            started = time.perf_counter()
            for start in range(0, group, rows_at_once):
                batch = self._batch(slice(start, start + rows_at_once))
                if isinstance(self.trainer, VideoDPOTrainer):
                    loss = self.trainer._compute_loss(self.model, batch, False)
                else:
                    loss = self.trainer._compute_loss(self.model, batch)
                loss.backward()
                self.loss += loss.item()
            wait_for_device()
            return time.perf_counter() - started

    def _as_stock(self, way: str, pair: str):
        """Stock trainers hand pixels to every forward, which encodes them for every row."""
        if way == "plain" and pair == EVERYTHING:
            return mock.patch.object(inputs, "tower_is_frozen", lambda tower: False)
        return contextlib.nullcontext()

    def results(self, way: str, *, rows_at_once: int | None = None) -> dict:
        """What is compared: log-probabilities by this way, and the gradients of the last step."""
        gradients = {name: p.grad.cpu() for name, p in self.model.named_parameters() if p.grad is not None}
        log_probs, rows_at_once = [], rows_at_once or len(self.ids)
        with torch.no_grad(), self.trainer.accelerator.autocast():
            for start in range(0, len(self.ids), rows_at_once):
                ids, mask = (tensor[start : start + rows_at_once] for tensor in (self.ids, self.mask))
                rows = [self.model, self.base, [self.prompt] * len(ids), ids, mask]
                options = {"shared": way == "ours", "group": self.trainer.prompt_group}
                output = score_completions(*rows, pad_token_id=0, **options)
                log_probs.append(output.log_probs.float().cpu())
        return {"log_probs": torch.cat(log_probs), "gradients": gradients}

    def shifted_results(self, pair: str, *, rows_at_once: int | None = None) -> dict:
        """What rounding alone does to the plain way: all positions shifted, which changes nothing else."""
        self.prompt.positions += 17
        try:
            self.step("plain", pair, rows_at_once=rows_at_once)
            return self.results("plain", rows_at_once=rows_at_once)
        finally:
            self.prompt.positions -= 17


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def differences(ours: dict, plain: dict) -> dict:
    """Of log-probabilities, in nats, and of gradients, relative; and their limits.

    Args:
        ours, plain: of `Part.results`; in half precision `plain` has the same under "shifted", too.
    """
    if ours["gradients"].keys() != plain["gradients"].keys():
        raise RuntimeError("The two ways give gradients to different parameters.")
    apart = gradients_apart(ours["gradients"], plain["gradients"])
    log_probs = (ours["log_probs"] - plain["log_probs"]).abs()
    # NaN if one is
    result = {"log_probs": float(log_probs.max()), "gradients": float(apart["largest"]), "limits": LIMITS}
    if "shifted" in plain:
        shifted = plain["shifted"]
        noise = float((shifted["log_probs"] - plain["log_probs"]).abs().mean())
        gradient_noise = float(gradients_apart(shifted["gradients"], plain["gradients"])["all"])
        result |= {"log_probs, mean": float(log_probs.mean()), "rounding, mean": noise}
        result |= {"gradients, all": float(apart["all"]), "rounding, gradients": gradient_noise}
        result["limits"] = {"log_probs, mean": HALF_BOUND * noise, "gradients, all": HALF_BOUND * gradient_noise}
    return result


def gradients_apart(found: dict, expected: dict) -> dict[str, torch.Tensor]:
    """Relative differences: the largest of a parameter, and that of all parameters together."""
    expected = {name: value.float() for name, value in expected.items()}
    apart = torch.stack([(found[name].float() - value).norm() for name, value in expected.items()])
    norms = torch.stack([value.norm() for value in expected.values()])
    # One whose gradient is rounding errors is measured by the others'.
    largest = (apart / norms.clamp(min=1e-3 * norms[norms > 0].median())).max()
    return {"largest": largest, "all": apart.norm() / norms.norm()}


def over_limits(apart: dict) -> bool:
    return not all(apart[name] <= limit for name, limit in apart["limits"].items())  # NaN is over, too
