"""GRPO-CARE: the bonus by its worked table, and likelihoods under a slow copy of the policy."""

import math

import pytest
import torch
from helpers import make_grpo_trainer, make_tiny_policy, plain_log_probs, state, video_rows

from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.errors import ConfigError, VeripoError
from veripo_trl.methods import with_methods
from veripo_trl.methods.care import FILE, CAREOptions, answer_tokens, care_bonus, thinking_of
from veripo_trl.methods.t_grpo import TGRPOOptions, advantages
from veripo_trl.trainers.grpo import VideoGRPOTrainer

NAN = float("nan")


@pytest.mark.parametrize(
    ("accuracy", "likelihood", "margin", "bonus"),
    [
        ([1, 1, 0, 0], [0.9, 0.5, 0.99, 0.1], 0, [0.5, 0, 0, 0]),
        ([1, 1, 1, 1], [0.5] * 4, 0, [0.5] * 4),
        ([1, 1, 1], [0.1] * 3, 0, [0.5] * 3),  # whose mean in float32 is above each
        ([0, 0, 0, 0], [0.9] * 4, 0, [0] * 4),
        ([1, 1, 0, 0], [0.95, 0.95, 0.2, 0.2], 0, [0.5, 0.5, 0, 0]),  # .99 and .96, both capped
        ([1, 1, 0, 0], [0.8, 0.79, 0.2, 0.2], 0, [0.5, 0, 0, 0]),
        ([1, 1, 0, 0], [0.8, 0.79, 0.2, 0.2], 0.01, [0.5, 0.5, 0, 0]),
        ([1, 0, 0, 0], [0.2, 0.9, 0.9, 0.9], 0, [0.5, 0, 0, 0]),
        ([0.8, 0.4, 0.2, 0.1], [0.2, 0.1, 0.9, 0.9], 0, [0.4, 0, 0, 0]),  # graded: of the mean, and over 0.1
        ([0.09, 0.08, 0, 0], [0.9] * 4, 0, [0] * 4),
        ([0.12, 0.08, 0, 0], [0.9] * 4, 0, [0.06, 0, 0, 0]),
        ([1, NAN, 0, 0], [0.2, 0.9, 0.9, 0.9], 0, [0.5, 0, 0, 0]),
        ([NAN] * 4, [0.0] * 4, 0, [0] * 4),
    ],
)
def test_bonus(accuracy, likelihood, margin, bonus):
    given = torch.tensor([accuracy]).float(), torch.tensor([likelihood]).float()
    assert (0.5 * care_bonus(*given, margin=margin))[0].tolist() == pytest.approx(bonus)


def test_who_does_not_count_earns_none_and_is_not_compared_with():
    accuracy, likelihood = torch.ones(1, 3), torch.tensor([[0.9, 0.3, 0.2]])
    assert care_bonus(accuracy, likelihood, margin=0).tolist() == [[1, 0, 0]]
    counted = torch.tensor([[False, True, True]])
    assert care_bonus(accuracy, likelihood, margin=0, counted=counted).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([1.5, 1, 0, 0], [1.1665, 0.4999, -0.8332, -0.8332]), ([1, 1, 0, 0], [0.8659, 0.8659, -0.8659, -0.8659])],
)
def test_advantages_of_the_worked_rewards(rewards, expected):
    assert advantages(torch.tensor([rewards]).float(), "group")[0].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("<think>so B</think><answer>B</answer>", "B"),
        ("<think>é — 蓝 🙂</think><answer> the 蓝 🙂\n</answer>", "the 蓝 🙂"),  # tokens that are parts of a letter
        ("<think>B</think><answer>B</answer><|im_end|>", "B"),
        ("<answer></answer>", None),
        ("<think>so B</think>", None),
        ("<think>so</think><answer>B", None),  # cut off at its last token
        ("<think><answer>A</answer></think><answer>B</answer>", None),
    ],
)
def test_tokens_of_the_answer(text, tokens, load):
    tokenizer = load()[1].processor.tokenizer
    ids = tokenizer(text)["input_ids"]
    found = answer_tokens(ids, tokenizer)
    assert (found is None) == (tokens is None)
    if found:
        inside = tokenizer.decode([ids[place] for place in found])
        assert inside.strip(" >") == tokens  # a token may begin before the answer
        for shorter in (found[1:], found[:-1]):
            assert tokens not in tokenizer.decode([ids[place] for place in shorter])


