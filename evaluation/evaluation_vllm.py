"""Answer the questions of a benchmark, with VerIPO's command line and output format.

    python evaluation/evaluation_vllm.py --model_path Uni-MoE/VerIPO-7B-v1.0 --output_path outputs/vsi_bench.json \\
        --prompt_path vsi_bench.json --video_dir videos

Reads VerIPO's JSON files as they are, and files that benchmarks/convert.py makes. May be broken off and started again
with the same command. Exits with 3 if rows could not be answered (they are listed), with 2 if nothing was run.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from veripo_trl import stages
from veripo_trl.evaluate import Decoding, TransformersEngine
from veripo_trl.journal import Journal, JournalError, OutputFiles, answer_questions, lock_output, write_outputs
from veripo_trl.policy import adapter_config, load_policy
from veripo_trl.prompts import PromptError
from veripo_trl.questions import read_questions
from veripo_trl.rows import RowError

RANK = "VERIPO_EVALUATION_RANK"  # set for the processes of a data-parallel run
BATCH_SIZES = {"transformers": 8, "vllm": 64}
SHOWN = 10


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    released = parser.add_argument_group("as VerIPO's script has them")
    released.add_argument("--model_path", required=True, help="a folder, or a model's name on the Hub")
    released.add_argument("--output_path", required=True, help="a .json file; what belongs to it is written beside it")
    released.add_argument("--prompt_path", required=True, help="the questions: .json (a list) or .jsonl")
    released.add_argument("--video_dir", default="", help="what video paths start from (default: the file's folder)")
    released.add_argument("--video_fps", type=float, default=2.0)
    released.add_argument("--video_max_pixels", type=int, default=256 * 28 * 28, help="per frame")
    released.add_argument("--video_max_frames", type=int, default=128)
    released.add_argument("--max_new_tokens", type=int, default=4096)
    released.add_argument("--temperature", type=float, default=1e-6, help="below 1e-5: greedy")
    released.add_argument("--top_p", type=float, default=1.0)
    released.add_argument("--repetition_penalty", type=float, default=1.05)
    released.add_argument("--tensor_parallel_size", type=int, default=1, help="GPUs per engine (vllm)")
    released.add_argument("--batch_size", type=int, help="rows at once (default: 64 for vllm, 8 for transformers)")
    ours = parser.add_argument_group("more")
    ours.add_argument("--engine", choices=sorted(BATCH_SIZES), help="default: vllm where it is installed")
    ours.add_argument("--adapter", help="a LoRA adapter on top of model_path")
    ours.add_argument("--model_revision", help="of model_path on the Hub")
    ours.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, float32 on a CPU")
    ours.add_argument("--attn_implementation", help="of the transformers engine")
    ours.add_argument("--gpu_memory_utilization", type=float, default=0.8, help="of the vllm engine")
    ours.add_argument("--data_parallel_size", type=int, default=1, help="engines beside each other")
    ours.add_argument("--num_workers", type=int, help="processes that decode ahead, per engine (default: the cores)")
    ours.add_argument("--seed", type=int, default=0, help="of the sampling")
    ours.add_argument("--limit", type=int, help="the first n questions")
    ours.add_argument("--prompt_template", default="default", help="default, tiny, or a YAML file with wording of yours")
    ours.add_argument("--video_min_pixels", type=int, default=16 * 28 * 28, help="per frame")
    ours.add_argument("--video_min_frames", type=int, default=4)
    ours.add_argument("--max_prompt_tokens", type=int, help="a longer prompt is an error of its row")
    ours.add_argument("--decode_timeout_s", type=float, default=60.0)
    ours.add_argument("--frame_cache", help="folder for sampled frames, shared by runs")
    args = parser.parse_args(argv)
    for name in ("batch_size", "data_parallel_size", "tensor_parallel_size", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}: expected 1 or more, came {getattr(args, name)}")
    args.engine = args.engine or ("vllm" if importlib.util.find_spec("vllm") else "transformers")
    if args.engine == "vllm" and not importlib.util.find_spec("vllm"):
        parser.error("--engine vllm: vLLM is not installed; pip install 'veripo_trl[vllm]', or --engine transformers")
    if args.engine == "transformers" and args.tensor_parallel_size > 1:
        parser.error("--tensor_parallel_size is for vllm; with transformers use --data_parallel_size")
    args.batch_size = args.batch_size or BATCH_SIZES[args.engine]
    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if args.num_workers is None:
        args.num_workers = max(1, (os.cpu_count() or 1) // args.data_parallel_size)
    return args


def fingerprint(name: str) -> str | None:
    """A folder's weights and settings by name, size and time of change: a model trained on is another one."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    files = [file for pattern in ("*.safetensors", "*.bin", "*.json") for file in folder.glob(pattern)]
    listing = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return hashlib.sha256(repr(listing).encode()).hexdigest()[:16]


