"""The report: what it reads, how it samples, and the page in a real browser."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_video

from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.report import page as report_page
from veripo_trl.report import plots
from veripo_trl.report import read as report_read
from veripo_trl.report.read import ReportError
from veripo_trl.report.write import write_report
from veripo_trl.verifier.files import PAIR_SCHEMA, VERDICT_SCHEMA, write_files

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "report.py"
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'><!-- <b>bold</b> &amp; "
    "\u2028\u202e${window.hacked = 3}"
)
COLOURS = ["A. red", "B. blue", "C. green", "D. yellow"]


# ---- a run on disk --------------------------------------------------------------------------------------------------


def question(number: int) -> dict:
    kinds = (
        {"problem": f"Which colour is first in clip {number}?", "options": COLOURS, "problem_type": "multiple choice",
         "solution": "B"},
        {"problem": f"How many shapes are in clip {number}?", "options": [], "problem_type": "numerical",
         "solution": "3"},
    )  # fmt: skip
    media = {"videos": ["clips/long.mp4"], "images": []} if number % 2 == 0 else {"videos": [], "images": ["square.png"]}
    return {"question_id": f"q{number:03d}", **kinds[number % 2], **media, "data_source": "test"}


def rollout(stage: str, number: int, place: int, **changes) -> dict:
    """The 1st of four is right, the 2nd wrong, the 3rd right but inconsistent, the 4th wrong, long and cut."""
    right = place in (0, 2)
    texts = (
        "<think>I see blue, so the answer is B.</think><answer>B</answer>",
        "<think>I see red, so the answer is A.</think><answer>A</answer>",
        "<think>I see green, so the answer is C.</think><answer>B</answer>",
        f"<think>{'round and round ' * 200}",
    )
    return {
        **question(number),
        "rollout_id": f"{stage}/step{number}-{place}",
        "step": number,
        "completion": texts[place],
        "completion_tokens": 10 + 100 * place + number,
        "finish_reason": "length" if place == 3 else "stop",
        "rewards": {"accuracy_reward": float(right), "format_reward": 0.5},
        "advantage": 0.5 - place / 4,
        "policy": "start",
        "prompt_template": "0" * 16,
        "seed": 0,
        **changes,
    }


def verdict(rollout: dict, place: int) -> dict:
    return {
        "rollout_id": rollout["rollout_id"],
        "question_id": rollout["question_id"],
        "format_ok": place != 3,
        "accuracy": rollout["rewards"]["accuracy_reward"],
        "concluded_answer": "C" if place == 2 else None,
        "consistency": ("consistent", "consistent", "inconsistent", "unknown")[place],
        "repetition": 0.9 if place == 3 else 0.0,
        "think_tokens": 9,
        "judge": "rules",
        "prompt_version": "1",
        "reason": "no answer" if place == 3 else "",
    }


def pair(number: int, kind: str, chosen: str, rejected: str) -> dict:
    ids = [f"search-1/step{number}-{place}" for place in range(2)]
    verdicts = [verdict({**rollout("search-1", number, place), "rollout_id": ids[place]}, place) for place in range(2)]
    return {
        **question(number),
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "?"}]}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "rejected_finished": True,
        "kind": kind,
        "chosen_ids": ids[:1],
        "rejected_id": ids[1],
        "verdicts": {"chosen": verdicts[:1], "rejected": verdicts[1], "fault": "wrong"},
        "prompt_template": "0" * 16,
        "policy": "start",
    }


def summary(accuracy: float, inconsistency: float, unknown: float = 0.02) -> dict:
    values = {
        "accuracy": accuracy, "accuracy_low": accuracy - 0.03, "accuracy_high": accuracy + 0.03, "format": 0.99,
        "inconsistency": inconsistency, "unknown": unknown, "accurate_and_consistent": accuracy * (1 - inconsistency),
        "think_tokens": 12.5, "truncated": 0.01, "questions": 100, "accuracy: numerical": accuracy / 2,
    }  # fmt: skip
    return {"greedy": {**values, "accuracy": accuracy + 0.1}, "sampled": values}


def write_stage(folder: Path, results: dict, *, rollouts=(), verdicts=(), pairs=(), arguments=None) -> None:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    if arguments:
        (folder / "_arguments.json").write_text(json.dumps(arguments))
    if rollouts:
        names = ["accuracy_reward", "format_reward"]
        RolloutStore(folder / "rollouts").write(list(rollouts), step=0, part=0, rank=0, reward_names=names)
    for name, rows, schema in (("verdicts", verdicts, VERDICT_SCHEMA), ("pairs", pairs, PAIR_SCHEMA)):
        if rows:
            write_files(list(rows), folder / name, schema)


def data_arguments(path: str) -> dict:
    sizes = {"fps": 2.0, "min_frames": 4, "max_frames": 6, "min_pixels": 56 * 56, "max_pixels": 56 * 56}
    return {"DataArguments": {"datasets": [{"path": path}], **sizes}}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """`outputs/loop` with a search, its verification and a DPO stage; `data/` with a clip and an image."""
    from PIL import Image

    place = tmp_path_factory.mktemp("report")
    (place / "data" / "clips").mkdir(parents=True)
    write_video(place / "data" / "clips" / "long.mp4", frames=24, height=56, width=56)
    Image.new("RGB", (80, 40), "teal").save(place / "data" / "square.png")
    (place / "data" / "rows.jsonl").write_text("{}\n")
    loop = place / "outputs" / "loop"
    rows = [rollout("search-1", number, part) for number in range(25) for part in range(4)]
    rows[4]["completion"] = f"<think>{HOSTILE}</think><answer>B</answer>"
    for row in rows[4:8]:
        row["problem"] += f" {HOSTILE}"
    history = [{"step": step, "reward": step / 10, "loss": float("nan")} for step in range(1, 6)]
    results = {"before": summary(0.5, 0.25), "after": summary(0.7, 0.1), "history": history, "minutes": 3.0}
    write_stage(loop / "search-1", results, rollouts=rows, arguments=data_arguments("data/rows.jsonl"))
    pairs = [
        pair(0, "penalty", "<think>I see blue then red.</think><answer>B</answer>",
             "<think>I see red then red.</think><answer>A</answer>"),
        pair(1, "consistency", "<think>so 3.</think><answer>3</answer>", f"<think>{HOSTILE}</think><answer>3</answer>"),
        *(pair(number, "penalty", f"chosen {number}", f"rejected {number}") for number in range(2, 12)),
    ]  # fmt: skip
    verdicts = [verdict(row, place % 4) for place, row in enumerate(rows)]
    write_stage(loop / "verify-1", {"rollouts": 100}, verdicts=verdicts, pairs=pairs)
    write_stage(loop / "align-1", {"after": summary(0.71, 0.04, float("nan"))})
    done = {"recipe": "a_recipe.py", "iteration": 1, "status": "done"}
    names = ("search-1", "verify-1", "align-1")
    stages = [{**done, "name": name, "output_dir": f"outputs/loop/{name}"} for name in names]
    stages.append({"name": "search-2 <b>", "iteration": 2, "status": "running", "output_dir": "outputs/loop/search-2"})
    stages.append({"name": "align-2", "iteration": 2, "status": "skipped", "reason": "no pairs"})
    (loop / "run.json").write_text(json.dumps({"name": "a <loop> & more", "stages": stages}))
    return place


@pytest.fixture(scope="module")
def page(workplace, tmp_path_factory):
    return write_report([workplace / "outputs" / "loop"], tmp_path_factory.mktemp("page") / "r.html")


def embedded(path: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)[1])


# ---- without a browser ----------------------------------------------------------------------------------------------


def test_what_is_read(page):
    data = embedded(page)
    assert data["stages"] == ["search-1", "verify-1", "align-1", "search-2 <b>", "align-2"]
    assert len(data["questions"]) == 25 and all(len(item["rollouts"]) == 4 for item in data["questions"])
    (first,) = [item for item in data["questions"] if item["question_id"] == "q001"]
    assert first["rollouts"][0]["completion"] == f"<think>{HOSTILE}</think><answer>B</answer>"
    assert [item["verdict"]["consistency"] for item in first["rollouts"]] == [
        "consistent", "consistent", "inconsistent", "unknown",
    ]  # fmt: skip
    assert first["rollouts"][2]["rewards"] == {"accuracy": 1.0, "format": 0.5}
    assert len(data["pairs"]) == 12 and {item["kind"] for item in data["pairs"]} == {"penalty", "consistency"}
    # the frames that the model saw: the run's settings, found from where the run was started
    assert data["media"]["clips/long.mp4"]["note"].startswith("6 frames that the model saw, of 24 at 2")
    assert len(data["media"]["clips/long.mp4"]["frames"]) == len(data["media"]["clips/long.mp4"]["times"]) == 6
    assert data["media"]["square.png"]["note"] == "image, 40 × 80 pixels"
    text = page.read_text()
    assert "All 25 questions and all 100 rollouts are on this page." in text
    assert "100: 33.3% inconsistent, 25.0% unknown" in text  # 25 of the 75 whose verdict is known
    assert "Inconsistent (unknown –)" in text and "−21.0 points" in text  # 0.25 to 0.04; unknown is not known
    assert "its folder outputs/loop/search-2 is not there" in text
    assert "Stage align-2 was skipped: no pairs." in text
    assert text.count("data:image/svg") == 4 + 1  # four measures and the reward; a loss that is no number has no curve


def test_the_page_loads_nothing_and_names_its_scripts_by_hash(page):
    text = page.read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    for tag in ("script", "style"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S)[1]
        assert f"{tag}-src '{report_page.content_hash(body)}'" in policy
    assert "<loop>" not in text and "a &lt;loop&gt; &amp; more" in text and "search-2 &lt;b&gt;" in text
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)|@import|url\(|innerHTML|<link""", text)
    assert str(page.parent) not in text and "/data/clips" not in text  # no paths of this machine


