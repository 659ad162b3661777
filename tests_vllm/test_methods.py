"""Methods with rollouts from vLLM in the same process: the engine draws what each method takes it to draw."""

import pytest
import torch

from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.methods import with_methods
from veripo_trl.methods.care import CAREOptions
from veripo_trl.methods.reg_grpo import RegGRPOOptions
from veripo_trl.methods.t_grpo import TGRPOOptions
from veripo_trl.methods.tw_grpo import TWGRPOOptions
from veripo_trl.trainers.grpo import VideoGRPOConfig, VideoGRPOTrainer
from veripo_trl.vllm import training as backend

PROMPT_GAP = "sampling/largest_prompt_gap"
BOUND = 1e-4
METHODS = {
    "t_grpo": (TGRPOOptions(length_range=[1, 9]), {}),
    "tw_grpo": (TWGRPOOptions(), {}),
    "reg_grpo": (RegGRPOOptions(), {"num_iterations": 2, "vllm_importance_sampling_correction": False}),
    "care": (CAREOptions(care_every_steps=1, care_decay=0.5, care_min_think_tokens=0), {}),
}


@pytest.fixture(autouse=True)
def short_starts(monkeypatch):
    """Engines that compile nothing."""
    options = backend.engine_options
    monkeypatch.setattr(backend, "engine_options", lambda *a, **k: {**options(*a, **k), "enforce_eager": True})


def accuracy_reward(completion_ids, **kwargs):
    """Never the same within a group."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


@pytest.fixture
def make_trainer(load, mixed_rows, tmp_path):
    """Text, image, video, and image with video, a group of four of each."""

    def make(name):
        model, encoder = load()
        options, changes = METHODS[name]
        rows = [row for row in mixed_rows if row["question_id"] != "two-videos"]
        settings = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": 16, "num_generations": 4,
            "max_completion_length": 8, "gradient_checkpointing": False, "bf16": False, "use_cpu": True,
            "report_to": "none", "save_strategy": "no", "shuffle_dataset": False, "max_steps": 3, "logging_steps": 1,
            "learning_rate": 1e-2, "disable_tqdm": True, "use_vllm": True, **changes,
        }  # fmt: skip
        return with_methods(VideoGRPOTrainer, [name], [options])(
            model=model, reward_funcs=[accuracy_reward], args=VideoGRPOConfig(**settings), encoder=encoder,
            train_dataset=rows_to_dataset(rows), processing_class=encoder.processor,
        )  # fmt: skip

    return make


def log_probs(trainer, prompt, completion) -> torch.Tensor:
    """The trainer's, of a completion's tokens after a prompt."""
    active, trainer._active = trainer._active, [prompt]
    ids = torch.tensor([[*prompt.input_ids.tolist(), *completion]])
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), len(completion)
        )
    trainer._active = active
    return found[0][0]


@pytest.mark.parametrize("name", METHODS)
def test_the_engine_follows_the_policy(name, make_trainer, monkeypatch):
    """Its log-probabilities are the policy's at the start and after each update; those of T-GRPO's extra rollouts are
    the policy's on shuffled frames, and not those on the frames in order."""
    trainer, gaps, others = make_trainer(name), [], []
    if name == "care":  # far from the policy: the engine must not be given it
        torch.manual_seed(0)
        slow = trainer._slow_copy().items()
        trainer._slow = {key: value + 0.1 * torch.randn_like(value) for key, value in slow}
    generate = VideoGRPOTrainer._generate_single_turn

    def checking(self, *args, **kwargs):
        completions, engine = generate(self, *args, **kwargs)
        for prompt, completion, drawn in zip(self._active, completions, engine, strict=True):
            drawn = torch.tensor(drawn).view(-1)
            gaps.append((log_probs(self, prompt, completion) - drawn).abs().max().item())
        for (index, shuffled), completion, drawn in zip(
            getattr(self, "_extra", []), completions[16:], engine[16:], strict=True
        ):
            ordered = self._active[index]
            assert shuffled.question_id == ordered.question_id
            apart = log_probs(self, ordered, completion) - torch.tensor(drawn).view(-1)
            others.append(apart.abs().max().item())
        return completions, engine

    monkeypatch.setattr(VideoGRPOTrainer, "_generate_single_turn", checking)
    before = {key: value.detach().clone() for key, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    moved = max(float((p - before[key]).abs().max()) for key, p in trainer.model.named_parameters() if key in before)
    assert moved > 1e-3 and trainer.state.global_step == 3
    generations = 2 if name == "reg_grpo" else 3
    assert len(gaps) == generations * (16 + 4 * (name == "t_grpo")) and max(gaps) < BOUND, max(gaps)
    assert len(others) == generations * 4 * (name == "t_grpo")
    assert all(other > 100 * BOUND for other in others), others
    logged = [entry[PROMPT_GAP] for entry in trainer.state.log_history if PROMPT_GAP in entry]
    assert len(logged) >= generations and max(logged) < BOUND
