"""What several test modules share: trainers on tiny models, pairs, rollouts, clips."""

import contextlib
import copy
import json
import re
import resource
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from trl import ModelConfig

from conftest import make_row
from veripo_trl.answers.rewards import REWARDS
from veripo_trl.data.prompts import build_messages, load_template
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.evaluate.questions import RELEASED_TAIL
from veripo_trl.evaluate.run import OutputFiles
from veripo_trl.hub.cards import dataset_card, rollout_counts
from veripo_trl.hub.push import push_folder
from veripo_trl.media.sampling import VideoSettings
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.build import make_encoder, make_policy
from veripo_trl.trainers.dpo import VideoDPOConfig, VideoDPOTrainer
from veripo_trl.trainers.grpo import VideoGRPOConfig, VideoGRPOTrainer
from veripo_trl.trainers.sft import VideoSFTConfig, VideoSFTTrainer

EMBEDDINGS = {"lora_target_modules": ["q_proj", "v_proj", "embed_tokens"]}


def make_tiny_policy(path, **changes):
    """(policy, encoder) as a recipe makes them."""
    model_args = ModelConfig(model_name_or_path=str(path), **{"use_peft": True, "lora_r": 4, **changes})
    sizes = {"min_frames": 2, "max_frames": 6, "min_pixels": 56 * 56, "max_pixels": 112 * 56}
    data_args = DataArguments(prompt_template="tiny", **sizes)
    torch.manual_seed(0)
    model, processor = make_policy(model_args, data_args)
    return model, make_encoder(model, processor, data_args)


