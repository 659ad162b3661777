"""Every loss of TRL's, with the prompt computed once, is what stock TRL computes of whole rows: value and gradient.

Which losses and options there are is read from TRL's own code: a loss that a new version adds is tried without being
named here, and an option that its loss reads and no case sets is asked for.
"""

import ast
import copy
import inspect
import textwrap
from dataclasses import fields

import pytest
import torch
from conftest import make_row
from datasets import Dataset
from helpers import fixed_completions, pair_dataset, settings
from peft import LoraConfig, get_peft_model
from PIL import Image
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from veripo_trl.data.prompts import build_messages
from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.trainers.dpo import VideoDPOConfig, VideoDPOTrainer
from veripo_trl.trainers.grpo import VideoGRPOConfig, VideoGRPOTrainer


def code_of(trainer):
    return ast.walk(ast.parse(textwrap.dedent(inspect.getsource(trainer._compute_loss))))


def choices(trainer, name: str) -> list[str]:
    """All texts that a trainer's loss compares a variable or attribute with."""
    compared = [node for node in code_of(trainer) if isinstance(node, ast.Compare)]
    sides = [node.comparators for node in compared if getattr(node.left, "attr", getattr(node.left, "id", "")) == name]
    constants = [part.value for side in sides for tree in side for part in ast.walk(tree) if hasattr(part, "value")]
    return sorted(dict.fromkeys(constants))


def options_read(trainer, config) -> set[str]:
    return {node.attr for node in code_of(trainer) if isinstance(node, ast.Attribute)} & {f.name for f in fields(config)}


