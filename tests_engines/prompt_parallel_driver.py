"""Scores completions with their prompt shared out over processes, as `torchrun` starts it, and whole, in each of them.

    torchrun --nproc_per_node N tests_engines/prompt_parallel_driver.py CASES.json

CASES.json is {"rows", "models", "cases", "output"}; a case is {name, model, rows (a question for each group of `count`
processes), count, and optionally lora, checkpointing, ddp, split}. Rank 0 writes what it found to `output`. Used by
test_prompt_parallel.py only.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from trl import ModelConfig
from trl.trainer.utils import add_fused_lm_head

from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.build import make_encoder, make_policy
from veripo_trl.shared_prompt.parallel import prefill_in_parts, share_features, zigzag
from veripo_trl.shared_prompt.rollout import prefill
from veripo_trl.shared_prompt.scoring import score_completions
from veripo_trl.trainers.loading import RowsForGroups

ROWS, WIDTH = 8, 12  # completions of a group, and tokens of the longest


def make(case, models):
    lora = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0} if case.get("lora") else {}
    model_args = ModelConfig(model_name_or_path=models[case["model"]], **lora)
    data_args = DataArguments(
        prompt_template="tiny", min_frames=2, max_frames=24, min_pixels=3136, max_pixels=56 * 112
    )
    torch.manual_seed(0)
    model, processor = make_policy(model_args, data_args)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # 0 as it is made: its adapter would have no gradient
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    add_fused_lm_head(base, outputs=("log_probs",))
    if case.get("checkpointing"):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if case.get("lora"):
            model.enable_input_require_grads()
    return model, base, make_encoder(model, processor, data_args)


def completions(seed: int):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 200, (ROWS, WIDTH), generator=generator)
    lengths = torch.randint(1, WIDTH + 1, (ROWS,), generator=generator)
    mask = (torch.arange(WIDTH) < lengths[:, None]).long()
    mask[0] = 0  # nothing to score in it
    return ids, mask, torch.randn(ROWS, WIDTH, generator=generator) * mask


def gradients(model) -> dict:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def run(case, rows, models) -> dict:
    count, world = case["count"], dist.get_world_size()
    model, base, encoder = make(case, models)
    prompts = [encoder.encode(rows[name]) for name in case["rows"]]
    if "text" in case:  # a prompt of a few tokens
        for prompt in prompts:
            prompt.input_ids, prompt.positions = (
                prompt.input_ids[-case["text"] :],
                prompt.positions[:, -case["text"] :],
            )

    def score(runner, prompt, ids, mask, group=None):
        return score_completions(
            runner, base, [prompt] * len(ids), ids, mask, pad_token_id=0, group=group
        ).log_probs

    whole = []
    for place, prompt in enumerate(prompts):
        ids, mask, weight = completions(place)
        whole.append(score(model, prompt, ids, mask))
        (whole[-1] * weight).sum().backward()
    reference = gradients(model)
    features = prompts[0].features
    for prompt in prompts:
        prompt.features = None

    group, _ = dist.new_subgroups(group_size=count)
    place, share = dist.get_rank() // count, ROWS // count
    mine = slice(group.rank() * share, (group.rank() + 1) * share)
    ids, mask, weight = (tensor[mine] for tensor in completions(place))
    runner = model
    if case.get("ddp"):
        runner = torch.nn.parallel.DistributedDataParallel(
            model, find_unused_parameters=not case.get("checkpointing")
        )
    own = score(runner, prompts[place], ids, mask, group)
    (own * weight).sum().backward()
    found = gradients(model)
    apart = 0.0
    for name, gradient in reference.items():
        total = found[name] * world if case.get("ddp") else found[name]
        if not case.get("ddp"):
            dist.all_reduce(total)
        size = gradient.norm().clamp(min=1e-3 * max(g.norm() for g in reference.values()))
        apart = max(apart, float((total - gradient).norm() / size))
    same = True  # features, computed at once and in shares
    if place == 0 and features:
        (one,), (shared,) = features.values(), prompts[0].features.values()
        for kind in ("items", "levels"):
            ours, theirs = getattr(one, kind), getattr(shared, kind)
            same &= str(ours) == str(theirs) and ours.keys() == theirs.keys()
            for key in ours:
                flat = [sum((x if isinstance(x, list) else [x] for x in y[key]), []) for y in (ours, theirs)]
                same &= all(torch.equal(a, b) for a, b in zip(*flat, strict=True))
    model.eval()  # in training, gradient checkpointing keeps no keys and values
    caches = (
        prefill(model, base, [prompts[place]], pad_token_id=0, config=encoder.config),
        prefill_in_parts(base, prompts[place], group, "cpu"),
    )
    layers = list(zip(*(cache.layers for cache in caches), strict=True))
    keys = max(float((a.keys - b.keys).abs().max()) for a, b in layers)
    values = max(float((a.values - b.values).abs().max()) for a, b in layers)
    gap = float((own - whole[place][mine]).abs().max())
    chunks = [sum(map(len, pair)) for pair in zigzag(len(prompts[0]) - 1, count)]
    found = {"log_probs": gap, "gradients": apart, "tensors": len(reference), "same_features": same, "chunks": chunks}
    found |= {"cache": max(keys, values), "layers": len(layers)}
    every = [None] * world
    dist.all_gather_object(every, found)
    return {"name": case["name"], "processes": every}


def run_different(case, rows, models) -> dict:
    """Processes of a group that hold different prompts."""
    _, base, encoder = make(case, models)
    group, _ = dist.new_subgroups(group_size=case["count"])
    try:
        share_features(base, [encoder.encode(rows[case["rows"][dist.get_rank() % 2]])], group, "cpu")
        said = ""
    except RuntimeError as error:
        said = str(error)
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, said)
    return {"name": case["name"], "said": every}


def count_tokens(trainer) -> list[dict]:
    """Has a trainer note the tokens of this process's rows by step, and what `num_tokens` grew by. Not in an epoch's last
    step, of which `gather_for_metrics` leaves out what it takes for repeated rows."""
    steps, compute_loss = [], trainer.compute_loss

    def noted(model, inputs, *args, **kwargs):
        before = trainer._total_train_tokens
        loss = compute_loss(model, inputs, *args, **kwargs)
        if not trainer.accelerator.gradient_state.end_of_dataloader:
            own, counted = int(inputs["attention_mask"].sum()), trainer._total_train_tokens - before
            steps.append({"own": own, "counted": counted})
        return loss

    trainer.compute_loss = noted
    return steps


def run_steps(case, rows, models) -> dict:
    """Weights after four steps of SFT or DPO on the same rows: with prompts shared out, whole, and shared out and resumed
    from the second step. How far each of the latter is from the first, and how far that one moved; and how far
    `num_tokens` is from the tokens of each group's rows."""
    from helpers import make_dpo_trainer, make_sft_trainer, make_tiny_policy, pair_dataset

    rows, kept = [rows[name] for name in case["rows"]], []
    checkpoint = Path(case["output_dir"], "checkpoint-2")
    for way in ("shared out", *case["others"]):
        model, encoder = make_tiny_policy(models[case["model"]], use_peft=False)
        saved = {"save_strategy": "steps", "save_steps": 2} if way == "shared out" else {}
        options = {
            "per_device_train_batch_size": 1, "max_steps": 4, "optim": "sgd", "prompt_parallel": case["count"],
            "learning_rate": case["learning_rate"], "lr_scheduler_type": "constant", "max_grad_norm": 0.0, **saved,
        }  # fmt: skip
        make = make_dpo_trainer if case["trainer"] == "dpo" else make_sft_trainer
        given = pair_dataset(rows) if case["trainer"] == "dpo" else rows
        trainer = make(model, encoder, given, case["output_dir"], **options)
        first = {name: p.detach().clone() for name, p in model.named_parameters()}
        if way == "whole":
            trainer.prompt_group = None
            sampler = RowsForGroups(trainer.train_dataset, case["count"], seed=trainer.args.seed)
            trainer._get_train_sampler = lambda *args, sampler=sampler: sampler
        if way == "shared out":
            steps = count_tokens(trainer)
        trainer.train(resume_from_checkpoint=str(checkpoint) if way == "resumed" else None)
        kept.append({name: p.detach() for name, p in model.named_parameters()})
    apart = [max(float((kept[0][name] - other[name]).abs().max()) for name in first) for other in [*kept[1:], first]]
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, [step["own"] for step in steps])
    once = map(sum, zip(*every[:: case["count"]], strict=True))
    miscounted = max(abs(step["counted"] - own) for step, own in zip(steps, once, strict=True))
    found = dict(zip([*case["others"], "start"], apart, strict=True))
    dist.all_gather_object(every, {**found, "miscounted tokens": miscounted})
    return {"name": case["name"], "processes": every}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    given = json.loads(Path(sys.argv[1]).read_text())
    ways = {"scores": run, "different": run_different, "steps": run_steps}
    found = [ways[case.get("way", "scores")](case, given["rows"], given["models"]) for case in given["cases"]]
    if dist.get_rank() == 0:
        Path(given["output"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
