"""Answers about perturbed videos: what is shown, by whom they are kept, and the pairs that they make."""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import load_script, make_row

from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.data.schema import RowError
from veripo_trl.errors import ConfigError
from veripo_trl.evaluate.perturb import PERTURBATIONS, perturb
from veripo_trl.loop.check import check_settings
from veripo_trl.loop.plan import LoopError, plan, read_loop
from veripo_trl.verifier.pairs import PairOptions, build_pairs

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
COLUMNS = ("question_id", "problem", "options", "problem_type", "solution", "videos", "images", "data_source")


def recipe(name: str):
    return load_script(f"recipes/{name}.py")


def asked(rows: list[dict]) -> list[dict]:
    return [{"position": n, "key": f"{n}-x", "raw": row, "row": row} for n, row in enumerate(rows)]


@pytest.fixture(scope="module")
def rows(media_root, tmp_path_factory):
    """Three videos under four names, two of them in one row; and a row without."""
    (media_root / "again.mp4").exists() or (media_root / "again.mp4").symlink_to(media_root / "long.mp4")
    videos = {"q0": ["long.mp4"], "q1": ["again.mp4"], "q2": ["wide.mp4", "fast.mp4"], "q3": []}
    return [make_row(name, media_root, videos=found) for name, found in videos.items()]


def test_no_perturbation_leaves_a_video_as_it_was(rows, load):
    encoder = load()[1]
    found = perturb(asked(rows), list(PERTURBATIONS), seed=0)
    assert [(one["row"]["question_id"], one["perturbed"]) for one in found] == [
        (f"q{n}", kind) for n in range(3) for kind in PERTURBATIONS
    ]
    assert len({one["key"] for one in found}) == len(found) == found[-1]["position"] + 1
    own = {row["question_id"]: encoder.encode(row) for row in rows}
    files = {name: (Path(rows[0]["media_root"]) / name).resolve() for row in rows for name in row["videos"]}
    for one in found:
        row, prompt = one["row"], encoder.encode(one["row"])
        true = own[row["question_id"]]
        assert one["true"]["videos"] == next(r["videos"] for r in rows if r["question_id"] == row["question_id"])
        if one["perturbed"] == "no_video":
            assert prompt.pixel_values_videos is None and len(prompt) < len(true)
        elif one["perturbed"] == "another_clip":
            assert len(row["videos"]) == len(one["true"]["videos"])
            assert not {files[name] for name in row["videos"]} & {files[name] for name in one["true"]["videos"]}
        else:  # other pixels at the same times
            assert prompt.input_ids.tolist() == true.input_ids.tolist()
            assert (prompt.positions == true.positions).all()
            assert not prompt.pixel_values_videos.equal(true.pixel_values_videos)
    # By the question and the seed alone.
    alone = perturb(asked(rows)[2:3], ["shuffle", "drop"], seed=0)
    for one, other in zip(alone, (found[8], found[9]), strict=True):
        assert encoder.encode(one["row"]).pixel_values_videos.equal(encoder.encode(other["row"]).pixel_values_videos)
    reseeded = perturb(asked(rows)[:1], ["shuffle"], seed=1)[0]["row"]
    assert not encoder.encode(reseeded).pixel_values_videos.equal(encoder.encode(found[0]["row"]).pixel_values_videos)


