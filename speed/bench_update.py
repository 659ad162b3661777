"""The GRPO update and the DPO step: the prompt computed once against the plain path of the same trainers.

    python speed/bench_update.py                                    # mid-size random model, CPU
    python speed/bench_update.py --device cuda --shape 7b           # LoRA, bf16, gradient checkpointing
    python speed/bench_update.py --device cuda --shape 7b --frames_in_gib 80

One video question of P tokens, G completions (DPO: 2 answers) of C tokens each. An update is `_compute_loss` and the
backward pass; a DPO step has the reference's pass in it too. Two ratios each:

- everything: ours encodes the video once; the plain path encodes it per row, as stock trainers do.
- features given: both get the vision features ready-made, so that only the sharing of the prompt differs.

Every measurement runs in a process of its own: "memory" is what its resident set (on a GPU: the allocator) grows by
from before the first update to the highest point, model and prompt not included, gradients included. Times are medians
over all updates of a process, the first one included, which is the slowest. On a CPU the two processes take turns, so
that both see the same noise; on a GPU they follow one another, each with the whole memory, and one that does not fit is
a line of the table. Log-probabilities and gradients of both are compared, in half precision against what rounding alone
does to plain rows, and a larger difference ends the program with an error. The limit is the ratio of language model
tokens; attention, of which the plain path has more, and the vision tower are not in it.

On a GPU the model has a LoRA adapter on the language model. TRL asks for gradients of the embeddings under gradient
checkpointing, and so the plain path's "everything" back-propagates through the frozen tower too, as stock trainers do.
"""

import argparse
import contextlib
import gc
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from machine import describe_machine
from models import SIDE, random_model, video_questions

from veripo_trl.data.rows import rows_to_dataset
from veripo_trl.model import inputs
from veripo_trl.recipe import stages
from veripo_trl.shared_prompt.scoring import HALF_BOUND, score_completions
from veripo_trl.trainers.dpo import VideoDPOConfig, VideoDPOTrainer
from veripo_trl.trainers.grpo import VideoGRPOConfig, VideoGRPOTrainer

ROOT = Path(__file__).resolve().parent.parent
CASES = {  # (part, P, C, G), the last one last: its ratios are the program's last line
    "cpu": [("grpo", 4096, 256, 8), ("dpo", 4096, 256, 2), ("grpo", 1024, 128, 8)],
    "cuda": [("grpo", 8200, 270, 8), ("dpo", 8200, 270, 2), ("grpo", 1024, 128, 8)],
}
PAIRS = ("everything", "features given")
LIMITS = {"log_probs": 1e-5, "gradients": 1e-4}  # in float32


