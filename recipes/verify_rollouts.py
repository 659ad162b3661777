"""Judge a GRPO run's rollouts and build preference pairs for DPO (arXiv 2505.19000, the rollout-aware verifier).

    python recipes/verify_rollouts.py                                            # the tiny world's, by rules
    python recipes/verify_rollouts.py --rollouts outputs/my_grpo/rollouts --output_dir outputs/my_verify \\
        --judge server --judge_url http://127.0.0.1:8000/v1 --judge_model Qwen/Qwen3-4B-Instruct-2507

Writes <output_dir>/verdicts (one per rollout), pairs, solved.json (questions the next iteration leaves out), pairs.png
and results.json. One process does it all; a judge server brings its own GPUs. Broken off, it is started again with the
same command: what a judge model said is kept in the verdict cache, and the pairs come out the same.
"""

import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from veripo_trl.answers.score import REGRESSION_SCORES
from veripo_trl.data.prompts import load_template
from veripo_trl.data.rows import content_of
from veripo_trl.errors import ConfigError, run
from veripo_trl.files.disk import read_json
from veripo_trl.files.run_folder import move_finished_aside, only_process, write_results
from veripo_trl.hub.ask import HubError
from veripo_trl.hub.cards import dataset_card
from veripo_trl.hub.locate import fetch, is_local, locate
from veripo_trl.hub.push import prepare_repo, push_folder
from veripo_trl.recipe import stages
from veripo_trl.verifier import files
from veripo_trl.verifier.cache import VerdictCache
from veripo_trl.verifier.curriculum import choose_solved
from veripo_trl.verifier.judge_prompts import load_judge_prompt
from veripo_trl.verifier.judges import RulesJudge
from veripo_trl.verifier.pairs import PairOptions, build_pairs, generation_of
from veripo_trl.verifier.server import ServerJudge
from veripo_trl.verifier.summary import PairsSeen, card_facts, plot, print_summary, summarize
from veripo_trl.verifier.verify import verify_stream

RECIPES = Path(__file__).resolve().parent
DEFAULT_CONFIG = RECIPES / "configs" / "tiny" / "verify.yaml"
JUDGES = ("rules", "server", "local")
LOCAL_OPTIONS = ("revision", "dtype", "device", "batch_size", "max_new_tokens")