def test_thinking_is_what_stands_before_the_answer():
    assert thinking_of("<think> so <x>it</x> is </think> <answer>B</answer>") == "so it is"
    assert thinking_of("It is red. <answer>A</answer>") == "It is red."


TEXTS = [
    "<think>red then blue, first is blue: B.</think><answer>B</answer>",
    "<think>B</think><answer>B</answer>",
    "<think>blue then red, first is: B.</think><answer>B</answer>",
    "<think>red then blue: A.</think><answer>A</answer>",
]


@pytest.fixture
def make_trainer(load, media_root, tmp_path, monkeypatch):
    """A group of four on a clip, with fixed completions: three right, of which one thinks no more than its answer."""

    def make(options=None, *, texts=TEXTS, folder="run", names=("care",), policy=None, **changes):
        model, encoder = policy or load()
        own = {"care": options or CAREOptions(care_min_think_tokens=3), "t_grpo": TGRPOOptions(length_range=[1, 9])}
        kind = with_methods(VideoGRPOTrainer, list(names), [own[name] for name in names])
        settings = {
            "num_generations": 4, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 1.0,
            "logging_steps": 1, **changes,
        }  # fmt: skip
        rows = video_rows(media_root, 1)
        trainer = make_grpo_trainer(model, encoder, rows, tmp_path / folder, make=kind, **settings)
        trainer.rollout_store = RolloutStore(tmp_path / folder / "rollouts")
        if texts:
            tokenizer = encoder.processor.tokenizer
            ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]

            def give(self, *args, **kwargs):  # T-GRPO's extra rollouts too
                return [ids[place % len(ids)] for place in range(len(self._active))], None

            monkeypatch.setattr(VideoGRPOTrainer, "_generate_single_turn", give)
        return trainer

    return make


def scored(trainer) -> list[tuple]:
    """What `_earned` is given for the first batch, with what it gives."""
    seen, earned = [], trainer._earned

    def recording(*given):
        seen.append((*given, earned(*given)))
        return seen[-1][-1]

    trainer._earned = recording
    trainer.model.train()
    trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    return seen[0]


@pytest.mark.parametrize("kind", ["full weights", "adapter"])
@pytest.mark.parametrize("shared", [True, False])
def test_likelihoods_are_the_slow_copys(kind, shared, make_trainer, model_paths, media_root, load):
    """Against plain forwards of a policy with the copy's weights; the policy's own are as before, to the last bit."""
    make = load if kind == "full weights" else lambda: make_tiny_policy(model_paths["qwen2_5_vl"])
    trainer, (other, encoder) = make_trainer(policy=make(), shared_prefix=shared), make()
    other.eval()  # no dropout
    texts = [*TEXTS[:3], "<think>no answer is known here</think>"]
    tokenizer = encoder.processor.tokenizer
    completions = [tokenizer(text)["input_ids"] for text in texts]
    trainer._generate_single_turn = lambda *args, **kwargs: (completions, None)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    trainer._slow = {name: p.detach().clone() for name, p in other.named_parameters() if p.requires_grad}
    before = state(trainer.model)
    accuracy, likelihood, think_tokens, earned = scored(trainer)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())

    (row,) = video_rows(media_root, 1)
    expected = []
    for ids in completions[:3]:
        log_probs = plain_log_probs(other, encoder, row, ids)[list(answer_tokens(ids, tokenizer))]
        expected.append(math.exp(log_probs.mean()))
    assert likelihood[0].tolist() == pytest.approx([*expected, 0.0], rel=1e-4)
    own = [math.exp(plain_log_probs(trainer.model, encoder, row, ids)[-4:].mean()) for ids in completions]
    assert likelihood[0, 0].item() != pytest.approx(own[0], rel=1e-2)
    assert accuracy[0].tolist() == [1, 1, 1, 0]
    counts = [len(tokenizer(thinking_of(text))["input_ids"]) for text in texts]
    assert think_tokens[0].tolist() == counts and counts[1] == 1
    best = 0 if expected[0] >= expected[2] else 2
    assert [place for place, value in enumerate(earned[0]) if value] == [best]  # the letter alone is not compared with
    assert trainer._scored["rewards"][:, 1].tolist() == earned[0].tolist()
    logged = {name: trainer._metrics["train"][f"care/{name}"] for name in ("think_is_answer", "bonus_rate")}
    assert logged == {"think_is_answer": [0.25], "bonus_rate": [0.25]}
    trainer._care = CAREOptions(care_likelihood_cap=(cap := expected[0] / 2))
    assert max(trainer._measured(completions)[:, 0].tolist()) == pytest.approx(cap)