@pytest.mark.parametrize(
    "value",
    [HOSTILE, "</ScRiPt >", "\u2028\u2029", {"a": [1, None, float("nan")]}, "]]>", "\x00\x1f\ud800", "é 漢"],
)
def test_embedded_data_cannot_leave_its_element(value):
    text = report_page.embed(value)
    assert not set(text) & set("<>&\u2028\u2029")
    expected = {"a": [1, None, None]} if isinstance(value, dict) else value
    assert json.loads(text.encode("utf-8", "backslashreplace")) == expected


def test_the_sample_is_drawn_by_seed_and_said(workplace, tmp_path):
    run = [workplace / "outputs" / "loop"]
    pages = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pages[name] = write_report(run, tmp_path / f"{name}.html", seed=seed, questions=0, max_mb=0.03)
    assert pages["a"].read_bytes() == pages["b"].read_bytes() != pages["c"].read_bytes()
    data = embedded(pages["a"])
    assert 0 < len(data["questions"]) < 25 and len(data["pairs"]) < 12 and not data["media"]
    text = pages["a"].read_text()
    count = len(data["questions"])
    assert f"A sample (seed 0): {count} of 25 questions and {4 * count} of 100 rollouts are on this page." in text
    assert f"A sample (seed 0): {len(data['pairs'])} of 12 pairs" in text
    ids = [{item["question_id"] for item in shown["questions"]} for shown in (data, embedded(pages["c"]))]
    assert ids[0] != ids[1]
    assert "100: 33.3% inconsistent" in text  # tables are about all