@dataclass
class VerifyArguments:
    """What is judged, by whom, and where the result goes."""

    output_dir: str = field(metadata={"help": "Folder for verdicts, pairs and tables."})
    rollouts: list[str] = field(
        default_factory=list, metadata={"help": "Folders of rollout files, or a Hub dataset org/name."}
    )
    rollouts_revision: str | None = field(default=None, metadata={"help": "Revision of the Hub dataset."})
    limit: int | None = field(default=None, metadata={"help": "Read the first n rollouts only, to try things out."})
    prompt_template: str = field(
        default="default", metadata={"help": "The one that the rollouts were made with: a name or a YAML file."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Counts the tokens of the thinking. Default: the rollouts' policy."}
    )
    regression_score: str = field(
        default="mean_relative_accuracy",
        metadata={"help": "How numbers earn accuracy, as in the GRPO run's reward: or relative_error."},
    )
    judge: str = field(default="rules", metadata={"help": f"Who judges consistency: {', '.join(JUDGES)}."})
    judge_url: str | None = field(default=None, metadata={"help": "Of an OpenAI-compatible endpoint, with its /v1."})
    judge_model: str | None = field(default=None, metadata={"help": "Its name there, or the local model."})
    judge_api_key_env: str | None = field(
        default=None, metadata={"help": "Name of the environment variable that holds the endpoint's key."}
    )
    judge_prompt: str = field(
        default="consistency", metadata={"help": "A file of verifier_prompts/ by its name, or a path."}
    )
    judge_concurrency: int = field(default=64, metadata={"help": "Requests under way at once."})
    judge_timeout_s: float = field(default=120.0, metadata={"help": "Seconds before a request is given up."})
    judge_retries: int = field(default=5, metadata={"help": "Further tries of a request that failed."})
    judge_request_options: str | None = field(
        default=None,
        metadata={
            "help": 'As JSON. judge server: more of a request, like {"max_tokens": 2048} or {"chat_template_kwargs": '
            '{"enable_thinking": false}}. judge local: how it is loaded and asked, any of revision (on the Hub), dtype '
            '(auto, float32, bfloat16, float16), device (cuda, cpu), batch_size (16), max_new_tokens (512, of a reply).'
        },
    )
    verdict_cache: str | None = field(
        default=None,
        metadata={
            "help": "SQLite file of what judge models said, on a local disk (on a network disk SQLite's locks may not "
            "hold). Default: verdict_cache.sqlite beside output_dir, so that it outlives that folder and serves every "
            "iteration. Rules are not cached: they are faster."
        },
    )
    drop_solved_share: float = field(
        default=0.8, metadata={"help": "Share of the questions with all rollouts right that solved.json drops."}
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Push pairs (with solved.json) and verdicts as datasets."}
    )
    hub_pairs_id: str | None = field(default=None, metadata={"help": "Hub dataset for the pairs."})
    hub_verdicts_id: str | None = field(default=None, metadata={"help": "Hub dataset for the verdicts."})
    hub_private: bool = field(default=True, metadata={"help": "Create those datasets as private ones."})
    hub_license: str = field(default="unknown", metadata={"help": "Licence in the cards, by the Hub's identifier."})

    def __post_init__(self):
        if not self.rollouts:
            raise ConfigError("Expected `rollouts:`, a list of folders or a Hub dataset; none was given.")
        if self.judge not in JUDGES:
            raise ConfigError(f"judge: expected one of {', '.join(JUDGES)}, got {self.judge!r}.")
        needed = {"server": ("judge_url", "judge_model"), "local": ("judge_model",)}.get(self.judge, ())
        if self.push_to_hub:
            needed += ("hub_pairs_id", "hub_verdicts_id")
        if missing := [name for name in needed if getattr(self, name) is None]:
            why = "push_to_hub" if missing[0].startswith("hub") else f"judge: {self.judge}"
            raise ConfigError(f"{why} needs {' and '.join(missing)}; not given.")
        if self.push_to_hub and self.hub_pairs_id.lower() == self.hub_verdicts_id.lower():
            raise ConfigError(f"hub_pairs_id and hub_verdicts_id: expected two datasets, both are {self.hub_pairs_id!r}.")
        self.judge_request_options = read_request_options(self.judge_request_options, self.judge)
        if self.regression_score not in REGRESSION_SCORES:
            raise ConfigError(f"regression_score: expected one of {REGRESSION_SCORES}, got {self.regression_score!r}.")
        if not 0 <= self.drop_solved_share <= 1:
            raise ConfigError(f"drop_solved_share: expected a share from 0 to 1, got {self.drop_solved_share}.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit: expected 1 or more, got {self.limit}.")


ARGUMENTS = (VerifyArguments, PairOptions)


def read_request_options(given: str | dict | None, judge: str) -> dict | None:
    """`judge_request_options` as a dict; ConfigError if it is none, or has a key that a local judge does not know."""
    expected = f"judge_request_options: expected a JSON object, like {{\"max_tokens\": 2048}}, got {given!r}"
    try:
        options = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ConfigError(f"{expected}: {error}.") from error
    if options is not None and not isinstance(options, dict):
        raise ConfigError(f"{expected}.")
    if judge == "local" and (unknown := [key for key in options or () if key not in LOCAL_OPTIONS]):
        raise ConfigError(
            f"judge_request_options: judge: local does not know {', '.join(map(str, unknown))}; expected any of "
            f"{', '.join(LOCAL_OPTIONS)}."
        )
    return options


def find_rollouts(arguments: VerifyArguments) -> tuple[files.RolloutFiles, dict[str, dict]]:
    """The checked rollout files, and what the Hub has of them, by what was fetched or pushed: {name: {"repo_id",
    "revision"}}."""
    found, fetched, pushed = [], {}, {}
    for name in arguments.rollouts:
        folder = name
        if origin := locate(name, "dataset", arguments.rollouts_revision):
            print(f"{name}: no such folder here, so it is read as a Hub dataset", flush=True)
            folder, fetched[name] = fetch(**origin), origin
        here = files.find_rollout_files(folder)
        if name not in fetched and (origin := pushed_rollouts(here[0].parent)):
            pushed[name] = origin
        found += here
    if arguments.rollouts_revision and len(fetched) != 1:
        raise ConfigError(f"rollouts_revision is for one Hub dataset; of {arguments.rollouts} {len(fetched)} are such.")
    return files.open_rollouts(found, limit=arguments.limit), fetched | pushed


def pushed_rollouts(folder: Path) -> dict | None:
    """{"repo_id", "revision"} of a folder of rollouts that the GRPO run beside it has pushed, by its results.json."""
    results = folder.absolute().parent / stages.RESULTS
    if folder.name != "rollouts" or not results.is_file():
        return None
    pushed = (read_json(results, remedy="Take it from a copy, or remove it.").get("hub") or {}).get("rollouts")
    return pushed and {key: pushed[key] for key in ("repo_id", "revision")}


def load_matching_template(name: str, templates: Iterable[str]):
    """The prompt template, if it is the one of all rollouts: pairs repeat the prompt that the policy saw."""
    template = load_template(name)
    if others := sorted(set(templates) - {template.hash}):
        raise ConfigError(
            f"prompt_template {name!r} has the hash {template.hash}, but rollouts were made with {', '.join(others)}. "
            "Set prompt_template to the one of the GRPO run."
        )
    return template


def load_tokenizer(name: str | None, rollouts: files.RolloutFiles):
    """The tokenizer of that name; else the one that the run beside the rollouts has saved, or their only policy's.

    A policy outside of the working directory is recorded by the last part of its path. That is not a name on the Hub.
    """
    from transformers import AutoTokenizer

    policies, given = sorted(rollouts.policies), "`tokenizer`"
    if name is None and len(policies) > 1:
        raise ConfigError(f"The rollouts are of several policies ({', '.join(policies)}): give `tokenizer`.")
    if name is None:
        runs = {file.absolute().parents[1] for file in rollouts.files if file.parent.name == "rollouts"}
        places = [place for run in sorted(runs) for place in (run, *sorted(run.glob("checkpoint-*")))]
        saved = [str(place) for place in places if (place / "tokenizer_config.json").is_file()]
        name, given = [*saved, policies[0]][0], "the rollouts' policy"
    try:
        if given != "`tokenizer`" and not Path(name).is_dir() and is_local(name):
            raise OSError("no such folder, and not the name of a model on the Hub.")
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"No tokenizer in {name!r}, {given}: {str(error).splitlines()[0]}\nGive `tokenizer`: the folder or Hub name "
            "of the model that made the rollouts. Relative folders are seen from the working directory."
        ) from error


