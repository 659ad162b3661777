"""The relatives' questions on the tiny world: true by the pixels; the own world stays as it was."""

import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from veripo_trl.answers.score import check_solution, score_answer
from veripo_trl.data.rows import load_rows
from veripo_trl.tiny import model as tiny_model
from veripo_trl.tiny.clips import (
    BACKGROUND,
    COLOURS,
    DIGITS,
    FPS,
    NUM_FRAMES,
    SIZE,
    clip_spec,
    draw_clip,
)
from veripo_trl.tiny.judge import conclude, judge
from veripo_trl.tiny.questions import PLANTED_SHARE, SPLITS, make_split
from veripo_trl.tiny.relatives import FAMILIES, SECTIONS, TOKENS, template_texts
from veripo_trl.tiny.relatives import make_split as make_relatives
from veripo_trl.tiny.steps import STYLES
from veripo_trl.tiny.world import WorldError, make_world
from veripo_trl.verifier.judges import judge_by_rules
from veripo_trl.verifier.pairs import RECHECK

SMALL = {"train": 7, "rl": 4, "dev": 2, "heldout": 2}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def test_the_own_world_stays_as_it_was():
    """Clips, questions and vocabulary that published figures come from."""
    drawn = {
        kind: digest(
            b"".join(draw_clip(clip_spec(kind, [0, 1, number])).tobytes() for number in range(20))
        )
        for kind in ("count", "order")
    }
    assert drawn == {"count": "5f23497b4e2a1ed9", "order": "196bf7caf9fd89ed"}
    rows = {split: digest(json.dumps(make_split(split)).encode()) for split in SPLITS}
    assert rows == {
        "train": "2ef36f5c601190de", "rl": "855118bd3bba3584", "dev": "2389cd4b413260ad", "heldout": "67495897e212f3c6"
    }  # fmt: skip
    vocabulary = tiny_model.build_tokenizer().get_vocab()
    assert digest(json.dumps(vocabulary, sort_keys=True).encode()) == "dcb12ec2955710f7"


# ------------------------------------------------------------------------ what is seen in the pixels


def colours_of(frame) -> list[str]:
    return [name for name, colour in COLOURS.items() if (frame == colour).all(-1).any()]


def span_of(frames, colour: str) -> str:
    shown = [number for number, frame in enumerate(frames) if colour in colours_of(frame)]
    assert shown == list(range(shown[0], shown[-1] + 1))
    return f"{shown[0] / FPS} to {(shown[-1] + 1) / FPS}"


def asked_colour(row) -> str:
    return next(name for name in COLOURS if name in row["problem"])


def when(row, frames) -> str:
    return f"{span_of(frames, asked_colour(row))} of 4.0"


def which(row, frames) -> str:
    colour = asked_colour(row)
    frame = next(frame for frame in frames if colour in colours_of(frame))
    ys, xs = np.nonzero((frame == COLOURS[colour]).all(-1))
    inside = (frame == BACKGROUND).all(-1)
    found = set()
    for mark, lines in DIGITS.items():
        digit = np.kron([list(map(int, line)) for line in lines], np.ones((2, 2))) == 1
        for top in range(ys.min(), ys.max() - 8):
            for left in range(xs.min(), xs.max() - 4):
                if np.array_equal(inside[top : top + 10, left : left + 6], digit):
                    found.add(mark)
    assert len(found) == 1
    return f"{found.pop()}; {span_of(frames, colour)} of 4.0"


def where(row, frames) -> str:
    ys, xs = np.nonzero((frames[-1] != BACKGROUND).any(-1))
    edges = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    box = json.loads(row["solution"])
    assert all(edge % 100 == 0 for edge in box)
    assert np.abs(np.array(box) - np.array(edges) / SIZE * 1000).max() <= 50
    return row["solution"]


def change(row, frames) -> str:
    return "yes" if len({name for frame in frames for name in colours_of(frame)}) == 2 else "no"


