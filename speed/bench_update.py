"""The GRPO update and the DPO step: the prompt computed once against the plain path of the same trainers, on a CPU.

    python speed/bench_update.py                                    # mid-size random model
    python speed/bench_update.py --cases grpo:1024:128:8

One video question of P tokens, G completions (DPO: 2 answers) of C tokens each. An update is `_compute_loss` and the
backward pass; a DPO step has the reference's pass in it too. Two ratios each:

- everything: ours encodes the video once; the plain path encodes it per row, as stock trainers do.
- features given: both get the vision features ready-made, so that only the sharing of the prompt differs.

Every measurement runs in a process of its own: "memory" is what its resident set grows by from before the first update
to the highest point, model and prompt not included, gradients included. Times are medians over all updates of a process,
the first one included, which is the slowest. The two processes take turns, so that both see the same noise.
Log-probabilities and gradients of both are compared; a larger difference than LIMITS ends the program with an error. The
limit is the ratio of language model tokens; attention, of which the plain path has more, and the vision tower are not in
it. On a GPU the same is measured by on_gpu.py.
"""

import argparse
import gc
import multiprocessing
import statistics
import tempfile
from pathlib import Path

import torch
from machine import cores, describe_machine
from models import SIDE, made_up_prompt, random_model
from update_step import LIMITS, PAIRS, Part, differences, over_limits, peak_bytes, resident_bytes

from veripo_trl.files.tables import print_table, write_json

ROOT = Path(__file__).resolve().parent.parent
# (part, P, C, G), the last one last: its ratios are the program's last line
CASES = [("grpo", 4096, 256, 8), ("dpo", 4096, 256, 2), ("grpo", 1024, 128, 8)]


def serve(connection, part, sizes, way, pair, args) -> None:
    """One process: build, then step whenever asked, until a file's name comes, which the results go to."""
    torch.set_num_threads(args.threads)
    prompt_tokens, completion, group = sizes
    model, processor = random_model(args.shape)
    reference = random_model(args.shape)[0] if part == "dpo" else None
    ready = Part(part, model, processor, half=False, checkpointing=False, reference=reference)
    prompt = made_up_prompt(model.config, prompt_tokens, side=SIDE[args.shape], dtype=torch.float32)
    ready.load(prompt, completion=completion, group=group)
    if pair == "features given":
        ready.hold_features()
    gc.collect()
    before = resident_bytes(ready.device)
    connection.send("ready")
    while (message := connection.recv()) == "step":
        connection.send(ready.step(way, pair))
    memory_mb = (peak_bytes(ready.device) - before) / 1e6
    torch.save(ready.results(way), message)
    connection.send({"tokens": ready.tokens, "patches": ready.patches, "memory_mb": memory_mb})


def measure(part: str, sizes: tuple[int, int, int], pair: str, args, folder: Path) -> dict:
    """Both ways of one case, in turn."""
    context = multiprocessing.get_context("spawn")  # a fork of a process whose OpenMP has run would hang
    found, ends = {way: {"seconds": []} for way in ("ours", "plain")}, {}
    for way in found:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, part, sizes, way, pair, args), daemon=True)
        process.start()
        theirs.close()
        ends[way] = ours, process
    for connection, _ in ends.values():
        connection.recv()
    for _ in range(args.repeats or (3 if sizes[0] > 2048 else 7)):
        for way, (connection, _) in ends.items():
            connection.send("step")
            found[way]["seconds"].append(connection.recv())
    for way, (connection, process) in ends.items():
        file = folder / f"{way}.pt"
        connection.send(str(file))
        found[way] |= {**connection.recv(), "median_s": statistics.median(found[way]["seconds"])}
        process.join()
        found[way]["results"] = torch.load(file)
    found["differences"] = differences(found["ours"].pop("results"), found["plain"].pop("results"))
    found["ratio"] = found["plain"]["median_s"] / found["ours"]["median_s"]
    return found


def run_case(part: str, prompt: int, completion: int, group: int, args, folder: Path) -> dict:
    case = {"part": part, "P": prompt, "C": completion, "G": group}
    case["limit"] = group * (prompt + completion) / (prompt + group * completion)
    for pair in PAIRS:
        print(f"{part}, P {prompt}, C {completion}, G {group}: {pair} …", flush=True)
        found = case[pair] = measure(part, (prompt, completion, group), pair, args, folder)
        if over_limits(found["differences"]):
            raise RuntimeError(f"{part} at P {prompt}, C {completion}, G {group}: too different: {found['differences']}")
    return case


def table_rows(case: dict) -> list[dict]:
    rows = []
    for pair in PAIRS:
        found = case[pair]

        def both(name, form, found=found):
            return " → ".join(format(found[way][name], form) for way in ("plain", "ours"))

        rows.append(
            {
                "part": case["part"],
                "P / C / G": f"{case['P']} / {case['C']} / {case['G']}",
                "counted": pair,
                "plain → ours, s": both("median_s", ".2f"),
                "ratio": f"{found['ratio']:.2f}",
                "limit": f"{case['limit']:.2f}",
                "tokens": both("tokens", ","),
                "patches": both("patches", ","),
                "memory, MB": both("memory_mb", ",.0f"),
                "log-prob": f"{found['differences']['log_probs']:.0e}",
                "gradient": f"{found['differences']['gradients']:.0e}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["mid", "3b", "7b"], default="mid")
    parser.add_argument("--repeats", type=int, help="updates of each way; default: 3 where P is over 2,048, else 7")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--cases", nargs="+", metavar="PART:P:C:G", help="for example grpo:1024:128:8 dpo:4096:256:2")
    parser.add_argument("--json", type=Path, default=ROOT / "speed" / "results" / "bench_update.json")
    args = parser.parse_args()
    described = {"machine": describe_machine(), "device": "cpu"}
    described |= {name: getattr(args, name) for name in ("shape", "threads", "repeats")}
    cases = CASES
    if args.cases:
        cases = [(name, *map(int, sizes)) for name, *sizes in (case.split(":") for case in args.cases)]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            results.append(run_case(*case, args, Path(folder)))
            print_table("", table_rows(results[-1]))
            write_json(args.json, described | {"cases": results})
    print_table(f"GRPO update and DPO step, {args.shape} model", [row for case in results for row in table_rows(case)])
    last = results[-1]
    ratios = ", ".join(f"{last[pair]['ratio']:.2f}x {pair}" for pair in PAIRS)
    largest = {name: max(last[pair]["differences"][name] for pair in PAIRS) for name in LIMITS}
    print(
        f"P {last['P']}, C {last['C']}, G {last['G']}: {ratios} (limit {last['limit']:.2f}x); largest difference "
        f"{largest['log_probs']:.1e} in log-probabilities, {largest['gradients']:.1e} in gradients, relative"
    )


if __name__ == "__main__":
    main()
