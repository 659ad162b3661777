"""The methods of TRL and transformers that we override or call, with the parameters that we rely on.

When an upgrade of TRL moves one, this test names it; read the new method before changing a line here.
"""

import inspect

import pytest
import trl
from accelerate.utils import fsdp_utils
from transformers import Trainer
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, SFTTrainer
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from veripo_trl.trainers.base import VideoMixin
from veripo_trl.trainers.checkpoints import CheckpointMixin
from veripo_trl.trainers.dpo import VideoDPOTrainer
from veripo_trl.trainers.grpo import VideoGRPOTrainer
from veripo_trl.trainers.sft import VideoSFTTrainer

SEAMS = {
    (GRPOTrainer, "_get_dataloader"): "self dataset description batch_size sampler_fn is_training dataloader_key",
    (GRPOTrainer, "_get_train_sampler"): "self dataset",
    (GRPOTrainer, "_generate_and_score_completions"): "self inputs",
    (GRPOTrainer, "_tokenize_prompts"): "self prompts",
    (GRPOTrainer, "_generate_single_turn"): (
        "self prompt_ids images multimodal_fields num_generations has_tool_images"
    ),
    (GRPOTrainer, "_calculate_rewards"): "self inputs prompts completions completion_ids_list",
    (GRPOTrainer, "_prepare_inputs"): "self generation_batch",
    (GRPOTrainer, "_compute_loss"): "self model inputs",
    (GRPOTrainer, "_get_per_token_logps_and_entropies"): (
        "self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss pixel_values "
        "image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes token_type_ids "
        "mm_token_type_ids image_position_ids"
    ),
    (GRPOTrainer, "training_step"): "self model inputs num_items_in_batch",
    (GRPOTrainer, "_save_rng_state"): "self output_dir",
    (GRPOTrainer, "_load_rng_state"): "self checkpoint",
    (Trainer, "get_train_dataloader"): "self",
    (Trainer, "get_batch_samples"): "self epoch_iterator num_batches device",
    (Trainer, "training_step"): "self model inputs num_items_in_batch",
    (Trainer, "_run_epoch"): (
        "self model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
        "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch"
    ),
    (Trainer, "_maybe_log_save_evaluate"): (
        "self tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate"
    ),
    (Trainer, "_save_rng_state"): "self output_dir",
    (Trainer, "_load_callback_state"): "self",
    (Trainer, "_finalize_training"): "self trial num_train_samples start_time",
    (Trainer, "_load_from_checkpoint"): "self resume_from_checkpoint model",
    (Trainer, "_load_best_model"): "self",
    (Trainer, "init_hf_repo"): "self token private",
    (Trainer, "save_model"): "self output_dir _internal_call",
    (Trainer, "_save"): "self output_dir state_dict",
    (Trainer, "create_model_card"): (
        "self language license tags model_name finetuned_from tasks dataset_tags dataset dataset_args"
    ),
    (VLLMGeneration, "_init_vllm"): "self",
    (VLLMGeneration, "sync_weights"): "self",
    (VLLMGeneration, "generate"): "self prompts images num_generations profiler",
    (VLLMClient, "image_features"): "self images max_concurrent_requests",
    (VLLMClient, "generate"): (
        "self prompts features n repetition_penalty temperature top_p top_k min_p max_tokens logprobs "
        "structured_outputs_regex generation_kwargs"
    ),
    (VLLMClient, "reset_prefix_cache"): "self",
    (VLLMClient, "check_server"): "self total_timeout retry_interval",
    (VLLMClient, "get_server_info"): "self",
    (VLLMClient, "_post"): "self url kwargs",
    (SFTTrainer, "_get_train_sampler"): "self train_dataset",
    (SFTTrainer, "compute_loss"): "self model inputs return_outputs num_items_in_batch",
    (DPOTrainer, "_get_train_sampler"): "self train_dataset",
    (DPOTrainer, "_compute_loss"): "self model inputs return_outputs",
    (DPOTrainer, "compute_ref_log_probs"): "self model inputs",
    (DPOTrainer, "_save"): "self output_dir state_dict",
}


