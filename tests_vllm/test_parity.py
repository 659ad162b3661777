"""docs/parity.md: training's own log-probabilities of what each engine samples, measured again and compared.

WRITE_PARITY=1 writes the table anew.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_inputs import sampled
from test_trainer import make_trainer, short_starts  # noqa: F401  (a fixture)

from veripo_trl.shared_prompt.rollout import cut_at_end, sample_completions
from veripo_trl.vllm import training as backend

FILE = Path(__file__).resolve().parents[1] / "docs" / "parity.md"
FAMILIES = {"qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL", "qwen3_5": "Qwen3.5"}
SHOWN = {
    "image": "image",
    "video": "video",
    "two-videos": "two videos",
    "image-and-video": "image and video",
}
BOUND = 1e-4  # float32
SEEN = 1e-2  # the least that a control must differ by
HALF = {"qwen3_5": (0.2, 0.3)}  # both where vLLM is in bfloat16, as its CPU build has linear attention in nothing else
TOKENS = 12


def one_later(clip):
    clip.frames = np.roll(clip.frames, -1, axis=0)


def twice_as_fast(clip):
    clip.fps *= 2


def encoded(encoder, row, change=None):
    """The row's prompt, read from its files, with its clips changed."""
    clips, images = encoder.read_media(row)
    for clip in clips if change else ():
        change(clip)
    return encoder.encode_media(row, clips, images)


def by_transformers(model, encoder, prompt) -> list[tuple]:
    """(ids, log-probabilities) of two samples, as the rollout without vLLM draws them."""
    steps = []

    def record(input_ids, scores):
        steps.append(scores.log_softmax(-1))
        return scores

    pad = encoder.processor.tokenizer.pad_token_id
    options = {
        "max_new_tokens": TOKENS,
        "do_sample": True,
        "top_k": 0,
        "logits_processor": [record],
    }
    torch.manual_seed(0)
    tokens = sample_completions(
        model, [prompt] * 2, pad_token_id=pad, config=encoder.config, **options
    )
    log_probs = torch.stack(steps, 1).gather(2, tokens[:, :, None])[..., 0].tolist()  # (2, tokens)
    ids = cut_at_end(tokens, [encoder.processor.tokenizer.eos_token_id])
    return [(row, found[: len(row)]) for row, found in zip(ids, log_probs, strict=True)]


def largest_gap(trainer, prompt, samples: list[tuple]) -> float:
    """The largest difference of an engine's log-probabilities from those of the trainer's forward."""
    width, found = max(len(ids) for ids, _ in samples), []
    lines = torch.tensor(
        [[*prompt.input_ids.tolist(), *ids, *[0] * (width - len(ids))] for ids, _ in samples]
    )
    mask = torch.tensor(
        [[1] * (len(prompt) + len(ids)) + [0] * (width - len(ids)) for ids, _ in samples]
    )
    trainer._active = [prompt] * len(samples)
    with torch.no_grad():
        own = trainer._get_per_token_logps_and_entropies(trainer.model, lines, mask, width)[0]
    for row, (ids, engine) in zip(own.tolist(), samples, strict=True):
        found += [abs(a - b) for a, b in zip(row, engine, strict=False)]
    return max(found)


def measure(kind: str, load, rows, folder) -> dict[str, list[float]]:
    """{the row's media: gaps of transformers, of vLLM, and of vLLM with frames, then times, seen differently}."""
    model, encoder = load(kind)
    trainer = make_trainer(
        model, encoder, rows, folder
    )  # whose head has the engine's ban of vision tokens
    model.eval()
    options = {
        "max_tokens": TOKENS,
        "seed": None if kind in HALF else 0,  # a CPU's generator cannot go back, as where a prefill comes in parts
        "logit_bias": trainer.args.generation_kwargs["logit_bias"],
    }
    table = {}
    for row in rows:
        prompt = encoded(encoder, row)  # the trainer's
        gaps = [
            largest_gap(trainer, prompt, by_transformers(model, encoder, encoded(encoder, row)))
        ]
        for change in (None, one_later, twice_as_fast):
            torch.manual_seed(0)
            (samples,) = sampled(
                trainer.vllm_generation.llm, [encoded(encoder, row, change)], **options
            )
            gaps.append(largest_gap(trainer, prompt, samples))
        table[SHOWN[row["question_id"]]] = gaps if row["videos"] else gaps[:2]
    return table


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_table_is_what_is_measured(kind, load, mixed_rows, tmp_path, monkeypatch):
    bound, seen = HALF.get(kind, (BOUND, SEEN))
    if kind in HALF:
        monkeypatch.setattr(backend, "engine_dtype", lambda config, model: torch.bfloat16)
    table = measure(kind, load, mixed_rows[1:], tmp_path)
    lines = {
        f"| {FAMILIES[kind]} | {media} | ": " | ".join(
            [f"{gap:.0e}" for gap in gaps] + ["–"] * (4 - len(gaps))
        )
        + " |"
        for media, gaps in table.items()
    }
    text = FILE.read_text()
    if os.environ.get("WRITE_PARITY"):
        for start, cells in lines.items():
            text = re.sub(rf"^{re.escape(start)}.*$", start + cells, text, flags=re.M)
        FILE.write_text(text)
    for start, cells in lines.items():
        (line,) = (line for line in text.splitlines() if line.startswith(start))
        written = [
            float(cell)
            for cell in line.removeprefix(start).split("|")
            if cell.strip() not in ("", "–")
        ]
        measured = [float(cell) for cell in cells.split("|") if cell.strip() not in ("", "–")]
        assert len(written) == len(measured), line
        for gaps in (written, measured):  # in both, and the controls alike
            assert gaps[0] < BOUND and gaps[1] < bound and min([seen, *gaps[2:]]) >= seen, (start, gaps, line)
        if kind not in HALF:  # whose rounding, and so what is sampled, is the processor's
            assert written[2:] == pytest.approx(measured[2:], rel=0.5), (start, cells, line)