class Part:
    """One trainer, ready to be stepped with groups of completions of one prompt, on either way.

    Args:
        part: "grpo" or "dpo".
        model: with its adapter, if it is to have one.
        reference: for DPO on a model without an adapter.
        half: update under bfloat16's autocast.
    """

    def __init__(
        self, part: str, model, encoder, rows, folder: Path, *, half: bool, checkpointing: bool, reference=None
    ):
        self.device = next(model.parameters()).device
        self.half = half
        options = {
            "output_dir": str(folder / "unused"), "per_device_train_batch_size": 2, "report_to": "none",
            "save_strategy": "no", "use_cpu": self.device.type == "cpu", "bf16": half,
            "activation_checkpointing": checkpointing, "max_steps": 1,
        }  # fmt: skip
        if part == "grpo":
            self.trainer = VideoGRPOTrainer(
                model=model,
                reward_funcs=[lambda completions, **kwargs: [0.0] * len(completions)],
                args=VideoGRPOConfig(num_generations=2, **options),
                train_dataset=rows_to_dataset(rows),
                processing_class=encoder.processor,
                encoder=encoder,
            )
        else:
            dataset = rows_to_dataset(rows)
            for name, value in (("chosen", "yes"), ("rejected", "no"), ("rejected_finished", True)):
                dataset = dataset.add_column(name, [value] * len(rows))
            self.trainer = VideoDPOTrainer(
                model=model,
                ref_model=reference,
                args=VideoDPOConfig(**options | {"per_device_train_batch_size": 1}),
                train_dataset=dataset,
                processing_class=encoder.processor,
                encoder=encoder,
            )
            if reference is not None:  # the policy has moved away from it
                with torch.no_grad():
                    self.trainer.ref_model.lm_head.weight.mul_(1.1)
        self.model = self.trainer.model
        self.model.train()
        self.base = self.trainer.accelerator.unwrap_model(self.model)
        self.base = self.base.get_base_model() if hasattr(self.base, "peft_config") else self.base
        if checkpointing:  # `train()` would do it, which this program does not call.
            kwargs = self.trainer.args.activation_checkpointing_kwargs
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
            if not self.base.is_activation_checkpointing:
                raise RuntimeError("Gradient checkpointing is not on.")
        self.tokens = self.patches = 0
        for counted in [self.base] if self.trainer.ref_model is None else [self.base, self.trainer.ref_model]:
            counted.model.language_model.register_forward_pre_hook(self._count_tokens, with_kwargs=True)
            counted.model.visual.register_forward_pre_hook(self._count_patches)

    def _count_tokens(self, module, args, kwargs):
        self.tokens += kwargs["inputs_embeds"].shape[:2].numel()

    def _count_patches(self, module, args):
        self.patches += len(args[0])

    def load(self, prompt, *, completion: int, group: int) -> None:
        """Take a prompt with `group` made-up completions, all of them `completion` tokens long."""
        self.prompt = prompt
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(100, 250, (group, completion), generator=generator).to(self.device)
        self.mask = torch.ones_like(self.ids)

    def hold_features(self) -> None:
        if self.prompt.features is None:
            inputs.vision_inputs(self.base, [self.prompt], self.device)

    def _batch(self, rows: slice) -> dict:
        ids, mask = self.ids[rows], self.mask[rows]
        group, width = ids.shape
        prompt_ids = torch.from_numpy(self.prompt.input_ids).to(self.device).expand(group, -1)
        if isinstance(self.trainer, VideoDPOTrainer):
            before = torch.zeros_like(prompt_ids)
            return {
                "input_ids": torch.cat([prompt_ids, ids], 1), "attention_mask": torch.cat([before + 1, mask], 1),
                "completion_mask": torch.cat([before, mask], 1), "completion_width": width,
                "prompts": [self.prompt] * group,
            }  # fmt: skip
        self.trainer._encoded["train"] = (1, [self.prompt] * group)
        return {
            "prompt_ids": prompt_ids, "prompt_mask": torch.ones_like(prompt_ids), "completion_ids": ids,
            "completion_mask": mask, "advantages": torch.linspace(-1, 1, len(self.ids), device=self.device)[rows],
            "row_index": torch.arange(group), "generation": torch.ones(group, dtype=torch.long),
            "num_items_in_batch": mask.sum(),
        }  # fmt: skip

    def step(self, way: str, pair: str, *, rows_at_once: int | None = None) -> float:
        """One update of the whole group, forward and backward. Returns seconds.

        Args:
            way: "ours", or "plain". pair: one of PAIRS.
            rows_at_once: of a GRPO group in one forward; the gradient is the same. Default: all.
        """
        self.trainer.shares_prompts = way == "ours"  # compared below
        group, rows_at_once = len(self.ids), rows_at_once or len(self.ids)
        self.trainer.current_gradient_accumulation_steps = group // rows_at_once
        self.model.zero_grad()
        if pair == "everything":
            self.prompt.features = None
        else:
            self.hold_features()
        self.tokens = self.patches = self.loss = 0
        with self._as_stock(way, pair):
            synchronize(self.device)
            started = time.perf_counter()
            for start in range(0, group, rows_at_once):
                batch = self._batch(slice(start, start + rows_at_once))
                if isinstance(self.trainer, VideoDPOTrainer):
                    loss = self.trainer._compute_loss(self.model, batch, False)
                else:
                    loss = self.trainer._compute_loss(self.model, batch)
                loss.backward()
                self.loss += loss.item()
            synchronize(self.device)
            return time.perf_counter() - started

    def _as_stock(self, way: str, pair: str):
        """Stock trainers hand pixels to every forward, which encodes them for every row."""
        if way == "plain" and pair == "everything":
            return mock.patch.object(inputs, "tower_is_frozen", lambda tower: False)
        return contextlib.nullcontext()

    def results(self, way: str, *, rows_at_once: int | None = None) -> dict:
        """What is compared: log-probabilities by this way, and the gradients of the last step."""
        gradients = {name: p.grad.cpu() for name, p in self.model.named_parameters() if p.grad is not None}
        log_probs, rows_at_once = [], rows_at_once or len(self.ids)
        with torch.no_grad(), self.trainer.accelerator.autocast():
            for start in range(0, len(self.ids), rows_at_once):
                ids, mask = (tensor[start : start + rows_at_once] for tensor in (self.ids, self.mask))
                rows = [self.model, self.base, [self.prompt] * len(ids), ids, mask]
                output = score_completions(*rows, pad_token_id=0, shared=way == "ours")
                log_probs.append(output.log_probs.float().cpu())
        return {"log_probs": torch.cat(log_probs), "gradients": gradients}

    def shifted_results(self, pair: str, *, rows_at_once: int | None = None) -> dict:
        """What rounding alone does to the plain way: all positions shifted, which changes nothing else."""
        self.prompt.positions += 17
        try:
            self.step("plain", pair, rows_at_once=rows_at_once)
            return self.results("plain", rows_at_once=rows_at_once)
        finally:
            self.prompt.positions -= 17


