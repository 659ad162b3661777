"""Runs recipes in this process under DDP, ZeRO-2, ZeRO-3 or FSDP2, on CPUs over gloo, as `torchrun` starts it.

    python tests_engines/matrix_driver.py ENGINE SCENARIOS.json

SCENARIOS.json is a list of {name, recipe, argv, limit_s, environ, and optionally completions, break_after, refused,
fail}. They run one after the other, so that their processes pay for their imports once. One that outlasts its limit
ends its process with the stack of every thread. Used by test_matrix.py only.
"""

import contextlib
import faulthandler
import gc
import importlib.util
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path

import accelerate.state as state
import yaml
from accelerate.utils import DistributedType
from transformers import Trainer
from transformers.integrations import unset_hf_deepspeed_config

from veripo_trl import errors
from veripo_trl.errors import VeripoError
from veripo_trl.methods.streaming import Streaming
from veripo_trl.trainers.grpo import VideoGRPOTrainer

ENGINE, RANK = sys.argv[1], os.environ["RANK"]
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
CONFIGS = RECIPES / "configs" / "accelerate"
# Where `accelerate launch` gives a key of its YAML another name in the environment.
NAMES = {"ZERO3_INIT_FLAG": "ZERO3_INIT", "TRANSFORMER_LAYER_CLS_TO_WRAP": "TRANSFORMER_CLS_TO_WRAP"}


def environ_of(engine: str) -> dict[str, str]:
    """What `accelerate launch` sets from an engine's file in recipes/configs/accelerate/."""
    config = yaml.safe_load((CONFIGS / f"{engine}.yaml").read_text())
    found = {}
    for section, prefix in (("deepspeed", "ACCELERATE_DEEPSPEED_"), ("fsdp", "FSDP_")):
        for key, value in config.get(f"{section}_config", {}).items():
            name = key.removeprefix("fsdp_").upper()
            found[prefix + NAMES.get(name, name)] = str(value).lower() if isinstance(value, bool) else str(value)
            found[f"ACCELERATE_USE_{section.upper()}"] = "true"
    return found


def run_on_cpu() -> None:
    """accelerate takes these engines for GPUs' alone: it is told that there are several devices, which are CPUs."""
    state.PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    if ENGINE != "fsdp2":
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling, for what gloo does too
        return
    make = state.AcceleratorState.__init__

    def make_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    state.AcceleratorState.__init__ = make_fsdp


def load_recipe(name: str):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)  # TrlParser resolves annotations there
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def fix_completions(completions: dict[str, list[str]]) -> None:
    """Give the n-th row of a group its question's n-th completion, counted over all processes. Nothing is computed for
    them: as with vLLM, vision features are made elsewhere than in a rollout. Streaming, which refuses vLLM, samples."""

    def fixed(self, prompt_ids, *args, **kwargs):
        if isinstance(self, Streaming):
            KEPT[VideoGRPOTrainer, "_generate_single_turn"](self, prompt_ids, *args, **kwargs)
        first = self.accelerator.process_index * len(prompt_ids)
        texts = [
            completions[prompt.question_id][(first + place) % self.num_generations]
            for place, prompt in enumerate(self._active)
        ]
        return [[*self._tokenizer(text)["input_ids"], self._tokenizer.eos_token_id] for text in texts], None

    VideoGRPOTrainer._generate_single_turn = fixed


class BrokenOff(BaseException):
    """Stands in for the death of a run."""


def break_after(step: int) -> None:
    def break_off(self, *args, **kwargs):
        KEPT[Trainer, "_maybe_log_save_evaluate"](self, *args, **kwargs)
        if self.state.global_step == step:
            raise BrokenOff

    Trainer._maybe_log_save_evaluate = break_off


def fail_in_process_1() -> None:
    """A row of rank 1's alone is what an error names, while the others wait for it."""

    def fail(self, *args, **kwargs):
        if RANK == "1":
            raise VeripoError("row 'row3' is not as it was")
        return KEPT[Trainer, "training_step"](self, *args, **kwargs)

    Trainer.training_step = fail


KEPT = {
    (owner, name): getattr(owner, name)
    for owner, name in (
        (Trainer, "_maybe_log_save_evaluate"),
        (Trainer, "training_step"),
        (VideoGRPOTrainer, "_generate_single_turn"),
    )
}


def run(scenario: dict) -> str:
    for (owner, name), value in KEPT.items():
        setattr(owner, name, value)
    environ = {**environ_of(ENGINE), **scenario["environ"]}
    environ = {name: value for name, value in environ.items() if value is not None}
    os.environ.update(environ)
    if "completions" in scenario:
        fix_completions(scenario["completions"])
    if "break_after" in scenario:
        break_after(scenario["break_after"])
    if scenario.get("fail"):
        fail_in_process_1()
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            errors.run(lambda: load_recipe(scenario["recipe"]).main(scenario["argv"]))
        return said.getvalue().strip().rpartition("\n")[2]
    try:
        return f"exit code {load_recipe(scenario['recipe']).main(scenario['argv']) or 0}"
    except BrokenOff:
        return "broken off"
    except Exception as error:
        if "refused" in scenario:
            return f"{type(error).__name__}: {error}"
        raise
    finally:
        state.AcceleratorState._reset_state(reset_partial_state=False)
        state.GradientState._reset_state()
        unset_hf_deepspeed_config()
        for name in environ:
            del os.environ[name]


def say(line: str) -> None:
    """In one write: unbuffered, `print` writes a line's end apart, and another process's line may come between."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    if ENGINE != "ddp":
        run_on_cpu()
    for scenario in json.loads(Path(sys.argv[2]).read_text()):
        name = scenario["name"]
        faulthandler.dump_traceback_later(scenario["limit_s"], exit=True)
        started = time.monotonic()
        try:
            said = run(scenario)
        except BaseException:
            traceback.print_exc()
            say(f"cell {name} rank {RANK} failed")
            os._exit(3)
        faulthandler.cancel_dump_traceback_later()
        gc.collect()
        say(f"cell {name} rank {RANK} {time.monotonic() - started:.1f} s: {said}")


if __name__ == "__main__":
    main()