def test_pairs_are_drawn_from_all_stages(tmp_path):
    for stage in ("a", "b"):
        write_stage(tmp_path / stage, {}, pairs=[pair(number, "penalty", "x" * 900, stage) for number in range(40)])
    shown = embedded(write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html", max_mb=0.2))["pairs"]
    assert len(shown) < 40 and {item["rejected"] for item in shown} == {"a", "b"}


def test_long_completions_and_large_groups_are_cut_and_said(tmp_path):
    rows = [rollout("s", 0, 0, rollout_id=f"r{place}", completion="x" * 30_000) for place in range(100)]
    write_stage(tmp_path / "run", {}, rollouts=rows)
    (item,) = embedded(write_report([tmp_path / "run"]))["questions"]
    assert item["total"] == 100 and len(item["rollouts"]) == report_read.MAX_ROLLOUTS
    assert {len(row["completion"]) for row in item["rollouts"]} != {30_000}
    assert item["rollouts"][0]["completion"].endswith("[…10000 more characters are not on this page]")


def test_the_size_holds_for_texts_that_escapes_make_longer(tmp_path):
    rows = [rollout("s", number, 0, completion="<&>" * 6_000) for number in range(60)]
    pairs = [pair(number, "penalty", "<" * 9_000, ">" * 9_000) for number in range(60)]
    write_stage(tmp_path / "run", {}, rollouts=rows, pairs=pairs)
    path = write_report([tmp_path / "run"], max_mb=2.0)
    assert 1e6 < path.stat().st_size < 2e6
    assert "of 60 questions" in path.read_text() and "of 60 pairs" in path.read_text()


def test_media_that_cannot_be_shown_say_why(workplace, tmp_path, capsys):
    data = workplace / "data"
    (tmp_path / "secret.png").write_bytes((data / "square.png").read_bytes())
    (tmp_path / "below").mkdir()
    twin = tmp_path / "twin"
    shutil.copytree(data, twin)
    (twin / "broken.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 100)
    cases = [
        (["clips/long.mp4"], [f"{data}/rows.jsonl"], None, "frames that the model saw"),
        (["clips/long.mp4"], ["gone/rows.jsonl"], None, "the run did not record where its media are"),
        (["clips/long.mp4"], ["gone/rows.jsonl"], data, "frames that the model saw"),
        (["clips/long.mp4"], [f"{data}/rows.jsonl", f"{twin}/rows.jsonl"], None, "found below two media folders"),
        (["clips/none.mp4"], [f"{data}/rows.jsonl"], None, "not found below the media folders"),
        (["../secret.png"], [f"{tmp_path}/below/rows.jsonl"], tmp_path / "below", "not found below the media folders"),
        (["https://example.org/a.mp4"], [f"{data}/rows.jsonl"], None, "named by URL"),
        (["broken.mp4"], [f"{twin}/rows.jsonl"], None, "it cannot be decoded"),
    ]
    for number, (videos, paths, root, expected) in enumerate(cases):
        arguments = data_arguments(paths[0])
        arguments["DataArguments"]["datasets"] = [{"path": path} for path in paths]
        run = tmp_path / f"run{number}"
        write_stage(run, {}, rollouts=[rollout("s", 0, 0, videos=videos, images=[])], arguments=arguments)
        page = write_report([run], media_root=root and str(root))
        ((_, media),) = embedded(page)["media"].items()
        assert expected in media["note"], (videos, media)
        assert bool(media["frames"]) == ("frames that" in expected)
        assert ("broken.mp4" in capsys.readouterr().err) == (expected == "it cannot be decoded")
        assert ("1 of 1 videos and images are not shown" in page.read_text()) != bool(media["frames"])


def test_parts_that_are_absent_are_named(tmp_path):
    write_stage(tmp_path / "bare", {"after": summary(0.5, 0.1)})
    text = write_report([tmp_path / "bare"]).read_text()
    for words in ("No rollouts:", "No verdicts:", "No preference pairs.", "No training log:"):
        assert words in text
    (tmp_path / "bare" / "_arguments.json").write_text("{half")
    assert "bare/_arguments.json is damaged" in write_report([tmp_path / "bare"]).read_text()


def test_benchmark_results(tmp_path):
    """What calculate_score.py writes: found in the run's folder, or given."""
    line = {"benchmark": "mmvu", "category": "", "value": "", "rows": 625, "ours": 0.5, "ours_low": 0.46,
            "ours_high": 0.54, "released": 0.47, "unparsable": 0.01, "truncated": None, "inconsistency": 0.08,
            "unknown": 0.1, "think_length": 212.3}  # fmt: skip
    scores = {"lines": [line, {**line, "category": "subject", "value": "<i>art</i>"}], "notes": ["a & b"], "rows": []}
    write_stage(tmp_path / "run", {})
    (tmp_path / "run" / "evaluation").mkdir()
    (tmp_path / "run" / "evaluation" / "mmvu.scores.json").write_text(json.dumps(scores))
    (tmp_path / "other.scores.json").write_text(json.dumps(scores))
    (tmp_path / "run" / "bad.scores.json").write_text('{"rows": []}')
    page = write_report([tmp_path / "run"], scores=[tmp_path / "other.scores.json"]).read_text()
    assert "Benchmark: mmvu" in page and "Benchmark: other" in page and "bad.scores.json holds no scores" in page
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page[page.index("Benchmark: mmvu") :])[:10]
    assert cells == ["mmvu", "625", "50.0", "46.0–54.0", "47.0", "1.0", "–", "8.0", "10.0", "212.3"]
    assert "· subject: &lt;i&gt;art&lt;/i&gt;" in page and "a &amp; b" in page
    with pytest.raises(ReportError, match="gone.scores.json: no such file"):
        write_report([tmp_path / "run"], scores=["gone.scores.json"])


def test_several_folders_are_the_stages_of_one_report(workplace, tmp_path):
    loop = workplace / "outputs" / "loop"
    whole = embedded(write_report([loop / "search-1", loop / "verify-1"], tmp_path / "r.html", questions=0))
    assert whole["stages"] == ["search-1", "verify-1"] and whole["questions"][0]["rollouts"][0]["verdict"]
    alone = embedded(write_report([loop / "verify-1"], tmp_path / "v.html"))
    assert len(alone["pairs"]) == 12 and not alone["questions"]


def test_a_verdict_belongs_to_the_rollouts_before_it(tmp_path):
    """Two runs whose folders have the same names: their rollouts have the same ids, and not the same verdicts."""
    places = []
    for run, consistency in (("a", "consistent"), ("b", "inconsistent")):
        row = rollout("search", 0, 0, completion=run)
        write_stage(tmp_path / run / "search", {}, rollouts=[row])
        write_stage(tmp_path / run / "verify", {}, verdicts=[{**verdict(row, 0), "consistency": consistency}])
        places += [tmp_path / run / "search", tmp_path / run / "verify"]
    a_search, a_verify, b_search, b_verify = places
    for runs, expected, missing in (
        (places, ["consistent", "inconsistent"], 0),
        ([b_search, b_verify, a_search, a_verify], ["inconsistent", "consistent"], 0),
        ([a_search, b_search, b_verify], [None, "inconsistent"], 0),
        ([a_search, a_verify, b_search], ["consistent", None], 0),
        ([a_verify, a_search], [None], 1),
    ):
        page = write_report(runs, tmp_path / "r.html")
        (item,) = embedded(page)["questions"]
        assert [(row["verdict"] or {}).get("consistency") for row in item["rollouts"]] == expected, runs
        assert page.read_text().count("verdicts have no rollouts before them") == missing


def test_different_questions_of_one_id_stand_apart(tmp_path):
    for run in ("a", "b"):
        write_stage(tmp_path / run, {}, rollouts=[rollout(run, 0, place, problem=f"Is it {run}?") for place in range(2)])
    questions = embedded(write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html"))["questions"]
    assert [(item["problem"], len(item["rollouts"])) for item in questions] == [("Is it a?", 2), ("Is it b?", 2)]


def test_results_are_text_too(tmp_path):
    """A run's results.json may come from anywhere."""
    write_stage(tmp_path / "plain", {"after": summary(0.5, 0.1)})
    values = {**summary(0.5, 0.1)["greedy"], "questions": HOSTILE, "accuracy": HOSTILE, f"accuracy: {HOSTILE}": 0.5}
    history = [{"step": step, "reward": 0.5, "loss": HOSTILE} for step in (1, 2, HOSTILE)]
    results = {"after": {"greedy": values, HOSTILE: values}, "minutes": HOSTILE, "history": history}
    write_stage(tmp_path / HOSTILE.replace("/", "|"), results)
    texts = [write_report([path], tmp_path / f"{n}.html").read_text() for n, path in enumerate(tmp_path.iterdir())]
    tags = [{tag: len(re.findall(f"<{tag}[ >]", text)) for tag in ("script", "b")} for text in texts]
    assert tags[0] == tags[1], tags
    assert not [text for text in texts if re.search(r'<img (?!src="data:image/svg)', text)]


def test_the_types_own_metrics_stand_beside_the_accuracies(tmp_path):
    values = {**summary(0.5, 0.1)["greedy"], "mIoU: temporal grounding": 0.482, "MAE: regression": 5.2}
    write_stage(tmp_path / "run", {"before": summary(0.4, 0.1), "after": {"greedy": values}})
    text = write_report([tmp_path / "run"]).read_text()
    for cell in ("mIoU: temporal grounding</th>", "MAE: regression</th>", ">48.2%</td>", ">5.20</td>"):
        assert cell in text, cell


def test_what_cannot_be_reported_is_an_error(tmp_path):
    with pytest.raises(ReportError, match="no such folder"):
        write_report([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="nothing to report"):
        write_report([tmp_path / "empty"])
    write_stage(tmp_path / "run", {}, rollouts=[rollout("s", 0, 0)])
    (file,) = (tmp_path / "run" / "rollouts").iterdir()
    with pytest.raises(ReportError, match="no such folder"):
        write_report([tmp_path / "run"], media_root=str(tmp_path / "gone"))
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_broken_file_is_left_out_and_named_with_its_remedy(tmp_path, capsys):
    """Its place on the page says so; everything else is there."""
    rows = [rollout("s", number, place) for number in range(2) for place in range(4)]
    store = RolloutStore(tmp_path / "run" / "rollouts")
    names = {"part": 0, "rank": 0, "reward_names": ["accuracy_reward"]}
    files = [store.write(rows[step * 4 :][:4], step=step, **names) for step in (0, 1)]
    verdicts = [verdict(row, place % 4) for place, row in enumerate(rows)]
    write_files(verdicts, tmp_path / "run" / "verdicts", VERDICT_SCHEMA)
    whole, name = files[0].read_bytes(), f"run/rollouts/{files[0].name}"
    wrong = [b"PAR1 no more", whole.replace(b"I see", b"\xff see"), whole[:-50], b""]
    remedies = ["not a readable Parquet file .*remove it"] * 4 + ["no column advantage, .*remove it"]
    for content, remedy in zip([*wrong, None], remedies, strict=True):
        if content is not None:
            files[0].write_bytes(content)
        else:
            columns = ["question_id", "completion", "completion_tokens", "finish_reason", "rewards"]
            files[0].write_bytes(whole)
            pq.write_table(pq.read_table(files[0], columns=columns), files[0])
        page = write_report([tmp_path / "run"], questions=0)
        said = capsys.readouterr().err
        assert said.count(name) == 1 and re.match(f"{name}: {remedy}", said), said
        text, data = page.read_text(), embedded(page)
        assert f"<li>{name}: " in text and str(tmp_path) not in text
        assert [item["question_id"] for item in data["questions"]] == ["q001"]


def test_the_recipe(workplace, tmp_path):
    command = [sys.executable, str(RECIPE), str(workplace / "outputs" / "loop"), "--questions", "0"]
    done = subprocess.run([*command, "--output", "r.html"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.match(r"r\.html \(0\.\d MB\): open it in a browser", done.stdout) and (tmp_path / "r.html").is_file()
    command = [sys.executable, str(RECIPE), "gone"]
    wrong = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert wrong.returncode == 1 and wrong.stderr.startswith("ReportError: gone: no such folder")


def test_charts(tmp_path):
    nan, ticks = float("nan"), ["a", "<b> & $c", "d", "e" * 30]
    points = [{"label": tick, "sampled": {"accuracy": value, "accuracy_low": 0.1, "accuracy_high": 0.5}}
              for tick, value in zip(ticks, [0.2, nan, None, 0.4], strict=True)]  # fmt: skip
    chart = plots.held_out_charts(points)[0]
    svg = base64.b64decode(plots.svg_uri(chart).split(",")[1]).decode()
    assert svg == base64.b64decode(plots.svg_uri(chart).split(",")[1]).decode()  # equal runs, equal reports
    assert "&lt;b&gt; &amp; $c" in svg and "e" * 15 + "…" in svg
    history = [{"step": step, "reward": step**2, "rewards/my_own/mean": 0.5, "loss": nan} for step in range(10_000)]
    own, reward = sorted(plots.training_charts(history), key=lambda chart: chart["title"])
    assert (own["title"], reward["title"]) == ("my own", "reward")
    assert len(reward["series"][0]["x"]) <= plots.MAX_POINTS and reward["series"][0]["x"][-1] == 9_999
    plots.save_charts(tmp_path / "x.png", [own, reward], title="$x")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    plots.save_charts(tmp_path / "none.png", [], title="x")
    assert not (tmp_path / "none.png").exists()


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium. Without one the tests are skipped, or fail where CI_BROWSER=required."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        reason = "no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("CI_BROWSER") == "required":
            pytest.fail(f"CI_BROWSER=required, but there is {reason}")
        pytest.skip(f"the report is not tried in a browser: {reason}")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument("--window-size=1280,900")
    if os.geteuid() == 0:  # Chromium's sandbox refuses root
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    started.set_page_load_timeout(60)
    yield started
    started.quit()


@pytest.fixture
def opened(browser, page):
    browser.get(page.as_uri())
    yield browser
    assert browser.get_log("browser") == []  # no errors, nothing refused


def texts(browser, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)", selector
    )


def put(browser, field: str, value: str) -> None:
    """Set a filter as a user does: its value, then the event; wait for the list."""
    browser.execute_script(
        "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', {bubbles: true}))", field, value,
    )  # fmt: skip
    time.sleep(0.25)


def count(browser, prefix: str = "q") -> str:
    return texts(browser, f"#{prefix}-count")[0]


@pytest.mark.browser
def test_filters_change_what_is_shown(opened):
    assert count(opened) == "25 questions, 100 rollouts match"
    for field, value, expected in (
        ("q-show", "Wrong (accuracy under 0.5)", "25 questions, 50 rollouts match"),
        ("q-show", "Inconsistent", "25 questions, 25 rollouts match"),
        ("q-show", "Consistency unknown", "25 questions, 25 rollouts match"),
        ("q-show", "All rollouts", "25 questions, 100 rollouts match"),
        ("q-kind", "numerical", "12 questions, 48 rollouts match"),
        ("q-kind", "", "25 questions, 100 rollouts match"),
        ("q-text", "CLIP 7?", "1 question, 4 rollouts match"),
        ("q-text", "i see green", "25 questions, 25 rollouts match"),
        ("q-text", "nowhere", "0 questions, 0 rollouts match"),
        ("q-text", "", "25 questions, 100 rollouts match"),
    ):
        put(opened, field, value)
        assert count(opened) == expected, (field, value)
    put(opened, "q-sort", "longest")
    assert texts(opened, ".question .meta span:first-child")[0] == "q024"
    assert "334 tokens" in texts(opened, ".rollout .badges")[0]
    put(opened, "q-sort", "")


@pytest.mark.browser
def test_pages(opened):
    seen = texts(opened, ".question .meta span:first-child")
    for _ in range(2):
        opened.execute_script("document.querySelector('#q-pager button:last-of-type').click()")
        seen += texts(opened, ".question .meta span:first-child")
    assert len(set(seen)) == 25 and texts(opened, "#q-pager") == ["Previous21 to 25 of 25Next"]
    opened.execute_script("document.querySelector('#q-pager button').click()")
    assert texts(opened, "#q-pager") == ["Previous11 to 20 of 25Next"]


@pytest.mark.browser
def test_what_a_model_wrote_is_text(opened):
    put(opened, "q-text", "q001")
    assert HOSTILE in texts(opened, ".problem")[0]
    assert texts(opened, ".rollout .text")[0] == f"<think>{HOSTILE}</think><answer>B</answer>"
    put(opened, "p-kind", "consistency")
    assert "".join(texts(opened, ".rejected .text")) == f"<think>{HOSTILE}</think><answer>3</answer>"
    assert opened.execute_script("return window.hacked") is None
    counts = "return ['script', '.text b', '.text img', '.problem img'].map(s => document.querySelectorAll(s).length)"
    assert opened.execute_script(counts) == [2, 0, 0, 0]
    assert opened.title == "a <loop> & more"
    put(opened, "q-text", "")
    put(opened, "p-kind", "")


@pytest.mark.browser
def test_pairs_side_by_side(opened):
    put(opened, "p-text", "blue then")
    assert count(opened, "p") == "1 pair match"
    assert texts(opened, ".chosen ins") == ["blue", "B"] and texts(opened, ".rejected del") == ["red", "A"]
    assert texts(opened, ".chosen .text") == ["<think>I see blue then red.</think><answer>B</answer>"]
    assert "rejected as wrong" in texts(opened, ".rejected .badges")[0]
    put(opened, "p-text", "")
    put(opened, "p-kind", "penalty")
    assert count(opened, "p") == "11 pairs match" and len(texts(opened, ".pair")) == 5
    put(opened, "p-kind", "")
    opened.execute_script("document.querySelector('.pair .link').click()")  # to its rollouts
    assert count(opened) == "1 question, 4 rollouts match"
    put(opened, "q-text", "")


@pytest.mark.browser
def test_frames_are_shown_and_nothing_is_fetched(opened):
    from selenium.webdriver.support.ui import WebDriverWait

    sizes = "return [...document.querySelectorAll('.strip img')].map(image => image.naturalWidth)"
    WebDriverWait(opened, 10).until(lambda driver: all(driver.execute_script(sizes)))
    assert {56, 80} <= set(opened.execute_script(sizes)) and "frames that the model saw" in texts(opened, ".film")[0] + (
        texts(opened, ".film")[1]
    )
    fetched = "return performance.getEntriesByType('resource').map(entry => entry.name.slice(0, 5))"
    assert set(opened.execute_script(fetched)) <= {"data:"}


@pytest.mark.browser
def test_names_and_accuracies_that_are_not_there(browser, tmp_path):
    """A file that is called as what every object of the script's language has; rollouts that were never scored."""
    rows = [
        rollout("s", number, place, videos=["constructor"], rewards={"accuracy_reward": accuracy, "format_reward": 0.5})
        for number, accuracies in enumerate([(None, None), (0.0, 1.0), (0.0, None), (1.0, 1.0)])
        for place, accuracy in enumerate(accuracies)
    ]
    write_stage(tmp_path / "run", {}, rollouts=rows)
    browser.get(write_report([tmp_path / "run"], questions=0).as_uri())
    assert count(browser) == "4 questions, 8 rollouts match"
    assert "constructor: drawn without its frames" in texts(browser, ".film")[0]
    for sort, expected in (("hardest", "q002 q001 q003 q000"), ("mixed", "q001 q00[23] q00[23] q000")):
        put(browser, "q-sort", sort)
        assert re.fullmatch(expected, " ".join(texts(browser, ".question .meta span:first-child"))), sort
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_equal_rollouts_are_folded_and_any_accuracy_is_known(browser, tmp_path):
    own = {"accuracy_relative_error_reward": 0.75, "brevity_reward": 0.1}
    rows = [rollout("s", 0, place // 6, rewards=own, rollout_id=f"r{place}") for place in range(8)]
    folder = tmp_path / "run"
    folder.mkdir()
    RolloutStore(folder / "rollouts").write(rows, step=0, part=0, rank=0, reward_names=list(own))
    path = write_report([folder])
    assert ">75.0%</td>" in path.read_text()
    browser.get(path.as_uri())
    assert count(browser) == "1 question, 8 rollouts match"
    assert [text.split("accuracy")[0] for text in texts(browser, ".rollout .badges")] == ["× 6", "× 2"]
    assert "brevity 0.1" in texts(browser, ".rollout .badges")[0]


@pytest.mark.browser
def test_narrow_and_dark(opened):
    narrow = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        opened.execute_script("dispatchEvent(new Event('resize'))")
        assert "scroll it sideways" in texts(opened, ".wide.shown")[0]
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 390
        colour = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", colour)[:3])) < 60
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.browser
def test_the_policy_refuses_what_is_not_ours(browser, page):
    """Were a script or an address to get into the page after all, the browser would neither run nor load it."""
    browser.get(page.as_uri())
    browser.execute_script(
        "const script = document.createElement('script'); script.textContent = 'window.hacked = 1';"
        "document.body.append(script);"
        "const image = document.createElement('img'); image.src = 'http://127.0.0.1:9/'; document.body.append(image);"
    )
    time.sleep(0.3)
    assert browser.execute_script("return window.hacked") is None
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert len(refused) == 2 and all("Content Security Policy" in message for message in refused), refused


@pytest.mark.browser
def test_of_a_large_run_a_sample_is_shown(browser, tmp_path):
    rows = []
    for number in range(4000):
        text = f"<think>{'I look at the clip again and count the shapes. ' * (10 + number % 13)}{number}</think>"
        changes = {"rollout_id": f"r{number}", "completion": f"{text}<answer>{number % 4}</answer>"}
        rows.append(rollout("s", number // 8, number % 2, **changes))
    write_stage(tmp_path / "large", {}, rollouts=rows, verdicts=[verdict(row, n % 4) for n, row in enumerate(rows)])
    table = pa.Table.from_pylist([pair(3, "penalty", "chosen " * 50, "rejected " * 50)], schema=PAIR_SCHEMA)
    (tmp_path / "large" / "pairs").mkdir()
    pq.write_table(table.take([0] * 1000), tmp_path / "large" / "pairs" / "pairs-00000.parquet")
    path = write_report([tmp_path / "large"], questions=0, max_mb=5)
    assert path.stat().st_size < 5e6
    browser.get(path.as_uri())
    note = texts(browser, "#q-note")[0]
    shown = re.search(r"A sample \(seed 0\): ([\d,]+) of 500 questions and ([\d,]+) of 4,000", note)
    assert count(browser) == f"{shown[1]} questions, {shown[2]} rollouts match"
    assert "400 of 1,000 pairs" in texts(browser, "#p-note")[0]
    put(browser, "q-text", "no such words")
    assert count(browser) == "0 questions, 0 rollouts match"
    assert browser.get_log("browser") == []
