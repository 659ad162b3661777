"""What the verifier costs: rules over many rollouts, and how much of a judge server's throughput is used.

    python speed/bench_verifier.py

- rules: choice and numerical rollouts are read from Parquet files, checked (accuracy, format, repetition, length in
  tokens) and judged by rules, in a process of its own that may use one core, with a progress bar.
- server: rollouts are judged by a scripted server in another process that answers 50 ms after a request has arrived.
  64 requests in flight allow 64 / 0.050 = 1,280 per second. Timed from the first rollout to the last verdict, empty cache
  included: `judge` is the wire with prompts, parsing, comparing and the cache; `everything` is `verify_stream` with the
  checks as well. The scripted server takes a part of the machine, which a real one would not.

The numbers are medians over `--repeats` runs. The verdicts of each run are compared with the ones that the rollouts were
made for; a difference ends the program.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LETTERS = "ABCD"
THINGS = ["chair", "table", "window", "lamp", "door", "cup", "book", "plant", "box", "phone"]
DOINGS = ["stands by", "moves to", "is left of", "is behind", "passes", "hides", "touches", "falls off"]

# What a GRPO run's rollouts have beside what is judged: the reader checks that it is there.
REST = {"problem": "What happens first in the video?", "videos": ["clips/1.mp4"], "images": [], "data_source": "bench",
        "step": 0, "finish_reason": "stop", "policy": "policy", "prompt_template": "0123456789abcdef"}  # fmt: skip


def make_rollouts(count: int, *, seed: int = 0):
    """Yield rollouts with thoughts of 80 to 320 words, and the verdict that each is made for as `expected`."""
    rng = random.Random(seed)
    for number in range(count):
        sentences = [
            f"At {rng.randrange(60)} seconds the {rng.choice(THINGS)} {rng.choice(DOINGS)} the {rng.choice(THINGS)}, and "
            f"the camera turns {rng.choice(('left', 'right'))}."
            for _ in range(rng.randint(5, 20))
        ]
        consistent = rng.random() < 0.8
        if number % 2:
            things = rng.sample(THINGS, 4)
            options = [f"{letter}. the {thing}" for letter, thing in zip(LETTERS, things)]
            concluded, other, truth = rng.sample(LETTERS, 2) + [rng.choice(LETTERS)]
            kind = "multiple choice"
        else:
            options, kind = [], "numerical"
            # None is another one in another unit, of which the rules would say "unknown".
            concluded, other, truth = (str(value) for value in rng.sample(range(40, 80), 2) + [rng.randrange(40, 80)])
        answer = concluded if consistent else other
        sentences.append(f"So the answer is {concluded}.")
        yield {
            "rollout_id": f"r{number}",
            "question_id": f"q{number // 8}",
            "completion": f"<think>{' '.join(sentences)}</think>\n<answer>{answer}</answer>",
            "problem_type": kind,
            "solution": truth,
            "options": options,
            "expected": "consistent" if consistent else "inconsistent",
        }


def make_tokenizer():
    """A byte-level BPE tokenizer with Qwen's splitting, trained on such thoughts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((rollout["completion"] for rollout in make_rollouts(2000)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def check(verdicts, expected: list[str]) -> dict:
    """Compare, and count."""
    found = [verdict["consistency"] for verdict in verdicts]
    if found != expected:
        wrong = [place for place, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]]
        raise SystemExit(f"{len(wrong)} verdicts differ from the expected ones, the first at {wrong[:1]}; "
                         f"{len(found)} of {len(expected)} came.")  # fmt: skip
    return {name: found.count(name) for name in ("consistent", "inconsistent", "unknown")}


# ------------------------------------------------------------------------------------------------------------ rules


def write_store(folder: Path, count: int, *, rows_per_file: int = 5000) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rollouts = []
    for number, rollout in enumerate(make_rollouts(count)):
        rollouts.append({**rollout, **REST})
        if len(rollouts) == rows_per_file or number + 1 == count:
            pq.write_table(pa.Table.from_pylist(rollouts), folder / f"rollouts-{number // rows_per_file:05d}.parquet")
            rollouts = []