def settings_of(args, questions: list[dict], encoder, revision: str | None) -> dict:
    """What the answers depend on: first line of the journal, and part of the record."""
    video = {name: value for name, value in asdict(encoder.loader.settings).items() if name != "size_factor"}
    keys = json.dumps([question["key"] for question in questions])
    return {
        "model": args.model_path,
        "model_revision": revision or fingerprint(args.model_path),
        "adapter": args.adapter,
        "adapter_revision": fingerprint(args.adapter) if args.adapter else None,
        "engine": args.engine,
        "dtype": args.dtype,
        "tensor_parallel_size": args.tensor_parallel_size,
        "batch_size": args.batch_size,
        "decoding": asdict(decoding_of(args)),
        "video": video,
        "max_prompt_tokens": args.max_prompt_tokens,
        "prompt_template": encoder.template.hash,
        "rows": len(questions),
        "rows_sha256": hashlib.sha256(keys.encode()).hexdigest(),
    }


def decoding_of(args) -> Decoding:
    names = ("max_new_tokens", "temperature", "top_p", "repetition_penalty", "seed")
    return Decoding(**{name: getattr(args, name) for name in names})


def data_arguments(args) -> stages.DataArguments:
    return stages.DataArguments(
        prompt_template=args.prompt_template,
        fps=args.video_fps,
        min_frames=args.video_min_frames,
        max_frames=args.video_max_frames,
        min_pixels=min(args.video_min_pixels, args.video_max_pixels),
        max_pixels=args.video_max_pixels,
        max_prompt_tokens=args.max_prompt_tokens,
        decode_timeout_s=args.decode_timeout_s,
        frame_cache=args.frame_cache,
    )


def load_model(args, *, weights: bool):
    """(model or config, processor, revision on the Hub); the weights only where they are needed here."""
    from transformers import AutoConfig, AutoProcessor

    if weights:
        model, processor = load_policy(
            args.model_path,
            revision=args.model_revision,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
        )
        if args.adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, args.adapter)
        return model.eval(), processor, getattr(model.config, "_commit_hash", None)
    name, revision = args.model_path, args.model_revision
    if (adapter := adapter_config(name, revision)) is not None:
        name, revision = adapter["base_model_name_or_path"], adapter.get("revision")
    config = AutoConfig.from_pretrained(name, revision=revision)
    processor = AutoProcessor.from_pretrained(name, revision=revision, padding_side="left")
    return config, processor, getattr(config, "_commit_hash", None)


def merged_folder(args, folder: str) -> str:
    """Where vLLM finds the weights: model_path itself, or a merged copy if an adapter is part of them."""
    if args.adapter is None and adapter_config(args.model_path, args.model_revision) is None:
        return args.model_path
    model, processor, _ = load_model(args, weights=True)
    model.merge_and_unload().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_engine(args, model, encoder, questions, folder: str):
    if args.engine == "transformers":
        if torch.cuda.is_available():
            model.to("cuda")
        return TransformersEngine(model, encoder, decoding_of(args))
    from veripo_trl.vllm_engine import VLLMEngine

    return VLLMEngine(
        merged_folder(args, folder),
        encoder,
        decoding_of(args),
        dtype=getattr(torch, args.dtype),
        rows=[question["row"] for question in questions],
        tensor_parallel_size=args.tensor_parallel_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        **({} if args.model_revision is None or args.adapter else {"revision": args.model_revision}),
    )


def progress_bar(questions: list[dict], journal: Journal, files: OutputFiles, *, hidden: bool = False):
    return tqdm(
        total=len(questions), initial=len(journal.answers), desc=files.output.stem, unit="row", disable=hidden
    )


