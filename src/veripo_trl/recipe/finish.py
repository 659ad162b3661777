"""The end of a run: the saved policy, tables, curves, card and results, and the push to the Hub."""

import signal
from pathlib import Path

from accelerate import PartialState

from veripo_trl.files.disk import read_json
from veripo_trl.files.run_folder import RESULTS, TRAINED, write_results
from veripo_trl.files.tables import print_table
from veripo_trl.hub.push import HubError
from veripo_trl.hub.runs import push_run, run_card
from veripo_trl.recipe.arguments import PushArguments
from veripo_trl.recipe.held_out import HeldOutEvaluation
from veripo_trl.report.plots import save_charts, training_charts


def finish(trainer, evaluation: HeldOutEvaluation, *, title: str, push: PushArguments, **results) -> int | None:
    """End a stage: save the model, then tables on the screen, curves as a picture, the push, and results.json.

    Args:
        title: of the table of held-out questions. results: what the stage adds to results.json.

    Returns:
        An exit code where SIGTERM ended the training: its checkpoint is there, and the run stays unfinished.
    """
    folder, state = Path(trainer.args.output_dir), trainer.state
    main = trainer.accelerator.is_main_process
    if trainer.terminated:
        if main:
            print(
                f"{folder}: terminated after step {state.global_step} of {state.max_steps}; the same command goes on "
                f"from its checkpoint",
                flush=True,
            )
        return 128 + signal.SIGTERM
    trainer.save_model(_internal_call=True)  # without transformers' push: ours comes last, when there is all to push
    evaluation.run_after()
    if main:
        _print_tables(trainer, evaluation, title)
        save_charts(folder / "curves.png", training_charts(state.log_history), title=folder.name)
        results = {
            "stage": trainer._name,
            "model": trainer.model.config._name_or_path,
            "before": evaluation.before,
            "after": evaluation.after,
            "steps": state.global_step,
            "minutes": trainer.minutes,
            "history": state.log_history,
            "seconds": dict(trainer.seconds),
            **results,
        }
        card = run_card(folder, results, repo_id=folder.absolute().name, license=push.hub_license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        print(f"\nmodel, {RESULTS} and curves.png are in {folder} ({results['minutes']:.1f} minutes)", flush=True)
        write_results(folder, results, TRAINED if trainer.args.push_to_hub else RESULTS)
    trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        finish_push(trainer.args, push)
    return None


def _print_tables(trainer, evaluation: HeldOutEvaluation, title: str) -> None:
    if rows := evaluation.table():
        print_table(f"{title} (consistency judged by {evaluation.report.report_judge})", rows)
    if trainer.seconds:
        steps = max(trainer.state.global_step, 1)
        print_table(
            "Seconds per step (load and encode run in the loader's workers where there are any)",
            [{"part": part, "seconds": seconds / steps} for part, seconds in trainer.seconds.items()],
        )


def finish_push(training_args, push: PushArguments) -> bool:
    """Push a run that is trained and not pushed, perhaps by an earlier process, which then counts as finished.

    Returns:
        Whether there was one, on every process: nothing is left to do. Without `push_to_hub` its push is given up.
    """
    folder, state = Path(training_args.output_dir), PartialState()
    trained = (folder / TRAINED).exists() and not (folder / RESULTS).exists()
    state.wait_for_everyone()
    if trained and state.is_main_process:
        results = read_json(folder / TRAINED, remedy="Remove it: the same command then goes on from the last checkpoint.")
        if training_args.push_to_hub:
            print(f"{folder} is trained; pushing it. Broken off, the same command goes on with the push.", flush=True)
            try:
                results["hub"] = push_run(folder, training_args, results, license=push.hub_license)
            except HubError as error:
                raise HubError(f"{error}\nOr start the run's own command again: it does not train again.") from None
        write_results(folder, results)
        (folder / TRAINED).unlink()
    return trained
