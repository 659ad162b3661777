"""A group's prompt computed once gives what whole rows give: log-probabilities, entropies, gradients, loss curves."""

import logging
import pickle
import weakref
from itertools import product

import pytest
import torch
from accelerate import Accelerator
from helpers import fixed_completions, give_completions, masked_attention, random_pieces
from helpers import make_grpo_trainer as make_trainer
from trl.trainer.utils import add_fused_lm_head

from veripo_trl.model import features
from veripo_trl.model.inputs import vision_inputs
from veripo_trl.shared_prompt import attention as prefix_attention
from veripo_trl.shared_prompt import scoring as shared_prefix
from veripo_trl.shared_prompt.attention import PackedLayout, attend
from veripo_trl.shared_prompt.rollout import sample_completions
from veripo_trl.shared_prompt.scoring import prefix_can_be_shared, score_completions

KINDS = ["qwen2_5_vl", "qwen3_vl"]
GROUPS = [3, 1, 2, 3, 2]  # completions of each of the mixed rows: text, image, video, two videos, image + video


@pytest.fixture(scope="module")
def batches(load, mixed_rows):
    """`batches(kind) -> (prompts, completion_ids, completion_mask)`: ragged, one row with nothing to score."""
    made = {}

    def batch(kind):
        if kind not in made:
            _, encoder = load(kind)
            encoded = [encoder.encode(row) for row in mixed_rows]
            prompts = [prompt for prompt, count in zip(encoded, GROUPS, strict=True) for _ in range(count)]
            completions = fixed_completions(encoder.processor.tokenizer, len(prompts))
            width = max(map(len, completions))
            ids = torch.full((len(prompts), width), encoder.processor.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, completion in enumerate(completions):
                ids[row, : len(completion)] = torch.tensor(completion)
                mask[row, : len(completion)] = row != 4
            made[kind] = prompts, ids, mask
        return made[kind]

    return batch


def full(model):
    return model


def trained_tower(model):
    model.model.visual.requires_grad_(True)
    return model


def lora(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=r".*language_model\..*\.(q_proj|v_proj|down_proj)", init_lora_weights=False)
    return get_peft_model(model, config)


def checkpointed(reentrant, wrap):
    def prepare(model):
        model = wrap(model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    return prepare


def half(model):
    return model.to(torch.bfloat16)


PREPARED = {
    "full": full,
    "trained-tower": trained_tower,
    "lora": lora,
    "checkpointed": checkpointed(False, full),
    "checkpointed-reentrant": checkpointed(True, full),
    "checkpointed-tower": checkpointed(False, trained_tower),
    "checkpointed-lora": checkpointed(True, lora),
}


def score(model, batch, *, shared, rows=slice(None)):
    """Values and gradients of a loss that weighs every log-probability and entropy differently."""
    prompts, ids, mask = batch
    unwrapped = model.get_base_model() if hasattr(model, "peft_config") else model
    model.zero_grad()
    output = score_completions(
        model, unwrapped, prompts[rows], ids[rows], mask[rows], pad_token_id=0, shared=shared
    )
    weights = torch.linspace(-1, 1, output.log_probs.numel()).view(output.log_probs.shape)
    (output.log_probs * weights + 0.1 * output.entropy * weights.flip(0)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output, gradients


def largest_relative(gradients, expected) -> float:
    """Largest relative difference of a parameter's gradient; a gradient of rounding errors is measured by the rest's."""
    assert gradients.keys() == expected.keys()
    typical = torch.stack([value.norm() for value in expected.values()]).median()
    return max(
        float((gradients[name] - value).norm() / value.norm().clamp(min=1e-3 * typical))
        for name, value in expected.items()
    )


@pytest.fixture
def fused(load):
    def build(kind, prepare):
        model, encoder = load(kind)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        model = prepare(model)
        model.train()
        return model, encoder

    return build


@pytest.mark.parametrize(
    "kind, prepared", [*product(KINDS, PREPARED), ("qwen3_5", "checkpointed-tower"), ("qwen3_5", "lora")]
)
def test_exact(kind, prepared, fused, batches):
    """Text, image, video and mixed prompts of different lengths, groups of 1 to 3, ragged completions, one batch."""
    model, _ = fused(kind, PREPARED[prepared])
    found, gradients = score(model, batches(kind), shared=True)
    expected, plain_gradients = score(model, batches(kind), shared=False)
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)
    assert not found.log_probs[4].any() and found.log_probs[3].any()
    assert largest_relative(gradients, plain_gradients) < 1e-4
    assert ("visual" in str(list(gradients))) == ("tower" in prepared)


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_5"])
def test_a_batch_smaller_than_a_group_shares_what_it_can(kind, fused, batches):
    """Rows 5 to 8: the end of one group and the beginning of the next; then a batch whose only row scores nothing."""
    model, _ = fused(kind, full)
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    rows = slice(5, 8)
    found, gradients = score(model, batches(kind), shared=True, rows=rows)
    expected, plain_gradients = score(model, batches(kind), shared=False, rows=rows)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=0)
    assert largest_relative(gradients, plain_gradients) < 1e-4
    prompts, _, mask = batches(kind)
    tokens = len(prompts[5]) - 1 + len(prompts[6]) - 1 + int(mask[rows].sum())
    assert prompts[5] is not prompts[6] and prompts[6] is prompts[7]
    assert seen == [(1, tokens), (3, max(map(len, prompts[rows])) + mask.size(1))]  # no token twice, no padding
    found, gradients = score(model, batches(kind), shared=True, rows=slice(4, 5))
    assert not found.log_probs.any() and gradients and not any(value.any() for value in gradients.values())


def test_bfloat16_is_as_near_as_rounding(fused, batches):
    """Against float32 results of the same rounded weights, the packed pass is no further off than plain rows."""
    model, _ = fused("qwen2_5_vl", half)
    prompts, ids, mask = batches("qwen2_5_vl")
    found, gradients = score(model, batches("qwen2_5_vl"), shared=True)
    plain, plain_gradients = score(model, batches("qwen2_5_vl"), shared=False)
    for prompt in prompts:
        prompt.features = None  # bfloat16's
    exact, exact_gradients = score(model.float(), batches("qwen2_5_vl"), shared=False)
    for prompt in prompts:
        prompt.features = None
    error, plain_error = ((part.log_probs.float() - exact.log_probs).abs() for part in (found, plain))
    assert error.max() < 2 * plain_error.max() + 1e-3 and error.mean() < 1.5 * plain_error.mean()
    errors = [
        sum((part[name].float() - value).norm() ** 2 for name, value in exact_gradients.items())
        for part in (gradients, plain_gradients)
    ]
    assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_5"])
def test_qlora(kind, model_paths, batches):
    """4-bit weights on CPU: dequantized alike for both, so that only the order of sums differs."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from veripo_trl.model.policy import LANGUAGE_MODEL_LINEAR, load_policy

    model, _ = load_policy(
        str(model_paths[kind]),
        lora=LoraConfig(r=4, target_modules=LANGUAGE_MODEL_LINEAR, init_lora_weights=False),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
    model.train()
    found, gradients = score(model, batches(kind), shared=True)
    expected, plain_gradients = score(model, batches(kind), shared=False)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=0)
    assert largest_relative(gradients, plain_gradients) < 1e-4


# Attention by itself


def varlen_forward(query, key, value, pieces, causal, scale):
    """What a variable-length kernel computes from cumulative lengths alone, as torch documents it."""
    out, lse = torch.zeros_like(query), torch.zeros(query.size(1), query.size(0))
    for q, k in zip(pieces.query_ends.unfold(0, 2, 1).tolist(), pieces.key_ends.unfold(0, 2, 1).tolist(), strict=True):
        scores, values = varlen_scores(query[slice(*q)], key[slice(*k)], value[slice(*k)], causal, scale)
        lse[:, slice(*q)] = scores.logsumexp(-1)
        out[slice(*q)] = (scores.softmax(-1) @ values).transpose(0, 1)
    return out, lse


def varlen_backward(grad, query, key, value, out, lse, pieces, causal, scale):
    """Flash attention's formula: probabilities rebuilt from the log-sum-exp that is handed over."""
    grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    for q, k in zip(pieces.query_ends.unfold(0, 2, 1).tolist(), pieces.key_ends.unfold(0, 2, 1).tolist(), strict=True):
        q, k = slice(*q), slice(*k)
        scores, values = varlen_scores(query[q], key[k], value[k], causal, scale)
        probs = (scores - lse[:, q, None]).exp()
        d_out, own = grad[q].transpose(0, 1), out[q].transpose(0, 1)
        d_scores = probs * (d_out @ values.mT - (d_out * own).sum(-1, keepdim=True)) * query.size(-1) ** -0.5
        repeats = query.size(1) // key.size(1)
        d_key = (d_scores.mT @ query[q].transpose(0, 1)).unflatten(0, (-1, repeats)).sum(1)
        d_value = (probs.mT @ d_out).unflatten(0, (-1, repeats)).sum(1)
        keys = key[k].transpose(0, 1).repeat_interleave(repeats, 0)
        for whole, place, part in zip(grads, (q, k, k), (d_scores @ keys, d_key, d_value), strict=True):
            whole[place] = part.transpose(0, 1)
    return grads


def varlen_scores(query, key, value, causal, scale):
    assert scale is None
    keys, values = (t.transpose(0, 1).repeat_interleave(query.size(1) // key.size(1), 0) for t in (key, value))
    scores = query.transpose(0, 1) @ keys.mT * query.size(-1) ** -0.5
    if causal:
        assert query.size(0) == key.size(0)
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return scores, values


@pytest.mark.parametrize("way", ["cpu kernel", "emulated variable-length kernel", "gathered keys"])
@pytest.mark.parametrize("prefixes, segments", [([7, 5], [[3, 1, 4], [2]]), ([1], [[6]]), ([40], [[9] * 8])])
@pytest.mark.parametrize("segments_only", [False, True])
def test_attention_is_that_of_the_written_out_mask(way, prefixes, segments, segments_only, monkeypatch):
    layout = PackedLayout(prefixes, segments, "cpu")
    tensors = random_pieces(layout, dtype=torch.float32)
    if way == "emulated variable-length kernel":
        monkeypatch.setattr(prefix_attention, "kernel_for", lambda query: (varlen_forward, varlen_backward))
    if way == "gathered keys":
        monkeypatch.setattr(prefix_attention, "kernel_for", lambda query: None)
    start = layout.prefix_tokens if segments_only else 0
    found = attend(*tensors, layout, segments_only=segments_only)[start:]
    expected = masked_attention(*tensors, layout)[start:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((found * weights).sum(), tensors)
    for gradient, want in zip(gradients, torch.autograd.grad((expected * weights).sum(), tensors), strict=True):
        torch.testing.assert_close(gradient, want, atol=1e-5, rtol=1e-4)


def test_the_gpu_kernels_are_called_as_torch_declares_them():
    """Shapes and order of arguments, on fake CUDA tensors: no GPU computes here."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layout = PackedLayout([7, 5], [[3, 1, 4], [2]], "cuda")
        query, key, value = (
            torch.empty(22, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)
        )  # fmt: skip
        for pieces, causal, part in (
            (prefix_attention.own_pieces(layout, False), True, (query, key, value)),
            (prefix_attention.own_pieces(layout, True), True, (query[12:], key[12:], value[12:])),
            (prefix_attention.on_prefixes(layout), False, (query[12:], key[:12], value[:12])),
        ):
            out, lse = prefix_attention.cuda_forward(*part, pieces, causal, 0.125)
            assert out.shape == part[0].shape and lse.shape == (4, part[0].size(0)) and lse.dtype == torch.float32
            grads = prefix_attention.cuda_backward(out, *part, out, lse, pieces, causal, 0.125)
            assert [grad.shape for grad in grads] == [tensor.shape for tensor in part]


def test_the_last_layer_leaves_out_the_prefix(fused, batches, monkeypatch):
    """Its MLP and its own attention run on the segments only, and on whole rows again without a layout."""
    model, _ = fused("qwen2_5_vl", full)
    prompts, ids, mask = batches("qwen2_5_vl")
    packed = shared_prefix.Packed(prompts, ids, mask)
    whole, segments = packed.input_ids.size(1), packed.flat_index.numel()
    widths, queries = [], []
    for layer in model.model.language_model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: widths.append(args[0].size(1)))

    def counted_forward(query, *args, forward=prefix_attention.cpu_forward):
        queries.append(len(query))
        return forward(query, *args)

    monkeypatch.setattr(prefix_attention, "cpu_forward", counted_forward)
    with torch.no_grad():
        score_completions(model, model, prompts, ids, mask, pad_token_id=0)
    layers = len(model.model.language_model.layers)
    assert widths == [whole] * (layers - 1) + [segments]
    assert queries == [whole, segments] * (layers - 1) + [segments, segments]
    widths.clear()
    with torch.no_grad():
        score_completions(model, model, prompts, ids, mask, pad_token_id=0, shared=False)
    assert widths == [max(map(len, prompts)) + ids.size(1)] * layers


# Features


def test_features_do_not_travel(fused, batches):
    """They belong to the towers of one process."""
    model, _ = fused("qwen2_5_vl", full)
    prompt = batches("qwen2_5_vl")[0][4]
    vision_inputs(model, [prompt], "cpu")
    assert prompt.features
    copied = pickle.loads(pickle.dumps(prompt))
    assert copied.features is None and prompt.features
    assert torch.equal(torch.from_numpy(copied.input_ids), torch.from_numpy(prompt.input_ids))


def count_tower_calls(model):
    calls = []
    model.model.visual.register_forward_pre_hook(lambda *args: calls.append(1))
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_tower_runs_once_for_rollout_update_and_reference(kind, fused, batches, load):
    model, encoder = fused(kind, full)
    prompts, ids, mask = batches(kind)
    for prompt in prompts:
        prompt.features = None
    calls = count_tower_calls(model)
    sample_completions(model, prompts, pad_token_id=0, config=encoder.config, do_sample=False, max_new_tokens=2)
    assert len(calls) == 2  # all images, all videos
    for shared in (True, False):
        score(model, (prompts, ids, mask), shared=shared)
    assert len(calls) == 2
    reference, _ = load(kind)  # the same checkpoint once more, as a reference with full weights is
    reference.requires_grad_(False)
    calls = count_tower_calls(reference)
    vision_inputs(reference, prompts, "cpu")
    assert calls == []
    reference.model.visual.patch_embed.proj.weight.add_(0.01)
    vision_inputs(reference, prompts, "cpu")
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["trained", "step", "adapter", "checkpoint"])
def test_no_stale_features(change, fused, batches):
    """Whatever may change a tower's features makes the next pass compute them."""
    model, _ = fused("qwen2_5_vl", full)
    prompts, tower = batches("qwen2_5_vl")[0], model.model.visual
    for prompt in prompts:
        prompt.features = None
    first = vision_inputs(model, prompts, "cpu")["mm_encoder_outputs"]["video"].pooler_output
    if change == "trained":
        tower.merger.requires_grad_(True)
        assert "pixel_values_videos" in vision_inputs(model, prompts, "cpu")
        return
    if change == "adapter":
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False))
        wrapped.requires_grad_(False)  # as for an adapter that is switched off
        assert "pixel_values_videos" in vision_inputs(model, prompts, "cpu")
        return
    if change == "step":
        with torch.no_grad():
            tower.patch_embed.proj.weight.mul_(1.1)
    else:
        model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
    second = vision_inputs(model, prompts, "cpu")["mm_encoder_outputs"]["video"].pooler_output
    assert not torch.equal(first[0], second[0])
    assert len(first) == len(second)


def test_features_are_freed_with_their_prompt(fused, batches, load, mixed_rows):
    model, encoder = fused("qwen2_5_vl", full)
    prompt = encoder.encode(mixed_rows[2])
    vision_inputs(model, [prompt], "cpu")
    held = weakref.ref(prompt.features[model.model.visual].items["video"][0])
    assert held() is not None
    del prompt
    assert held() is None
    assert not features.tower_is_frozen(trained_tower(model).model.visual)


# The check at the first batch, and whole runs


@pytest.mark.parametrize("precision", [full, half])
def test_the_first_batch_is_checked(precision, fused, batches, monkeypatch, caplog):
    model, _ = fused("qwen2_5_vl", precision)
    prompt = batches("qwen2_5_vl")[0][4]
    prompt.features = None
    check = {"pad_token_id": 0, "accelerator": Accelerator(cpu=True)}
    assert prefix_can_be_shared(model, model, prompt, **check)
    assert model.training

    def positions_off_by_one(self, *args, pack=shared_prefix.Packed.__init__):
        pack(self, *args)
        self.positions[:, :, sum(self.prefixes) + 1 :] += 1

    logger = logging.getLogger("veripo_trl.shared_prompt.scoring")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(shared_prefix.Packed, "__init__", positions_off_by_one)
    assert not prefix_can_be_shared(model, model, prompt, **check)
    assert "SHARED PROMPTS ARE OFF" in caplog.text and "shared_prefix: false" in caplog.text


def wrong_gradient(*args, backward=prefix_attention.cpu_backward):
    d_query, d_key, d_value = backward(*args)
    return d_query, d_key * 1.2, d_value


def no_kernel(*args):
    raise NotImplementedError("no kernel image is available")


@pytest.mark.parametrize(
    ("name", "kernel", "message"),
    [
        ("cpu_backward", wrong_gradient, "results or gradients are off by"),
        ("cpu_backward", no_kernel, "the attention kernel failed (no kernel image is available)"),
        ("cpu_backward", lambda *args: [part * torch.nan for part in args[1:4]], "results or gradients are off by nan"),
    ],
)
@pytest.mark.parametrize("precision", [full, half])
def test_the_first_batch_tries_the_kernel(precision, name, kernel, message, fused, batches, monkeypatch, caplog):
    """Its gradients too, which a comparison of log-probabilities does not see."""
    model, _ = fused("qwen2_5_vl", precision)
    monkeypatch.setattr(logging.getLogger("veripo_trl.shared_prompt.scoring"), "propagate", True)
    monkeypatch.setattr(prefix_attention, name, kernel)
    check = {"pad_token_id": 0, "accelerator": Accelerator(cpu=True)}
    assert not prefix_can_be_shared(model, model, batches("qwen2_5_vl")[0][4], **check)
    assert "SHARED PROMPTS ARE OFF" in caplog.text and message in caplog.text


def test_other_attention_takes_the_plain_path_and_says_so(fused, batches, monkeypatch, caplog):
    model, _ = fused("qwen2_5_vl", full)
    expected, _ = score(model, batches("qwen2_5_vl"), shared=False)
    monkeypatch.setattr(logging.getLogger("veripo_trl.shared_prompt.scoring"), "propagate", True)
    monkeypatch.setattr(shared_prefix, "Packed", None)
    model.set_attn_implementation("eager")
    for _ in range(2):
        found, _ = score(model, batches("qwen2_5_vl"), shared=True)
    assert caplog.text.count("Every row computes its prompt for itself: attn_implementation 'eager'") == 1
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=0)
    model.set_attn_implementation("sdpa")
    config = model.config.get_text_config()
    for name, value in (
        ("layer_types", ["full_attention", "chunked_attention"]),
        ("layer_types", ["sliding_attention"] * 2),
        ("attention_dropout", 0.1),
        ("output_router_logits", True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(config, name, value, raising=False)
            assert shared_prefix.why_not_shared(model)
    assert shared_prefix.why_not_shared(model) is None


def test_a_model_that_ignores_the_layout_is_found_out(fused, batches, monkeypatch):
    model, _ = fused("qwen2_5_vl", full)

    def use_and_replace(model, use=shared_prefix.use_shared_prefix):
        use(model)
        model.set_attn_implementation("eager")

    monkeypatch.setattr(shared_prefix, "use_shared_prefix", use_and_replace)
    with pytest.raises(RuntimeError, match="attended as packed"):
        score(model, batches("qwen2_5_vl"), shared=True)


def test_a_vision_token_in_a_completion_is_refused(fused, batches):
    model, encoder = fused("qwen2_5_vl", full)
    prompts, ids, mask = batches("qwen2_5_vl")
    ids = ids.clone()
    ids[1, 1] = encoder.config.video_token_id
    with pytest.raises(RuntimeError, match="A completion has video token"):
        score(model, (prompts, ids, mask), shared=True)


@pytest.mark.parametrize(
    "options", [{"loss_type": "bnpo"}, {"gradient_checkpointing": True, "beta": 0.1, "num_iterations": 2}]
)
def test_a_run_has_the_same_loss_curve_with_and_without(options, load, mixed_rows, tmp_path, monkeypatch):
    curves = []
    for shared in (True, False):
        model, encoder = load()
        if "beta" in options:
            model = lora_with_seed(model)
        trainer = make_trainer(
            model, encoder, mixed_rows, tmp_path / str(shared), shared_prefix=shared, max_steps=3, logging_steps=1,
            per_device_train_batch_size=5, gradient_accumulation_steps=2, learning_rate=1e-2, **options,
        )  # fmt: skip
        give_completions(trainer, fixed_completions(encoder.processor.tokenizer, 10), monkeypatch)
        trainer.reward_funcs = [lambda completions, **kwargs: [float(n % 3) for n in range(len(completions))]]
        trainer.train()
        assert trainer.shares_prompts == shared == trainer.args.shared_prefix
        curves.append([(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log])
    shared, plain = torch.tensor(curves)
    assert len(shared) == 3 and (shared[1:].abs() > 1e-3).all() and shared[0, 1] != shared[-1, 1]
    torch.testing.assert_close(shared, plain, atol=2e-5, rtol=1e-3)


def lora_with_seed(model):
    torch.manual_seed(0)
    return lora(model)
