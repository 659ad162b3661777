"""The methods of TRL and transformers that we override or call, with the parameters that we rely on.

When an upgrade of TRL moves one, this test names it; read the new method before changing a line here.
"""

import inspect

import pytest
import trl
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, SFTTrainer

from veripo_trl.trainers.grpo import VideoGRPOTrainer
from veripo_trl.trainers.sft import VideoSFTTrainer

SEAMS = {
    (GRPOTrainer, "_get_dataloader"): "self dataset description batch_size sampler_fn is_training dataloader_key",
    (GRPOTrainer, "_get_train_sampler"): "self dataset",
    (GRPOTrainer, "get_batch_samples"): "self epoch_iterator num_batches device",
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
    (GRPOTrainer, "log"): "self logs start_time",
    (Trainer, "_load_from_checkpoint"): "self resume_from_checkpoint model",
    (SFTTrainer, "compute_loss"): "self model inputs return_outputs num_items_in_batch",
}


@pytest.mark.parametrize(("place", "parameters"), SEAMS.items(), ids=lambda value: str(value)[:60])
def test_seam(place, parameters):
    owner, method = place
    found = " ".join(inspect.signature(getattr(owner, method)).parameters)
    assert found == parameters, f"{owner.__name__}.{method} of TRL {trl.__version__} now takes ({found})"


@pytest.mark.parametrize("own", [VideoGRPOTrainer, VideoSFTTrainer])
def test_every_override_is_listed(own):
    """A method of ours that replaces one of TRL's must stand above."""
    parent = own.__bases__[-1]
    overridden = {name for name in vars(own) if name in dir(parent) and not name.startswith("__")}
    overridden -= {"_abc_impl"}
    assert overridden == {method for owner, method in SEAMS if owner is parent}


def test_attributes_that_trl_sets():
    """State of the trainer that our overrides read or change."""
    source = inspect.getsource(GRPOTrainer)
    for name in (
        "_buffered_inputs", "_step", "generation_config", "generation_kwargs", "eos_token_ids", "reward_func_names",
        "_metrics", "_tokenizer", "num_iterations", "pad_to_multiple_of",
    ):  # fmt: skip
        assert f"self.{name} = " in source, f"GRPOTrainer no longer sets {name}"


def test_defaults_that_we_state_ourselves():
    """Differs from the method's settings: were TRL to change them, our configs would still say what they mean."""
    fields = GRPOConfig.__dataclass_fields__
    assert fields["loss_type"].default == "dapo"
    assert fields["hub_private_repo"].default is None