def find_judge_prompt(name: str) -> Path:
    """A prompt file by its path, or by its name in verifier_prompts/ beside this recipe's folder."""
    shipped = RECIPES.parent / "verifier_prompts"
    for path in (Path(name).expanduser(), shipped / f"{name}.yaml", shipped / name):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml"))) or "none there"
    raise ConfigError(f"judge_prompt {name!r}: no such file here, and not one of {shipped} ({known}).")


def make_judge(arguments: VerifyArguments):
    """The judge of the arguments; model judges are imported only where they are used."""
    if arguments.judge == "rules":
        return RulesJudge()
    prompt = load_judge_prompt(find_judge_prompt(arguments.judge_prompt))
    if arguments.judge == "local":
        from veripo_trl.verifier.local import LocalJudge

        try:
            return LocalJudge(arguments.judge_model, prompt, **(arguments.judge_request_options or {}))
        except (OSError, ValueError) as error:
            raise ConfigError(f"judge_model {arguments.judge_model!r} cannot be loaded: {error}") from error
    return ServerJudge(
        arguments.judge_url,
        arguments.judge_model,
        prompt,
        api_key_env=arguments.judge_api_key_env,
        concurrency=arguments.judge_concurrency,
        timeout_s=arguments.judge_timeout_s,
        retries=arguments.judge_retries,
        request_options=arguments.judge_request_options,
    )