def with_adapter(model):
    from peft import LoraConfig, get_peft_model

    from veripo_trl.model.policy import LANGUAGE_MODEL_LINEAR

    model.requires_grad_(False)
    # With LoRA's usual start at 0, half of the gradients would be 0.
    config = LoraConfig(r=64, lora_alpha=128, target_modules=LANGUAGE_MODEL_LINEAR, init_lora_weights=False)
    return get_peft_model(model, config)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


TOO_LARGE = "does not fit"
ENOUGH_S = 75  # a way whose two updates took longer has no third, unless `--repeats` asks for it


def build(part: str, args, folder: Path, *, prompt_tokens: int, completion: int, group: int) -> Part:
    """As the command line asks: on a GPU with an adapter, in half precision, with activation checkpointing."""
    half = args.device != "cpu"
    dtype = torch.bfloat16 if half else torch.float32
    model, processor = random_model(args.shape, device=args.device, dtype=dtype)
    encoder, rows = video_questions(model, processor, folder, prompt_tokens=prompt_tokens, side=SIDE[args.shape])
    reference = None if half or part == "grpo" else random_model(args.shape)[0]
    model = with_adapter(model) if half else model
    made = Part(part, model, encoder, rows, folder, half=half, checkpointing=half, reference=reference)
    made.load(encoder.encode(rows[0]), completion=completion, group=group)
    return made


def serve(connection, part, sizes, way, pair, args, folder) -> None:
    """One process: build, then step whenever asked. Ends with TOO_LARGE where the GPU's memory does not suffice."""
    torch.set_num_threads(args.threads)
    prompt_tokens, completion, group = sizes
    try:
        ready = build(part, args, folder, prompt_tokens=prompt_tokens, completion=completion, group=group)
        if pair == "features given":
            ready.hold_features()
        gc.collect()
        before = resident_bytes(ready.device)
        connection.send("ready")
        while (message := connection.recv()) == "step":
            connection.send(ready.step(way, pair))
        memory_mb = (peak_bytes(ready.device) - before) / 1e6
        computed = {"tokens": ready.tokens, "patches": ready.patches, "memory_mb": memory_mb}
        results = ready.results(way)
        if ready.half and way == "plain":
            results["shifted"] = ready.shifted_results(pair)
        torch.save(results, message)
        connection.send(computed)
    except torch.OutOfMemoryError:
        connection.send(TOO_LARGE)


def measure(part: str, sizes: tuple[int, int, int], pair: str, args, folder: Path) -> dict:
    """Both ways of one case. A way that does not fit has no "file" and no times."""
    if args.device == "cpu":
        return take_turns(("ours", "plain"), part, sizes, pair, args, folder)
    return {way: take_turns((way,), part, sizes, pair, args, folder)[way] for way in ("ours", "plain")}


