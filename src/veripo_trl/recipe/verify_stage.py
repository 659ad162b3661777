"""What the verify recipe is given, what it reads and whom it asks, and how it ends."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from veripo_trl.answers.rewards import ACCURACIES, reward_functions
from veripo_trl.data.schema import QUESTION, content_of
from veripo_trl.errors import ConfigError
from veripo_trl.files.disk import read_json
from veripo_trl.files.run_folder import RESULTS, move_finished_aside, write_results
from veripo_trl.hub.ask import HubError
from veripo_trl.hub.cards import dataset_card
from veripo_trl.hub.locate import fetch, is_local, locate
from veripo_trl.hub.push import prepare_repo, push_folder
from veripo_trl.options import option
from veripo_trl.recipe.arguments import read_mapping
from veripo_trl.user_functions import is_user_function
from veripo_trl.verifier import files
from veripo_trl.verifier.curriculum import choose_solved
from veripo_trl.verifier.judge_prompts import load_judge_prompt
from veripo_trl.verifier.judges import Judge, RulesJudge, UserJudge
from veripo_trl.verifier.pairs import PairOptions, check_setting
from veripo_trl.verifier.reply_cache import VerdictCache
from veripo_trl.verifier.server_judge import ServerJudge
from veripo_trl.verifier.summary import card_facts

JUDGES = ("rules", "server", "local")


@dataclass(kw_only=True)
class JudgeArguments:
    """Who judges, and how it is asked."""

    judge: str = option(
        f"Who judges consistency: {', '.join(JUDGES)}, or the user's own as module:function.",
        "rules",
    )
    judge_url: str | None = option("Of an OpenAI-compatible endpoint, with its /v1.")
    judge_model: str | None = option("Its name there, or the local model.")
    judge_api_key_env: str | None = option(
        "Name of the environment variable that holds the endpoint's key."
    )
    judge_prompt: str = option("A file of verifier_prompts/ by its name, or a path.", "consistency")
    judge_concurrency: int = option("Requests under way at once.", 64)
    judge_timeout_s: float = option("Seconds before a request is given up.", 120.0)
    judge_retries: int = option("Further tries of a request that failed.", 5)
    judge_request_options: str | None = option(
        'As JSON. judge server: more of a request, like {"max_tokens": 2048} or {"chat_template_kwargs": '
        '{"enable_thinking": false}}. judge local: how it is loaded and asked, any of revision (on the Hub), dtype '
        "(auto, float32, bfloat16, float16), device (cuda, cpu), batch_size (16), max_new_tokens (512, of a reply)."
    )
    verdict_cache: str | None = option(
        "SQLite file of what judge models said, on a local disk (on a network disk SQLite's locks may not hold). "
        "Default: verdict_cache.sqlite beside the folder that is written, so that it outlives that and serves every "
        "iteration. Rules are not cached: they are faster."
    )

    def __post_init__(self):
        if isinstance(self.judge_request_options, str):
            with contextlib.suppress(ValueError):  # refused as a text
                self.judge_request_options = json.loads(self.judge_request_options)
        check = partial(check_setting, self)
        fits = self.judge in JUDGES or is_user_function(self.judge)
        check("judge", fits, f"one of {', '.join(JUDGES)}, or module:function")
        model_less = self.judge not in ("server", "local")
        check("judge_url", self.judge_url or self.judge != "server", "a URL, for judge: server")
        check("judge_model", self.judge_model or model_less, f"a name, for judge: {self.judge}")
        check("judge_concurrency", self.judge_concurrency >= 1, "1 or more")
        check("judge_timeout_s", self.judge_timeout_s > 0, "more than 0")
        check("judge_retries", self.judge_retries >= 0, "0 or more")
        fine = isinstance(self.judge_request_options, dict | None)
        check("judge_request_options", fine, 'JSON like {"max_tokens": 2048}')


@dataclass(kw_only=True)
class VerifyArguments(JudgeArguments):
    """What is judged, by whom, and where the result goes."""

    output_dir: str = field(metadata={"help": "Folder for verdicts, pairs and tables."})
    rollouts: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of rollout files, or a Hub dataset org/name."},
    )
    rollouts_revision: str | None = option("Revision of the Hub dataset.")
    perturbed: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders of rollouts on perturbed videos (recipes/sample_perturbed.py), for kinds: [video]."
        },
    )
    limit: int | None = option("Read the first n rollouts only, to try things out.")
    prompt_template: str = option(
        "The one that the rollouts were made with: a name or a YAML file.", "default"
    )
    tokenizer: str | None = option(
        "Counts the tokens of the thinking. Default: the rollouts' policy."
    )
    accuracy_reward: str = option(
        f"What is right: the GRPO run's reward for that, {', '.join(ACCURACIES)} or the user's own as module:function, "
        "from 0 to 1.",
        "accuracy",
    )
    reward_kwargs: str | None = option(
        "Its options, as in the GRPO run: {accuracy_absolute_range: {max_range: 1}}."
    )
    drop_solved_share: float = option(
        "Share of the questions with all rollouts right that solved.json drops.", 0.8
    )
    push_to_hub: bool = option("Push pairs (with solved.json) and verdicts as datasets.", False)
    hub_pairs_id: str | None = option("Hub dataset for the pairs.")
    hub_verdicts_id: str | None = option("Hub dataset for the verdicts.")
    hub_private: bool = option("Create those datasets as private ones.", True)
    hub_license: str = option("Licence in the cards, by the Hub's identifier.", "unknown")

    def __post_init__(self):
        super().__post_init__()
        check = partial(check_setting, self)
        check("rollouts", self.rollouts, "a list of folders or a Hub dataset")
        of_hub = len(self.rollouts) == 1 and not is_local(self.rollouts[0])
        fits = of_hub or not self.rollouts_revision
        check("rollouts_revision", fits, "one Hub dataset as `rollouts` beside it")
        check("limit", self.limit is None or self.limit >= 1, "1 or more")
        fits = self.accuracy_reward in ACCURACIES or is_user_function(self.accuracy_reward)
        check("accuracy_reward", fits, f"one of {', '.join(ACCURACIES)}, or module:function")
        self.reward_kwargs = read_mapping("reward_kwargs", self.reward_kwargs)
        self.reward()
        check("drop_solved_share", 0 <= self.drop_solved_share <= 1, "a share from 0 to 1")
        for name in ("hub_pairs_id", "hub_verdicts_id") if self.push_to_hub else ():
            check(name, getattr(self, name), "a name, for push_to_hub")

    def reward(self) -> Callable[..., list[float]]:
        (found,) = reward_functions([self.accuracy_reward], self.reward_kwargs)
        return found


# ------------------------------------------------------------------------------------------------- what is read


def check_kinds(arguments: VerifyArguments, options: PairOptions) -> None:
    """Raise a ConfigError unless there are pairs of kind video and what they are made of, or neither."""
    if ("video" in options.kinds) != bool(arguments.perturbed):
        raise ConfigError(
            f"kinds and perturbed: expected both `video` and the folder of sample_perturbed.py, or neither; got "
            f"{options.kinds!r} and {arguments.perturbed!r}."
        )


def find_rollouts(arguments: VerifyArguments) -> tuple[list[Path], dict[str, dict]]:
    """The rollout files, and what the Hub has of them, by what was fetched or pushed: {name: {"repo_id",
    "revision"}}."""
    found, inputs = [], {}
    for name in arguments.rollouts:
        if origin := locate(name, "dataset", arguments.rollouts_revision):
            print(f"{name}: no such folder here, so it is read as a Hub dataset", flush=True)
        here = files.find_rollout_files(fetch(**origin) if origin else name)
        if origin := origin or pushed_rollouts(here[0].parent):
            inputs[name] = origin
        found += here
    return found, inputs


def say_other_accuracy(arguments: VerifyArguments, rollout_files: list[Path]) -> None:
    """Say so where what is right here is not what a run was trained with."""
    found, known = arguments.reward().__name__, {f"{name}_reward" for name in ACCURACIES}
    for file in {file.parent: file for file in rollout_files}.values():
        schema = pq.read_schema(file)
        kind = schema.field("rewards").type if "rewards" in schema.names else None
        names = {field.name for field in kind} if kind is not None and pa.types.is_struct(kind) else set()
        if names & known and found not in names:
            trained = ", ".join(sorted(name.removesuffix("_reward") for name in names & known))
            print(f"{file.parent}: trained with {trained}; what is right is told by {found} here (accuracy_reward).")


def pushed_rollouts(folder: Path) -> dict | None:
    """{"repo_id", "revision"} of a folder of rollouts that the GRPO run beside it has pushed, by its results.json."""
    results = folder.absolute().parent / RESULTS
    if folder.name != "rollouts" or not results.is_file():
        return None
    hub = read_json(results, remedy="Take it from a copy, or remove it.").get("hub")
    pushed = (hub or {}).get("rollouts")
    return pushed and {key: pushed[key] for key in ("repo_id", "revision")}


def load_tokenizer(name: str | None, rollout_files: list[Path], policies: Iterable[str]):
    """The tokenizer of that name; else the one that the run beside the rollouts has saved, or their only policy's.

    A policy outside of the working directory is recorded by the last part of its path. That is not a name on the Hub.
    """
    from transformers import AutoTokenizer

    policies, given = sorted(policies), "`tokenizer`"
    if name is None:
        if len(policies) > 1:
            raise ConfigError(
                f"The rollouts are of several policies ({', '.join(policies)}): give `tokenizer`."
            )
        store = rollout_files[0].absolute().parent
        run = store.parent if store.name == "rollouts" else store  # elsewhere what is beside it is another's
        folders = [run, *sorted(run.glob("checkpoint-*"))]
        saved = [str(folder) for folder in folders if (folder / "tokenizer_config.json").is_file()]
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


# ------------------------------------------------------------------------------------------------ who is asked


def make_judge(arguments: JudgeArguments) -> Judge:
    """The judge of the arguments; a local one is imported only where it is used."""
    if arguments.judge == "rules":
        return RulesJudge()
    if arguments.judge not in JUDGES:
        return UserJudge(arguments.judge, concurrency=arguments.judge_concurrency)
    prompt = load_judge_prompt(arguments.judge_prompt)
    options = arguments.judge_request_options or {}
    if arguments.judge == "local":
        from veripo_trl.verifier.local_judge import LocalJudge

        try:
            return LocalJudge(arguments.judge_model, prompt, **options)
        except (
            Exception
        ) as error:  # what transformers and torch say of a model, an option, a device
            raise ConfigError(
                f"judge_model {arguments.judge_model!r}, judge_request_options {options}: cannot be loaded: {error}"
            ) from error
    return ServerJudge(
        arguments.judge_url,
        arguments.judge_model,
        prompt,
        api_key_env=arguments.judge_api_key_env,
        concurrency=arguments.judge_concurrency,
        timeout_s=arguments.judge_timeout_s,
        max_retries=arguments.judge_retries,
        request_options=options,
    )


def open_cache(path: str | None, judge: Judge, *, beside: str | Path) -> contextlib.AbstractContextManager:
    """What to enter for the cache of the judge's replies, at `path` or `beside` what is written; for None, if it keeps
    them in none. Raises CacheError at once if it cannot be opened."""
    if not judge.caches:
        return contextlib.nullcontext()
    cache = VerdictCache(path or Path(beside).absolute().parent / "verdict_cache.sqlite")
    print(f"verdict cache: {cache.path}, {len(cache)} replies", flush=True)
    return cache


def open_folder(output_dir: str) -> Path:
    """The run's folder, ready to write. A finished run is moved aside; what an unfinished one wrote is made anew: its
    expensive part, the judge's replies, is in the cache."""
    folder = Path(output_dir)
    move_finished_aside(folder)
    if sum(files.remove_files(folder / name) for name in ("verdicts", "pairs")):
        print(f"{folder} holds an unfinished verification: starting it again", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ------------------------------------------------------------------------------------------------------ the end


def solved_questions(rollouts: pa.Table, verdicts: pa.Table, *, share: float, seed: int) -> dict:
    """What solved.json holds: `choose_solved`, and the `contents` of what it drops, in that order."""
    told = rollouts.select(["rollout_id", "question_id", "step", *QUESTION]).append_column(
        "accuracy", verdicts["accuracy"]
    )
    accuracies = (
        (row["question_id"], (row["rollout_id"].rpartition("/")[0], row["step"]), row["accuracy"])
        for row in files.rows_of(told.select(["rollout_id", "question_id", "step", "accuracy"]))
    )
    solved = choose_solved(accuracies, share=share, seed=seed)
    dropped = pc.is_in(told["question_id"], pa.array(solved["dropped"], pa.large_string()))
    contents = {row["question_id"]: content_of(row) for row in files.rows_of(told.filter(dropped))}
    return {**solved, "contents": [contents[name] for name in solved["dropped"]]}


def check_repositories(arguments: VerifyArguments) -> None:
    """Where results are to be pushed: a name or a token that is refused shall not be found out at the end."""
    if arguments.push_to_hub:
        ids = (arguments.hub_verdicts_id, arguments.hub_pairs_id)
        how = {"repo_type": "dataset", "private": arguments.hub_private}
        names = {prepare_repo(name, **how).lower() for name in ids}
        if len(names) < len(ids):
            raise ConfigError(
                f"hub_pairs_id and hub_verdicts_id: expected two datasets, both are {names.pop()!r}."
            )


def finish(folder: Path, arguments: VerifyArguments, results: dict, *, started: float) -> None:
    """Push, then write results.json: a failed push is tried again by the same command."""
    if arguments.push_to_hub:
        try:
            results["hub"] = push(folder, arguments, results)
        except HubError as error:
            raise HubError(f"{error} Or start the same command again.") from error
    results["minutes"] = (time.time() - started) / 60
    write_results(folder, results)
    pairs = sum(results["counts"]["pairs"].values())
    if not pairs:
        print(
            "\nNo pairs. A pair needs a question with a right and consistent rollout and a worse one beside it; the "
            "table above says what was missing. DPO has nothing to train on."
        )
    print(
        f"\n{pairs} pairs, verdicts, solved.json and {RESULTS} are in {folder} ({results['minutes']:.1f} minutes)",
        flush=True,
    )


def push(folder: Path, arguments: VerifyArguments, results: dict) -> dict[str, dict]:
    """Push verdicts and pairs with cards of what happened; what the Hub holds then. With the pairs goes solved.json,
    which the next GRPO run leaves out (`leave_out`)."""
    held, license = {}, arguments.hub_license
    message = f"{results['counts']['rollouts']} rollouts, judged by {results['judge']['name']}"
    how = {"repo_type": "dataset", "private": arguments.hub_private, "message": message}
    for kind, name, source, patterns in (
        ("verdicts", arguments.hub_verdicts_id, folder / "verdicts", ["*.parquet"]),
        ("pairs", arguments.hub_pairs_id, folder, ["pairs/*.parquet", "solved.json"]),
    ):
        facts = card_facts(kind, results)
        card = dataset_card(kind, repo_id=name, data_files=patterns[0], license=license, **facts)
        held[kind] = pushed = push_folder(source, name, card=card, patterns=patterns, **how)
        print(f"{pushed['url']} holds the {kind} at revision {pushed['revision']}", flush=True)
    return held