def open_folder(output_dir: str) -> Path:
    """The run's folder, ready to write. A finished run is moved aside; what an unfinished one wrote is made anew: its
    expensive part, the judge's replies, is in the cache."""
    folder = Path(output_dir)
    move_finished_aside(folder)
    if sum(files.remove_files(folder / name) for name in ("verdicts", "pairs")):
        print(f"{folder} holds an unfinished verification: starting it again", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_cache(arguments: VerifyArguments, judge) -> VerdictCache | None:
    """The cache of the judge's replies, if it keeps them in one. Raises CacheError if that cannot be opened."""
    if not judge.caches:
        return None
    cache = VerdictCache(
        arguments.verdict_cache or Path(arguments.output_dir).absolute().parent / "verdict_cache.sqlite"
    )
    print(f"verdict cache: {cache.path}, {len(cache)} replies", flush=True)
    return cache


def judge_rollouts(
    rollouts: files.RolloutFiles, folder: Path, judge, tokenizer, cache: VerdictCache | None, arguments, ngram: int
) -> Counter:
    """Write a verdict for every rollout; counts of what they say."""
    counts: Counter = Counter()

    def counted(verdicts: Iterable[dict]) -> Iterator[dict]:
        for verdict in verdicts:
            counts[verdict["consistency"]] += 1
            counts["well formed"] += verdict["format_ok"]
            counts["accuracy"] += verdict["accuracy"]
            if verdict["consistency"] == "unknown":
                counts[f"unknown: {verdict['reason'].split(':')[0]}"] += 1
            yield verdict

    with tqdm(total=rollouts.rollouts, desc="verdicts", unit="rollout", smoothing=0.05) as bar:
        verdicts = verify_stream(
            rollouts,
            judge=judge,
            tokenizer=tokenizer,
            cache=cache,
            ngram=ngram,
            progress=bar,
            regression_score=arguments.regression_score,
        )
        files.write_files(counted(verdicts), folder / "verdicts", files.VERDICT_SCHEMA)
    return counts


def lowest_and_highest(question: list[dict]) -> list[tuple]:
    """Of a question's rollouts what `choose_solved` has to know: of every generation the extremes of accuracy."""
    generations: dict[tuple, list[float]] = {}
    for rollout in question:
        generations.setdefault(generation_of(rollout), []).append(rollout["verdict"]["accuracy"])
    name = question[0]["question_id"]
    both = {g: (min(values), max(values)) if len(values) > 1 else values for g, values in generations.items()}
    return [(name, generation, accuracy) for generation, values in both.items() for accuracy in values]


def push(folder: Path, arguments: VerifyArguments, results: dict) -> dict[str, dict]:
    """Push verdicts and pairs with cards of what happened; what the Hub holds then. With the pairs goes solved.json,
    which the next GRPO run leaves out (`leave_out`)."""
    held = {}
    for kind, repo_id, place, patterns in (
        ("verdicts", arguments.hub_verdicts_id, folder / "verdicts", ["*.parquet"]),
        ("pairs", arguments.hub_pairs_id, folder, ["pairs/*.parquet", "solved.json"]),
    ):
        card = dataset_card(
            kind, repo_id=repo_id, data_files=patterns[0], license=arguments.hub_license, **card_facts(kind, results)
        )
        message = f"{results['counts']['rollouts']} rollouts, judged by {results['judge']['name']}"
        held[kind] = pushed = push_folder(
            place, repo_id, repo_type="dataset", card=card, private=arguments.hub_private, patterns=patterns,
            message=message,
        )  # fmt: skip
        print(f"{pushed['url']} holds the {kind} at revision {pushed['revision']}", flush=True)
    return held


def main(argv: list[str] | None = None) -> None:
    arguments, options = stages.parse(ARGUMENTS, default_config=DEFAULT_CONFIG, argv=argv)
    if not int(os.environ.get("RANK", "0")):  # one process of a launcher's does the work
        with only_process(arguments.output_dir):
            verify(arguments, options)


def verify(arguments: VerifyArguments, options: PairOptions) -> None:
    started = time.time()
    if arguments.push_to_hub:  # a name or a token that is refused shall not be found out at the end
        ids = (arguments.hub_verdicts_id, arguments.hub_pairs_id)
        names = {prepare_repo(name, repo_type="dataset", private=arguments.hub_private).lower() for name in ids}
        if len(names) < len(ids):
            raise ConfigError(f"hub_pairs_id and hub_verdicts_id: expected two datasets, both are {names.pop()!r}.")
    rollouts, inputs = find_rollouts(arguments)
    template = load_matching_template(arguments.prompt_template, rollouts.templates)
    tokenizer = load_tokenizer(arguments.tokenizer, rollouts)
    judge = make_judge(arguments)
    cache = open_cache(arguments, judge)
    folder = open_folder(arguments.output_dir)  # after all that can be wrong with the arguments
    stages.save_arguments(str(folder), arguments, options)
    with cache or contextlib.nullcontext():
        counts = judge_rollouts(rollouts, folder, judge, tokenizer, cache, arguments, options.ngram)
    accuracies, questions, pairs = [], {}, PairsSeen()

    def watched(groups: Iterable[list[dict]]) -> Iterator[list[dict]]:
        for group in tqdm(groups, desc="pairs", unit="question"):
            questions[group[0]["question_id"]] = content_of(group[0])
            accuracies.extend(lowest_and_highest(group))
            yield group

    judged = watched(files.judged_questions(rollouts, folder / "verdicts"))
    found, dropped = build_pairs(judged, options, template=template, folder=folder)
    count = files.write_files(pairs.watch(found), folder / "pairs", files.PAIR_SCHEMA)
    solved = choose_solved(accuracies, share=arguments.drop_solved_share, seed=options.seed)
    contents = [questions[question] for question in solved["dropped"]]
    stages.write_json(folder / "solved.json", {**solved, "contents": contents})
    summary = summarize(rollouts.rollouts, len(questions), counts, pairs, dropped)
    plot(folder / "pairs.png", summary, pairs, title=folder.name)
    print(f"\n{judge.summary()}")
    print_summary(summary, solved, pairs)
    if not count:
        print(
            "\nNo pairs. A pair needs a question with a right and consistent rollout and a worse one beside it; the "
            "table above says what was missing. DPO has nothing to train on."
        )
    results = {
        "counts": summary,
        "solved": {**solved, "dropped": len(solved["dropped"])},
        "rollouts": arguments.rollouts,
        "inputs": inputs,
        "judge": {
            "name": judge.name,
            "prompt_version": judge.prompt_version,
            "requests": judge.requests,
            "retries": judge.retries,
            "failures": dict(judge.failures),
        },
        "prompt_template": template.hash,
        "policies": dict(rollouts.policies),
        "hub": None,
    }
    if arguments.push_to_hub:  # before the run counts as finished: a failed push is tried again by the same command
        try:
            results["hub"] = push(folder, arguments, results)
        except HubError as error:
            raise HubError(f"{error} Or start the same command again.") from error
    results["minutes"] = (time.time() - started) / 60
    write_results(folder, results)
    print(
        f"\n{count} pairs, verdicts, solved.json, pairs.png and {stages.RESULTS} are in {folder} "
        f"({results['minutes']:.1f} minutes)",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(run(main))
