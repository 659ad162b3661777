"""Before training: the machine, whether and from which checkpoint to resume, the record of settings."""

import json
import os
import resource
import socket
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from veripo_trl.errors import ConfigError
from veripo_trl.files.disk import read_json
from veripo_trl.files.run_folder import (
    changed_keys,
    held_by,
    last_checkpoint,
    move_finished_aside,
    process_name,
    refuse_own_input,
)
from veripo_trl.files.secrets import without_secrets
from veripo_trl.files.tables import write_json

# Named so that the trainer's push leaves it out: it may hold paths of this machine.
ARGUMENTS_FILE = "_arguments.json"
# What decides which weights a checkpoint holds, and what its optimizer keeps of them; the first three without LoRA.
WEIGHTS = ("use_peft", "train_vision_tower", "optim", "lora_r", "lora_target_modules", "lora_modules_to_save")
SHARED_WAIT_S = 60  # a network disk may show another node's new file some seconds late


def prepare_machine(training_args, data_args, model_args) -> None:
    """Limits and threads of this process; the embedded world, where a configuration asks for it."""
    if training_args.resume_from_checkpoint is not None:  # nobody would read it
        raise ConfigError(
            f"resume_from_checkpoint: expected none, came {training_args.resume_from_checkpoint!r}. A run goes on from "
            f"the last checkpoint in its output_dir; to begin with another policy, give that as model_name_or_path."
        )
    refuse_own_input(training_args.output_dir, [model_args.model_name_or_path])
    refuse_separate_disks(training_args.output_dir)
    allow_many_open_files()
    if training_args.use_cpu:  # `accelerate launch` gives each process a single thread
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // training_args.world_size))
    if data_args.tiny_world is not None:
        from veripo_trl.tiny.world import make_world

        with training_args.main_process_first(desc="tiny world"):
            make_world(data_args.tiny_world, questions=data_args.tiny_questions)


def refuse_separate_disks(output_dir: str) -> None:
    """Every process has to see what the first one writes: else the rollouts of other nodes would stay on their disks,
    where no verifier reads them, and a resumed run would find no checkpoint there.

    Raises:
        ConfigError: in every process, with the nodes that do not.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    first, deadline = broadcast_object_list([process_name()])[0], time.monotonic() + SHARED_WAIT_S
    while not (seen := state.is_main_process or held_by(output_dir, first)) and time.monotonic() < deadline:
        time.sleep(1)
    place = f"rank {state.process_index} on {socket.gethostname()} in {os.getcwd()}"
    if elsewhere := gather_object([] if seen else [place]):
        raise ConfigError(
            f"output_dir {output_dir}: expected one folder for all processes, on a disk that every node has; "
            f"{', '.join(elsewhere[:4])} (of {len(elsewhere)}) sees another. Give it as an absolute path on that disk."
        )


def allow_many_open_files() -> None:
    """Raise the soft limit of open files to the hard one: every tensor from a loader's worker holds a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_run(output_dir: str, *arguments) -> str | None:
    """Prepare a run's folder, record the arguments in it, and find the checkpoint to go on from.

    A finished run of the same name is moved aside, never written over; an unfinished one is continued.

    Returns:
        The last checkpoint of an unfinished run, or None for a fresh start.
    """
    folder, checkpoint = Path(output_dir), None
    if PartialState().is_main_process:
        move_finished_aside(folder)
        checkpoint = last_checkpoint(folder)
        if checkpoint is not None:
            print(f"{folder} holds an unfinished run: going on from {checkpoint}", flush=True)
        save_arguments(output_dir, *arguments, resumed=checkpoint is not None)
    return broadcast_object_list([checkpoint])[0]


def save_arguments(output_dir: str, *arguments, resumed: bool = False) -> None:
    """Record what a run was started with, secrets left out; say what is not as in the start that it goes on from."""
    record = {type(item).__name__: asdict(item) for item in arguments}
    record = without_secrets(json.loads(json.dumps(record, default=str)), [])
    file = Path(output_dir) / ARGUMENTS_FILE
    if resumed and file.exists():
        before = read_json(file, remedy="Remove it: the run goes on without knowing its settings before.")
        refuse_other_weights(output_dir, before, record)
        changed = filter(None, (changed_keys(before.get(kind, {}), values) for kind, values in record.items()))
        if changed := ", ".join(changed):
            print(f"{output_dir} goes on with changed settings: {changed}", flush=True)
    write_json(file, record)


def refuse_other_weights(output_dir: str, before: dict, now: dict) -> None:
    """Raise unless a checkpoint's weights and optimizer are those of these settings, {their kind: settings}: torch would
    say so in other words."""
    before, now = ({key: value for kind in each.values() for key, value in kind.items()} for each in (before, now))
    names = WEIGHTS if now.get("use_peft") and before.get("use_peft") else WEIGHTS[:3]
    names = [name for name in names if name in before]
    if changed := changed_keys(*({name: each.get(name) for name in names} for each in (before, now))):
        raise ConfigError(
            f"{output_dir} cannot go on with other weights or another optimizer than its checkpoint's ({changed}). Start "
            f"it as it was; or give another output_dir, and the checkpoint as model_name_or_path."
        )
