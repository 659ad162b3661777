"""A trainer's run to its end: training, the saved policy, tables, curves, card and results, and the push to the Hub."""

import shutil
import signal
from pathlib import Path

from accelerate import PartialState

from veripo_trl.files.disk import read_json
from veripo_trl.files.run_folder import RESULTS, TRAINED, write_results
from veripo_trl.files.tables import print_table
from veripo_trl.hub.cards import shown_name
from veripo_trl.hub.push import HubError
from veripo_trl.hub.runs import push_run, run_card
from veripo_trl.recipe.arguments import ReportArguments
from veripo_trl.recipe.console import show_steps
from veripo_trl.recipe.held_out import HeldOutEvaluation
from veripo_trl.recipe.training_rows import rows_folder
from veripo_trl.report.plots import save_charts, training_charts


def train(trainer, heldout, report: ReportArguments, *, checkpoint: str | None, title: str, **results) -> int | None:
    """Train, and save the model; then tables on the screen, curves as a picture, results.json and the push.

    Args:
        heldout: rows of the table at the end, or None. title: of that table. checkpoint: to go on from.
        results: what the stage adds to results.json; a function is called at the end.

    Returns:
        An exit code where SIGTERM ended the training: its checkpoint is there, and the run stays unfinished.
    """
    evaluation = HeldOutEvaluation(trainer, heldout, report)
    show_steps(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
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
        if rows := evaluation.table():
            print_table(f"{title} (consistency judged by {report.report_judge})", rows)
        steps = max(state.global_step, 1)
        if trainer.seconds:  # of no step there are none
            print_table(
                "Seconds per step (load and encode run in the loader's workers where there are any)",
                [{"part": part, "seconds": seconds / steps} for part, seconds in trainer.seconds.items()],
            )
        save_charts(folder / "curves.png", training_charts(state.log_history), title=folder.name)
        results = {
            "stage": trainer._name,
            "model": trainer.model.config._name_or_path,
            **evaluation.found,
            "steps": state.global_step,
            "minutes": trainer.minutes,
            "history": state.log_history,
            "seconds": dict(trainer.seconds),
            **{name: value() if callable(value) else value for name, value in results.items()},
        }
        card = run_card(folder, results, repo_id=shown_name(str(folder)), license=trainer.args.hub_license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        curves = f", {RESULTS} and curves.png" if (folder / "curves.png").exists() else f" and {RESULTS}"
        print(f"\nmodel{curves} are in {folder} ({results['minutes']:.1f} minutes)", flush=True)
        write_results(folder, results, TRAINED if trainer.args.push_to_hub else RESULTS)
        shutil.rmtree(rows_folder(trainer.args.output_dir), ignore_errors=True)  # none reads them any more
    trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        finish_push(trainer.args)
    return None


def finish_push(training_args) -> bool:
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
                results["hub"] = push_run(folder, training_args, results, license=training_args.hub_license)
            except HubError as error:
                raise HubError(f"{error}\nOr start the run's own command again: it does not train again.") from None
        write_results(folder, results)
        (folder / TRAINED).unlink()
    return trained