@pytest.mark.parametrize(("seam", "parameters"), SEAMS.items(), ids=lambda value: str(value)[:60])
def test_seam(seam, parameters):
    owner, method = seam
    found = " ".join(inspect.signature(getattr(owner, method)).parameters)
    assert found == parameters, f"{owner.__name__}.{method} of TRL {trl.__version__} now takes ({found})"


CALLED = {"compute_ref_log_probs", "save_model"}  # called by ours, not replaced


MIXINS = (VideoMixin, CheckpointMixin)  # before any trainer


@pytest.mark.parametrize("own", [VideoGRPOTrainer, VideoSFTTrainer, VideoDPOTrainer, MIXINS])
def test_every_override_is_listed(own):
    """A method of ours that replaces one of TRL's must stand above."""
    parent, own = (Trainer, own) if own is MIXINS else (own.__bases__[-1], [own])
    overridden = {name for kind in own for name in vars(kind) if name in dir(parent) and not name.startswith("__")}
    overridden -= {"_abc_impl"}
    assert overridden == {method for owner, method in SEAMS if owner is parent} - CALLED


def test_what_trl_asks_of_vllm():
    """The calls that vllm/training.py answers in the place of vLLM's `LLM` and TRL's client."""
    source = inspect.getsource(VLLMGeneration)
    for line in (
        "self.llm = LLM(", "self.vllm_client = VLLMClient(", "self.llm.reset_prefix_cache()",
        "self.llm.generate(vllm_prompts, sampling_params=sampling_params, use_tqdm=False)",
        'row["multi_modal_data"] = {"image": img_list if len(img_list) > 1 else img_list[0]}',
        "self.vllm_client.image_features(all_images[::num_generations])",
        'expected = len(features["mm_placeholders"]["image"])', "self.vllm_client.reset_prefix_cache()",
        # what a process answers itself, as if it were alone
        "all_prompts = gather_object(prompts)", "all_images = gather_object(", "if accelerator.is_main_process:",
        "broadcast_object_list(obj_list, from_process=0)", "accelerator.process_index * len(prompts),",
        "group=self.tp_group",
    ):  # fmt: skip
        assert line in source, f"VLLMGeneration no longer has {line}"


def test_attributes_that_trl_sets():
    """State of the trainer that our overrides read or change."""
    source = inspect.getsource(GRPOTrainer)
    for name in (
        "_buffered_inputs", "_step", "generation_config", "generation_kwargs", "eos_token_ids", "reward_func_names",
        "_metrics", "_tokenizer", "num_iterations", "pad_to_multiple_of",
    ):  # fmt: skip
        assert f"self.{name} = " in source, f"GRPOTrainer no longer sets {name}"
    for trainer in (GRPOTrainer, SFTTrainer, DPOTrainer):
        assert "self._total_train_tokens = 0" in inspect.getsource(trainer)
    for trainer in (SFTTrainer, DPOTrainer):
        assert "self._total_train_tokens += num_tokens_in_batch // self._tp_size" in inspect.getsource(trainer)
    source = inspect.getsource(Trainer)
    for line in (
        "self._tr_loss = ", "self._total_loss_scalar = 0.0", "self._initial_global_step = self.state.global_step",
        "train_loss = self._total_loss_scalar / max(num_steps_trained,", "self._run_epoch(\n                model=model,",
    ):  # fmt: skip
        assert line in source, f"Trainer no longer has {line}"
    saving = inspect.getsource(Trainer._save_checkpoint)  # what says that a checkpoint is whole comes last
    order = ("self.save_model(", "self._save_rng_state(", "self.state.save_to_json(", "rotate_checkpoints(")
    assert sorted(order, key=saving.index) == list(order)


def test_where_accelerate_asks_for_the_final_norm():
    assert list(inspect.signature(fsdp_utils._find_final_norm).parameters) == ["model"]
    assert "_find_final_norm(model)" in inspect.getsource(fsdp_utils.fsdp2_prepare_model)


def test_defaults_that_we_state_ourselves():
    """Differs from the method's settings: were TRL to change them, our configs would still say what they mean."""
    fields = GRPOConfig.__dataclass_fields__
    assert fields["loss_type"].default == "dapo"
    assert fields["hub_private_repo"].default is None
