"""Every shipped YAML: read by its recipe's own parser, launched by a command that exists, saying what it claims."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import load_script
from transformers import TrainingArguments
from trl import ModelConfig

from veripo_trl.data.prompts import load_template
from veripo_trl.data.rows import DatasetSource
from veripo_trl.errors import ConfigError
from veripo_trl.loop.plan import plan, read_loop
from veripo_trl.media.sampling import VideoSettings
from veripo_trl.model.policy import SEEING
from veripo_trl.recipe.arguments import DataArguments, ReportArguments
from veripo_trl.recipe.arguments import parse as parse_arguments
from veripo_trl.trainers.dpo import VideoDPOConfig
from veripo_trl.trainers.grpo import VideoGRPOConfig
from veripo_trl.trainers.sft import VideoSFTConfig
from veripo_trl.verifier.pair_dataset import PairSource

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "recipes" / "configs"
ALL = {str(file.relative_to(CONFIGS)): file for file in sorted(CONFIGS.rglob("*.yaml"))}
ACCELERATE = [name for name in ALL if name.startswith("accelerate/")]
LOOPS = [name for name in ALL if name.endswith("/veripo.yaml")]
VERIFY = [name for name in ALL if name.endswith("verify.yaml")]
SAMPLE = ["tiny/perturbed.yaml"]
TRAINING = [name for name in ALL if name not in {*ACCELERATE, *LOOPS, *VERIFY, *SAMPLE}]
GRPO_7B = ["qwen2_5_vl_7b/1_activation.yaml", "qwen2_5_vl_7b/2_search.yaml"]
SYSTEMS = sorted(file.parent.name for file in CONFIGS.glob("*/README.md"))
SOURCES = ROOT / "src" / "veripo_trl" / "sources"
NODE = 8  # processes that the 7B files are written for

# The dataclasses that a recipe adds of its own are found in it by name.
PARSED_BY = {
    "grpo_video.py": ("GRPOArguments", VideoGRPOConfig),
    "sft_video.py": ("StopArguments", VideoSFTConfig),
    "dpo_video.py": ("PairArguments", VideoDPOConfig),
}


def header(name: str) -> dict[str, str]:
    """{field: text} of the comment block that opens a file."""
    fields, field = {}, None
    for line in ALL[name].read_text().splitlines():
        if not line.startswith("#") or line == "#":
            break
        if match := re.fullmatch(r"# (\w+): +(.*)", line):
            field = match[1]
            fields[field] = match[2]
        elif field and line.startswith("#  "):
            fields[field] += " " + line[1:].strip()
    return fields


def launch(name: str) -> tuple[str | None, Path, list[str]]:
    """(accelerate's config, the recipe, its arguments) of a file's launch command."""
    words = shlex.split(header(name)["Launch"])
    if name in {*LOOPS, *VERIFY, *SAMPLE}:  # one process, whatever the machine has
        assert words[0] == "python"
        return None, ROOT / words[1], words[2:]
    if words[:2] == ["torchrun", "--nproc_per_node"]:  # on a machine without GPUs accelerate starts one process
        return None, ROOT / words[3], words[4:]
    assert words[:3] == ["accelerate", "launch", "-q"], name  # without the launcher's traceback behind a message
    words, config_file = words[3:], None
    if words[0] == "--config_file":
        config_file, words = words[1], words[2:]
    return config_file, ROOT / words[0], words[1:]


def parse(file: Path, recipe: Path) -> dict:
    """{attribute: value} of all argument objects that the recipe makes of a file. No GPU: bf16 is refused then."""
    if recipe.name in ("verify_rollouts.py", "sample_perturbed.py"):
        module = load_script(recipe)
        parsed = parse_arguments(module.ARGUMENTS, default_config=module.DEFAULT_CONFIG, argv=["--config", str(file)])
        return {key: value for item in parsed for key, value in vars(item).items()}
    own, training = PARSED_BY[recipe.name]
    module = load_script(recipe)
    kinds = (DataArguments, ReportArguments, getattr(module, own), training, ModelConfig)
    argv = ["--config", str(file), "--bf16", "false", "--use_cpu", "true"]
    values, processes = {}, re.search(r"^prompt_parallel: (\d+)", file.read_text() if file.exists() else "", re.M)
    with pytest.MonkeyPatch.context() as patch:
        if processes:  # a group's completions fill a batch of so many
            patch.setattr(TrainingArguments, "world_size", int(processes[1]))
        for item in parse_arguments(kinds, default_config=module.DEFAULT_CONFIG, argv=argv):
            values |= vars(item)
    return values


@pytest.fixture(scope="module")
def parsed():
    return {name: parse(ALL[name], launch(name)[1]) for name in [*TRAINING, *VERIFY, *SAMPLE]}


def test_every_promised_file_is_there():
    promised = {*GRPO_7B, "tiny/sft.yaml", "tiny/grpo.yaml", "video_r1/sft.yaml", "video_r1/grpo.yaml"}
    promised |= {"qwen2_5_vl_3b_lora/sft.yaml", "qwen2_5_vl_3b_lora/grpo.yaml"} | {
        f"accelerate/{n}.yaml" for n in ("single", "ddp", "zero2", "zero3", "fsdp2")
    }
    promised |= {f"qwen2_5_vl_7b/{n}.yaml" for n in ("3_verify", "4_align", "5_search", "veripo")}
    promised |= {"tiny/veripo.yaml", "qwen2_5_vl_3b_lora/veripo.yaml"}
    assert promised <= ALL.keys()


@pytest.mark.parametrize("name", ALL)
def test_header_and_launch_command(name):
    assert list(header(name)) == ["Purpose", "Launch", "Hardware", "Expected"]
    assert all(header(name).values())
    config_file, recipe, arguments = launch(name)
    assert recipe.is_file()
    assert config_file is None or str((ROOT / config_file).relative_to(CONFIGS)) in ACCELERATE
    if name in ACCELERATE:
        assert ROOT / config_file == ALL[name]
        assert arguments[0] == "--config" and arguments[1] in TRAINING
        assert launch(arguments[1])[1] == recipe, "the configuration is another recipe's"
    elif arguments:
        assert arguments == ["--config", name]
    else:  # the recipe's own default
        assert load_script(recipe).DEFAULT_CONFIG == ALL[name]


@pytest.mark.parametrize("name", TRAINING)
def test_recipe_parses_it(name, parsed):
    values, written = parsed[name], yaml.safe_load(ALL[name].read_text())
    seeing = {key: default if values[key] is None else values[key] for key, default in SEEING.items()}
    VideoSettings(**{key: seeing[key] for key in ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels")})
    for source in (values["datasets"] or []) + (values["eval_datasets"] or []):
        DatasetSource(**source)  # a mistyped key of an entry is an error here
        assert source.get("source") is None or (SOURCES / f"{source['source']}.py").is_file()
    for source in values.get("pairs", []):
        PairSource(**source)
    load_template(values["prompt_template"] or SEEING["prompt_template"])
    assert values["output_dir"].startswith("outputs/")
    for key in ("dataloader_num_workers", "report_to", "save_steps", "logging_steps", "dtype", "seed"):
        assert key in written, f"{key} is left to a default that may change"
    for key in ("report_batch_size", "report_max_new_tokens"):
        assert key in written
    if not re.match("tiny/|.*/tiny|.*/two_processes", name):
        assert written["bf16"] is True and values["dtype"] == "bfloat16" and values["gradient_checkpointing"]
        assert "not run on a GPU yet" in header(name)["Expected"]
    # What no default may decide: TRL's differ from the papers' and are changed between its versions.
    if launch(name)[1].name == "grpo_video.py":
        for key in ("loss_type", "beta", "scale_rewards", "num_generations", "temperature", "max_completion_length"):
            assert key in written, key
        assert values["reward_weights"] is None or len(values["reward_weights"]) == len(values["rewards"])


@pytest.mark.parametrize("system", SYSTEMS)
def test_readme_of_a_system(system):
    """What it is, needs and reports, what is wrong with that, and which of its files is run how."""
    text = (CONFIGS / system / "README.md").read_text()
    for name in (name for name in TRAINING if name.startswith(f"{system}/")):
        assert f"`{Path(name).name}`" in text, name
    for part in ("**Needs**", "**Published**", "**Known to be wrong**", "**Here**", "**Measured here**"):
        assert part in text, part
    assert "not run on a GPU" in text


def test_servers_listen_on_this_machine_alone():
    """Each `vllm serve` that is written down anywhere, in a configuration, a document or a message."""
    files = [file for kind in ("*.md", "*.yaml", "*.py") for file in ROOT.rglob(kind) if ".venv" not in str(file)]
    commands = [c for file in files for c in re.findall(r"vllm,? serve,? [A-Z{].{50}", file.read_text(), re.DOTALL)]
    assert len(commands) > 6
    assert [command for command in commands if not re.search(r"--host,? 127\.0\.0\.1", command)] == []


@pytest.mark.parametrize(("name", "key", "mistyped"), [
    *((n, "save_steps", "save_step") for n in TRAINING), *((n, "judge", "jugde") for n in VERIFY)
])  # fmt: skip
def test_mistyped_key_is_named(name, key, mistyped, tmp_path):
    file = tmp_path / "mistyped.yaml"
    file.write_text(re.sub(rf"^{key}:", f"{mistyped}:", ALL[name].read_text(), flags=re.MULTILINE))
    with pytest.raises(
        ConfigError, match=rf"mistyped.yaml: unknown key '{mistyped}' \(close: .*{key}.*Nothing was run"
    ):
        parse(file, launch(name)[1])


def test_unknown_reward_and_missing_file_are_named(tmp_path):
    recipe = ROOT / "recipes" / "grpo_video.py"
    file = tmp_path / "reward.yaml"
    file.write_text("model_name_or_path: x\noutput_dir: outputs/x\nrewards: [accuracy, fromat]\n")
    with pytest.raises(ConfigError, match="expected some of accuracy, .*format, or module:function; got 'fromat'"):
        parse(file, recipe)
    with pytest.raises(ConfigError, match=r"--config absent.yaml: no such file"):
        parse(Path("absent.yaml"), recipe)


@pytest.mark.parametrize(
    ("name", "kind", "processes", "zero_stage"),
    [
        ("accelerate/single.yaml", "NO", 1, None),
        ("accelerate/ddp.yaml", "MULTI_GPU", NODE, None),
        ("accelerate/zero2.yaml", "DEEPSPEED", NODE, 2),
        ("accelerate/zero3.yaml", "DEEPSPEED", NODE, 3),
        ("accelerate/fsdp2.yaml", "FSDP", NODE, None),
    ],
)
def test_accelerate_loads_it(name, kind, processes, zero_stage):
    config = load_config_from_file(str(ALL[name]))
    assert (config.distributed_type.value, config.num_processes, config.mixed_precision) == (kind, processes, "bf16")
    assert config.num_machines == 1 and not config.use_cpu
    assert config.deepspeed_config.get("zero_stage") == zero_stage


@pytest.mark.parametrize(
    ("name", "completions_per_step", "steps_per_rollout"),
    [(GRPO_7B[0], 128, 4), (GRPO_7B[1], 64, 8), ("vst/grpo.yaml", 512, 1)],
)
def test_batches_of_the_papers_table(name, completions_per_step, steps_per_rollout, parsed):
    values = parsed[name]
    assert load_config_from_file(str(ROOT / launch(name)[0])).num_processes == NODE
    per_forward = values["per_device_train_batch_size"] * NODE
    per_rollout = per_forward * values["steps_per_generation"]
    assert per_forward * values["gradient_accumulation_steps"] == completions_per_step
    assert per_rollout == values["num_generations"] * 64
    assert per_rollout / completions_per_step == steps_per_rollout
    assert values["num_iterations"] == 1  # more would repeat those steps
    assert values["save_steps"] % steps_per_rollout == 0


# Numbers with a source: the paper's table, its README, or Video-R1's code.
SETTINGS = {
    GRPO_7B[0]: {
        "model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct",
        "learning_rate": 1e-6,
        "num_generations": 8,
        "temperature": 1.0,
        "fps": 2.0,
        "max_frames": 128,
        "max_pixels": 128 * 28 * 28,
        "beta": 0.0,
        "epsilon": 0.2,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "warmup_steps": 0.03,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "max_completion_length": 4096,
        "loss_type": "grpo",
        "train_vision_tower": False,
    },
    "video_r1/sft.yaml": {
        "model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct",
        "learning_rate": 1e-6,
        "num_train_epochs": 1,
        "max_frames": 16,
        "max_pixels": 128 * 28 * 28,
        "max_length": None,
    },
    "video_r1/grpo.yaml": {
        "model_name_or_path": "Video-R1/Qwen2.5-VL-7B-COT-SFT",
        "num_generations": 8,
        "beta": 0.04,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "max_completion_length": 768,
        "max_prompt_tokens": 16384,
        "temperature": 1.0,
        "top_p": 0.95,
        "max_grad_norm": 5.0,
        "max_steps": 1200,
        "fps": 2.0,
        "min_frames": 4,
        "max_frames": 16,
        "max_pixels": 128 * 28 * 28,
        "rewards": ["accuracy_relative_error", "format"],
        "reward_weights": [1.0, 2.0],
        "methods": ["t_grpo"],
        "temporal_ratio": 0.8,
        "temporal_threshold": 0.1,
        "temporal_rollouts": 4,
        "temporal_bonus": 0.3,
        "length_bonus": 0.2,
        "length_range": [320, 512],
    },
    "qwen2_5_vl_3b_lora/grpo.yaml": {
        "model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct",
        "use_peft": True,
        "lora_r": 64,
        "lora_dropout": 0.0,
        "learning_rate": 1e-5,
        "max_frames": 64,
        "max_pixels": 100352,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 8,
        "num_generations": 8,
        "max_completion_length": 1024,
        "loss_type": "grpo",
        "beta": 0.0,
    },
}
SEED_BENCH = {"source": "seed_bench_r1", "max_frames": 16, "max_pixels": 252 * 252, "max_image_pixels": 252 * 252}
SETTINGS |= {  # of the relatives, what their code or paper says
    "tw_grpo/grpo.yaml": {
        "methods": ["tw_grpo"], "token_weight_max": 1.7,
        "source": "clevrer", "rewards": ["accuracy_soft", "format"], "reward_weights": [1.0, 2.0], "loss_type": "bnpo",
        "beta": 0.0, "epsilon_high": 0.28, "learning_rate": 1e-6, "max_steps": 500, "max_grad_norm": 20.0,
        "max_completion_length": 4096, "max_frames": 16, "max_pixels": 196 * 28 * 28, "train_vision_tower": False,
    },
    "deepvideo_r1/grpo.yaml": SEED_BENCH | {
        "methods": ["reg_grpo", "difficulty_augmentation"], "num_iterations": 2, "beta": 0.1, "max_steps": 2000,
        "train_vision_tower": False,
    },
    "seed_bench_r1/grpo.yaml": SEED_BENCH | {
        "rewards": ["accuracy"], "beta": 0.1, "learning_rate": 1e-6, "max_completion_length": 256, "num_train_epochs": 1,
        "max_prompt_tokens": 8192, "min_frames": 4, "loss_type": "grpo", "scale_rewards": "group",
    },
    "seed_bench_r1/care.yaml": {
        "methods": ["care"], "care_bonus": 0.5, "care_margin": 0.0, "care_likelihood_cap": 0.95, "care_decay": 0.995,
        "care_every_steps": 10, "rewards": ["accuracy", "format"], "reward_weights": [1.0, 2.0], "beta": 0.0,
        "source": "seed_bench_r1", "top_p": 0.95, "learning_rate": 1e-6, "lr_scheduler_type": "cosine",
        "weight_decay": 0.01, "max_grad_norm": 5.0, "max_completion_length": 768, "max_prompt_tokens": 16384,
        "max_image_pixels": 401_408, "num_train_epochs": 1, "scale_rewards": "group",
    },
    "long_video/grpo.yaml": {
        "source": "longvideo_reason", "rewards": ["accuracy", "format"], "reward_weights": [0.9, 0.2], "beta": 0.01,
        "weight_decay": 0.01, "max_grad_norm": 1.0, "temperature": 1.0, "top_p": 0.99, "max_completion_length": 2048,
        "num_generations": 8, "max_frames": 1024,
    },
    "primo/grpo.yaml": {
        "source": "primo_r1", "rewards": ["accuracy_absolute_range", "structured_format"], "beta": 0.04, "top_p": 0.95,
        "reward_kwargs": {"accuracy_absolute_range": {"max_range": 100},
                          "structured_format": {"sections": ["planning", "observation", "reasoning"]}},
        "learning_rate": 1e-6, "weight_decay": 0.01, "max_grad_norm": 5.0, "max_completion_length": 4096,
        "max_steps": 2500, "max_image_pixels": 401_408, "model_name_or_path": "outputs/primo/sft", "methods": ["t_grpo"],
        "temporal_rollouts": 0, "temporal_threshold": 0.1, "length_bonus": 0.2, "length_range": [320, 512],
    },
    "primo/sft.yaml": {"source": "primo_r1", "gradient_accumulation_steps": 8, "max_grad_norm": 4.0},
    "stvg/grpo.yaml": {
        "source": "stvg_r1", "rewards": ["object_id", "tiou", "format"], "reward_weights": [1.0, 1.0, 2.0], "beta": 0.04,
        "learning_rate": 1e-6, "max_completion_length": 1024, "max_prompt_tokens": 8192, "num_train_epochs": 2,
    },
    "grounding/grpo.yaml": {
        "source": "time_r1", "rewards": ["tiou_time_r1", "format"], "loss_type": "bnpo", "beta": 0.04, "epsilon": 0.2,
        "learning_rate": 1e-6, "gradient_accumulation_steps": 2, "max_completion_length": 200, "num_train_epochs": 5,
    },
    "videotg/grpo.yaml": {"source": "charades_sta", "rewards": ["tiou", "format"], "beta": 0.04, "num_train_epochs": 2},
    "scene_r1/grpo.yaml": {"source": None, "rewards": ["accuracy", "format"], "max_pixels": 256 * 28 * 28},
    "video_thinker/grpo.yaml": {
        "source": "video_thinker", "rewards": ["accuracy", "segments_format"], "reward_weights": [1.0, 0.5],
        "prompt_template": "video_thinker", "beta": 0.04, "learning_rate": 5e-6, "weight_decay": 0.01,
        "max_grad_norm": 1.0, "max_steps": 2500, "max_frames": 16, "max_pixels": 128 * 28 * 28,
        "model_name_or_path": "outputs/video_thinker/sft",
    },
    "video_thinker/sft.yaml": {"learning_rate": 1e-5, "num_train_epochs": 1, "prompt_template": "video_thinker"},
    "videohallu/grpo.yaml": {"source": "video_hallu", "beta": 0.04, "learning_rate": 1e-6, "max_completion_length": 768},
    "sole/grpo.yaml": {
        "source": "sole_r1", "rewards": ["exponential_error", "format"], "reward_weights": [1.0, 2.0],
        "reward_kwargs": {"exponential_error": {"tau": 10, "scale": 1.5}}, "top_p": 0.9, "top_k": 50,
        "max_completion_length": 200, "max_prompt_tokens": 2048, "model_name_or_path": "outputs/sole/sft",
    },
    "sole/sft.yaml": {"model_name_or_path": "Qwen/Qwen3-VL-8B-Instruct", "source": "sole_r1"},
    "vst/grpo.yaml": {
        "source": "vst", "rewards": ["accuracy"], "loss_type": "dapo", "scale_rewards": "none", "beta": 0.01,
        "learning_rate": 5e-7, "warmup_steps": 20, "top_p": 0.98, "max_frames": 280, "max_pixels": 160 * 28 * 28,
        "max_completion_length": 1000, "num_train_epochs": 1, "methods": ["streaming"], "clip_tokens": 5000,
    },
}  # fmt: skip
SETTINGS[GRPO_7B[1]] = SETTINGS[GRPO_7B[0]] | {"model_name_or_path": "outputs/qwen2_5_vl_7b/1_activation"}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_with_a_source(name, parsed):
    values = parsed[name] | {"source": parsed[name]["datasets"][0].get("source")}
    assert {key: values[key] for key in SETTINGS[name]} == SETTINGS[name]


@pytest.mark.parametrize(
    ("name", "images", "videos"),
    [(GRPO_7B[0], [30_000, 39_000], []), (GRPO_7B[1], [4_000, 9_000, 10_000], [8_000, 8_000, 8_000])],
)
def test_rows_of_the_papers_table(name, images, videos, parsed):
    sources = parsed[name]["datasets"]
    limits = {"image": [], "video": []}
    for source in sources:
        limits[source["where"]["data_type"]].append(source["limit"])
    assert limits == {"image": images, "video": videos}
    # Two entries that match one row would give its id twice, which loading refuses.
    for one, other in itertools.combinations([source["where"] for source in sources], 2):
        assert any(values_of(one[key]).isdisjoint(values_of(other[key])) for key in one.keys() & other.keys())


def values_of(wanted) -> set:
    """The values that a `where` accepts for a column."""
    return set(wanted) if isinstance(wanted, list) else {wanted}


def test_settings_of_the_papers_alignment(parsed):
    values = parsed["qwen2_5_vl_7b/4_align.yaml"]
    assert (values["beta"], values["learning_rate"], values["loss_type"]) == (0.1, 5e-7, ["sigmoid"])
    assert values["per_device_train_batch_size"] * NODE * values["gradient_accumulation_steps"] == 32
    later = parsed["qwen2_5_vl_7b/5_search.yaml"]
    first = parsed[GRPO_7B[1]]
    assert later["learning_rate"] == 5e-7
    for key in SETTINGS[GRPO_7B[1]].keys() - {"learning_rate", "model_name_or_path"} | {"steps_per_generation"}:
        assert later[key] == first[key], key
    assert [source["limit"] for source in later["datasets"]] == [8_000, 8_000, 8_000]


@pytest.mark.parametrize("name", LOOPS)
def test_loop_plans_and_its_stages_parse(name, tmp_path):
    """Every stage's YAML, as the loop writes it, is read by its recipe; what a stage reads, one before it writes."""
    loop = read_loop(str(ALL[name]))
    planned = plan(loop)
    assert len(planned) == len(loop["stages"]) + loop["iterations"] * len(loop["iteration"])
    made: set[str] = set()
    for stage in planned:
        file = tmp_path / f"{stage['name']}.yaml"
        file.write_text(yaml.safe_dump(stage["settings"]))
        values = parse(file, ROOT / "recipes" / stage["recipe"])
        read = [source["path"] for source in values.get("pairs", [])] + list(values.get("leave_out") or [])
        read += values.get("rollouts", []) if isinstance(values.get("rollouts"), list) else []
        read += [values["model_name_or_path"]] if made and "model_name_or_path" in values else []
        for path in read:
            assert any(path == folder or path.startswith(f"{folder}/") for folder in made), (stage["name"], path)
        made.add(values["output_dir"])
    if not name.startswith("tiny/"):
        option, file = loop["accelerate"]
        assert option == "--config_file" and file in ACCELERATE
        assert "not run on a GPU yet" in header(name)["Expected"]


def test_each_stage_starts_from_what_the_one_before_saved(parsed):
    assert parsed[GRPO_7B[1]]["model_name_or_path"] == parsed[GRPO_7B[0]]["output_dir"]
    assert parsed["tiny/grpo.yaml"]["model_name_or_path"] == parsed["tiny/sft.yaml"]["output_dir"]
    for folder, grpo, verify, dpo in (
        ("tiny", "grpo", "verify", "dpo"),
        ("qwen2_5_vl_3b_lora", "grpo", "verify", "dpo"),
        ("qwen2_5_vl_7b", "2_search", "3_verify", "4_align"),
    ):
        search, judged, align = (parsed[f"{folder}/{stage}.yaml"] for stage in (grpo, verify, dpo))
        assert judged["rollouts"] == [f"{search['output_dir']}/rollouts"]
        assert [source["path"] for source in align["pairs"]] == [f"{judged['output_dir']}/pairs"]
        assert align["model_name_or_path"] == search["output_dir"]
        assert {align[key] for key in SEEING} == {None}  # as the search's policy was trained
        assert align["holdout"] == search["holdout"]
        assert not align["holdout"] or align["datasets"] == search["datasets"]
        assert judged["prompt_template"] == search["prompt_template"]
    start, search = parsed["qwen2_5_vl_3b_lora/sft.yaml"], parsed["qwen2_5_vl_3b_lora/grpo.yaml"]
    for key in (*SEEING, "model_name_or_path", "use_peft", "lora_r", "lora_alpha"):
        assert start[key] == search[key], key
    later = parsed["qwen2_5_vl_7b/5_search.yaml"]
    assert later["model_name_or_path"] == parsed["qwen2_5_vl_7b/4_align.yaml"]["output_dir"]
    assert later["leave_out"] == ["outputs/qwen2_5_vl_7b/3_verify/solved.json"]
    outputs = [values["output_dir"] for values in parsed.values()]
    assert len(set(outputs)) == len(outputs)
