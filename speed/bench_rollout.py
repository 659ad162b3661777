"""Rollouts with a group's prompt computed once, against stock generation on whole rows.

    python speed/bench_rollout.py
    python speed/bench_rollout.py --device cuda --shape 7b --cases 8192:270:8
    python speed/bench_rollout.py --engine vllm        # in an environment with vLLM: its n = G beside ours

Stock: `model.generate` on the G expanded rows with the pixels of every row, as TRL's trainer calls it for images (it has
no path for video at all). Ours: `generation.sample_completions`. Both decode greedily, all of the C tokens. In float32
they must give the same tokens; in half precision, where both round, each of our tokens must be as good a choice as
stock's by a plain forward. Otherwise the program fails.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch
from machine import describe_machine
from models import SHAPES, random_model, video_questions
from own_positions import use_trained_positions
from timing import alternate

from veripo_trl.files.tables import print_table, write_json
from veripo_trl.model.encoding import vision_token_ids
from veripo_trl.model.inputs import model_inputs
from veripo_trl.shared_prompt.rollout import left_pad, sample_completions

ROOT = Path(__file__).resolve().parent.parent
# Two of them have prompts of several lengths in one batch; the last is the one with a target.
CASES = ["256:64:8", "1024+512:64:4", "1024:256:8", "1024:64:8"]


def parse_case(text: str) -> tuple[list[int], int, int]:
    """`P[+P…]:C:G` to (prompt lengths, C, G)."""
    prompts, completion, group = text.split(":")
    return [int(length) for length in prompts.split("+")], int(completion), int(group)


@torch.no_grad()
def stock_generation(model, rows, *, pad_token_id: int, **options) -> torch.Tensor:
    """What stock generation does with rows: each for itself. Returns int64 (rows, new tokens)."""
    device = next(model.parameters()).device
    input_ids, attention_mask = (tensor.to(device) for tensor in left_pad(rows, pad_token_id))
    config = model.config
    inputs = model_inputs(rows, input_ids, completion_width=0, config=config)
    inputs.pop("position_ids")  # generate computes them, by the rule that the model was given
    kinds = (input_ids == config.image_token_id).int() + 2 * (input_ids == config.video_token_id).int()
    seconds = [second for row in rows for second in row.second_per_grid_ts or []]
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        mm_token_type_ids=kinds,
        second_per_grid_ts=torch.tensor(seconds, device=device),
        pad_token_id=pad_token_id,
        **inputs,
        **options,
    )
    return output[:, input_ids.size(1) :]


@torch.no_grad()
def regret(model, prompt, tokens: torch.Tensor, banned: list[int]) -> float:
    """How far a greedy completion's worst token is below the best one, in nats, by a plain forward of one row."""
    ids = torch.from_numpy(prompt.input_ids).to(tokens.device)
    ids = torch.cat([ids, tokens])[None]
    inputs = model_inputs([prompt], ids, completion_width=len(tokens), config=model.config)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=len(tokens) + 1, **inputs)
    logits = output.logits[0, :-1].float()
    logits[:, banned] = -math.inf
    return float((logits.amax(-1) - logits.gather(1, tokens[:, None])[:, 0]).max())


