"""Long videos in a GRPO update, on a CPU: frames against memory, work and time, for each technique and over processes.

    python speed/long_video.py                        # mid-size random model, 64, 128 and 256 frames

One video of F frames, G completions of C tokens, the group's prompt computed once, gradient checkpointing. Ways:

- whole: the tower and each MLP work on all tokens at once;
- tower in pieces, MLP in pieces: of TOKENS tokens. In training they are larger, see model/features.py and pieces.py;
- all: both, and layer inputs on the host. On a CPU the host is the device: what this spares is seen by fake_memory.py;
- whole and all over 2 and 4 processes that share out the prompt (docs/prompt_parallel.md), over gloo.

Each measurement has processes of its own, which take the update twice: timed, and counted. "memory" is the most that the
tensors of an update hold together, gradients with them, weights and prompt not (resident sets shrink on a busy machine);
"tokens" are the language model's, "TFLOP" all, recomputed ones included. Each is one process's, of several the most that
one has. Log-probabilities and gradients, which are
averaged over the processes as data parallelism does, are compared with those of "whole" on one (limits as in
update_step.py). With fewer cores than processes, seconds say nothing.
"""

import argparse
import multiprocessing
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from fake_memory import Tracked
from machine import cores, describe_machine
from models import SIDE, made_up_prompt, random_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop
from update_step import EVERYTHING, Part, differences, over_limits

from veripo_trl.files.tables import print_table, write_json
from veripo_trl.model import features, pieces

ROOT = Path(__file__).resolve().parent.parent
WAYS = {
    "whole": set(),
    "tower in pieces": {"tower"},
    "MLP in pieces": {"mlp"},
    "all": {"tower", "mlp", "host"},
}
OVER = ("whole", "all")  # which are measured over several processes, too
TOKENS = 512


def count(work, before: list) -> dict:
    """Megabytes at the highest of what a call makes, without the tensors `before`, and its FLOPs; half of a causal
    attention's scores are not computed."""

    def forward(query, key, value, dropout=0.0, causal=False, *args, **kwargs):
        return sdpa_flop(query, key, value) // (1 + causal)

    def backward(grad, query, key, value, out, lse, dropout=0.0, causal=False, *args, **kwargs):
        return sdpa_backward_flop(grad, query, key, value) // (1 + causal)

    name = "_scaled_dot_product_flash_attention_for_cpu"
    kernels = {getattr(torch.ops.aten, name): forward, getattr(torch.ops.aten, f"{name}_backward"): backward}
    with Tracked(before) as tracked, FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        work()
    return {"memory MB": tracked.peak / 1e6, "TFLOP": counter.get_total_flops() / 1e12}


def measure(connection, rank: int, processes: int, frames: int, way: str, args) -> None:
    """One update by one way, in a process of its own, or in each of several."""
    torch.set_num_threads(args.threads)
    features.PATCHES_AT_ONCE = 4 * TOKENS if "tower" in WAYS[way] else 1 << 40
    pieces.WHOLE, pieces.PIECE = (TOKENS, TOKENS) if "mlp" in WAYS[way] else (1 << 40, 1 << 40)
    model, processor = random_model(args.shape)
    part, group = Part("grpo", model, processor, half=False, checkpointing=True), None
    if processes > 1:
        meet = args.folder / f"{frames}-{way}-{processes}"
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=processes)
        group = dist.group.WORLD
    part.trainer.args.activation_offloading = "host" in WAYS[way]
    tokens = 40 + frames // 2 * (SIDE[args.shape] // 28) ** 2
    prompt = made_up_prompt(model.config, tokens, side=SIDE[args.shape], dtype=torch.float32)
    part.load(prompt, completion=args.completion, group=args.group, over=group)
    found = {"prompt": len(prompt), "seconds": part.step("ours", EVERYTHING), "tokens": part.tokens}
    if group is not None:
        for parameter in part.model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= processes
    results = part.results("ours")
    if group is not None:
        every = [torch.empty_like(results["log_probs"]) for _ in range(processes)]
        dist.all_gather(every, results["log_probs"])
        results["log_probs"] = torch.cat(every)
    if rank == 0:
        torch.save(results, args.folder / "results.pt")
    before = [*part.model.parameters(), *part.model.buffers(), prompt.pixel_values_videos]
    connection.send(found | count(lambda: part.step("ours", EVERYTHING), before))
    if group is not None:
        dist.destroy_process_group()


def run(frames: int, args) -> list[dict]:
    context, table, whole = multiprocessing.get_context("forkserver"), [], None
    context.set_forkserver_preload(["veripo_trl.recipe.build", "veripo_trl.trainers.dpo", "veripo_trl.trainers.grpo"])
    for processes in args.processes:
        for way in WAYS if processes == 1 else OVER:
            ends, started = [], []
            for rank in range(processes):
                ours, theirs = context.Pipe()
                given = (theirs, rank, processes, frames, way, args)
                started.append(context.Process(target=measure, args=given, daemon=True))
                started[-1].start()
                theirs.close()
                ends.append(ours)
            each = [end.recv() for end in ends]
            for process in started:
                process.join()
            found = {name: max(one[name] for one in each) for name in each[0]}
            results = torch.load(args.folder / "results.pt")
            whole = whole or results
            apart = differences(results, whole)
            if over_limits(apart):
                raise RuntimeError(f"{frames} frames, {way}, {processes} processes: too different: {apart}")
            first = table[0] if table else found
            table.append(
                {"frames": frames, "way": way, "processes": processes, **found}
                | {f"{name} of one": found[name] / first[name] for name in ("memory MB", "TFLOP")}
                | {"log-prob": f"{apart['log_probs']:.0e}", "gradient": f"{apart['gradients']:.0e}"}
            )
            print(table[-1], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", "mid"], default="mid")
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="the first is 1")
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--json", type=Path, default=ROOT / "speed" / "results" / "long_video.json")
    args = parser.parse_args()
    if args.processes[0] != 1 or any(args.group % count for count in args.processes):
        parser.error("--processes: expected 1 first, with which the others are compared, and divisors of --group.")
    table = []
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for frames in args.frames:
            table += run(frames, args)
            described = {"machine": describe_machine(), "shape": args.shape, "group": args.group}
            write_json(args.json, {**described, "completion": args.completion, "table": table})
    print_table(f"GRPO update on one video, {args.shape} model", table)


if __name__ == "__main__":
    main()
