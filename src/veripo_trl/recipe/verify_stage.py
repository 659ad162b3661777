"""What the verify recipe is given, what it reads and whom it asks, and how it ends."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from veripo_trl.answers.rewards import reward_function
from veripo_trl.data.prompts import load_template
from veripo_trl.errors import ConfigError
from veripo_trl.files.disk import read_json
from veripo_trl.files.run_folder import RESULTS, move_finished_aside, write_results
from veripo_trl.hub.ask import HubError
from veripo_trl.hub.cards import dataset_card
from veripo_trl.hub.locate import fetch, is_local, locate
from veripo_trl.hub.push import prepare_repo, push_folder
from veripo_trl.user_functions import is_user_function
from veripo_trl.verifier import files
from veripo_trl.verifier.judge_prompts import load_judge_prompt
from veripo_trl.verifier.judges import Judge, RulesJudge, UserJudge
from veripo_trl.verifier.pairs import option
from veripo_trl.verifier.reply_cache import VerdictCache
from veripo_trl.verifier.server_judge import ServerJudge
from veripo_trl.verifier.summary import card_facts

JUDGES = ("rules", "server", "local")


@dataclass
class VerifyArguments:
    """What is judged, by whom, and where the result goes."""

    output_dir: str = field(metadata={"help": "Folder for verdicts, pairs and tables."})
    rollouts: list[str] = field(
        default_factory=list, metadata={"help": "Folders of rollout files, or a Hub dataset org/name."}
    )
    rollouts_revision: str | None = option("Revision of the Hub dataset.")
    limit: int | None = option("Read the first n rollouts only, to try things out.")
    prompt_template: str = option("The one that the rollouts were made with: a name or a YAML file.", "default")
    tokenizer: str | None = option("Counts the tokens of the thinking. Default: the rollouts' policy.")
    accuracy_reward: str = option(
        "What is right: the GRPO run's reward for that, accuracy, accuracy_relative_error or the user's own as "
        "module:function, from 0 to 1.",
        "accuracy",
    )
    judge: str = option(f"Who judges consistency: {', '.join(JUDGES)}, or the user's own as module:function.", "rules")
    judge_url: str | None = option("Of an OpenAI-compatible endpoint, with its /v1.")
    judge_model: str | None = option("Its name there, or the local model.")
    judge_api_key_env: str | None = option("Name of the environment variable that holds the endpoint's key.")
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
        "Default: verdict_cache.sqlite beside output_dir, so that it outlives that folder and serves every iteration. "
        "Rules are not cached: they are faster."
    )
    drop_solved_share: float = option("Share of the questions with all rollouts right that solved.json drops.", 0.8)
    push_to_hub: bool = option("Push pairs (with solved.json) and verdicts as datasets.", False)
    hub_pairs_id: str | None = option("Hub dataset for the pairs.")
    hub_verdicts_id: str | None = option("Hub dataset for the verdicts.")
    hub_private: bool = option("Create those datasets as private ones.", True)
    hub_license: str = option("Licence in the cards, by the Hub's identifier.", "unknown")

    def __post_init__(self):
        def check(fine: bool, name: str, expected: str) -> None:
            if not fine:
                raise ConfigError(f"{name}: expected {expected}; got {getattr(self, name)!r}.")

        check(bool(self.rollouts), "rollouts", "a list of folders or a Hub dataset")
        check(
            self.judge in JUDGES or is_user_function(self.judge),
            "judge",
            f"one of {', '.join(JUDGES)}, or module:function",
        )
        needed = {"server": ("judge_url", "judge_model"), "local": ("judge_model",)}.get(self.judge, ())
        for name in needed + (("hub_pairs_id", "hub_verdicts_id") if self.push_to_hub else ()):
            check(getattr(self, name) is not None, name, f"a name, for judge: {self.judge} or push_to_hub")
        known = ("accuracy", "accuracy_relative_error")
        check(
            self.accuracy_reward in known or is_user_function(self.accuracy_reward),
            "accuracy_reward",
            f"one of {', '.join(known)}, or module:function",
        )
        reward_function(self.accuracy_reward)
        check(self.judge_concurrency >= 1, "judge_concurrency", "1 or more")
        check(0 <= self.drop_solved_share <= 1, "drop_solved_share", "a share from 0 to 1")
        check(self.limit is None or self.limit >= 1, "limit", "1 or more")
        if isinstance(self.judge_request_options, str):
            try:
                self.judge_request_options = json.loads(self.judge_request_options)
            except ValueError:
                pass  # refused as a text
        options = self.judge_request_options
        check(options is None or isinstance(options, dict), "judge_request_options", 'JSON like {"max_tokens": 2048}')


# ------------------------------------------------------------------------------------------------- what is read


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
    results = folder.absolute().parent / RESULTS
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
        folders = [folder for run in sorted(runs) for folder in (run, *sorted(run.glob("checkpoint-*")))]
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


def make_judge(arguments: VerifyArguments, prompts: Path) -> Judge:
    """The judge of the arguments; a local one is imported only where it is used.

    Args:
        prompts: the folder of the prompts that are shipped, for `judge_prompt` by its name.
    """
    if arguments.judge == "rules":
        return RulesJudge()
    if arguments.judge not in JUDGES:
        return UserJudge(arguments.judge, concurrency=arguments.judge_concurrency)
    name = arguments.judge_prompt
    path = Path(name).expanduser()
    prompt = load_judge_prompt(path if path.is_file() else prompts / f"{name.removesuffix('.yaml')}.yaml")
    options = arguments.judge_request_options or {}
    if arguments.judge == "local":
        from veripo_trl.verifier.local_judge import LocalJudge

        try:
            return LocalJudge(arguments.judge_model, prompt, **options)
        except (OSError, ValueError, TypeError, RuntimeError, AssertionError) as error:  # the last by torch without CUDA
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


def open_cache(arguments: VerifyArguments, judge: Judge) -> VerdictCache | None:
    """The cache of the judge's replies, if it keeps them in one. Raises CacheError if that cannot be opened."""
    if not judge.caches:
        return None
    beside = Path(arguments.output_dir).absolute().parent / "verdict_cache.sqlite"
    cache = VerdictCache(arguments.verdict_cache or beside)
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