def run_case(model, processor, case: str, *, runs: int, folder: Path, llm=None) -> dict:
    """One line of the table."""
    lengths, completion, group = parse_case(case)
    unique = []
    for place, length in enumerate(lengths):
        encoder, rows = video_questions(model, processor, folder, prompt_tokens=length, count=place + 1)
        unique.append(encoder.encode(rows[place]))
        encoder.loader.close()
    prompts = [prompt for prompt in unique for _ in range(group)]
    pad = processor.tokenizer.pad_token_id
    banned = vision_token_ids(processor, model.config)
    end = processor.tokenizer.eos_token_id
    options = {"max_new_tokens": completion, "min_new_tokens": completion, "suppress_tokens": banned}
    decoding = {True: {"do_sample": True, "top_k": 0}, False: {"do_sample": False}}

    def stock(sample: bool = True):
        torch.manual_seed(0)
        return stock_generation(model, prompts, pad_token_id=pad, **options, **decoding[sample])

    def ours(sample: bool = True):
        for prompt in unique:
            prompt.features = None  # held since the last call; a rollout is the first to need them
        torch.manual_seed(0)
        return sample_completions(
            model, prompts, pad_token_id=pad, config=model.config, **options, **decoding[sample]
        )

    greedy = {"stock": stock(sample=False), "ours": ours(sample=False)}  # also warms up
    worst = {
        name: max(regret(model, prompt, tokens[place * group], [*banned, end]) for place, prompt in enumerate(unique))
        for name, tokens in greedy.items()
    }
    ways = {"stock": stock, "ours": ours}
    if llm is not None:
        ways["vllm"] = lambda: run_vllm(llm, unique, group, completion, [*banned, end])
        ways["vllm"]()
    found = alternate(ways, runs=runs, warm_up=0)
    sampled = {name: found[name]["result"] for name in ("stock", "ours")}
    line = {
        "P:C:G": case,
        "stock s": found["stock"]["seconds"],
        "ours s": found["ours"]["seconds"],
        "ratio": found["stock"]["seconds"] / found["ours"]["seconds"],
        "equal sampled": float((sampled["ours"] == sampled["stock"]).float().mean()),
        "equal greedy": float((greedy["ours"] == greedy["stock"]).float().mean()),
        "regret ours": worst["ours"],
        "regret stock": worst["stock"],
        "runs": {name: found[name]["all_seconds"] for name in ways},
    }
    if model.dtype == torch.float32:
        line["ok"] = line["equal sampled"] == line["equal greedy"] == 1 and worst["ours"] < 1e-3
    else:
        line["ok"] = worst["ours"] <= max(2 * worst["stock"], 0.1)
    if llm is not None:
        tokens = torch.tensor(run_vllm(llm, unique, 1, completion, [*banned, end]), device=greedy["ours"].device)
        line["vllm s"] = found["vllm"]["seconds"]
        line["vllm equal greedy"] = float((tokens == greedy["ours"][::group]).float().mean())
        line["ok"] = line["ok"] and (line["vllm equal greedy"] == 1 or model.dtype != torch.float32)
    return line


def start_vllm(model, processor, lengths: list[int], folder: Path, encoder, **options):
    """vLLM with the same weights."""
    from vllm import LLM

    from veripo_trl.vllm.inputs import engine_options

    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return LLM(
        str(folder),
        max_model_len=max(lengths),
        enforce_eager=model.device.type == "cpu",
        **engine_options(encoder, dtype=model.dtype),
        **options,
    )


def run_vllm(llm, prompts, group: int, completion: int, banned: list[int]) -> list[list[int]]:
    """Sampled completions for a group (vLLM refuses greedy ones with n > 1), greedy ones for single rows."""
    from vllm import SamplingParams

    from veripo_trl.vllm.inputs import generate_with_vllm, vllm_inputs

    llm.reset_prefix_cache()
    params = SamplingParams(
        n=group,
        temperature=0.0 if group == 1 else 1.0,
        max_tokens=completion,
        ignore_eos=True,
        logit_bias={token: -100.0 for token in banned},
    )
    outputs = generate_with_vllm(llm, vllm_inputs(llm, prompts), [params] * len(prompts))
    return [list(sample.token_ids) for output in outputs for sample in output.outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=None, metavar="P[+P…]:C:G", help=f"default: {' '.join(CASES)}")
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="mid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--runs", type=int, default=3, help="the table has their median")
    parser.add_argument("--quick", action="store_true", help="one small case, to see that the program works")
    parser.add_argument("--clips", type=Path, default=ROOT / "outputs" / "bench_clips")
    parser.add_argument("--json", type=Path, default=ROOT / "speed" / "results" / "bench_rollout.json")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.runs, args.cases = "tiny", 1, args.cases or ["128+256:8:2"]
    cases = args.cases or CASES
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    model, processor = random_model(args.shape, device=args.device, dtype=dtype)
    model.eval()
    use_trained_positions(model)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        llm = None
        if args.engine == "vllm":
            longest = [max(parse_case(case)[0]) + parse_case(case)[1] for case in cases]
            encoder, _ = video_questions(model, processor, args.clips, prompt_tokens=max(longest))
            encoder.loader.close()
            llm = start_vllm(model, processor, longest, Path(folder), encoder)
        for case in cases:
            lines.append(run_case(model, processor, case, runs=args.runs, folder=args.clips, llm=llm))
            shown = {name: value for name, value in lines[-1].items() if name != "runs"}
            print(", ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
    shown = [{name: value for name, value in line.items() if name != "runs"} for line in lines]
    print_table(f"Rollout, {args.shape} model, {args.device}, {dtype}: medians of {args.runs} runs", shown)
    machine = describe_machine() | {"threads": torch.get_num_threads()}
    options = {"shape": args.shape, "device": args.device, "dtype": str(dtype), "engine": args.engine, "runs": args.runs}
    write_json(args.json, {"machine": machine, "options": options, "table": lines})
    print(f"\nwritten to {args.json}\n{lines[-1]['P:C:G']}: {lines[-1]['ratio']:.2f}x")
    if not all(line["ok"] for line in lines):
        sys.exit("The completions differ by more than rounding: see the table.")


if __name__ == "__main__":
    main()
