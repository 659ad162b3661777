"""What methods and losses add to a GRPO step: processor time and memory of whole steps, on a CPU.

    python speed/bench_methods.py
    python speed/bench_methods.py --only TW-GRPO "TW-GRPO, blocks of 64" --sizes 256:64:8 \\
        --vocabulary 152064                                                             # its memory

A step is one question about a video (P tokens), G completions of C tokens each, and their update;
two updates where a line says so. Each line is a process of its own with the real trainer. They take
turns, so that all see the same noise; medians, without the first step, which checks the rows. Times
are of the processor, which other work on the machine hardly changes; frames come from a cache.
"Memory" is what a process' resident set grows by from before the first step to its highest point.

Methods are set so that by their formulas the first gradient is GRPO's (bonuses of weight 0, a
largest token weight of 1; Reg-GRPO's is 2 C / s₀ times that), and compute as much as with others.
The program fails where it is not.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from machine import describe_machine
from models import SHAPES, random_model, video_questions
from transformers import PrinterCallback, TrainerCallback, set_seed
from update_step import peak_bytes, resident_bytes

from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.files.tables import print_table, write_json
from veripo_trl.methods import load_methods, with_methods
from veripo_trl.trainers.grpo import VideoGRPOConfig, VideoGRPOTrainer

ROOT, CPU = Path(__file__).resolve().parent.parent, torch.device("cpu")
WEIGHTLESS = {"temporal_bonus": 0.0, "length_bonus": 0.0}
# Line: (settings, methods, their options). All completions are of one length: losses' means agree.
CASES = {
    "GRPO": ({}, [], {}),
    "T-GRPO": ({}, ["t_grpo"], WEIGHTLESS),
    "TW-GRPO": ({"loss_type": "bnpo"}, ["tw_grpo"], {"token_weight_max": 1.0}),
    "TW-GRPO, blocks of 64": (
        {"loss_type": "bnpo"}, ["tw_grpo"], {"token_weight_max": 1.0, "token_weight_block": 64},
    ),
    "CARE": ({}, ["care"], {"care_bonus": 0.0}),
    "Dr. GRPO": ({"loss_type": "dr_grpo"}, [], {}),
    "DAPO": ({"loss_type": "dapo"}, [], {}),
    "GSPO": ({"importance_sampling_level": "sequence"}, [], {}),
    "CISPO": ({"loss_type": "cispo", "epsilon_high": 5.0}, [], {}),
    "SAPO": ({"loss_type": "sapo"}, [], {}),
    "GRPO, twice": ({"num_iterations": 2}, [], {}),
    "Reg-GRPO, twice": ({"num_iterations": 2}, ["reg_grpo"], {"regression_floor": 0.1}),
}  # fmt: skip
LIMIT = 1e-3  # of the first gradient's norm, relative


def accuracy_reward(completion_ids, **kwargs) -> list[float]:
    """Differs within a group, so that there is something to learn."""
    return [float(sum(ids) % 7) / 7 for ids in completion_ids]


class Turns(TrainerCallback):
    """Makes a step when the other end of a pipe asks for it, and says how long it computed."""

    def __init__(self, connection):
        self.connection = connection

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = resident_bytes(CPU)
        self._wait()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.num_iterations == 0:
            self.connection.send(time.process_time() - self.started)
            if state.global_step < state.max_steps:
                self._wait()

    def _wait(self):
        self.connection.recv()
        self.started = time.process_time()


def serve(connection, name: str, args, folder: Path) -> None:
    """A line: step whenever asked; then send the first gradient's norm and the memory."""
    torch.set_num_threads(args.threads)
    set_seed(0)
    SHAPES["mid"]["text"]["vocab_size"] = args.vocabulary
    (settings, methods, given), (prompt, completion, group) = CASES[name], args.sizes
    model, processor = random_model("mid")
    encoder, rows = video_questions(
        model, processor, folder, prompt_tokens=prompt, count=args.steps, frame_cache=str(folder)
    )
    training = VideoGRPOConfig(
        per_device_train_batch_size=group, num_generations=group, steps_per_generation=1,
        max_completion_length=completion, generation_kwargs={"min_new_tokens": completion},
        max_steps=args.steps * settings.get("num_iterations", 1), learning_rate=1e-6,
        output_dir=str(folder / name), save_strategy="no", report_to="none", logging_steps=1,
        disable_tqdm=True, use_cpu=True, bf16=False, activation_checkpointing=False, **settings,
    )  # fmt: skip
    options, turns = [mixin.OPTIONS(**given) for mixin in load_methods(methods)], Turns(connection)
    trainer = with_methods(VideoGRPOTrainer, methods, options)(
        model=model, processing_class=processor, encoder=encoder, args=training, callbacks=[turns],
        reward_funcs=[accuracy_reward], train_dataset=rows_to_dataset(rows),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    connection.send("ready")
    trainer.train()
    norm = next(float(log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log)
    memory_mb = (peak_bytes(CPU) - turns.before) / 1e6
    connection.send({"grad_norm": norm, "memory_mb": memory_mb})


def measure(names: list[str], args, folder: Path) -> dict[str, dict]:
    # forked: this process has imported everything and computed nothing
    context, ends, found = multiprocessing.get_context("fork"), {}, {}
    for name in names:  # one after another: they write the same clips and frames
        ends[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, name, args, folder), daemon=True).start()
        theirs.close()
        ends[name].recv()
    seconds = {name: [] for name in names}
    for _ in range(args.steps):
        for name, end in ends.items():
            end.send("step")
            seconds[name].append(end.recv())
    for name, end in ends.items():
        found[name] = {
            **end.recv(),
            "seconds": seconds[name],
            "median_s": median(seconds[name][1:]),
        }
    return found


def table_row(name: str, run: dict, found: dict, completion: int) -> dict:
    grpo = found.get("GRPO, twice" if name.endswith("twice") else "GRPO", found["GRPO"])
    expected = found["GRPO"]["grad_norm"] * (2 * completion / 0.1 if "Reg" in name else 1)
    return {
        "step": name,
        "seconds": run["median_s"],
        "over GRPO": f"{run['median_s'] / grpo['median_s'] - 1:+.1%}",
        "memory, MB": run["memory_mb"],
        "first gradient differs": f"{abs(run['grad_norm'] / expected - 1):.0e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="LINE")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--sizes", default="1024:64:8", metavar="P:C:G")
    parser.add_argument("--vocabulary", type=int, default=SHAPES["mid"]["text"]["vocab_size"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--json", type=Path, default=ROOT / "speed" / "results" / "bench_methods.json"
    )
    args = parser.parse_args()
    args.sizes = [int(size) for size in args.sizes.split(":")]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(list(dict.fromkeys(["GRPO", *args.only])), args, Path(folder))
    table = [table_row(name, each, found, args.sizes[1]) for name, each in found.items()]
    print_table("GRPO steps of a mid-size model: P {}, C {}, G {}".format(*args.sizes), table)
    options = {name: getattr(args, name) for name in ("steps", "sizes", "vocabulary", "threads")}
    found = {"options": options, "table": table, "runs": found}
    write_json(args.json, {"machine": describe_machine(), **found})
    if wrong := [row["step"] for row in table if not float(row["first gradient differs"]) <= LIMIT]:
        sys.exit(f"{', '.join(wrong)}: the first gradient's norm is not what the formula says.")


if __name__ == "__main__":
    main()