def take_turns(ways: tuple[str, ...], part: str, sizes: tuple[int, int, int], pair: str, args, folder: Path) -> dict:
    context = multiprocessing.get_context("spawn")  # a fork of a process whose OpenMP has run would hang
    found, ends = {way: {"seconds": []} for way in ways}, {}
    for way in ways:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, part, sizes, way, pair, args, folder), daemon=True)
        process.start()
        theirs.close()
        ends[way] = ours, process
    too_large = {way for way, (connection, _) in ends.items() if connection.recv() == TOO_LARGE}
    for _ in range(args.repeats or (3 if sizes[0] > 2048 else 7)):
        for way in sorted(set(ways) - too_large):
            done = found[way]["seconds"]
            if not args.repeats and len(done) > 1 and sum(done) > ENOUGH_S:
                continue
            connection = ends[way][0]
            connection.send("step")
            if (seconds := connection.recv()) == TOO_LARGE:
                too_large.add(way)
            else:
                found[way]["seconds"].append(seconds)
    for way, (connection, process) in ends.items():
        if way not in too_large:
            file = folder / f"{way}.pt"
            connection.send(str(file))
            if (computed := connection.recv()) == TOO_LARGE:
                too_large.add(way)
            else:
                found[way] |= computed | {"file": str(file), "median_s": statistics.median(found[way]["seconds"])}
        process.join()
    return found


def differences(ours: dict, plain: dict) -> dict:
    """Of log-probabilities, in nats, and of gradients, relative; and their limits.

    Args:
        ours, plain: of `Part.results`; in half precision `plain` has the same under "shifted", too.
    """
    if ours["gradients"].keys() != plain["gradients"].keys():
        raise RuntimeError("The two ways give gradients to different parameters.")
    apart = gradients_apart(ours["gradients"], plain["gradients"])
    log_probs = (ours["log_probs"] - plain["log_probs"]).abs()
    # NaN if one is
    result = {"log_probs": float(log_probs.max()), "gradients": float(apart["largest"]), "limits": LIMITS}
    if "shifted" in plain:
        shifted = plain["shifted"]
        noise = float((shifted["log_probs"] - plain["log_probs"]).abs().mean())
        gradient_noise = float(gradients_apart(shifted["gradients"], plain["gradients"])["all"])
        result |= {"log_probs, mean": float(log_probs.mean()), "rounding, mean": noise}
        result |= {"gradients, all": float(apart["all"]), "rounding, gradients": gradient_noise}
        result["limits"] = {"log_probs, mean": HALF_BOUND * noise, "gradients, all": HALF_BOUND * gradient_noise}
    return result


def gradients_apart(found: dict, expected: dict) -> dict[str, torch.Tensor]:
    """Relative differences: the largest of a parameter, and that of all parameters together."""
    expected = {name: value.float() for name, value in expected.items()}
    apart = torch.stack([(found[name].float() - value).norm() for name, value in expected.items()])
    norms = torch.stack([value.norm() for value in expected.values()])
    # One whose gradient is rounding errors is measured by the others'.
    largest = (apart / norms.clamp(min=1e-3 * norms[norms > 0].median())).max()
    return {"largest": largest, "all": apart.norm() / norms.norm()}


def over_limits(apart: dict) -> bool:
    return not all(apart[name] <= limit for name, limit in apart["limits"].items())  # NaN is over, too


def run_case(part: str, prompt: int, completion: int, group: int, args, folder: Path) -> dict:
    case = {"part": part, "P": prompt, "C": completion, "G": group}
    case["limit"] = group * (prompt + completion) / (prompt + group * completion)
    for pair in PAIRS:
        print(f"{part}, P {prompt}, C {completion}, G {group}: {pair} …", flush=True)
        found = case[pair] = measure(part, (prompt, completion, group), pair, args, folder)
        if not all("file" in found[way] for way in ("ours", "plain")):
            for way in ("ours", "plain"):
                found[way].pop("file", None)
            continue  # nothing to compare with
        found["ratio"] = found["plain"]["median_s"] / found["ours"]["median_s"]
        found["differences"] = differences(*(torch.load(found[way].pop("file")) for way in ("ours", "plain")))
        if over_limits(found["differences"]):
            raise RuntimeError(f"{part} at P {prompt}, C {completion}, G {group}: too different: {found['differences']}")
    return case


def table_rows(cases: list[dict]) -> list[dict]:
    rows = []
    for case in cases:
        for pair in PAIRS:
            found = case[pair]
            ours, plain = found["ours"], found["plain"]
            apart = found.get("differences", {})

            def both(name, form, ours=ours, plain=plain):
                return " → ".join(format(way[name], form) if name in way else TOO_LARGE for way in (plain, ours))

            rows.append(
                {
                    "part": case["part"],
                    "P / C / G": f"{case['P']} / {case['C']} / {case['G']}",
                    "counted": pair,
                    "plain → ours, s": both("median_s", ".2f"),
                    "ratio": f"{found['ratio']:.2f}" if apart else "–",
                    "limit": f"{case['limit']:.2f}",
                    "tokens": both("tokens", ","),
                    "patches": both("patches", ","),
                    "memory, MB": both("memory_mb", ",.0f"),
                    "log-prob": f"{apart['log_probs']:.0e}" if apart else "–",
                    "gradient": f"{apart['gradients']:.0e}" if apart else "–",
                }
            )
    return rows


