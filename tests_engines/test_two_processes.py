"""recipes/grpo_video.py with two processes over gloo, against one process on the same global batches.

The whole file starts the recipe three times: two processes, whose last run is broken off; one process, for the numbers
to compare with; two processes, which resume.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import make_row, write_video
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.data.rows import load_rows

DRIVER = Path(__file__).with_name("two_process_driver.py")
TIMEOUT_S = 300  # of one launch with all its runs
GUARD_ROWS = 3  # `guards.ROWS_SHOWN`: rows that the main process reads to show what their media became

# Two processes average over (gradients of half a batch) / 2 what one process sums over the whole: the same numbers in
# another order of float32 additions. Plain SGD passes that on in proportion (AdamW's first steps are sign(gradient),
# which turns a rounding difference of a gradient near 0 into a full step). The updates themselves are over a thousand
# times larger; the test says so.
TOLERANCE = 1e-5

OPTIONS = {
    "num_generations": 2, "max_completion_length": 40, "optim": "sgd", "learning_rate": 1.0,
    "lr_scheduler_type": "constant", "loss_type": "grpo", "temperature": 1.0, "gradient_checkpointing": "false",
    "bf16": "false", "use_cpu": "true", "dtype": "float32", "report_to": "none", "save_strategy": "no",
    "logging_steps": 1, "disable_tqdm": "true", "dataloader_num_workers": 0, "seed": 0, "prompt_template": "tiny",
    "min_frames": 2, "max_frames": 4, "min_pixels": 3136, "max_pixels": 3136, "report_batch_size": 2,
    "report_samples": 2, "report_max_new_tokens": 4,
}  # fmt: skip

SHARED_OUT = {"num_generations": 4, "prompt_parallel": 2, "steps_per_generation": 1}  # with one process it is off

# Per scenario: names of rows, completions per process and micro-step with two processes (one process gets twice that),
# other options.
SAME_BATCH = {
    # 4 questions × 2 completions per step, two steps, one epoch: nothing is read beyond what is trained on
    "whole groups": ("clips", 4, {"max_steps": 2, "dataloader_num_workers": 1}),
    # each group of 4 has 2 completions in each process
    "straddling groups": ("two clips", 2, {"num_generations": 4, "max_steps": 2}),
    # and its 2 rollouts on shuffled frames in one of them
    "straddling groups, t_grpo": ("two clips", 2, {"num_generations": 4, "max_steps": 2, "methods": "t_grpo"}),
    # 3 groups of 4: the middle one straddles the processes, and a group's rows are updated in different micro-steps
    "slices": (
        "three clips", 3,
        {"num_generations": 4, "gradient_accumulation_steps": 2, "max_steps": 1, "loss_type": "dapo"},
    ),
    # one process has the text row, the other the video; the vision tower frozen, as by default
    "text beside video": ("text and clip", 2, {"max_steps": 1}),
    # and trained, with gradient checkpointing (TRL's default): only one process has gradients for it
    "text beside video, tower trained": (
        "text and clip", 2, {"max_steps": 1, "train_vision_tower": "true", "gradient_checkpointing": "true"}
    ),
    "mixed": ("mixed", 4, {"max_steps": 1, "train_vision_tower": "true"}),
    # methods that need whole groups, one in each process
    "token weights": ("two clips", 4, {"num_generations": 4, "methods": "tw_grpo", "max_steps": 2}),
    # one process has the text row, of a single turn, the other a clip of two
    "turns": (
        "text and clip", 2,
        {"max_steps": 2, "methods": "streaming", "clip_tokens": 4, "loss_type": "dapo", "scale_rewards": "none"},
    ),
    "regression": (
        "two clips", 4, {"num_generations": 4, "methods": "reg_grpo", "num_iterations": 2, "max_steps": 2}
    ),
    # a group in pieces again: likelihoods are compared over both processes, under a copy that moves at each step
    "straddling groups, care": (
        "two clips", 2,
        {
            "num_generations": 4, "methods": "care", "max_steps": 2, "care_every_steps": 1, "care_decay": 0.5,
            "care_min_think_tokens": 1,
        },
    ),
    # from the third epoch on, easy questions have noise; one group of each step straddles the processes
    "augmentation": (
        "three clips", 6,
        {"num_generations": 4, "methods": "difficulty_augmentation", "difficulty_window": 3, "max_steps": 3},
    ),
    # a row in each step, in both processes; half of its frames outside the span are hidden, then none
    "curriculum": (
        "grounded clips", 2,
        {
            "num_generations": 4, "methods": "grounding_curriculum", "difficulty_files": "{clips}/evaluated.json",
            "max_steps": 2,
        },
    ),
    # a prompt computed by both processes, each with half of its completions
    "prompt over both": ("two clips", 2, {**SHARED_OUT, "num_iterations": 2, "max_steps": 4, "beta": 0.1}),
    "prompt over both, t_grpo": ("two clips", 2, {**SHARED_OUT, "max_steps": 2, "methods": "t_grpo"}),
    "prompt over both, care": (
        "two clips", 2,
        {
            **SHARED_OUT, "methods": "care", "max_steps": 2, "care_every_steps": 1, "care_decay": 0.5,
            "care_min_think_tokens": 1,
        },
    ),
}  # fmt: skip
# "whole groups" again, broken off by the death of one process in its second step, and resumed.
BROKEN = ("clips", 4, {"max_steps": 2, "save_strategy": "steps", "save_steps": 1})
# And again, with SIGTERM to one process in its first step.
TERMINATED = ("clips", 4, {"max_steps": 2})
TWO_PROCESS_RUNS = {
    **SAME_BATCH, "resumed": BROKEN, "terminated": TERMINATED,
    "prompt over both, terminated": SAME_BATCH["prompt over both"],  # amid a generation batch
}  # fmt: skip
UNBROKEN = {
    "resumed": "whole groups", "terminated": "whole groups", "prompt over both, terminated": "prompt over both",
}  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """JSON Lines files of rows, each with media of its own."""
    folder = tmp_path_factory.mktemp("two_processes_media")
    for place in range(8):
        write_video(folder / f"clip{place}.mp4", frames=4, height=56, width=56, seed=300 + place)
    from PIL import Image

    Image.effect_noise((56, 56), 80).convert("RGB").save(folder / "noise.png")
    rows = [make_row(f"row{place}", folder, videos=[f"clip{place}.mp4"]) for place in range(8)]
    text = make_row("text", folder, problem="Which colour is last?")
    image = make_row("image", folder, images=["noise.png"])
    both = make_row("both", folder, videos=["clip1.mp4", "clip2.mp4"], images=["noise.png"])
    spans = {"problem_type": "temporal grounding", "options": [], "solution": "0.5 to 1.0"}
    grounded = [row | spans for row in rows[:2]]
    answers = [{"question": row, "ground_truth": row["solution"], "model_output": "?"} for row in grounded]
    (folder / "evaluated.json").write_text(json.dumps(answers))
    groups = {
        "grounded clips": grounded, "clips": rows, "two clips": rows[:2], "three clips": rows[:3],
        "text and clip": [text, rows[0]],
        "mixed": [text, image, rows[0], both],
    }  # fmt: skip
    for name, members in groups.items():
        lines = [json.dumps({k: v for k, v in row.items() if k != "media_root"}) for row in members]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def completions_of(names, generations=4) -> dict[str, list[str]]:
    """Completions per question, of different lengths and rewards within each group, different between questions."""
    found = {}
    for place, name in enumerate(names):
        think = "red then blue, " * (1 + place % 3)
        texts = [
            f"<think>{think}first is blue: B.</think><answer>B</answer>",
            f"<think>{think}so red.</think><answer>{'ACD'[place % 3]}</answer>",
            f"<answer>{'BA'[place % 2]}</answer>",
            f"no idea {place}",
        ]
        found[name] = texts[:generations]
    return found


def scenario(name, rows, *, clips, model, folder, per_device, **options) -> dict:
    argv = []
    source = {"path": str(clips / f"{rows}.jsonl"), "media_root": str(clips)}
    given = {
        **OPTIONS, "model_name_or_path": str(model), "output_dir": str(folder / name), "datasets": json.dumps(source),
        "per_device_train_batch_size": per_device, **options,
    }  # fmt: skip
    for key, value in given.items():
        argv += [f"--{key}", str(value).replace("{clips}", str(clips))]
    names = [row["question_id"] for row in load_rows([source])]
    return {
        "name": name, "argv": [*argv, "--rewards", "accuracy", "format"], "log": str(folder / f"{name}.log"),
        "completions": completions_of(sorted(names)),
    }  # fmt: skip


def start(scenarios: list[dict], folder: Path, *, processes: int) -> subprocess.CompletedProcess:
    """Run the driver; a hang ends in a failure, with every process of the launch killed."""
    file = folder / f"scenarios-{processes}-{len(list(folder.glob('scenarios*')))}.json"
    file.write_text(json.dumps(scenarios))
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [*command, str(DRIVER), str(file)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{processes} processes did not end within {TIMEOUT_S} s:\n{output[-8000:]}")
    return subprocess.CompletedProcess(command, process.returncode, output)


def build(names, clips, model, folder, *, processes: int) -> list[dict]:
    found = []
    for name in names:
        rows, per_device, options = TWO_PROCESS_RUNS[name]
        if processes == 1:
            options = {key: value for key, value in options.items() if key != "prompt_parallel"}
        per_device = per_device * 2 // processes
        found.append(scenario(name, rows, clips=clips, model=model, folder=folder, per_device=per_device, **options))
    return found


@pytest.fixture(scope="session")
def runs(clips, model_paths, tmp_path_factory):
    """Folders of the runs by number of processes, and the output of the launch that resumed the last one."""
    model = model_paths["qwen2_5_vl"]
    folders = {processes: tmp_path_factory.mktemp(f"processes{processes}") for processes in (1, 2)}
    # The recipe from nothing: a world to make, held-out rows that do not divide by two.
    held_out = {"path": str(clips / "three clips.jsonl"), "media_root": str(clips)}
    world = folders[2] / "world"
    from_nothing = scenario(
        "from nothing", "clips", clips=clips, model=model, folder=folders[2], per_device=2,
        max_steps=1, tiny_world=world, eval_datasets=json.dumps(held_out),
        datasets=json.dumps({"path": str(world / "rl.jsonl"), "media_root": str(clips)}),
    )  # fmt: skip
    from_nothing["make_world"] = str(clips / "clips.jsonl")
    del from_nothing["completions"]  # really sampled
    plain = [*build(SAME_BATCH, clips, model, folders[2], processes=2), from_nothing]
    # two nodes without a common disk: two working directories
    nodes = [tmp_path_factory.mktemp(f"node{rank}") for rank in (0, 1)]
    apart = build(["whole groups"], clips, model, Path(), processes=2)[0]
    apart |= {"name": "apart", "folders": [str(node) for node in nodes], "log": str(folders[2] / "apart.log")}
    run, *late = build(UNBROKEN, clips, model, folders[2], processes=2)

    broken = [
        *({**each, "log": each["log"] + ".broken", "terminate_at": 0} for each in late),
        {**run, "log": run["log"] + ".broken", "break_at": 1},
    ]
    two = start([apart, *plain, *broken], folders[2], processes=2)
    for rank in (0, 1):
        assert f"scenario apart rank {rank}: refused: output_dir whole groups: expected one folder" in two.stdout
    assert f"rank 1 on {socket.gethostname()} in {nodes[1]} (of 1) sees another" in two.stdout
    assert not any(nodes[1].iterdir())
    finished = [(folders[2] / item["name"] / "results.json").exists() for item in [*plain, *broken]]
    assert finished == [True] * len(plain) + [False] * len(broken), two.stdout[-8000:]
    for rank in (0, 1):
        for each in late:
            assert f"scenario {each['name']} rank {rank}, exit code 143" in two.stdout, two.stdout[-8000:]
    assert two.returncode != 0 and "going on from" not in two.stdout, two.stdout[-8000:]

    one = start(build(SAME_BATCH, clips, model, folders[1], processes=1), folders[1], processes=1)
    assert one.returncode == 0, one.stdout[-8000:]

    again = start([run, *late], folders[2], processes=2)
    assert again.returncode == 0, again.stdout[-8000:]
    return {**folders, "resuming": again.stdout}


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.log").read_text().splitlines()]


def rollouts(folder: Path, name: str) -> list[tuple]:
    """What a run generated, without what names a process."""
    rows = RolloutStore(folder / name / "rollouts").read()
    assert len({row["rollout_id"] for row in rows}) == len(rows)
    found = [
        (
            row["step"], row["question_id"], row["completion"], row["rewards"], row["shown"],
            pytest.approx(row["advantage"], abs=1e-5),
        )
        for row in rows
    ]  # fmt: skip
    return sorted(found, key=lambda row: row[:3])


@pytest.mark.parametrize("name", TWO_PROCESS_RUNS)
def test_two_processes_take_the_step_of_one(name, runs, model_paths):
    whole = UNBROKEN.get(name, name)
    first = load_file(model_paths["qwen2_5_vl"] / "model.safetensors")
    one, two = load_file(runs[1] / whole / "model.safetensors"), load_file(runs[2] / name / "model.safetensors")
    assert one.keys() == two.keys()
    moved = max(float((one[key] - first[key]).abs().max()) for key in first if key in one)
    assert moved > 1000 * TOLERANCE
    apart = {key: float((two[key] - one[key]).abs().max()) for key in one}
    assert max(apart.values()) <= TOLERANCE, max(apart.items(), key=lambda item: item[1])
    found = rollouts(runs[2], name)
    assert found == rollouts(runs[1], whole)
    if "t_grpo" in name:  # of one question as good in order, of the other worse
        assert sorted(row[3]["temporal_reward"] for row in found) == [0.0] * 6 + [1.0] * 2
    if "care" in name:  # at neither step all that are right earn it
        earned = [row[3] for row in found if row[3]["care_reward"]]
        assert 0 < len(earned) < len([row for row in found if row[3]["accuracy_reward"]])
    if name == "augmentation":
        assert {row[0] for row in found if row[4]} == {2}
    if name == "curriculum":
        assert [row[4] and row[4]["level"] for row in found] == [0.75] * 4 + [None] * 4


@pytest.mark.parametrize("name", [*TWO_PROCESS_RUNS, "from nothing"])
def test_there_are_two_processes(name, runs):
    worlds = {(line["size"], line["index"]) for line in lines(runs[2], name) if line["kind"] == "world"}
    assert worlds == {(2, 0), (2, 1)}


@pytest.mark.parametrize("name", TWO_PROCESS_RUNS)
def test_each_process_decodes_only_its_own_rows_and_once(name, runs, clips):
    """The start-up checks read the first rows besides, in every process: recorded apart, and bounded here. T-GRPO reads
    twice, for its frames in order and shuffled."""
    reads = [line for line in lines(runs[2], name) if line["kind"] == "read"]
    written = RolloutStore(runs[2] / name / "rollouts").read()
    if name in ("resumed", "terminated"):
        written = [row for row in written if row["step"] >= 1]  # the second start skips what was trained on, unread
    source = {"path": str(clips / f"{TWO_PROCESS_RUNS[name][0]}.jsonl"), "media_root": str(clips)}
    dataset = load_rows([source], seed=0)
    with_video = next(row for row in dataset if row["videos"])
    for rank in (0, 1):
        # one read per step, process and question
        own = {(r["step"], r["question_id"]): r["videos"] for r in written if f"-rank{rank}-" in r["rollout_id"]}
        trained = [line["video"] for line in reads if line["rank"] == rank and line["reader"] == "training"]
        expected = [video for videos in own.values() for video in videos] * (2 if "t_grpo" in name else 1)
        assert sorted(trained) == sorted(expected)
        checked = {line["video"] for line in reads if line["rank"] == rank and line["reader"] == "guard"}
        shown = [video for row in dataset.select(range(min(GUARD_ROWS, len(dataset)))) for video in row["videos"]]
        assert checked == {*with_video["videos"], *(shown if rank == 0 else [])}


def test_rows_are_read_once_and_mapped(runs):
    """Both processes train on the file that the first wrote, which is gone with the end of the run."""
    for name, processes in {"whole groups": 2, "resumed": 2, "slices": 1}.items():
        worlds = [line for line in lines(runs[processes], name) if line["kind"] == "world"]
        kept = runs[processes] / f".{name}.rows"
        found = [{Path(file).parent for file in line["rows"]} for line in worlds]
        assert found == [{kept / "training"} if processes == 2 else set()] * processes and not kept.exists()


def test_a_broken_run_resumes_in_both_processes(runs):
    """Rank 1 died after both had written step 1: its rollouts are set aside and generated again, none is doubled."""
    folder = runs[2] / "resumed"
    assert f"going on from {folder / 'checkpoint-1'}" in runs["resuming"]
    kept = [path.name for path in RolloutStore(folder / "rollouts").files()]
    assert kept == [f"rollouts-step{s:07d}-part0000-rank{r:04d}.parquet" for s in (0, 1) for r in (0, 1)]
    aside = sorted(path.name for path in (folder / "rollouts" / "set_aside").glob("*/*.parquet"))
    assert aside == [f"rollouts-step0000001-part0000-rank{r:04d}.parquet" for r in (0, 1)]
    assert json.loads((folder / "results.json").read_text())["steps"] == 2
    assert f"going on from {runs[2] / 'terminated' / 'checkpoint-1'}" in runs["resuming"]


def test_the_world_is_made_once(runs):
    found = lines(runs[2], "from nothing")
    made = [(line["kind"], line["rank"]) for line in found if line["kind"].startswith("world ")]
    assert made == [("world begins", 0), ("world ends", 0), ("world begins", 1), ("world ends", 1)]


def test_the_held_out_rows_are_shared_out_and_counted_once(runs):
    results = json.loads((runs[2] / "from nothing" / "results.json").read_text())
    for when in ("before", "after"):
        assert results[when]["greedy"]["questions"] == results[when]["sampled"]["questions"] == 3
        assert results[when]["greedy"]["completions"] == 3
        assert results[when]["sampled"]["completions"] == 6
