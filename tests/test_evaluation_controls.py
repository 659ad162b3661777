"""The controls of an evaluation: votes and who wins them, thinking closed before it began, and the table."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from helpers import evaluation_command as command
from helpers import released_file

from conftest import load_script
from veripo_trl.data.prompts import load_template, without_thinking
from veripo_trl.data.schema import RowError
from veripo_trl.evaluate import generate
from veripo_trl.evaluate.compare import control_files, control_lines
from veripo_trl.evaluate.generate import Decoding, TransformersEngine
from veripo_trl.evaluate.questions import key_of, read_questions
from veripo_trl.evaluate.run import OutputFiles
from veripo_trl.evaluate.votes import elected, majority
from veripo_trl.verifier.judges import RulesJudge

CHOICE = {"problem_type": "multiple choice", "options": ["A. red", "B. blue"]}
NUMBER = {"problem_type": "numerical", "options": []}


@pytest.fixture(scope="module")
def script():
    return load_script("evaluation/evaluation_vllm.py")


@pytest.fixture
def prompts(tmp_path):
    return released_file(tmp_path)


def said(answer: str, concluded: str | None = None) -> str:
    return f"<think>So the answer is {concluded or answer}.</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    "answers, task, index",
    [
        (["A", "B", "(b)"], CHOICE, 1),  # one answer in two dresses
        (["red", "B", "A", "blue"], CHOICE, 0),  # a tie: what came first
        (["B", "A", "A", "B"], CHOICE, 0),
        (["?", "B", "?", "?"], CHOICE, 1),  # what cannot be read has no vote
        (["?", "!", ""], CHOICE, 0),
        (["3", "12", "12.0", "1,2"], NUMBER, 1),
        (["1/2", "0.25", "0.5"], NUMBER, 0),
        (["red, then blue", "Blue", "red blue"], {"problem_type": "free-form", "options": None}, 0),
    ],
)
def test_the_majority_is_of_answers_not_of_texts(answers, task, index):
    assert majority([said(answer) for answer in answers], **task) == index


@pytest.mark.parametrize(
    "completions, verdicts, index",
    [
        (["A", "A", "B"], "inconsistent inconsistent consistent", 2),  # against the majority
        (["A", "B", "B"], "consistent consistent consistent", 1),
        (["A", "A", "B"], "inconsistent inconsistent unknown", 2),
        (
            ["A", "B", "B"],
            "inconsistent inconsistent inconsistent",
            1,
        ),  # none is better than another
        (["?", "B"], "unknown inconsistent", 1),
        (
            ["no form <answer>A</answer>", "B"],
            "consistent inconsistent",
            0,
        ),  # both are faulty: a tie
        (["no form <answer>A</answer>", "B"], "consistent unknown", 1),
        (
            ["<think>" + "and so on " * 30 + "</think><answer>A</answer>", "B"],
            "consistent unknown",
            1,
        ),
    ],
)
def test_the_verifier_elects_among_what_it_finds_best(completions, verdicts, index):
    texts = [text if "<" in text else said(text) for text in completions]
    assert elected(texts, verdicts.split(), **CHOICE) == index


def test_without_thinking_the_prompt_ends_with_closed_thinking(
    script,
    load,
    model_paths,
    media_root,
    prompts,
    tmp_path,
):
    encoder = load()[1]
    row = read_questions(prompts, video_dir=media_root)[0]["row"]
    begun = without_thinking(encoder.template)
    whole, closed = encoder.encode(row), encoder.encode({**row, "begun": begun})
    tail = encoder.processor.tokenizer(begun)["input_ids"]
    assert closed.input_ids.tolist() == [*whole.input_ids.tolist(), *tail] and tail
    assert (
        closed.positions[:, : len(whole)] == whole.positions
    ).all() and closed.next_position > whole.next_position
    assert without_thinking(load_template("default")) == "<think></think>\n"
    assert without_thinking(load_template("tiny_process")) == "<answer>"

    output = tmp_path / "direct.json"
    script.main([*command(model_paths, media_root, prompts, output, limit=2), "--direct"])
    assert all(item["model_output"].startswith(begun) for item in json.loads(output.read_text()))
    record = json.loads(OutputFiles(output).record.read_text())
    assert record["settings"]["direct"] and {
        row["completion_tokens"] for row in record["rows"]
    } == {8}


def test_a_vote_keeps_its_candidates_and_goes_on(
    script, model_paths, media_root, prompts, tmp_path
):
    output = tmp_path / "votes.json"
    argv = command(model_paths, media_root, prompts, output, limit=4, votes=3, vote_temperature=1.0)
    script.main(argv)
    files = OutputFiles(output)
    results, record = json.loads(output.read_text()), json.loads(files.record.read_text())
    assert [list(item) for item in results] == [["question", "ground_truth", "model_output"]] * 4
    assert record["settings"]["votes"] == 3 and record["settings"]["decoding"]["temperature"] == 1.0
    for item, row in zip(results, record["rows"], strict=True):
        texts = [candidate["completion"] for candidate in row["candidates"]]
        assert len(set(texts)) == 3 and item["model_output"] == texts[majority(texts, **CHOICE)]
    lines = files.journal.read_bytes().splitlines(keepends=True)
    files.journal.write_bytes(b"".join(lines[:-1]))  # half of the last batch
    output.unlink()
    script.main(argv)
    assert (
        json.loads(output.read_text()) == results and json.loads(files.record.read_text()) == record
    )


def test_votes_behind_long_prompts_hold_no_more_copies_than_there_are_prompts(load, mixed_rows, monkeypatch):
    model, encoder = load()
    engine = TransformersEngine(model.eval(), encoder, Decoding(max_new_tokens=3))
    prompts, rows = [encoder.encode(row) for row in mixed_rows[1:3]], []
    engine.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    whole = engine.complete(prompts, [1, 2], samples=4)
    assert rows == [2, 8, 8, 8]  # both prompts, then a token of each candidate
    for copied, pieces in ((0, [2] * 12), (3 * max(map(len, prompts)), [3] * 6 + [2] * 3)):
        rows.clear()
        monkeypatch.setattr(generate, "COPIED", copied)
        assert engine.complete(prompts, [1, 2], samples=4) == whole and rows == [2, *pieces]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--votes", "1"], "--votes: expected 2 or more"),
        (["--votes", "4", "--vote_temperature", "0"], "at a --vote_temperature of 1e-05"),
        (["--controls", "--vote_temperature", "0"], "at a --vote_temperature of 1e-05"),
        (["--votes", "4", "--temperature", "1"], "give that in place of --temperature"),
        (["--vote_temperature", "1"], "of --votes and --controls, which are not given"),
        (["--direct", "--streaming"], "not with --streaming"),
        (["--controls", "--perturb", "drop"], "perturbs by itself"),
    ],
)
def test_what_cannot_be_asked_together_is_refused(script, model_paths, capsys, more, message):
    with pytest.raises(SystemExit):
        script.parse_arguments(
            ["--model_path", "m", "--output_path", "o.json", "--prompt_path", "p.json", *more]
        )
    assert message in capsys.readouterr().err


def test_controls_of_questions_without_a_video_are_refused_at_once(script, tmp_path):
    row = {"question_id": "q", "problem": "Which?", "solution": "A", "problem_type": "multiple choice", **CHOICE}
    (tmp_path / "p.json").write_text(json.dumps([row]))
    argv = ["--model_path", "m", "--output_path", str(tmp_path / "o.json"), "--prompt_path", str(tmp_path / "p.json")]
    with pytest.raises(RowError, match="--controls: expected questions about videos, .* with --votes by themselves"):
        script.main([*argv, "--engine", "transformers", "--controls"])


# A control's process: it says that it is there, and when SIGTERM ended it.
CONTROL = """
import pathlib, signal, sys, time
def ended(*_):
    pathlib.Path("ended").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, ended)
