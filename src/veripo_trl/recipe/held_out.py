"""Held-out tables before and after training, with the judge that reports in them; the early stop of a cold start."""

import math

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback

from veripo_trl.answers.score import score_name
from veripo_trl.data.rows import load_rows
from veripo_trl.evaluate.generate import generate, summarize, task_of
from veripo_trl.recipe.arguments import ReportArguments, StopArguments
from veripo_trl.recipe.verify_stage import open_cache
from veripo_trl.tiny.judge import judge as judge_by_templates
from veripo_trl.trainers.engines import whole_policy
from veripo_trl.verifier.judges import judge_by_rules
from veripo_trl.verifier.verify import judge_stream, judged_item


def evaluate_policy(
    trainer, dataset, report: ReportArguments, *, decoding: str, progress: str | None = None
) -> dict[str, float | int]:
    """The trainer's policy on rows, shared out over the processes; consistency judged by `report_judge`.

    Args:
        decoding: "greedy", or "sampled": `report_samples` answers per row at temperature 1.
        progress: title of a progress bar on the main process.

    Returns:
        What `evaluate.summarize` gives, the same on every process.
    """
    accelerator = trainer.accelerator
    own = list(range(accelerator.process_index, len(dataset), accelerator.num_processes))
    sampled = decoding == "sampled"
    with whole_policy(trainer) as model:
        answers = generate(
            model,
            trainer.held_out_encoder,
            dataset.select(own),
            samples=report.report_samples if sampled else 1,
            temperature=1.0 if sampled else 0.0,
            max_new_tokens=report.report_max_new_tokens,
            batch_size=report.report_batch_size,
            num_workers=trainer.args.dataloader_num_workers,
            seed=trainer.args.seed + accelerator.process_index,
            progress=progress if accelerator.is_main_process else None,
        )
    answers = gather_object([{**answer, "row": own[answer["row"]]} for answer in answers])
    found = [None]
    if accelerator.is_main_process:  # a server is asked once
        found = [verdicts_on(answers, dataset, report, beside=trainer.args.output_dir)]
    verdicts = broadcast_object_list(found)[0]
    second = None if report.report_judge == "rules" else _by_function(judge_by_rules, answers, dataset)
    return summarize(answers, dataset, verdicts=verdicts, second=second)


def _by_function(judge, answers: list[dict], dataset) -> list[str]:
    return [judge(answer["completion"], **task_of(dataset[answer["row"]])) for answer in answers]


def verdicts_on(answers: list[dict], dataset, report: ReportArguments, *, beside: str) -> list[str]:
    """The verdict of `report_judge` on each answer.

    Args:
        beside: a folder; the cache of a server's replies lies beside it, where the settings name none.

    Raises:
        JudgeError: the server cannot be asked; what it had said is in the cache.
    """
    if report.report_judge != "server":
        judge = judge_by_templates if report.report_judge == "tiny" else judge_by_rules
        return _by_function(judge, answers, dataset)
    judge, cache = report.server_judge(), report.report_judge_kwargs.get("verdict_cache")
    items = (judged_item(answer["completion"], **task_of(dataset[answer["row"]])) for answer in answers)
    with open_cache(cache, judge, beside=beside) as cache:
        verdicts = [verdict["consistency"] for verdict in judge_stream(items, judge=judge, cache=cache)]
    print(f"held-out consistency: {judge.summary()}", flush=True)
    return verdicts


class HeldOutEvaluation(TrainerCallback):
    """Evaluates a trainer's policy on held-out rows: before the first step, and after, when `finish` asks for it.

    `before` runs inside training on purpose: only there is the model wrapped for its backend. It survives a restart in
    the checkpoints. Without rows (None) it does nothing.

    Attributes:
        found: {"before", "after"}: {"greedy", "sampled"}: what `evaluate.summarize` gives, None where there is none.
    """

    STATE = "before"

    def __init__(self, trainer, dataset, report: ReportArguments):
        self.trainer, self.dataset, self.report = trainer, dataset, report
        self.found: dict[str, dict | None] = {"before": None, "after": None}
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        if self.report.report_before and self.dataset is not None and state.global_step == 0:
            state.stateful_callbacks[self.STATE] = self._evaluate("before")
        self.found["before"] = state.stateful_callbacks.get(self.STATE)

    def run_after(self) -> None:
        if self.dataset is not None:
            self.found["after"] = self._evaluate("after")

    def _evaluate(self, when: str) -> dict[str, dict]:
        return {
            decoding: evaluate_policy(
                self.trainer, self.dataset, self.report, decoding=decoding, progress=f"held-out, {when} ({decoding})"
            )
            for decoding in ("greedy", "sampled")
        }

    def table(self) -> list[dict]:
        """The rows of the table at the end."""
        keys = {key for found in self.found.values() for summary in (found or {}).values() for key in summary}
        metrics = sorted(key for key in keys if ": " in key and not key.startswith("accuracy: "))
        score = score_name(keys)
        return [
            {
                "policy": when,
                "decoding": decoding,
                score: summary["accuracy"],
                "95% interval": f"{summary['accuracy_low']:.3f}–{summary['accuracy_high']:.3f}",
                "format": summary["format"],
                "inconsistent": summary["inconsistency"],
                "unknown": summary["unknown"],
                **({"judges differ": summary.get("disagreement", math.nan)} if "disagreement" in keys else {}),
                **({"kappa": summary.get("kappa", math.nan)} if "kappa" in keys else {}),
                "accurate+consistent": summary["accurate_and_consistent"],
                "think tokens": summary["think_tokens"],
                **{key: summary.get(key, math.nan) for key in metrics},
            }
            for when, summaries in self.found.items()
            for decoding, summary in (summaries or {}).items()
        ]


class StopAtAccuracy(TrainerCallback):
    """Ends training once greedy accuracy on development rows is reached, where `stop_at_accuracy` is set.

    What it saw, and so why training ended, is in the checkpoints: a run that is resumed from the end is at its end.
    """

    STATE = "stop_at_accuracy"

    def __init__(self, trainer, report: ReportArguments, stop: StopArguments, *, allow_urls: bool = False):
        self.trainer, self.report, self.stop = trainer, report, stop
        if stop.stop_at_accuracy is not None:
            self.dataset = load_rows(stop.stop_datasets, shuffle=False, allow_urls=allow_urls, unique_ids=False)
            trainer.add_callback(self)

    def seen(self) -> list[dict]:
        """Greedy accuracy at each look: {"step"} and what `evaluate.summarize` gives."""
        return self.trainer.state.stateful_callbacks.setdefault(self.STATE, [])

    def on_train_begin(self, args, state, control, **kwargs):
        control.should_training_stop = bool(self.seen()) and self._reached(self.seen()[-1])

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.stop.stop_check_steps:
            return
        summary = evaluate_policy(self.trainer, self.dataset, self.report, decoding="greedy")
        self.seen().append({"step": state.global_step, **summary})
        if state.is_world_process_zero:
            kinds = [key for key in summary if key.startswith(("accuracy: ", "ROUGE: "))]
            parts = ", ".join(f"{key.removeprefix('accuracy: ')} {summary[key]:.2f}" for key in kinds)
            print(
                f"step {state.global_step}: development accuracy {summary['accuracy']:.3f} ({parts}), "
                f"format {summary['format']:.2f}; stops at {self.stop.stop_at_accuracy}",
                flush=True,
            )
        if self._reached(summary):
            control.should_training_stop = control.should_save = True

    def _reached(self, summary: dict) -> bool:
        return summary["accuracy"] >= self.stop.stop_at_accuracy
