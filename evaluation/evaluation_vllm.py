"""Answer the questions of a benchmark, with VerIPO's command line and output format.

    python evaluation/evaluation_vllm.py --model_path Uni-MoE/VerIPO-7B-v1.0 --output_path outputs/vsi_bench.json \\
        --prompt_path vsi_bench.json --video_dir videos

Reads VerIPO's JSON files as they are, and with --benchmark a benchmark's official ones. May be
broken off and started again with the same command. With --controls it asks the questions five times
and prints a table: thinking, direct, frames shuffled, no video, voted. Exits with 3 if rows could not be answered (they
are listed), with 1 if it broke off: what was answered is kept.
"""

from veripo_trl.start import start

start()  # before torch is imported

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor

from veripo_trl.data.official import find_source
from veripo_trl.data.prompts import without_thinking
from veripo_trl.data.schema import RowError
from veripo_trl.errors import ConfigError, VeripoError, run, settings_checked
from veripo_trl.evaluate.compare import control_files, show_controls
from veripo_trl.evaluate.generate import GREEDY_BELOW, Decoding, TransformersEngine
from veripo_trl.evaluate.perturb import PERTURBATIONS, perturb, write_rollouts
from veripo_trl.evaluate.questions import read_questions
from veripo_trl.evaluate.run import OutputFiles, answer_questions, answered, write_outputs
from veripo_trl.files.journal import Journal
from veripo_trl.files.run_folder import holder, only_process, refuse_own_input
from veripo_trl.files.tables import printable
from veripo_trl.hub.locate import locate
from veripo_trl.hub.push import PATTERNS
from veripo_trl.model.policy import SEEING, find_base, load_policy, merge_adapter
from veripo_trl.model.streaming import CLIP_TOKENS, MAX_MEMORY_TOKENS, StreamEncoder
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.build import encoder_from_config, see_as_trained
from veripo_trl.sources import BENCHMARKS
from veripo_trl.verifier.judges import RulesJudge