OLD = {"num_iterations": 2, "epsilon": 0.02}  # old log-probabilities are kept, and ratios leave the clip's range
GRPO = {
    "on-policy": {},
    "grpo": OLD,  # what the others have to differ from
    **{name: {**OLD, "loss_type": name} for name in choices(GRPOTrainer, "loss_type") if name != "grpo"},
    "gspo": {**OLD, "importance_sampling_level": "sequence"},
    "luspo-published": {**OLD, "loss_type": "luspo", "importance_sampling_level": "sequence"},
    "gdpo": {**OLD, "multi_objective_aggregation": "normalize_then_sum"},
    "unscaled": {**OLD, "scale_rewards": "none"},
    "top-entropy": {**OLD, "top_entropy_quantile": 0.3},
    "clip-higher": {**OLD, "epsilon_high": 0.5},
    "two-sided": {**OLD, "epsilon_high": 0.5, "delta": 1.01},
    "off-policy-mask": {**OLD, "off_policy_mask_threshold": 0.001},
    "dr_grpo-length": {**OLD, "loss_type": "dr_grpo", "max_completion_length": 40},
    "sapo-softer": {**OLD, "loss_type": "sapo", "sapo_temperature_pos": 3.0, "sapo_temperature_neg": 5.0},
    "vespo-other": {
        **OLD, "loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.0,
        "vespo_lambda_neg": 1.0,
    },
    "entropy-bonus": {**OLD, "entropy_coef": 0.1},
    "adaptive-entropy": {
        **OLD, "use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 50.0, "entropy_coef_delta": 0.01,
        "entropy_coef_min": 0.05, "entropy_coef_max": 0.2,
    },
    "kl": {**OLD, "beta": 0.5, "use_bias_correction_kl": False},
    "kl-corrected": {**OLD, "beta": 0.5, "use_bias_correction_kl": True},
    "kl-lora": {**OLD, "beta": 0.5, "adapter": True},
    "vllm": {**OLD, "use_vllm": True, "vllm_importance_sampling_correction": True},
    "vllm-vespo": {**OLD, "loss_type": "vespo", "use_vllm": True, "vllm_importance_sampling_correction": True},
}  # fmt: skip
DPO = {
    **{name: {"loss_type": [name]} for name in choices(DPOTrainer, "loss_type")},
    **{name: {"f_divergence_type": name} for name in choices(DPOTrainer, "f_divergence_type") if name != "reverse_kl"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld-dpo": {"ld_alpha": 0.3},
    "wpo": {"use_weighting": True},
    "discopop-softer": {"loss_type": ["discopop"], "discopop_tau": 0.5},
    "lower-beta": {"beta": 0.01},
    "lora": {"adapter": True},
    "plain rows": {"shared_prefix": False},
}
# Read by the losses, and no part of them: how many batches a step has, which model checkpoints, experts' routers
# (no supported model has them).
ELSEWHERE = {"steps_per_generation", "gradient_checkpointing_kwargs", "router_aux_loss_coef"}


@pytest.mark.parametrize("trainer, config, cases", [(GRPOTrainer, GRPOConfig, GRPO), (DPOTrainer, DPOConfig, DPO)])
def test_every_option_of_a_loss_is_tried(trainer, config, cases):
    assert options_read(trainer, config) - ELSEWHERE <= {name for case in cases.values() for name in case} | {
        "label_smoothing"  # of every DPO case
    }
    assert len(choices(trainer, "loss_type")) >= 8


@pytest.fixture(scope="module")
def start(load, media_root):
    """Two questions with images, for both sides; the policy and one with an adapter."""
    pictures = ["square.png", "tall.png"]
    rows = [make_row(name, media_root, images=[name], problem=f"Which is {name}?") for name in pictures]
    model, encoder = load()
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=r".*language_model\..*\.(q_proj|v_proj)", init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config)
    prompts, tokenizer = [build_messages(row, encoder.template) for row in rows], encoder.processor.tokenizer
    images = {name: [Image.open(media_root / name)] for name in pictures}
    questions = [[{"role": "user", "content": messages[0]["content"][-1]["text"]}] for messages in prompts]
    pairs = pair_dataset(rows)
    # The same tokens: prompts as text, and answers with the token that ended their rollouts.
    texts = encoder.processor.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    stock_pairs = {
        "prompt": [texts[index // 2] for index in range(len(pairs))],
        **{side: [answer + tokenizer.eos_token for answer in pairs[side]] for side in ("chosen", "rejected")},
        "images": [images[name] for name in pairs["question_id"]],
    }
    return {
        "encoder": encoder, "full": model, "adapted": adapted, "rows": rows_to_dataset(rows), "pairs": pairs,
        "stock rows": Dataset.from_dict({"prompt": questions, "images": list(images.values())}),
        "stock pairs": Dataset.from_dict(stock_pairs),
    }  # fmt: skip


def moved(trainer, scale: float):
    """The trainer with a policy some way from where it started, which its rollouts or reference are of."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and "visual" not in name:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    trainer.model.train()
    return trainer


def found(trainer, loss) -> tuple[float, torch.Tensor]:
    loss.backward()
    parameters = [p.grad.flatten() for _, p in trainer.model.named_parameters() if p.grad is not None]
    return loss.item(), torch.cat(parameters)


def check_equal(case, ours, stock, plain=None) -> None:
    """Equal within 1e-5, and not the loss without the case's options."""
    (loss, gradient), (expected, whole) = ours, stock
    # These multiply what rounding does to a whole answer's log-probability, by exp and by 1 / tau. (In float64 the
    # first passes with 1e-5; of the second, TRL keeps the reference in float32.)
    bound = 1e-4 if "vespo" in case or case == "discopop" else 1e-5
    assert loss == pytest.approx(expected, rel=bound, abs=bound)
    assert gradient.shape == whole.shape and whole.norm() > 1e-4
    assert (gradient - whole).norm() < bound * whole.norm().clamp(min=1)
    if plain is not None:
        assert (gradient - plain).norm() > 1e-3 * whole.norm()


def by_length(completions, completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def by_index(completions, **kwargs):
    return [float(index % 3) for index in range(len(completions))]


def grpo_losses(start, tmp_path, options: dict) -> list[tuple]:
    """(loss, gradient) of ours and of stock's."""
    options, results = {"loss_type": "grpo", "beta": 0.0, **options}, []
    model, vllm = start["adapted" if options.pop("adapter", False) else "full"], options.pop("use_vllm", False)
    encoder = start["encoder"]
    shared = {
        "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 12, "shuffle_dataset": False,
        "gradient_accumulation_steps": 1, **options,
    }  # fmt: skip
    for make, config, rows, more in (
        (VideoGRPOTrainer, VideoGRPOConfig, start["rows"], {"encoder": encoder}),
        (GRPOTrainer, GRPOConfig, start["stock rows"], {}),
    ):
        trainer = make(
            model=copy.deepcopy(model), reward_funcs=[by_length, by_index], train_dataset=rows,
            args=config(**settings(tmp_path, **shared)), processing_class=encoder.processor, **more,
        )  # fmt: skip
        trainer._generate_single_turn = lambda *args, **kwargs: (fixed_completions(encoder.processor.tokenizer, 8), None)
        trainer.shares_prompts = True
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # TRL sets it in its loop
        torch.manual_seed(0)  # of TRL's shuffle
        inputs = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
        if vllm:  # what its correction multiplies the loss with
            trainer.use_vllm = True
            ratios = torch.linspace(0.5, 2, inputs["completion_ids"].numel())
            inputs["importance_sampling_ratio"] = ratios.view_as(inputs["completion_ids"])
        moved(trainer, 0.005)
        if options.get("use_adaptive_entropy"):  # which acts on the step after
            trainer._compute_loss(trainer.model, inputs)
        results.append(found(trainer, trainer._compute_loss(trainer.model, inputs)))
    return results


@pytest.fixture(scope="module")
def plain_grpo(start, tmp_path_factory):
    return grpo_losses(start, tmp_path_factory.mktemp("grpo"), OLD)[0][1]


@pytest.mark.parametrize("case", GRPO)
def test_grpo(case, start, plain_grpo, tmp_path):
    other = case not in ("grpo", "on-policy", "kl-lora")
    check_equal(case, *grpo_losses(start, tmp_path, GRPO[case]), plain_grpo if other else None)


def dpo_losses(start, tmp_path, options: dict) -> list[tuple]:
    options, results, encoder = {"label_smoothing": 0.1, **options}, [], start["encoder"]
    model, shared = start["adapted" if options.pop("adapter", False) else "full"], options.pop("shared_prefix", True)
    for make, config, rows, more in (
        (VideoDPOTrainer, VideoDPOConfig, start["pairs"], {"encoder": encoder}),
        (DPOTrainer, DPOConfig, start["stock pairs"], {}),
    ):
        trainer = make(
            model=copy.deepcopy(model), ref_model=None if hasattr(model, "peft_config") else copy.deepcopy(model),
            args=config(**settings(tmp_path, max_length=None, **options)), train_dataset=rows,
            processing_class=encoder.processor, **more,
        )  # fmt: skip
        trainer.shares_prompts = shared  # without the check at a run's first batch, see test_shared_prefix.py
        moved(trainer, 0.01)
        batch = trainer.data_collator(list(trainer.train_dataset))
        results.append((*found(trainer, trainer.compute_loss(trainer.model, dict(batch))), trainer._metrics["train"]))
    return results


@pytest.fixture(scope="module")
def plain_dpo(start, tmp_path_factory):
    return dpo_losses(start, tmp_path_factory.mktemp("dpo"), {})[0][1]


@pytest.mark.parametrize("case", DPO)
def test_dpo(case, start, plain_dpo, tmp_path):
    (*ours, metrics), (*stock, expected) = dpo_losses(start, tmp_path, DPO[case])
    check_equal(case, ours, stock, None if case in ("sigmoid", "lora", "plain rows") else plain_dpo)
    for name in ("rewards/margins", "logps/chosen", "entropy", "logits/chosen", "mean_token_accuracy"):
        assert metrics[name][-1] == pytest.approx(expected[name][-1], abs=1e-5), name