@contextlib.contextmanager
def files_of_at_most(size: int):
    """As on a full disk, for every file: the system ends a write there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


CHOSEN = "<think>I see blue then red, first is blue: B.</think><answer>B</answer>"


REJECTED = "<think>I see red, first is red: A.</think><answer>B</answer>"


def pair_dataset(rows, *, finished=True, texts=None):
    """Two pairs a row, of different lengths."""
    texts = texts or [(CHOSEN, REJECTED), (CHOSEN, "<think>I count two, so 2.</think><answer>2</answer>")]
    dataset = rows_to_dataset([row for row in rows for _ in texts])
    dataset = dataset.add_column("chosen", [chosen for _ in rows for chosen, _ in texts])
    dataset = dataset.add_column("rejected", [rejected for _ in rows for _, rejected in texts])
    return dataset.add_column("rejected_finished", [finished] * len(dataset))


def settings(tmp_path, **changes) -> dict:
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "max_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        **changes,
    }


def make_dpo_trainer(model, encoder, dataset, tmp_path, *, ref_model=None, **changes):
    adapter = hasattr(model, "peft_config")
    return VideoDPOTrainer(
        model=model,
        ref_model=None if adapter else ref_model or copy.deepcopy(model),
        args=VideoDPOConfig(**settings(tmp_path, **changes)),
        train_dataset=dataset,
        processing_class=encoder.processor,
        encoder=encoder,
    )


def stored_pair(row, **changes) -> dict:
    template = load_template("tiny")
    pair = {key: value for key, value in row.items() if key not in ("process", "media_root")}
    verdict = {"rollout_id": "r", "consistency": "consistent"}
    return {
        **pair,
        "prompt": json.loads(json.dumps(build_messages(row, template))),
        "chosen": [{"role": "assistant", "content": CHOSEN}],
        "rejected": [{"role": "assistant", "content": REJECTED}],
        "kind": "consistency",
        "chosen_ids": ["a"],
        "rejected_id": "b",
        "rejected_finished": True,
        "verdicts": {"chosen": [verdict], "rejected": verdict},
        "prompt_template": template.hash,
        "policy": "p",
        **changes,
    }


def write_pairs(folder, pairs) -> str:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(pairs), folder / "train-00000.parquet")
    return str(folder)


def video_rows(media_root, count):
    from conftest import write_video

    for place in range(count):
        path = media_root / f"clip{place}.mp4"
        if not path.exists():
            write_video(path, frames=4, height=56, width=56, seed=200 + place)
    return [make_row(f"row{place}", media_root, videos=[f"clip{place}.mp4"]) for place in range(count)]


def make_grpo_trainer(model, encoder, rows, tmp_path, *, make=VideoGRPOTrainer, reward=REWARDS["accuracy"], **changes):
    options = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": len(rows) * 2,
        "num_generations": 2,
        "max_completion_length": 12,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "shuffle_dataset": False,
        "max_steps": 1,
        "learning_rate": 1e-3,
        **changes,
    }
    trainer = make(
        model=model,
        reward_funcs=[reward],
        args=VideoGRPOConfig(**options),
        train_dataset=rows_to_dataset(rows),
        processing_class=encoder.processor,
        encoder=encoder,
    )
    return trainer


class StoppedError(RuntimeError):
    """Ends a training, see `stop_at`."""


def stop_at(trainer, step: int | None) -> None:
    """Have a GRPO trainer end in `step`, when its rollouts are written; None: not at all."""
    store = trainer._store_rollouts

    def store_or_stop(*args):
        store(*args)
        if trainer.state.global_step == step:
            raise StoppedError

    trainer._store_rollouts = store_or_stop


def plain_positions(ids, batch, config) -> torch.Tensor:
    """The trained rule a second time: token by token, as transformers up to 5.2 states it."""
    merge = config.vision_config.spatial_merge_size
    per_second = getattr(config.vision_config, "tokens_per_second", None)
    videos = [] if "video_grid_thw" not in batch else batch["video_grid_thw"].tolist()
    if per_second is None:
        videos = [[1, h, w] for t, h, w in videos for _ in range(t)]
    images = [] if "image_grid_thw" not in batch else batch["image_grid_thw"].tolist()
    seconds = list(batch.get("second_per_grid_ts", []))
    result, highest, place, ids = [], -1, 0, ids.tolist()
    while place < len(ids):
        if ids[place] not in (config.image_token_id, config.video_token_id):
            highest += 1
            result.append((highest,) * 3)
            place += 1
            continue
        is_video = ids[place] == config.video_token_id
        t, h, w = (videos if is_video else images).pop(0)
        step = float(seconds.pop(0)) * per_second if is_video and per_second else 0.0
        start = highest + 1
        block = [
            (start + int(i * step), start + j, start + k)
            for i in range(t)
            for j in range(h // merge)
            for k in range(w // merge)
        ]
        result += block
        highest = max(max(cell) for cell in block)
        place += len(block)
    return torch.tensor(result).T


def plain_log_probs(model, encoder, row, completion_ids) -> torch.Tensor:
    """Log-probabilities of a completion by a plain forward, everything prepared without the encoder."""
    processor = encoder.processor
    text = processor.apply_chat_template(
        build_messages(row, encoder.template), tokenize=False, add_generation_prompt=True
    )
    inputs = {"text": [text.removesuffix("<think>\n")], "return_tensors": "pt"}
    if row["images"]:
        from PIL import Image

        inputs["images"] = [Image.open(f"{row['media_root']}/{name}") for name in row["images"]]
        inputs["images_kwargs"] = {"do_resize": encoder.config.vision_config.patch_size != 14}
        if inputs["images_kwargs"]["do_resize"]:  # 56 and 112 are no multiples of 32
            inputs["images_kwargs"]["size"] = {"shortest_edge": 1024, "longest_edge": encoder.max_image_pixels}
    if row["videos"]:
        clips = [encoder.loader.load(f"{row['media_root']}/{name}", row_id="plain") for name in row["videos"]]
        inputs["videos"] = [clip.frames for clip in clips]
        metadata = [
            {"total_num_frames": c.total_num_frames, "fps": c.fps, "frames_indices": c.frames_indices} for c in clips
        ]
        inputs["videos_kwargs"] = {"video_metadata": metadata, "do_sample_frames": False, "do_resize": False}
    batch = processor(**inputs)
    prompt = batch["input_ids"][0]
    ids = torch.cat([prompt, torch.tensor(completion_ids)])
    positions = plain_positions(ids, batch, encoder.config)[:, None]
    names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    media = {name: batch[name] for name in names if name in batch}
    with torch.no_grad():
        logits = model(input_ids=ids[None], position_ids=positions, **media).logits[0]
    log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(completion_ids)[:, None])[:, 0]


def fixed_completions(tokenizer, count, seed=0) -> list[list[int]]:
    """Text tokens of different lengths, each ended by the end of turn."""
    rng = np.random.default_rng(seed)
    text = [token for token in range(100, 250) if token not in tokenizer.all_special_ids]
    return [[*rng.choice(text, size=int(rng.integers(3, 12))).tolist(), tokenizer.eos_token_id] for _ in range(count)]


def give_completions(trainer, completions, monkeypatch):
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *args, **kwargs: (completions, None))


def rollout(number: int, **changes) -> dict:
    row = {
        "rollout_id": f"run/step0-part0-rank0-{number}", "question_id": f"q{number // 2}", "problem": "Which?",
        "options": ["A. red", "B. blue"], "problem_type": "multiple choice", "solution": "B", "videos": ["clips/1.mp4"],
        "images": [], "data_source": "test", "step": 0, "completion": "<think>x</think><answer>B</answer>",
        "completion_tokens": 9, "finish_reason": "stop" if number else "length", "advantage": 0.5,
        "policy": "outputs/sft", "prompt_template": "abc", "seed": 0, "rewards": {"accuracy_reward": 1.0},
    }  # fmt: skip
    return {**row, **changes}


def make_rollouts(folder: Path, *, files: int = 2, **changes) -> RolloutStore:
    store = RolloutStore(folder / "rollouts")
    for step in range(files):
        rows = [rollout(4 * step + place, step=step, **changes) for place in range(4)]
        store.write(rows, step=step, part=0, rank=0, reward_names=["accuracy_reward"])
    return store


def card_of(store: RolloutStore, repo_id: str, **options) -> str:
    counts, policy = rollout_counts(store.files())
    return dataset_card(
        "rollouts", repo_id=repo_id, counts=counts, policy=policy, data_files="rollouts/*.parquet", **options
    )


def push_rollouts(store: RolloutStore, repo_id: str = "tester/rollouts", **options):
    card = card_of(store, repo_id)
    return push_folder(store.folder, repo_id, repo_type="dataset", card=card, path_in_repo="rollouts", **options)


def make_sft_trainer(model, encoder, rows, tmp_path, *, eval_rows=None, **changes):
    options = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": len(rows),
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        **changes,
    }
    return VideoSFTTrainer(
        model=model,
        args=VideoSFTConfig(**options),
        train_dataset=rows_to_dataset(rows),
        eval_dataset=eval_rows and rows_to_dataset(eval_rows),
        processing_class=encoder.processor,
        encoder=encoder,
    )


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before: dict, model) -> set[str]:
    """Names of the tensors that are not what they were, bit by bit."""
    after = model.state_dict()
    assert set(after) == set(before)
    return {name for name in before if not torch.equal(before[name], after[name])}


def random_pieces(layout, *, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = int(layout.pieces[-1])
    return [torch.randn(tokens, heads, 16, generator=generator).to(dtype).requires_grad_() for heads in (4, 2, 2)]


def masked_attention(query, key, value, layout):
    """One dense attention with the mask written out token by token."""
    owner, group_of = [], []
    for group, length in enumerate(layout.prefixes):
        owner += [("prefix", group)] * length
    for group, lengths in enumerate(layout.segments):
        for place, length in enumerate(lengths):
            owner += [(place, group)] * length
    group_of = [group for _, group in owner]
    seen = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for i, own in enumerate(owner):
        for j in range(i + 1):
            seen[i, j] = own == owner[j] or (owner[j][0] == "prefix" and group_of[i] == group_of[j])
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    return output[0].transpose(0, 1)


def brightness(number):
    return 30 + 4 * number


def add_stream(container, codec, *, width, height, fps, options):
    stream = container.add_stream(codec, rate=fps)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.options = options
    return stream


def picture(number, *, width, height, corner=True):
    """Grey by its number, with a white upper left and a black lower left corner."""
    frame = np.full((height, width, 3), brightness(number), dtype=np.uint8)
    if corner:
        frame[: height // 4, : width // 4] = 250
        frame[-(height // 4) :, : width // 4] = 5
    return av.VideoFrame.from_ndarray(frame, format="rgb24")


X265 = "log-level=0:pools=none:frame-threads=1"


OPTIONS = {"libx264": {"crf": "10"}, "libsvtav1": {"preset": "12", "crf": "20"}, "libx265": {"x265-params": X265}}


def make_clip(
    path,
    *,
    codec="libx264",
    frames=32,
    fps=8,
    width=56,
    height=56,
    options=None,
    flags=None,
    times_s=None,
    matrix=None,
):
    """`times_s` are times of the frames, which come at a rate other than the header's."""
    options, flags = options or OPTIONS.get(codec, {}), flags or {}
    with av.open(str(path), "w", options=flags if isinstance(flags, dict) else {"movflags": flags}) as output:
        stream = add_stream(output, codec, width=width, height=height, fps=fps, options=options)
        stream.set_display_matrix(matrix)
        if times_s is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, time_s in enumerate(times_s if times_s is not None else [None] * frames):
            frame = picture(number, width=width, height=height)
            if time_s is not None:
                frame.pts, frame.time_base = round(time_s * 1000), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