RANK = "VERIPO_EVALUATION_RANK"  # set for the processes of a data-parallel run
BATCH_SIZES = {"transformers": 8, "vllm": 64}
SHOWN, VOTES, VOTE_TEMPERATURE = 10, 8, 0.7
DEFAULTS = {**SEEING, "max_pixels": 256 * 28 * 28}  # VerIPO's, where they have one
MODEL_FILES = [*PATTERNS["model"], "*model*.bin", "*.jinja"]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    trained = "default: as the policy was trained, else"
    add = parser.add_argument_group("as VerIPO's script has them").add_argument
    add(
        "--model_path", required=True, help="a model or LoRA adapter: a folder or a name on the Hub"
    )
    add("--output_path", required=True, help="a .json file; what belongs to it lies beside it")
    add(
        "--prompt_path",
        required=True,
        help="the questions: .json (a list), .jsonl, a folder of rollouts; see --benchmark",
    )
    add("--video_dir", default="", help="what video paths start from (default: the file's folder)")
    add("--video_fps", type=float, help=f"{trained} {DEFAULTS['fps']}")
    add("--video_max_pixels", type=int, help=f"per frame; {trained} {DEFAULTS['max_pixels']}")
    add("--video_max_frames", type=int, help=f"{trained} {DEFAULTS['max_frames']}")
    add("--max_new_tokens", type=int, default=4096)
    add("--temperature", type=float, default=1e-6, help="below 1e-5: greedy")
    add("--top_p", type=float, default=1.0)
    add("--repetition_penalty", type=float, default=1.05)
    add("--tensor_parallel_size", type=int, default=1, help="GPUs per engine (vllm)")
    add("--batch_size", type=int, help="rows at once (default: 64 for vllm, 8 for transformers)")
    add = parser.add_argument_group("more").add_argument
    known = f"prompt_path is official data of: {', '.join(BENCHMARKS)}; or module:function"
    add("--benchmark", help=known)
    add("--engine", choices=sorted(BATCH_SIZES), help="default: vllm where it is installed")
    add("--model_revision", help="of model_path on the Hub")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default: float32 on a CPU, else bfloat16",
    )
    add("--attn_implementation", help="of the transformers engine")
    add("--gpu_memory_utilization", type=float, default=0.8, help="of the vllm engine")
    add("--data_parallel_size", type=int, default=1, help="engines beside each other")
    add(
        "--num_workers",
        type=int,
        help="most processes that decode ahead, per engine (default: cores)",
    )
    add("--seed", type=int, default=0, help="of the sampling")
    add("--limit", type=int, help="the first n questions")
    add(
        "--perturb",
        nargs="+",
        choices=PERTURBATIONS,
        help="ask about perturbed videos, each question once for each kind: shuffle the frames, show no_video, …; "
        "without --streaming the answers are written as rollouts too",
    )
    add("--direct", action="store_true", help="answer without thinking: it is closed empty before the model begins")
    add("--votes", type=int, default=0, help="candidates per question; the majority's answer counts (default: none)")
    add("--vote_temperature", type=float, help=f"of --votes, in place of --temperature (default: {VOTE_TEMPERATURE})")
    add(
        "--controls",
        action=argparse.BooleanOptionalAction,
        help="thinking, --direct, --perturb shuffle, --perturb no_video and --votes "
        f"({VOTES}), each into a file of its own beside output_path, then the table of `calculate_score.py --controls`",
    )
    add("--prompt_template", help=f"default, veripo, video_r1, …, or a YAML file of yours; {trained} default")
    add("--video_min_pixels", type=int, help=f"per frame; {trained} {DEFAULTS['min_pixels']}")
    add("--video_min_frames", type=int, help=f"{trained} {DEFAULTS['min_frames']}")
    add(
        "--max_image_pixels",
        type=int,
        help=f"of an image; {trained} {DEFAULTS['max_image_pixels']}",
    )
    add("--streaming", action="store_true", help="a video clip by clip, the question with the last one")
    add("--clip_tokens", type=int, help=f"visual tokens of a clip (default: {CLIP_TOKENS})")
    add(
        "--max_memory_tokens",
        type=int,
        help=f"of the thoughts that are kept; 0: none (default: {MAX_MEMORY_TOKENS})",
    )
    add("--decode_timeout_s", type=float, default=60.0)
    add("--frame_cache", help="folder for sampled frames, shared by runs")
    args = parser.parse_args(argv)
    if not args.streaming and (args.clip_tokens, args.max_memory_tokens) != (None, None):
        parser.error("--clip_tokens and --max_memory_tokens are of --streaming, which is not given")
    args.clip_tokens = CLIP_TOKENS if args.clip_tokens is None else args.clip_tokens
    if args.max_memory_tokens is None:
        args.max_memory_tokens = MAX_MEMORY_TOKENS
    if args.streaming and (args.direct or args.votes or args.controls):
        parser.error("--direct, --votes and --controls: not with --streaming, whose control is --max_memory_tokens 0")
    if args.controls and (args.direct or args.perturb):
        parser.error("--controls asks directly and perturbs by itself: leave out --direct and --perturb")
    if args.votes and args.controls is None and args.temperature >= GREEDY_BELOW:
        parser.error("--votes samples at --vote_temperature: give that in place of --temperature")
    if args.vote_temperature is None:
        args.vote_temperature = VOTE_TEMPERATURE
    elif not args.votes and args.controls is None:  # each run of --controls is given both, and --no-controls
        parser.error("--vote_temperature is of --votes and --controls, which are not given")
    if args.votes and not args.controls:
        args.temperature = args.vote_temperature
    votes = args.votes or (VOTES if args.controls else 0)
    if votes and (votes < 2 or args.vote_temperature < GREEDY_BELOW):
        parser.error(f"--votes: expected 2 or more, at a --vote_temperature of {GREEDY_BELOW} or more")
    if args.perturb and len(set(args.perturb)) < len(args.perturb):
        parser.error(f"--perturb: expected each kind once, came {' '.join(args.perturb)}")
    for name in (
        "batch_size",
        "data_parallel_size",
        "tensor_parallel_size",
        "limit",
        "max_image_pixels",
        "clip_tokens",
    ):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}: expected 1 or more, came {getattr(args, name)}")
    if min(args.num_workers or 0, args.max_memory_tokens) < 0 or not args.decode_timeout_s > 0:
        parser.error(
            "expected --num_workers 0 or more, --max_memory_tokens 0 or more and --decode_timeout_s above 0"
        )
    if not 0 < args.gpu_memory_utilization <= 1:
        parser.error("expected --gpu_memory_utilization above 0 and at most 1")
    try:
        args.decoding = Decoding(
            args.max_new_tokens, args.temperature, args.top_p, args.repetition_penalty, args.seed
        )
    except ValueError as error:
        parser.error(str(error))
    args.engine = args.engine or ("vllm" if importlib.util.find_spec("vllm") else "transformers")
    if args.engine == "vllm" and not importlib.util.find_spec("vllm"):
        parser.error(
            "--engine vllm: vLLM is not installed; pip install 'veripo_trl[vllm]', or --engine transformers"
        )
    if args.engine == "transformers" and args.tensor_parallel_size > 1:
        parser.error(
            "--tensor_parallel_size is for vllm; with transformers use --data_parallel_size"
        )
    args.batch_size = args.batch_size or BATCH_SIZES[args.engine]
    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if args.num_workers is None:
        args.num_workers = max(1, (os.cpu_count() or 1) // args.data_parallel_size)
    return args


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a model on the Hub is at; None for a folder, be it there or not."""
    origin = locate(name, "model", revision)
    return origin and origin["revision"]


def fingerprint(name: str) -> str:
    """A model folder's files by name, size and time of change: a model trained on is another one.

    Of its own files alone, since the output may lie beside them.
    """
    files = {file for pattern in MODEL_FILES for file in Path(name).glob(pattern)}
    listing = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return hashlib.sha256(repr(listing).encode()).hexdigest()[:16]


def make_encoder(args):
    """The encoder of the model's prompts, made without its weights: how the options say, else as the policy was trained
    to see, else by default."""
    video = DataArguments(
        prompt_template=args.prompt_template,
        fps=args.video_fps,
        min_frames=args.video_min_frames,
        max_frames=args.video_max_frames,
        min_pixels=args.video_min_pixels,
        max_pixels=args.video_max_pixels,
        max_image_pixels=args.max_image_pixels,
        decode_timeout_s=args.decode_timeout_s,
        frame_cache=args.frame_cache,
    )
    video = see_as_trained(video, args.model_path, args.model_revision, defaults=DEFAULTS)
    if args.video_min_pixels is None:  # VerIPO's command has none: its --video_max_pixels may be small
        video.min_pixels = min(video.min_pixels, video.max_pixels)
    _, base, revision, _ = find_base(args.model_path, args.model_revision)
    config = AutoConfig.from_pretrained(base, revision=revision)
    processor = AutoProcessor.from_pretrained(base, revision=revision, padding_side="left")
    return encoder_from_config(config, processor, video, pixel_dtype=getattr(torch, args.dtype))


def load_weights(args):
    model, _ = load_policy(
        args.model_path,
        revision=args.model_revision,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        trainable=False,
    )
    return model.eval()


def settings_of(args, questions: list[dict], encoder) -> dict:
    """What the answers depend on: first line of the journal, and part of the record. Weights are known by their commit
    on the Hub, or by a fingerprint of their folder."""
    adapter, base, revision, _ = find_base(args.model_path, args.model_revision)
    video = {
        name: value
        for name, value in asdict(encoder.loader.settings).items()
        if name != "size_factor"
    }
    streaming = {"clip_tokens": args.clip_tokens, "max_memory_tokens": args.max_memory_tokens}
    keys = json.dumps([question["key"] for question in questions])
    libraries = ("torch", "transformers", *(["vllm"] if args.engine == "vllm" else []))
    return {
        "model": args.model_path,
        "model_revision": args.model_revision or fingerprint(args.model_path),
        **(
            {"base": base, "base_revision": commit_of(base, revision) or fingerprint(base)}
            if adapter
            else {}
        ),
        "engine": args.engine,
        **{f"{name}_version": str(importlib.import_module(name).__version__) for name in libraries},
        "attn_implementation": args.attn_implementation,
        "dtype": args.dtype,
        "tensor_parallel_size": args.tensor_parallel_size,
        "batch_size": args.batch_size,
        "decoding": asdict(args.decoding),
        "video": video,
        "max_image_pixels": encoder.max_image_pixels,
        "prompt_template": encoder.template.hash,
        **({"streaming": streaming} if args.streaming else {}),
        **({"perturb": args.perturb} if args.perturb else {}),
        **({"direct": True} if args.direct else {}),
        **({"votes": args.votes} if args.votes else {}),
        "rows": len(questions),
        "rows_sha256": hashlib.sha256(keys.encode()).hexdigest(),
    }


def make_vllm_engine(args, encoder, questions: list[dict], folder: Path):
    """vLLM with the model's weights; with a merged copy in `folder` if an adapter is part of them."""
    from veripo_trl.vllm.evaluation import VLLMEngine

    weights = {"model_path": args.model_path, "revision": args.model_revision}
    if find_base(args.model_path, args.model_revision)[0]:
        merge_adapter(args.model_path, folder, revision=args.model_revision, dtype=args.dtype)
        weights = {"model_path": str(folder)}
    begun = len(without_thinking(encoder.template)) if args.direct else 0  # characters: as many tokens or more
    return VLLMEngine(
        encoder=encoder,
        decoding=args.decoding,
        dtype=getattr(torch, args.dtype),
        rows=[question["row"] for question in questions],
        more_tokens=args.max_memory_tokens if args.streaming else begun,
        tensor_parallel_size=args.tensor_parallel_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        **weights,
    )


def run_engines(args, argv: list[str], journal: Journal, bar) -> None:
    """A process per engine, each with its share of the GPUs; what they write moves the bar."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = (
        given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    )
    count, size, children = args.data_parallel_size, args.tensor_parallel_size, []
    if devices and len(devices) < count * size:
        raise ConfigError(f"{count * size} GPUs are asked for, {len(devices)} are there.")
    for rank in range(count):
        own = {"CUDA_VISIBLE_DEVICES": ",".join(devices[rank * size :][:size])} if devices else {}
        environment = {**os.environ, RANK: str(rank), **own}
        children.append(subprocess.Popen([sys.executable, __file__, *argv], env=environment))
    try:
        while any(child.poll() is None for child in children) and not any(
            child.returncode for child in children
        ):
            time.sleep(0.5)
            journal.read()
            bar.update(len(journal.lines) - bar.n)
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()
    journal.read()
    if failed := [rank for rank, child in enumerate(children) if child.returncode]:
        raise VeripoError(
            f"Engine {failed[0]} ended with an error, see above. What is answered is kept."
        )


def interrupt(number: int, frame) -> None:
    """A signal as Ctrl-C, so that who starts processes ends them. SIGTERM only once: a scheduler or a terminal signals
    them as well."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args, rank = parse_arguments(argv), int(os.environ[RANK]) if RANK in os.environ else None
    files = OutputFiles(args.output_path)
    for own in (files.output, files.record, files.journal):
        refuse_own_input(own, [args.prompt_path])
    if args.controls:
        return evaluate_controls(args, argv)
    # an engine of its own name: one that outlives a killed run keeps the next one's from starting
    name = (
        files.output
        if rank is None
        else files.output.with_name(f"{files.output.name}.engine{rank}")
    )
    for lock in [] if rank is not None else name.parent.glob(f".{name.name}.engine*.lock"):
        if other := holder(lock.with_name(lock.name[1:].removesuffix(".lock"))):
            raise ConfigError(
                f"{name}: process {other} of a run that was killed still ends its batch. Wait until it ends."
            )
    with only_process(name):
        return evaluate(args, argv, files, rank)


def evaluate_controls(args, argv: list[str]) -> int:
    """Each control by a process of its own, whose engine so has the whole device; then the table."""
    failed, where = 0, {"video_dir": args.video_dir, "limit": args.limit, "benchmark": args.benchmark}
    if not any(question["row"]["videos"] for question in read_questions(args.prompt_path, **where)):
        raise RowError(
            f"--controls: expected questions about videos, to shuffle their frames; none of {args.prompt_path} has one. "
            f"Ask with --direct and with --votes by themselves."
        )
    for name, (path, options) in control_files(args.output_path).items():
        votes = (args.votes or VOTES) if name == "voted" else 0
        own = ["--no-controls", "--output_path", str(path), "--votes", str(votes)]
        print(f"{name}: {path}", flush=True)
        process = subprocess.Popen([sys.executable, __file__, *argv, *own, *options])
        try:
            code = process.wait()
        finally:
            process.terminate()  # nothing, where it has ended
            process.wait()
        if code not in (0, 3):
            raise VeripoError(f"{name} ended with an error, see above. The same command goes on from there.")
        failed = failed or code
    show_controls(Path(args.output_path), RulesJudge())
    return failed


def evaluate(args, argv: list[str], files: OutputFiles, rank: int | None) -> int:
    """Answer what is left, as one engine of a run or as the whole of it."""
    questions = read_questions(
        args.prompt_path, video_dir=args.video_dir, limit=args.limit, benchmark=args.benchmark
    )
    root = Path(questions[0]["row"]["media_root"])
    videos = {path for question in questions for path in question["row"]["videos"]}
    if videos and not any((root / path).exists() for path in videos):
        parts = any("cut" in question["raw"] for question in questions)
        cut = " Parts of videos are made beforehand, by evaluation/cut_videos.py." if parts else ""
        of = getattr(find_source(args.benchmark), "VIDEOS", None) if args.benchmark else None
        named = f" There it needs {of}." if of else ""
        raise RowError(
            f"None of the {len(videos)} videos is in {root}, such as {min(videos)!r}. Correct --video_dir.{cut}{named}"
        )
    if args.perturb:
        if rank is None and files.rollouts.exists() and not files.journal.exists():
            raise ConfigError(
                f"--perturb writes rollouts into {files.rollouts}, which is there and not this evaluation's. Give "
                f"another --output_path."
            )
        questions = perturb(questions, args.perturb, seed=args.seed)
    if rank is None:
        shutil.rmtree(files.merged, ignore_errors=True)  # of a run that was killed
    several = rank is None and args.data_parallel_size > 1
    with settings_checked():
        args.model_revision = commit_of(
            args.model_path, args.model_revision
        )  # all that is read is of one state
        encoder = make_encoder(args)
        for question in questions if args.direct else []:
            question["row"] = {**question["row"], "begun": without_thinking(encoder.template)}
        model = load_weights(args) if args.engine == "transformers" and not several else None
        settings = settings_of(args, questions, encoder)
    journal = Journal(files.journal, settings, repair=rank is None)
    done = answered(journal)
    journal.lines = {
        key: line for key, line in journal.lines.items() if key in done
    }  # errors are tried again
    if done and rank is None:
        print(
            f"{files.journal}: going on, {len(done)} of {len(questions)} rows are answered already",
            flush=True,
        )
    bar = tqdm(
        total=len(questions),
        initial=len(done),
        desc=files.output.stem,
        unit="row",
        disable=rank is not None,
    )
    try:
        if len(done) < len(questions) and several:
            run_engines(args, argv, journal, bar)
        elif len(done) < len(questions):
            if model is None:
                engine = make_vllm_engine(args, encoder, questions, files.merged / str(rank or 0))
            else:
                engine = TransformersEngine(
                    model.to("cuda" if torch.cuda.is_available() else "cpu"), encoder, args.decoding
                )
            answer_questions(
                questions,
                engine,
                StreamEncoder(encoder, args.clip_tokens, args.max_memory_tokens) if args.streaming else encoder,
                journal,
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                samples=args.votes or 1,
                rank=rank or 0,
                processes=args.data_parallel_size,
                progress=bar,
            )
    finally:
        bar.close()
        if rank is None:
            shutil.rmtree(files.merged, ignore_errors=True)
    if rank is not None:
        return 0
    errors = write_outputs(files, questions, journal, settings)
    print(f"{files.output}: {len(questions)} rows; {files.record} says what each was made with")
    if args.perturb and not args.streaming:  # a pair's prompt shows the whole video at once
        written = write_rollouts(files.rollouts, questions, journal, policy=args.model_path, seed=args.seed)
        print(f"{files.rollouts}: {written} rollouts on perturbed videos, for verify_rollouts.py --perturbed")
    if not errors:
        return 0
    print(
        f"{len(errors)} rows could not be answered and count as wrong ({files.record} has them all):"
    )
    for error in errors[:SHOWN]:
        print(f"  row {error['position']}, {printable(error['question_id'])}: {error['error']}")
    print("Put their files right and start the same command again: only these rows are run.")
    return 3


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a script
            signal.signal(number, interrupt)
    sys.exit(run(main))