pathlib.Path("there").touch()
time.sleep(60)
"""


def test_a_signal_to_controls_ends_the_one_at_work(script, media_root, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("control.py").write_text(CONTROL)
    monkeypatch.setattr(script, "__file__", "control.py")

    def send():
        while not Path("there").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    argv = ["--model_path", "m", "--output_path", "o.json", "--prompt_path", str(prompts), "--video_dir", str(media_root)]
    before = signal.signal(signal.SIGTERM, script.interrupt)
    try:
        threading.Thread(target=send, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            script.main([*argv, "--engine", "transformers", "--controls"])
        assert Path("ended").exists()
        os.kill(os.getpid(), signal.SIGTERM)  # a second one, as from a scheduler
    finally:
        signal.signal(signal.SIGTERM, before)


def written(path: Path, outputs: list, candidates=None) -> None:
    """A file of predictions and its record: question n has the truth B; None was never answered."""
    rows = [
        {"question_id": f"q{n}", "problem": f"Which is {n}?", "options": CHOICE["options"], "solution": "B",
         "problem_type": "multiple choice"} for n in range(len(outputs))
    ]  # fmt: skip
    predictions = [
        {"question": row, "ground_truth": "B", "model_output": text or ""}
        for row, text in zip(rows, outputs, strict=True)
    ]
    made = [
        {"key": key_of(n, row), **({"error": "no video"} if text is None else {"think_tokens": 5})}
        for n, (row, text) in enumerate(zip(rows, outputs, strict=True))
    ]
    for line, some in zip(made, candidates or [], strict=False):
        line["candidates"] = [
            {"completion": text, "think_tokens": 3, "finish_reason": "stop"} for text in some
        ]
    path.write_text(json.dumps(predictions))
    path.with_suffix(".record.json").write_text(json.dumps({"settings": {}, "rows": made}))


def test_the_table_pairs_each_control_with_thinking(tmp_path):
    files = {name: path for name, (path, _) in control_files(tmp_path / "run.json").items()}
    right, wrong = said("B"), said("A")
    with pytest.raises(
        RowError, match="expected it and others .* not there: thinking, direct, frames shuffled"
    ):
        control_lines(files["thinking"], RulesJudge())
    written(files["thinking"], [right] * 8)
    written(files["direct"], [right] * 2 + [wrong] * 4 + ["<think></think>" + wrong, None])
    # Two of three say A, but conclude B: the verifier elects the third.
    candidates = [[said("A", "B"), said("A", "B"), right]] * 4 + [[right, wrong, wrong]] * 4
    written(files["voted"], [said("A", "B")] * 4 + [wrong] * 4, candidates)
    lines, notes = control_lines(files["thinking"], RulesJudge())
    found = {line["control"]: line for line in lines}
    assert list(found) == [
        "thinking", "direct", "voted, majority of 3", "voted, elected by the verifier (rules)", "one vote, on average",
        "best vote (needs the truth)",
    ]  # fmt: skip
    assert notes[
        0
    ] == "Not there: frames shuffled, no video." and "left out: 1; compared: 7" in " ".join(notes)
    assert "direct: 1 answers of 7 opened another thinking: they are not direct." in notes
    assert found["thinking"]["paired"] is None and found["thinking"]["ours"] == 1
    direct = found["direct"]
    assert (
        direct["questions"] == 7
        and direct["ours"] == pytest.approx(2 / 7)
        and direct["think_length"] == 5
    )
    # five of seven worse: 2 · (1/2)^5
    assert (
        direct["paired"]["p"] == pytest.approx(2 / 32)
        and direct["paired"]["test"] == "McNemar, exact"
    )
    assert (
        direct["paired"]["difference"] == pytest.approx(-5 / 7) and direct["paired"]["worse"] == 5
    )
    shares = [found[name]["ours"] for name in list(found)[2:]]
    assert shares == pytest.approx([0, 1 / 2, 1 / 3, 1])
    assert found["one vote, on average"]["paired"]["test"] == "paired permutation"
    written(files["voted"], [right] * 8)
    with pytest.raises(RowError, match="expected the candidates of each question"):
        control_lines(files["thinking"], RulesJudge())
    files["voted"].unlink()
    written(files["thinking"], [right] * 5 + [wrong] * 2 + [None])
    lines, notes = control_lines(files["thinking"], RulesJudge())
    assert (lines[0]["control"], lines[0]["questions"], lines[0]["ours"]) == ("thinking", 7, pytest.approx(5 / 7))
    assert "thinking: never answered and left out: 1." in notes