def run_rules(folder: str, tokenizer_folder: str) -> None:
    """In a process of its own: prints seconds, peak memory and counts as JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tqdm import tqdm
    from transformers import PreTrainedTokenizerFast

    from veripo_trl.verifier.files import read_rollouts, rows_of
    from veripo_trl.verifier.judges import RulesJudge
    from veripo_trl.verifier.verify import verify_stream

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    files = sorted(Path(folder).glob("*.parquet"))
    total = sum(pq.ParquetFile(path).metadata.num_rows for path in files)
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    counts, tokens, start, cpu_start = {}, 0, time.perf_counter(), time.process_time()
    verdicts = verify_stream(rows_of(read_rollouts(files)), judge=RulesJudge(), tokenizer=tokenizer)
    truths = (truth for path in files for truth in pq.read_table(path, columns=["expected"])[0].to_pylist())
    progress = tqdm(verdicts, total=total, desc="verify", unit="rollout")
    for verdict, expected in zip(progress, truths, strict=True):
        if verdict["consistency"] != expected:
            raise SystemExit(f"{verdict} was expected to be {expected}")
        counts[verdict["consistency"]] = counts.get(verdict["consistency"], 0) + 1
        tokens += verdict["think_tokens"]
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    numbers = {"seconds": seconds, "cpu_seconds": cpu_s, "peak_mib": peak_mib, "before_mib": before_mib}
    print(json.dumps({**numbers, "think_tokens": tokens / total, **counts}))


def bench_rules(count: int, repeats: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        store, tokenizer = Path(folder) / "store", Path(folder) / "tokenizer"
        store.mkdir()
        write_store(store, count)
        make_tokenizer().save_pretrained(tokenizer)
        command = [sys.executable, __file__, "rules", str(store), str(tokenizer)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        runs = [
            json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
            for _ in range(repeats)
        ]
    return {"rollouts": count, "runs": runs} | {name: statistics.median(run[name] for run in runs) for name in runs[0]}


# ----------------------------------------------------------------------------------------------------------- server


async def judge_all(judge, cache, rollouts: list[dict]) -> list[dict]:
    from veripo_trl.answers.score import split_completion
    from veripo_trl.verifier.judge_prompts import judged_text

    slots = asyncio.Semaphore(judge.concurrency)

    async def judge_one(rollout: dict) -> dict:
        async with slots:
            think, answer = split_completion(rollout["completion"])
            item = {"think": think, "answer": answer, **rollout}
            key = cache.key(judge.name, judge.prompt_version, judged_text(item))
            if cache.get(key) is not None:
                raise SystemExit("expected an empty cache")
            verdict = await judge(item)
            cache.put(key, verdict["reply"], judge=judge.name, prompt_version=judge.prompt_version)
            return verdict

    verdicts = await asyncio.gather(*map(judge_one, rollouts))
    await judge.close()
    return verdicts


def run_server(kind: str, count: int, *, delay_s: float, concurrency: int, tokenizer) -> dict:
    from veripo_trl.verifier.judge_prompts import load_judge_prompt
    from veripo_trl.verifier.reply_cache import VerdictCache
    from veripo_trl.verifier.server_judge import ServerJudge
    from veripo_trl.verifier.verify import verify_stream

    rollouts = list(make_rollouts(count))
    expected = [rollout["expected"] for rollout in rollouts]
    command = [sys.executable, str(ROOT / "tests" / "judge_server.py"), "--delay_s", str(delay_s)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        prompt = load_judge_prompt(ROOT / "verifier_prompts" / "consistency.yaml")
        judge = ServerJudge(server.stdout.readline().strip(), "scripted", prompt, concurrency=concurrency)
        with tempfile.TemporaryDirectory() as folder, VerdictCache(Path(folder) / "verdicts.sqlite") as cache:
            start, cpu_start = time.perf_counter(), time.process_time()
            if kind == "everything":
                verdicts = list(verify_stream(rollouts, judge=judge, tokenizer=tokenizer, cache=cache))
            else:
                verdicts = asyncio.run(judge_all(judge, cache, rollouts))
            seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
            counts = check(verdicts, expected)
            if (judge.requests, judge.retries, len(cache)) != (count, 0, count):
                raise SystemExit(f"expected {count} requests, each answered and cached once: {judge.summary()}")
    finally:
        server.terminate()
        server.wait()
    per_second, allowed = count / seconds, concurrency / delay_s
    return {"seconds": seconds, "per_second": per_second, "share": per_second / allowed,
            "client_cpu_us": 1e6 * cpu_s / count, **counts}  # fmt: skip


def bench_server(kind: str, count: int, repeats: int, *, delay_s: float, concurrency: int) -> dict:
    tokenizer = make_tokenizer()
    runs = [
        run_server(kind, count, delay_s=delay_s, concurrency=concurrency, tokenizer=tokenizer) for _ in range(repeats)
    ]
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {"requests": count, "delay_s": delay_s, "concurrency": concurrency, "runs": runs} | middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=12_800)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["rules", "server"])
    parser.add_argument("--json", type=Path, default=ROOT / "speed" / "results" / "bench_verifier.json")
    args = parser.parse_args()
    from machine import describe_machine

    from veripo_trl.files.tables import print_table, write_json

    result = {"machine": describe_machine(), "load_average_before": os.getloadavg()}
    if args.only != "server":
        rules = result["rules"] = bench_rules(args.rollouts, args.repeats)
        print_table(
            "Rules on one core",
            [{"rollouts": rules["rollouts"], "seconds": rules["seconds"], "CPU seconds": rules["cpu_seconds"],
              "tokens of thinking": rules["think_tokens"], "peak MiB": rules["peak_mib"],
              "of that before": rules["before_mib"]}],
        )  # fmt: skip
    if args.only != "rules":
        table = []
        for kind in ("judge", "everything"):
            result[kind] = found = bench_server(kind, args.requests, args.repeats, delay_s=0.05, concurrency=64)
            table.append({"timed": kind, "requests": found["requests"], "per second": found["per_second"],
                          "of 1,280": f"{found['share']:.1%}", "client CPU µs": found["client_cpu_us"]})  # fmt: skip
        print_table("A server that answers in 50 ms, 64 requests in flight", table)
    write_json(args.json, result)
    print(f"written to {args.json}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["rules"]:
        run_rules(*sys.argv[2:])
    else:
        main()