def fits(frames: int, way: str, args, folder: Path) -> bool:
    """Whether an update with a video of that many frames stays within `--frames_in_gib` of GPU memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=try_frames, args=(theirs, frames, way, args, folder), daemon=True)
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    if isinstance(found, str):
        raise RuntimeError(f"{frames} frames, {way}: {found}")
    print(f"{frames} frames, {way}: {'fit' if found else 'too many'}", flush=True)
    return found


def try_frames(connection, frames: int, way: str, args, folder: Path) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, args.frames_in_gib * 2**30 / total))
    tokens = frames // 2 * (SIDE[args.shape] // 28) ** 2 + 100
    try:
        ready = build("grpo", args, folder, prompt_tokens=tokens, completion=270, group=8)
        ready.step(way, "everything")
        connection.send(True)
    except torch.OutOfMemoryError:
        connection.send(False)
    except Exception as error:  # reported by the parent, which must not wait for ever
        connection.send(repr(error))


def most(fit, *, start: int, step: int, factor: float = 2.0) -> int:
    """Largest multiple of `step` for which `fit` holds, 0 for none, if it holds up to some number and not beyond.

    From `start` on numbers grow by `factor`, until one does not fit; then the gap is halved.
    """
    low, high = 0, max(step, start // step * step)
    while fit(high):
        low, high = high, max(high + step, int(high * factor) // step * step)
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=["mid", "3b", "7b"], default="mid")
    parser.add_argument("--repeats", type=int, help="updates of each way; default: 2 or 3 where P is over 2,048, else 7")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cases", nargs="+", metavar="PART:P:C:G", help="for example grpo:1024:128:8 dpo:4096:256:2")
    parser.add_argument("--frames_in_gib", type=float, help="only search for the most frames that fit in so much memory")
    parser.add_argument("--json", type=Path, help="default: results/bench_update[_cuda_SHAPE[_frames]].json, beside this")
    args = parser.parse_args()
    name = "" if args.device == "cpu" else f"_cuda_{args.shape}" + ("_frames" if args.frames_in_gib else "")
    file = args.json or ROOT / "speed" / "results" / f"bench_update{name}.json"
    described = {
        "machine": describe_machine(), "device": args.device, "shape": args.shape, "threads": args.threads,
        "repeats": args.repeats,
    }  # fmt: skip
    cases = CASES[args.device]
    if args.cases:
        cases = [(name, *map(int, sizes)) for name, *sizes in (case.split(":") for case in args.cases)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.frames_in_gib:
            frames = {}
            for way in ("plain", "ours"):
                frames[way] = most(lambda count, way=way: fits(count, way, args, folder), start=64, step=16)
            side = SIDE[args.shape]
            print(f"Most frames of {side} × {side} in {args.frames_in_gib} GiB: {frames}")
            stages.write_json(file, described | {"gib": args.frames_in_gib, "side": side, "frames": frames})
            return
        results = []
        for case in cases:
            results.append(run_case(*case, args, folder))
            stages.print_table("", table_rows(results[-1:]))
            stages.write_json(file, described | {"cases": results})
    stages.print_table(f"GRPO update and DPO step, {args.shape} model on {args.device}", table_rows(results))
    last = results[-1]
    if not all("ratio" in last[pair] for pair in PAIRS):
        print(f"P {last['P']}, C {last['C']}, G {last['G']}: {TOO_LARGE}, nothing to compare with")
        return
    ratios = ", ".join(f"{last[pair]['ratio']:.2f}x {pair}" for pair in PAIRS)
    largest = {name: max(last[pair]["differences"][name] for pair in PAIRS) for name in LIMITS}
    print(
        f"P {last['P']}, C {last['C']}, G {last['G']}: {ratios} (limit {last['limit']:.2f}x); largest difference "
        f"{largest['log_probs']:.1e} in log-probabilities, {largest['gradients']:.1e} in gradients, relative"
    )


if __name__ == "__main__":
    main()