def test_the_copy_moves_every_so_many_steps(make_trainer):
    trainer = make_trainer(CAREOptions(), disable_tqdm=True)  # its bar is there in a run only
    trained = trainer._trained()
    with torch.no_grad():
        for parameter in trained.values():
            parameter.zero_()
        trainer._slow_copy()
        for parameter in trained.values():
            parameter.fill_(1.0)
    found = {}
    for step in range(1, 21):
        trainer.state.global_step = step
        trainer.callback_handler.on_step_end(trainer.args, trainer.state, trainer.control)
        found[step] = {float(value) for tensor in trainer._slow.values() for value in tensor.flatten()[:3]}
    assert found[9] == {0.0} and found[19] == found[10] != found[20]
    assert max(found[20]) == pytest.approx(0.009975) == min(found[20])
    trainer.model.to(torch.bfloat16)  # in which steps of 0.005 would round to nothing
    trainer._slow = {}
    assert {value.dtype for value in trainer._slow_copy().values()} == {torch.float32}


def trained(trainer, **options) -> dict:
    trainer.train(**options)
    return state(trainer.model)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_without_weight_the_first_step_is_plain_grpos(make_trainer):
    options = CAREOptions(care_bonus=0.0, care_min_think_tokens=3)
    plain, weightless, ours = (
        trained(make_trainer(given, names=names, folder=f"run{place}"))
        for place, (given, names) in enumerate([(None, ()), (options, ["care"]), (None, ["care"])])
    )
    assert same(weightless, plain) and not same(ours, plain)


def test_a_resumed_run_ends_like_an_unbroken_one(make_trainer, tmp_path):
    """From amid a generation batch, with its checkpoint's copy, which is not the policy that it starts with."""
    options = CAREOptions(care_every_steps=1, care_decay=0.5, care_min_think_tokens=3)
    changes = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2}
    whole = make_trainer(options, folder="whole", **changes)
    expected = trained(whole)
    again = make_trainer(options, folder="again", **changes)
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    found = trained(again, resume_from_checkpoint=str(checkpoint))
    assert same(found, expected) and same(again._slow, whole._slow)
    assert not same(again._slow, expected)
    last, likelihood = again.state.log_history[2], whole.state.log_history[2]["care/likelihood"]
    assert last["care/likelihood"] == likelihood != whole.state.log_history[0]["care/likelihood"]
    (checkpoint / FILE).unlink()
    with pytest.raises(VeripoError, match="of a run without it"):
        again._load_rng_state(str(checkpoint))


def test_evaluation_has_no_bonus(make_trainer):
    trainer = make_trainer(per_device_eval_batch_size=4)
    trainer._measured = None
    metrics = trainer.evaluate(eval_dataset=trainer.train_dataset)
    assert metrics["eval_rewards/care_reward/mean"] == 0.0
    assert not any(key.startswith("eval_care") for key in metrics)


@pytest.mark.parametrize("names", [("care",), ("care", "t_grpo"), ("t_grpo", "care")])
def test_what_no_reward_scores_gets_no_bonus_either(names, make_trainer):
    """Also beside other columns of bonuses, which then stay each their own."""

    def accuracy_reward(completions, **kwargs):
        return [1.0, None, 1.0, 0.0][: len(completions)]

    trainer = make_trainer(CAREOptions(care_margin=1.0, care_min_think_tokens=0), names=names)
    trainer.reward_funcs[0] = accuracy_reward
    scored(trainer)
    stored = trainer.rollout_store.read()
    assert [row["rewards"]["care_reward"] for row in stored] == [1.0, None, 1.0, 0.0]
    for row in stored:
        assert {value is None for value in row["rewards"].values()} == {row is stored[1]}
    assert stored[1]["advantage"] == 0.0 and stored[0]["advantage"] == stored[2]["advantage"] > 0


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"care_accuracy": "tiou"}, {}, "care_accuracy: expected one of rewards .accuracy.; got 'tiou'"),
        ({"care_likelihood_cap": 0.0}, {}, "expected a cap"),
        ({"care_decay": 1.5}, {}, "a decay in"),
        ({"care_every_steps": 0}, {}, "every step or more"),
        ({}, {"multi_objective_aggregation": "normalize_then_sum"}, "no bonus has its size"),
    ],
)
def test_what_it_cannot_do_is_refused(options, changes, message, make_trainer):
    with pytest.raises(ConfigError, match=message):
        make_trainer(CAREOptions(**options), **changes)