def run_here(args, model, encoder, questions, journal: Journal, files: OutputFiles, *, rank: int | None = None) -> None:
    """Answer what is left, or this engine's share of it, in this process."""
    with tempfile.TemporaryDirectory(dir=files.output.parent) as folder:
        engine = make_engine(args, model, encoder, questions, folder)
        started = time.perf_counter()
        with progress_bar(questions, journal, files, hidden=rank is not None) as bar:
            waiting = answer_questions(
                questions,
                engine,
                encoder,
                journal,
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                rank=rank or 0,
                processes=args.data_parallel_size,
                progress=bar,
            )
    seconds = time.perf_counter() - started
    run = {"engine": rank, "seconds": seconds, "start_s": waiting.start_s, "idle_s": waiting.idle_s}
    journal.append([{"run": run}])
    print(
        f"{'' if rank is None else f'engine {rank}: '}{seconds:.1f} s; first batch ready after {waiting.start_s:.1f} s, "
        f"later the engine waited {waiting.idle_s:.1f} s for prompts ({100 * waiting.idle_s / seconds:.1f}%)",
        flush=True,
    )


def run_engines(args, argv: list[str], questions, journal: Journal, files: OutputFiles) -> None:
    """A process per engine, each with its share of the GPUs; what they write moves the bar."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    needed = args.data_parallel_size * args.tensor_parallel_size
    if devices and len(devices) < needed:
        raise JournalError(f"{needed} GPUs are asked for, {len(devices)} are there.")
    children = []
    for rank in range(args.data_parallel_size):
        own = devices[rank * args.tensor_parallel_size : (rank + 1) * args.tensor_parallel_size]
        environment = {**os.environ, RANK: str(rank), **({"CUDA_VISIBLE_DEVICES": ",".join(own)} if devices else {})}
        children.append(subprocess.Popen([sys.executable, __file__, *argv], env=environment))
    try:
        with progress_bar(questions, journal, files) as bar:
            while any(child.poll() is None for child in children):
                if any(child.returncode for child in children):
                    break
                time.sleep(0.5)
                journal.read()
                bar.update(len({*journal.answers, *journal.errors}) - bar.n)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
            child.wait()
    journal.read()
    if failed := [rank for rank, child in enumerate(children) if child.returncode]:
        raise JournalError(f"Engine {failed[0]} ended with an error, see above. What is answered is kept.")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    files = OutputFiles(args.output_path)
    rank = int(os.environ[RANK]) if RANK in os.environ else None
    lock = lock_output(files, rank=rank)
    questions = read_questions(args.prompt_path, video_dir=args.video_dir, limit=args.limit)
    root = Path(questions[0]["row"]["media_root"])
    videos = {path for question in questions for path in question["row"]["videos"]}
    if videos and not any((root / path).exists() for path in videos):
        raise RowError(f"None of the {len(videos)} videos is in {root}, such as {min(videos)!r}. Correct --video_dir.")
    weights = args.engine == "transformers" and (args.data_parallel_size == 1 or rank is not None)
    model, processor, revision = load_model(args, weights=weights)
    config = model.config if weights else model
    encoder = stages.encoder_from_config(
        config, processor, data_arguments(args), pixel_dtype=getattr(torch, args.dtype)
    )
    settings = settings_of(args, questions, encoder, revision)
    journal = Journal(files.journal, settings, repair=rank is None)
    if rank is not None:
        run_here(args, model, encoder, questions, journal, files, rank=rank)
        return 0
    journal.errors.clear()  # they are tried again
    answered = len(journal.answers)
    if answered:
        print(f"{files.journal}: going on, {answered} of {len(questions)} rows are answered already", flush=True)
    if answered < len(questions) and args.data_parallel_size > 1:
        run_engines(args, argv, questions, journal, files)
    elif answered < len(questions):
        run_here(args, model, encoder, questions, journal, files)
    errors = write_outputs(files, questions, journal, settings)
    lock.close()
    return report(files, questions, errors)


def report(files: OutputFiles, questions: list[dict], errors: list[dict]) -> int:
    print(f"{files.output}: {len(questions)} rows; {files.record} says what each was made with")
    if not errors:
        return 0
    print(f"{len(errors)} rows could not be answered and count as wrong ({files.errors} has them all):")
    for error in errors[:SHOWN]:
        print(f"  row {error['position']}, {error['question_id']}: {error['error']}")
    print("Put their files right and start the same command again: only these rows are run.")
    return 3


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (JournalError, RowError, PromptError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
