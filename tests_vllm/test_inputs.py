"""Encoded prompts in vLLM's engine: what it samples has the log-probabilities of a plain forward."""

import copy

import pytest
import torch
from conftest import make_row, write_video
from vllm import LLM, SamplingParams

from veripo_trl.model.inputs import model_inputs
from veripo_trl.vllm import inputs as vllm_media
from veripo_trl.vllm.inputs import EngineMismatchError, engine_options, generate_with_vllm, vllm_inputs

KINDS = ["qwen2_5_vl", "qwen3_vl"]
MIXED = ["text", "image", "video", "two-videos", "image-and-video"]


def make_engine(path, encoder, **changes):
    options = engine_options(encoder, dtype=torch.float32, datasets=[{"images": [[0] * 2], "videos": [[0] * 2]}])
    options |= {"max_model_len": 1024, "max_num_seqs": 4, "enforce_eager": True, "logprobs_mode": "processed_logprobs"}
    return LLM(str(path), **{**options, **changes})


@pytest.fixture(scope="module")
def engines(load, model_paths):
    """`engines(kind) -> (engine, model, encoder)`, one of each kind."""
    made = {}

    def get(kind):
        if kind not in made:
            model, encoder = load(kind)
            made[kind] = make_engine(model_paths[kind], encoder), model, encoder
        return made[kind]

    return get


def sampled(engine, prompts, **options):
    """(ids, log-probabilities) of each sample of each prompt."""
    params = SamplingParams(**{"max_tokens": 8, "logprobs": 0, "n": 2, "temperature": 1.0, **options})
    return [
        [(list(o.token_ids), [next(iter(t.values())).logprob for t in o.logprobs]) for o in request.outputs]
        for request in generate_with_vllm(engine, vllm_inputs(engine, prompts), [params] * len(prompts))
    ]


def scored(model, encoder, prompt, completion) -> list[float]:
    """Log-probabilities of a completion by a plain forward."""
    ids = torch.cat([torch.from_numpy(prompt.input_ids), torch.tensor(completion)])[None]
    inputs = model_inputs([prompt], ids, completion_width=len(completion), config=encoder.config)
    with torch.no_grad():
        logits = model(input_ids=ids, **inputs).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_log_probs_of_a_plain_forward(kind, engines, mixed_rows):
    engine, model, encoder = engines(kind)
    prompts = [encoder.encode(row) for row in mixed_rows]
    assert [prompt.question_id for prompt in prompts] == MIXED
    for prompt, samples in zip(prompts, sampled(engine, prompts), strict=True):
        assert len(samples) == 2
        for ids, log_probs in samples:
            assert log_probs == pytest.approx(scored(model, encoder, prompt, ids), abs=1e-4), prompt.question_id


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_stands_for_one_content(kind, engines, media_root, tmp_path):
    """Another clip under the same file name, and the same frames at another speed, are not taken from a cache."""
    engine, model, encoder = engines(kind)
    prompts = []
    for place, (seed, fps) in enumerate([(7, 2), (8, 2), (7, 1)]):
        folder = tmp_path / str(place)
        folder.mkdir()
        write_video(folder / "clip.mp4", frames=6, height=64, width=64, fps=fps, seed=seed)
        prompts.append(encoder.encode(make_row("same", folder, videos=["clip.mp4"])))
    for prompt in prompts:
        ((ids, log_probs),) = sampled(engine, [prompt], n=1, temperature=0.0)[0]
        assert log_probs == pytest.approx(scored(model, encoder, prompt, ids), abs=1e-4)
    keys = [[vllm_media.content_key(i) for i in vllm_media.media_items(p, encoder.config)] for p in prompts]
    assert keys[0] != keys[1]
    # Qwen3-VL has the time in its text, and its pictures really are the same.
    assert (keys[0] == keys[2]) == (kind == "qwen3_vl" and torch.equal(*[p.pixel_values_videos for p in prompts[::2]]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_of_more_tokens_than_one_batch_of_vllm(kind, tmp_path):
    """vLLM takes 4,096 tokens at a time by TRL's setting; a video of more must fit nevertheless."""
    from transformers import AutoConfig

    from veripo_trl.model.policy import load_policy
    from veripo_trl.recipe.arguments import DataArguments
    from veripo_trl.recipe.build import make_encoder
    from veripo_trl.tiny.model import save_tiny_model

    path = save_tiny_model(tmp_path / kind, kind)
    config = AutoConfig.from_pretrained(path)
    config.text_config.max_position_embeddings = 8192
    config.save_pretrained(path)
    model, processor = load_policy(str(path))
    settings = {"prompt_template": "tiny", "fps": 2.0, "max_frames": 140, "min_pixels": 224 * 224}
    encoder = make_encoder(model, processor, DataArguments(**settings, max_pixels=256 * 256))
    write_video(tmp_path / "long.mp4", frames=140, height=224, width=224, seed=5)
    prompt = encoder.encode(make_row("long", tmp_path, videos=["long.mp4"]))
    assert prompt.video_grid_thw.prod() // 4 > (4096 if kind == "qwen2_5_vl" else 3000)
    engine = make_engine(path, encoder, max_model_len=6144)
    ((ids, log_probs),) = sampled(engine, [prompt], n=1)[0]
    assert log_probs == pytest.approx(scored(model, encoder, prompt, ids), abs=1e-4)


def test_what_the_engine_would_see_differently_is_refused(engines, model_paths, mixed_rows):
    engine, _, encoder = engines("qwen2_5_vl")
    prompt = encoder.encode(mixed_rows[2])

    other_fps = copy.copy(prompt)
    other_fps.second_per_grid_ts = [2 / 24]  # what vLLM's own processor assumes
    with pytest.raises(EngineMismatchError, match="position"):
        vllm_inputs(engine, [other_fps])

    other_rule = copy.copy(prompt)  # text after a video starts inside its temporal range, as in transformers 5.3
    other_rule.positions = prompt.positions.copy()
    other_rule.positions[:, -10:] -= 3
    with pytest.raises(EngineMismatchError, match="position"):
        vllm_inputs(engine, [other_rule])

    other_ids = copy.copy(prompt)
    other_ids.input_ids = encoder.encode(mixed_rows[3]).input_ids
    with pytest.raises(EngineMismatchError, match="run of"):
        vllm_inputs(engine, [other_ids])

    text = copy.copy(prompt)
    text.input_ids = encoder.encode(mixed_rows[0]).input_ids
    with pytest.raises(EngineMismatchError, match="more images or videos"):
        vllm_inputs(engine, [text])

    with pytest.raises(ValueError, match="do not fit"):
        sampled(engine, [prompt], max_tokens=1024)


def test_an_engine_that_normalises_pixels_is_refused(load, model_paths, mixed_rows):
    _, encoder = load()
    engine = make_engine(model_paths["qwen2_5_vl"], encoder, mm_device_do_normalize=True)
    with pytest.raises(EngineMismatchError, match="mm_device_do_normalize=False"):
        vllm_inputs(engine, [encoder.encode(mixed_rows[2])])