def several(row, frames) -> str:
    shown = {name for frame in frames for name in colours_of(frame)}
    return ",".join(option[0] for option in row["options"] if option[3:] in shown)


def ordered(frames) -> list[str]:
    return list(dict.fromkeys(name for frame in frames for name in colours_of(frame)))


def before(row, frames, media) -> str:
    (colour,) = colours_of(frames[media[row["images"][0]][2][0]])
    asked = ordered(frames)[ordered(frames).index(colour) - 1]
    return next(option[0] for option in row["options"] if option[3:] == asked)


def segments(row, frames) -> str:
    asked = ordered(frames)[
        ("first", "second", "last").index(row["problem"].split()[-1].rstrip("?"))
    ]
    traced = re.findall(
        r"<time>00:0([\d.]+)-00:0([\d.]+)</time><caption>(\w+)</caption>", row["process"]
    )
    assert [name for *_, name in traced] == ordered(frames)
    for start, end, name in traced:
        assert f"{float(start)} to {float(end)}" == span_of(frames, name)
    return next(option[0] for option in row["options"] if option[3:] == asked)


def percent(frame) -> int:
    xs = np.nonzero((frame != BACKGROUND).any(-1))[1]
    return round((xs.min() + xs.max() + 1 - 16) / 2 / (SIZE - 16) * 10) * 10


def progress(row, frames) -> str:
    assert percent(frames[0]) == 0
    assert re.findall(r"<(\w+)>", row["process"]) == list(SECTIONS)
    return str(percent(frames[-1]))


def composite(row, frames) -> str:
    assert f"before {percent(frames[NUM_FRAMES // 2 - 1])}." in row["problem"]
    return str(percent(frames[-1]))


def stream(row, frames) -> str:
    first, *_, last = shown = [name for (name,) in map(colours_of, frames[::2])]
    if row["problem_type"] == "thought":
        assert row["problem"].count("I see") == shown.index(row["process"].split()[-1][:-1])
        return row["process"]
    assert [f"I see {name}." in row["problem"] for name in shown] == [True, True, True, False]
    question = row["problem"].split("\n")[-1]
    if question.startswith("List"):
        return " ".join(shown)
    asked = first if "first" in question else last
    assert not any(option[3:] == last for option in row["options"] if asked != last)
    return next(option[0] for option in row["options"] if option[3:] == asked)


def follow(row, frames) -> str:
    """Of `steps`: by the colours of the four shapes, which may come again."""
    shown = [name for (name,) in map(colours_of, frames[::2])]
    if "like the last" in row["problem"]:
        return str(shown.count(shown[-1]))
    asked = row["problem"].split()[-1].rstrip("?")
    if row["problem_type"] == "numerical":
        return str(shown.count(asked))
    following = shown[shown.index(asked) + 1]
    return next(option[0] for option in row["options"] if option[3:] == following)


