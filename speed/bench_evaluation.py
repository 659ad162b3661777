"""How much faster is the evaluation engine than a loop that takes one question at a time?

    python speed/bench_evaluation.py

Both answer the same questions on the tiny world's clips with the tiny model, greedily, on the CPU, in this process:
first the loop (decode, encode, generate, next), then the engine (batches, decoding in worker processes). Their answers
must be equal. The loop has what the engine has: the same encoder and the prompt computed once.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait take the decoders' cores

import torch
from machine import cores, describe_machine

from veripo_trl.data.rows import load_rows
from veripo_trl.evaluate.generate import Decoding, TransformersEngine, describe_completion, encoded_batches
from veripo_trl.files.tables import write_json
from veripo_trl.model.policy import load_policy
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.build import make_encoder
from veripo_trl.tiny.world import make_world

ROOT = Path(__file__).resolve().parent.parent


def run(engine, encoder, rows, batches, *, num_workers: int) -> tuple[dict[int, str], dict[str, float]]:
    """Answers by index; seconds in all, until the first batch was ready, and later without the engine computing."""
    answers, busy_before, started, first = {}, engine.busy_s, time.perf_counter(), None
    for indices, prompts in encoded_batches(encoder, rows, batches, num_workers=num_workers):
        first = first or time.perf_counter()
        for index, ids in zip(indices, engine.complete(prompts, indices), strict=True):
            answers[index] = describe_completion(ids, tokenizer=engine.tokenizer, ends=engine.ends)["completion"]
    seconds, start_s = time.perf_counter() - started, first - started
    return answers, {"all": seconds, "start": start_s, "idle": seconds - start_s - (engine.busy_s - busy_before)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="outputs/tiny_world", help="made if it is not there")
    parser.add_argument("--model", help="default: the world's own, which is untrained")
    parser.add_argument("--questions", type=int, default=384)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=cores())
    parser.add_argument("--max_new_tokens", type=int, default=40)
    parser.add_argument("--json", type=Path, default=ROOT / "speed" / "results" / "bench_evaluation.json")
    args = parser.parse_args()
    world = make_world(args.world)
    rows = load_rows([{"path": str(world.heldout), "limit": args.questions}], shuffle=False)
    rows = [rows[place] for place in range(len(rows))]
    model, processor = load_policy(args.model or str(world.model))
    settings = {"prompt_template": "tiny", "min_pixels": 28 * 28, "max_pixels": 112 * 112, "max_frames": 32}
    encoder = make_encoder(model, processor, DataArguments(**settings))
    engine = TransformersEngine(model.eval(), encoder, Decoding(max_new_tokens=args.max_new_tokens))
    run(engine, encoder, rows, [[0]], num_workers=0)  # imports, the decoding process, lazy kernels

    one_by_one, loop = run(engine, encoder, rows, [[place] for place in range(len(rows))], num_workers=0)
    starts = range(0, len(rows), args.batch_size)
    batches = [list(range(start, min(start + args.batch_size, len(rows)))) for start in starts]
    together, batched = run(engine, encoder, rows, batches, num_workers=args.num_workers)

    equal = sum(one_by_one[place] == together[place] for place in one_by_one)
    result = {
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "model": "tiny Qwen2.5-VL, " + ("untrained" if args.model is None else "trained"),
        "questions": len(rows),
        "max_new_tokens": args.max_new_tokens,
        "one by one": {
            "seconds": loop["all"],
            "rows per s": len(rows) / loop["all"],
            "decoding s": loop["start"] + loop["idle"],
        },
        "engine": {
            "batch_size": args.batch_size,
            "num_workers": args.num_workers,
            "seconds": batched["all"],
            "rows per s": len(rows) / batched["all"],
            "first batch after s": batched["start"],
            "idle s": batched["idle"],
            "idle share": batched["idle"] / batched["all"],
        },
        "speedup": loop["all"] / batched["all"],
        "equal answers": equal,
    }
    write_json(args.json, result)
    print(json.dumps(result, indent=2))
    if equal != len(rows):
        raise SystemExit(f"{len(rows) - equal} of {len(rows)} answers differ.")
    print(f"\n{result['speedup']:.1f}x, all answers equal; written to {args.json}")


if __name__ == "__main__":
    main()
