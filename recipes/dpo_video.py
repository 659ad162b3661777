"""DPO on preference pairs that verify_rollouts.py made of a GRPO run's rollouts (arXiv 2505.19000, the fast alignment).

    accelerate launch -q recipes/dpo_video.py                                       # the tiny world, after its GRPO run
    accelerate launch -q recipes/dpo_video.py --config qwen2_5_vl_3b_lora/dpo.yaml \\
        --model_name_or_path outputs/qwen2_5_vl_3b_grpo --pairs '{"path": "my-org/my-pairs", "media_root": "clips"}'

`model_name_or_path` is the policy that made the rollouts. It is the reference too: its full weights, or, where it is an
adapter, a frozen copy of that. A run that was broken off goes on from its last checkpoint.
"""

from veripo_trl.start import start

start()  # before torch and peft are imported

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from peft import PeftModel
from transformers import set_seed
from trl import ModelConfig

from veripo_trl.data.prompts import load_template
from veripo_trl.data.rows import check_media
from veripo_trl.errors import ConfigError, run
from veripo_trl.files.run_folder import only_process
from veripo_trl.recipe import stages
from veripo_trl.recipe.console import show_steps
from veripo_trl.trainers.dpo import VideoDPOConfig, VideoDPOTrainer
from veripo_trl.verifier.preferences import load_pairs

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "tiny" / "dpo.yaml"


@dataclass
class PairArguments:
    """Where the preference pairs are."""

    pairs: list[str] | None = field(
        default=None,
        metadata={"help": "List of {path, media_root, revision, kinds, limit}; JSON on the command line."},
    )

    def __post_init__(self):
        if not self.pairs:
            raise ConfigError("Expected `pairs:`, a list of {path: …} that verify_rollouts.py wrote; none was given.")
        self.pairs = stages.read_sources("pairs", self.pairs)


ARGUMENTS = (
    stages.DataArguments,
    stages.ReportArguments,
    stages.PushArguments,
    PairArguments,
    VideoDPOConfig,
    ModelConfig,
)


def main(argv: list[str] | None = None) -> int | None:
    arguments = stages.parse(ARGUMENTS, default_config=DEFAULT_CONFIG, argv=argv)
    with only_process(arguments[4].output_dir):
        return train(*arguments)


def train(data_args, report, push, pair_args, training_args, model_args) -> int | None:
    started = time.time()
    stages.allow_many_open_files()
    stages.use_all_cores(training_args)
    if stages.push_trained(training_args, push):
        return None
    stages.make_tiny_world(data_args, training_args)
    stages.see_as_trained(data_args, model_args.model_name_or_path, model_args.model_revision)
    pairs = load_pairs(
        pair_args.pairs, template=load_template(data_args.prompt_template), allow_urls=data_args.allow_urls
    )
    check_media(pairs.dataset, allow_urls=data_args.allow_urls)
    heldout = stages.load_eval_rows(data_args)
    if data_args.holdout and (seen := set(heldout["question_id"]) & set(pairs.dataset["question_id"])):
        raise ConfigError(
            f"holdout: {len(seen)} of the {data_args.holdout} questions have pairs ({', '.join(sorted(seen)[:3])}, …): "
            f"the GRPO run trained on them. Give that run the same datasets, manifest and holdout, or give this one "
            f"eval_datasets."
        )
    set_seed(training_args.seed)
    model, processor = stages.make_policy(model_args, data_args)
    reference = None if isinstance(model, PeftModel) else stages.make_policy(model_args, data_args)[0]
    checkpoint = stages.open_run(training_args.output_dir, accelerator=PartialState())
    trainer = VideoDPOTrainer(
        model=model,
        ref_model=reference,
        args=training_args,
        train_dataset=pairs.dataset,
        processing_class=processor,
        encoder=stages.make_encoder(model, processor, data_args),
    )
    kinds = Counter(pairs.dataset["kind"])
    if trainer.accelerator.is_main_process:
        print(f"{len(pairs.dataset)} pairs ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))})", flush=True)
    trainer.started = started
    show_steps(trainer)
    arguments = (data_args, report, push, pair_args, training_args, model_args)
    stages.save_arguments(training_args.output_dir, *arguments, resumed=checkpoint is not None)
    evaluation = None
    if heldout is not None:
        evaluation = stages.HeldOutEvaluation(trainer, heldout, report, before=report.report_before)
        trainer.add_callback(evaluation)
    trainer.train(resume_from_checkpoint=checkpoint)
    return stages.finish(
        trainer,
        evaluation,
        title="Held-out questions",
        extra={
            "seconds": dict(trainer.seconds),
            "pairs": dict(kinds),
            "inputs": {**stages.hub_inputs(data_args, model_args), **pairs.inputs},
        },
        push=push,
    )


if __name__ == "__main__":
    sys.exit(run(main))