SMALL = VideoSettings(fps=2.0, min_frames=4, max_frames=8, min_pixels=28 * 28, max_pixels=56 * 56)


def numbers(clip):
    """Frame numbers read back from the brightness at the right edge of a `make_clip`, which has no corner marks."""
    height, width = clip.frames.shape[1:3]
    grey = clip.frames[:, height // 3 : 2 * height // 3, 2 * width // 3 :].mean(axis=(1, 2, 3))
    return np.round((grey - 30) / 4).astype(int).tolist()


def released(place, video="long.mp4", **more):
    return {"question_id": f"q{place // 2}", "video_path": video, "question": "Which?", "answer": "B",
            "processed_question": f"Which colour is {'first last second'.split()[place % 3]}?\nA. red\nB. blue"
            + RELEASED_TAIL, **more}  # fmt: skip


def released_file(folder: Path) -> Path:
    """Twelve released rows on three clips; each question id is there twice."""
    rows = [released(place, ("long.mp4", "wide.mp4", "fast.mp4")[place % 3]) for place in range(12)]
    file = folder / "tomato.json"
    file.write_text(json.dumps(rows))
    return file


def evaluation_command(model_paths, media_root, prompts, output, **more) -> list[str]:
    options = {
        "model_path": model_paths["qwen2_5_vl"], "output_path": output, "prompt_path": prompts, "video_dir": media_root,
        "engine": "transformers", "prompt_template": "tiny", "video_max_pixels": 112 * 56, "video_min_pixels": 56 * 56,
        "video_min_frames": 2, "video_max_frames": 24, "max_new_tokens": 8, "batch_size": 2, "num_workers": 2, **more,
    }  # fmt: skip
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def contents(output: Path) -> dict[str, bytes]:
    files = OutputFiles(output)
    return {name: getattr(files, name).read_bytes() for name in ("output", "record")}


def documented(name: str) -> str:
    """The code block behind a marker in what people read."""
    root = Path(__file__).resolve().parent.parent
    found = [
        re.search(rf"<!-- {name} -->\n```python\n(.+?)```", path.read_text(), re.S) for path in root.glob("docs/*.md")
    ]
    return next(match[1] for match in found if match)