def test_frames_are_shuffled_or_held():
    for kind, seed in ((kind, seed) for kind in ("shuffle", "drop") for seed in range(50)):
        for count in (2, 4, 8):
            changed = perturb(asked([make_row("q", "/", videos=["x.mp4"])]), [kind], seed=seed)[0]["row"]["shown"].frames
            clip = type("Clip", (), {"frames": np.arange(count)})
            frames = changed(clip).tolist()
            assert len(frames) == count and frames != list(range(count))
            if kind == "shuffle":
                assert sorted(frames) == list(range(count))
            else:
                kept = sorted(set(frames))
                assert len(kept) == max(1, count // 4) and all(frames[index] == index for index in kept)
                assert frames == sorted(frames)


@pytest.mark.parametrize(
    "kept, kinds, message",
    [(slice(3, 4), ["shuffle"], "none of the 1 has one"), (slice(0, 2), ["another_clip"], "all show long.mp4")],
)
def test_what_cannot_be_perturbed_is_refused(kept, kinds, message, rows):
    with pytest.raises(RowError, match=message):
        perturb(asked(rows)[kept], kinds, seed=0)


def said(answer: str, words: str = "I look") -> str:
    return f"<think>{words}, so the answer is {answer}.</think><answer>{answer}</answer>"


def judged(name, accuracy, *, perturbed=False, text=None, well_formed=True, finish="stop", consistency="consistent"):
    verdict = {"accuracy": accuracy, "format_ok": well_formed, "consistency": consistency, "repetition": 0.0}
    question = {key: value for key, value in make_row("q", "/", videos=["true.mp4"]).items() if key in COLUMNS}
    return {
        **question, "rollout_id": name, "perturbed": perturbed, "completion": text or said("B", name), "policy": "p",
        "finish_reason": finish, "prompt_template": "t", "verdict": {**verdict, "think_tokens": 9, "rollout_id": name},
    }  # fmt: skip


@pytest.mark.parametrize("kinds", [["video"], ["consistency", "penalty", "reflection", "video"]])
def test_pairs_of_a_group(kinds):
    """Rejected: what is wrong and well formed. Never chosen, and no part of the group otherwise."""
    from veripo_trl.data.prompts import load_template

    on = partial(judged, perturbed=True)
    group = [
        judged("own-right", 1.0), judged("own-wrong", 0.0, text=said("A")),
        on("a-same-text", 0.0, text=said("A")), on("b-right", 1.0), on("c-wrong", 0.0),
        on("d-cut", 0.0, finish="length"), on("e-malformed", 0.0, well_formed=False),
        on("f-inconsistent", 0.0, consistency="inconsistent"),
    ]  # fmt: skip
    options = PairOptions(kinds=kinds, max_pairs_per_question=None, max_pairs_per_question_and_kind=None)
    pairs = list(build_pairs([group], options, template=load_template("tiny"), dropped=(dropped := Counter())))
    video = [pair for pair in pairs if pair["kind"] == "video"]
    assert {pair["rejected_id"] for pair in video} == {"c-wrong", "f-inconsistent"}
    assert all(pair["chosen_ids"] == ["own-right"] and pair["videos"] == ["true.mp4"] for pair in video)
    others = {(pair["kind"], pair["rejected_id"]) for pair in pairs} - {("video", "c-wrong"), ("video", "f-inconsistent")}
    assert others == ({("penalty", "own-wrong"), ("reflection", "own-wrong")} if len(kinds) > 1 else set())
    assert dropped["rollouts: on a perturbed video, not wrong or not well formed"] == 3
    # A question with all of its own rollouts right stays one, and takes no pair of another kind from the perturbed.
    solved = [judged("own-right", 1.0), on("c-wrong", 0.0)]
    pairs = list(build_pairs([solved], options, template=load_template("tiny"), dropped=Counter()))
    assert [(pair["kind"], pair["rejected_id"]) for pair in pairs] == [("video", "c-wrong")]


def test_from_rollouts_to_pairs(rows, load, model_paths, tmp_path, capsys):
    """The recipe asks about real clips and goes on where it was broken off; of what is wrong come pairs."""
    policy = str(model_paths["qwen2_5_vl"])
    sample, out = recipe("sample_perturbed"), tmp_path / "perturbed-1"
    template = load()[1].template.hash
    own = {
        "completion_tokens": 9, "finish_reason": "stop", "step": 0, "advantage": 0.0, "policy": policy, "seed": 0,
        "prompt_template": template, "rewards": {"accuracy_reward": 1.0},
    }  # fmt: skip
    store = RolloutStore(tmp_path / "search-1" / "rollouts")
    store.write(
        [
            {**{key: row[key] for key in COLUMNS}, **own, "rollout_id": f"search-1/{n}", "completion": said("B", f"{n}")}
            for n, row in enumerate([*rows, *rows])
        ],
        step=0, part=0, rank=0, reward_names=["accuracy_reward"],
    )  # fmt: skip
    config = {
        "model_name_or_path": policy, "rollouts": str(store.folder), "output_dir": str(out),
        "perturb": ["shuffle", "another_clip"], "media_root": rows[0]["media_root"],
        "engine_options": {"engine": "transformers", "max_new_tokens": 3, "batch_size": 2, "num_workers": 0,
                           "prompt_template": "tiny", "video_max_frames": 4, "video_max_pixels": 56 * 56},
    }  # fmt: skip
    (tmp_path / "sample.yaml").write_text(yaml.safe_dump(config))
    sample.main(["--config", str(tmp_path / "sample.yaml")])
    first = RolloutStore(out / "rollouts").read()
    assert "evaluation_vllm.py --model_path" in capsys.readouterr().out
    assert [one["rollout_id"] for one in first] == [
        f"perturbed-1/{kind}-{n}" for n, kind in enumerate(["shuffle", "another_clip"] * 3)
    ]
    assert json.loads((out / "results.json").read_text())["counts"] == {"rollouts": 6}
    # Broken off after four answers, of which two are now well formed: one wrong, one right by luck.
    journal = out / "rollouts.journal.jsonl"
    head, *lines = journal.read_text().splitlines()
    kept = [json.loads(line) for line in lines[:4]]
    kept[0] |= {"model_output": said("A"), "finish_reason": "stop"}
    kept[1] |= {"model_output": said("B", "another"), "finish_reason": "stop"}
    journal.write_text("\n".join([head, *map(json.dumps, kept)]) + "\n")
    (out / "results.json").unlink()
    sample.main(["--config", str(tmp_path / "sample.yaml")])
    again = RolloutStore(out / "rollouts").read()
    assert [one["completion"] for one in again[:2]] == [said("A"), said("B", "another")]
    assert [one["completion"] for one in again[2:]] == [one["completion"] for one in first[2:]]
    assert [one["videos"] for one in again[:2]] == [["long.mp4"]] * 2 and again[0]["rewards"] == {"accuracy_reward": 0.0}

    # a folder that is no evaluation's own is not written into
    (out / "results.json").unlink()
    (out / "rollouts.journal.jsonl").unlink()
    with pytest.raises(ConfigError, match="which is there and not this evaluation's"):
        sample.main(["--config", str(tmp_path / "sample.yaml")])
    with pytest.raises(ConfigError, match="each once"):
        sample.main(["--config", str(tmp_path / "sample.yaml"), "--perturb", "drop", "drop"])

    verify = recipe("verify_rollouts")
    settings = {"rollouts": [str(store.folder)], "prompt_template": "tiny", "output_dir": str(tmp_path / "verify")}
    settings |= {"perturbed": [str(out)], "kinds": ["consistency", "video"]}
    (tmp_path / "verify.yaml").write_text(yaml.safe_dump(settings))
    verify.main(["--config", str(tmp_path / "verify.yaml")])
    pairs = pq.read_table(next((tmp_path / "verify" / "pairs").glob("*.parquet"))).to_pylist()
    assert {pair["chosen_ids"][0] for pair in pairs} == {"search-1/0", "search-1/4"}
    for pair in pairs:
        assert (pair["kind"], pair["rejected_id"], pair["question_id"]) == ("video", "perturbed-1/shuffle-0", "q0")
        assert pair["videos"] == ["long.mp4"] and pair["prompt"][0]["content"][0]["type"] == "video"
    results = json.loads((tmp_path / "verify" / "results.json").read_text())
    assert results["counts"]["rollouts"] == 8 and results["counts"]["accuracy"] == 1.0
    assert results["counts"]["perturbed"]["rollouts"] == 6 and results["solved"]["solved"] == 4
    assert "perturbed" in capsys.readouterr().out
    for changes in ({"perturbed": []}, {"kinds": ["consistency"]}):
        (tmp_path / "verify.yaml").write_text(yaml.safe_dump({**settings, **changes}))
        with pytest.raises(ConfigError, match="kinds and perturbed: expected both"):
            verify.main(["--config", str(tmp_path / "verify.yaml")])


def test_a_loop_with_video_pairs(tmp_path):
    """The guide's."""
    loop = yaml.safe_load((RECIPES / "configs" / "tiny" / "veripo.yaml").read_text())
    guide = (RECIPES.parent / "docs" / "guide.md").read_text(encoding="utf-8")
    loop |= yaml.safe_load(re.search(r"<!-- video pairs -->\n```yaml\n(.+?)```", guide, re.S)[1])
    search, perturbed, verify, align = loop["iteration"]
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump(loop))
    stages = {stage["name"]: stage for stage in plan(read_loop(str(tmp_path / "loop.yaml")))}
    check_settings(list(stages.values()))
    asks, judges = stages["perturb-2"]["settings"], stages["verify-2"]["settings"]
    assert asks["model_name_or_path"] == "outputs/veripo/search-2" == stages["align-2"]["settings"]["model_name_or_path"]
    assert asks["rollouts"] == "outputs/veripo/search-2/rollouts" == judges["rollouts"][0]
    assert judges["perturbed"] == ["outputs/veripo/perturb-2/rollouts"]
    for iteration in ([search, verify, align], [search, perturbed, {**verify, "overrides": {}}, align]):
        (tmp_path / "loop.yaml").write_text(yaml.safe_dump({**loop, "iteration": iteration}))
        with pytest.raises(LoopError, match="verify-1: expected a stage of sample_perturbed.py before it, and `video`"):
            plan(read_loop(str(tmp_path / "loop.yaml")))
