"""Long videos in a GRPO update, on a CPU: frames against memory and time, for each of the techniques.

    python speed/long_video.py                        # mid-size random model, 64, 128 and 256 frames

One video of F frames, G completions of C tokens, the group's prompt computed once, gradient checkpointing. Ways:

- whole: the tower and each MLP work on all tokens at once;
- tower in pieces, MLP in pieces: of TOKENS tokens. In training they are larger, see model/features.py and pieces.py;
- all: both, and layer inputs on the host. On a CPU the host is the device: what this spares is seen by fake_memory.py.

Each measurement has a process of its own: "memory" is what its resident set grows by from before the update to the
highest point, model and prompt not included. Gradients are compared with those of "whole" (limits as in update_step.py).
"processes" is 1: where a group's prompt is shared out over several, each has its own line.
"""

import argparse
import gc
import multiprocessing
import tempfile
from pathlib import Path

import torch
from machine import cores, describe_machine
from models import SIDE, made_up_prompt, random_model
from update_step import EVERYTHING, Part, differences, over_limits, peak_bytes, resident_bytes

from veripo_trl.files.tables import print_table, write_json
from veripo_trl.model import features, pieces

ROOT = Path(__file__).resolve().parent.parent
WAYS = {
    "whole": set(),
    "tower in pieces": {"tower"},
    "MLP in pieces": {"mlp"},
    "all": {"tower", "mlp", "host"},
}
TOKENS = 512


def measure(connection, frames: int, way: str, args) -> None:
    """One update by one way, in a process of its own."""
    torch.set_num_threads(args.threads)
    features.PATCHES_AT_ONCE = 4 * TOKENS if "tower" in WAYS[way] else 1 << 40
    pieces.WHOLE, pieces.PIECE = (TOKENS, TOKENS) if "mlp" in WAYS[way] else (1 << 40, 1 << 40)
    model, processor = random_model(args.shape)
    part = Part("grpo", model, processor, half=False, checkpointing=True)
    part.trainer.args.activation_offloading = "host" in WAYS[way]
    tokens = 40 + frames // 2 * (SIDE[args.shape] // 28) ** 2
    prompt = made_up_prompt(model.config, tokens, side=SIDE[args.shape], dtype=torch.float32)
    part.load(prompt, completion=args.completion, group=args.group)
    gc.collect()
    before = resident_bytes(part.device)
    seconds = part.step("ours", EVERYTHING)
    memory_mb = (peak_bytes(part.device) - before) / 1e6
    torch.save(part.results("ours"), args.folder / f"{way}.pt")
    connection.send({"tokens": len(prompt), "seconds": seconds, "memory MB": memory_mb})


def run(frames: int, args) -> list[dict]:
    context, table, whole = multiprocessing.get_context("spawn"), [], None
    for way in WAYS:
        ours, theirs = context.Pipe()
        process = context.Process(target=measure, args=(theirs, frames, way, args), daemon=True)
        process.start()
        theirs.close()
        found = ours.recv()
        process.join()
        results = torch.load(args.folder / f"{way}.pt")
        whole = whole or results
        apart = differences(results, whole)
        if over_limits(apart):
            raise RuntimeError(f"{frames} frames, {way}: too different: {apart}")
        table.append(
            {"frames": frames, "way": way, "processes": 1, **found}
            | {"log-prob": f"{apart['log_probs']:.0e}", "gradient": f"{apart['gradients']:.0e}"}
        )
        print(table[-1], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", "mid"], default="mid")
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--json", type=Path, default=ROOT / "speed" / "results" / "long_video.json")
    args = parser.parse_args()
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