SEEN = {
    "steps": follow,
    "when": when, "which": which, "where": where, "change": change, "several": several, "segments": segments,
    "progress": progress, "composite": composite, "stream": stream,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_solutions_are_what_is_seen(name):
    rows, media = make_relatives("train", questions=[name], size=60)
    assert len(rows) == len({row["question_id"] for row in rows}) == 60
    assert len({(row["problem"], *row["videos"], *row["images"]) for row in rows}) == 60
    assert {path for row in rows for path in (*row["videos"], *row["images"])} == set(media)
    assert len({row["solution"] for row in rows}) > 1
    for row in rows:
        arguments = media[(row["videos"] or row["images"])[0]]
        frames = draw_clip(clip_spec(*arguments[:2]))
        seen = before(row, frames, media) if name == "before" else SEEN[name](row, frames)
        assert row["solution"] == seen, row
        truth = {key: row[key] for key in ("problem_type", "solution", "options")}
        check_solution(**truth)
        assert score_answer(row["solution"], **truth) == 1


def test_splits_share_no_clip_and_only_one_thinks():
    drawn = []
    for split in SPLITS:
        rows, media = make_relatives(split, questions=["when", "where"], size=31)
        assert make_relatives(split, questions=["when", "where"], size=31)[0] == rows
        assert make_relatives(split, questions=["when", "where"], size=31, seed=1)[0] != rows
        assert sum(row["data_source"] == "tiny-when" for row in rows) == 16
        assert all((row["process"] is not None) == (split == "train") for row in rows)
        drawn += [draw_clip(clip_spec(*arguments)).tobytes() for arguments in media.values()]
    assert len(set(drawn)) == len(drawn)


def test_words_and_numbers_are_single_tokens():
    assert "once" not in str(template_texts())  # a word of steps.py, which others' tokenizers lack
    tokenizer = tiny_model.build_tokenizer(template_texts(), TOKENS)
    assert 450 < len(tokenizer) < 650
    assert tokenizer.get_vocab() == tiny_model.build_tokenizer(template_texts(), TOKENS).get_vocab()
    for piece in (*TOKENS, "yes", "no", " visible", " number", " shape", " before"):
        assert len(tokenizer(piece)["input_ids"]) == 1, piece
    rows, _ = make_relatives("train", questions=list(FAMILIES)[:-1], size=90)
    for row in rows:
        target = f"<think>{row['process']}</think><answer>{row['solution']}</answer>"
        ids = tokenizer(target)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == target
        assert len(ids) <= 48


def test_steps():
    """Its thoughts: in every style, planted ones too, each by the words of its tokenizer alone; the judge that reports
    and the rules read them alike."""
    rows, _ = make_relatives("train", questions=["steps"], size=600)
    tokenizer = tiny_model.build_tokenizer(template_texts(["steps"]), TOKENS)
    found = Counter()
    for row in rows:
        thought, last = row["process"], row["process"].split(RECHECK)[-1]
        style = "rechecked" if RECHECK in thought else "named" if thought[0].islower() else "short"
        concluded = re.fullmatch(r"(?:.*, s|S)o (\w)\.", last.strip())[1]
        assert conclude(thought) == concluded
        if style == "rechecked":  # something else was seen at first
            assert len(set(re.findall(r"0\.0 .* 3\.0 \w+", thought))) == 2
        verdict = "consistent" if concluded == row["solution"] else "inconsistent"
        found[style, verdict] += 1
        completion = f"<think>{thought}</think><answer>{row['solution']}</answer>"
        task = {key: row[key] for key in ("problem_type", "options")}
        assert judge(completion, **task) == judge_by_rules(completion, **task) == verdict
        ids = tokenizer(completion)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == completion
        assert len(ids) <= 80
    for style, share in STYLES.items():
        of_style = found[style, "consistent"] + found[style, "inconsistent"]
        assert abs(of_style / len(rows) - share) < 0.06
        assert abs(found[style, "inconsistent"] / of_style - PLANTED_SHARE) < 0.1
    assert [conclude(text) for text in ("So 2", "0.0 red. So 2.", "So 2. So 3.")] == [None] * 3


def test_a_world_of_them(tmp_path):
    root, questions = tmp_path / "world", ["which", "progress", "composite"]
    world = make_world(root, questions=questions, sizes=SMALL)
    assert make_world(root, questions=questions, sizes=SMALL) == world
    for split, size in SMALL.items():
        rows = load_rows([{"path": str(root / f"{split}.jsonl")}])
        assert len(rows) == size
        for row in rows:
            assert all((root / path).is_file() for path in (*row["videos"], *row["images"]))
            for path in row["images"]:
                width = 3 * SIZE if row["data_source"] == "tiny-composite" else SIZE
                assert Image.open(root / path).size == (width, SIZE)
    with pytest.raises(WorldError, match="was made with questions"):
        make_world(root, questions=["when"], sizes=SMALL)
    with pytest.raises(WorldError, match="was made with sizes"):
        make_world(root)
    with pytest.raises(WorldError, match="expected some of when, which, .*; got whence"):
        make_world(tmp_path / "other", questions=["whence"])