def check_repositories(arguments: VerifyArguments) -> None:
    """Where results are to be pushed: a name or a token that is refused shall not be found out at the end."""
    if arguments.push_to_hub:
        ids = (arguments.hub_verdicts_id, arguments.hub_pairs_id)
        names = {prepare_repo(name, repo_type="dataset", private=arguments.hub_private).lower() for name in ids}
        if len(names) < len(ids):
            raise ConfigError(f"hub_pairs_id and hub_verdicts_id: expected two datasets, both are {names.pop()!r}.")


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
        f"\n{pairs} pairs, verdicts, solved.json, pairs.png and {RESULTS} are in {folder} "
        f"({results['minutes']:.1f} minutes)",
        flush=True,
    )


def push(folder: Path, arguments: VerifyArguments, results: dict) -> dict[str, dict]:
    """Push verdicts and pairs with cards of what happened; what the Hub holds then. With the pairs goes solved.json,
    which the next GRPO run leaves out (`leave_out`)."""
    held = {}
    for kind, repo_id, source, patterns in (
        ("verdicts", arguments.hub_verdicts_id, folder / "verdicts", ["*.parquet"]),
        ("pairs", arguments.hub_pairs_id, folder, ["pairs/*.parquet", "solved.json"]),
    ):
        card = dataset_card(
            kind, repo_id=repo_id, data_files=patterns[0], license=arguments.hub_license, **card_facts(kind, results)
        )
        message = f"{results['counts']['rollouts']} rollouts, judged by {results['judge']['name']}"
        held[kind] = pushed = push_folder(
            source, repo_id, repo_type="dataset", card=card, private=arguments.hub_private, patterns=patterns,
            message=message,
        )  # fmt: skip
        print(f"{pushed['url']} holds the {kind} at revision {pushed['revision']}", flush=True)
    return held
