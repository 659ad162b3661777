"""Ask a policy the questions of a GRPO run about perturbed videos; what it gets wrong is the rejected side of DPO's
`video` pairs, whose both sides are conditioned on the true video: a DPO that ignores the video cannot tell them apart.

    python recipes/sample_perturbed.py                                                    # the tiny world's
    python recipes/verify_rollouts.py --kinds consistency penalty video --perturbed outputs/tiny_perturbed/rollouts

Writes <output_dir>/rollouts and results.json. The answers are made by evaluation/evaluation_vllm.py, whose options are in
`engine_options`: broken off, the same command goes on.
"""

from veripo_trl.start import start

start()  # before torch is imported

import runpy
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from veripo_trl.errors import ConfigError, VeripoError, run
from veripo_trl.evaluate.perturb import PERTURBATIONS
from veripo_trl.files.run_folder import move_finished_aside, refuse_own_input, write_results
from veripo_trl.options import option
from veripo_trl.recipe.arguments import parse, read_mapping
from veripo_trl.verifier.files import find_rollout_files, read_rollouts

RECIPES = Path(__file__).resolve().parent
DEFAULT_CONFIG = RECIPES / "configs" / "tiny" / "perturbed.yaml"


@dataclass
class SampleArguments:
    """Which questions are asked, of whom, and how their videos are perturbed."""

    model_name_or_path: str = field(metadata={"help": "The policy: a folder or a name on the Hub."})
    rollouts: str = field(metadata={"help": "Folder of a GRPO run's rollouts: their questions are asked."})
    output_dir: str = field(metadata={"help": "Folder for the rollouts on perturbed videos."})
    media_root: str = option("What the rollouts' video paths start from.", ".")
    perturb: list[str] = field(
        default_factory=lambda: list(PERTURBATIONS[:3]),
        metadata={"help": f"Perturbations, each an answer to every question: {', '.join(PERTURBATIONS)}."},
    )
    temperature: float = option("Of the sampling.", 1.0)
    engine_options: str | None = option("More options of evaluation_vllm.py: {engine: vllm, max_new_tokens: 2048}.")
    seed: int = option("Of perturbations and sampling.", 0)

    def __post_init__(self):
        self.engine_options = read_mapping("engine_options", self.engine_options)
        known = set(self.perturb) <= set(PERTURBATIONS)
        if not self.perturb or not known or len(set(self.perturb)) < len(self.perturb):
            raise ConfigError(f"perturb: expected some of {', '.join(PERTURBATIONS)}, each once; got {self.perturb!r}.")


def main(argv: list[str] | None = None) -> None:
    started, (arguments,) = time.time(), parse((SampleArguments,), default_config=DEFAULT_CONFIG, argv=argv)
    folder = Path(arguments.output_dir)
    refuse_own_input(folder, [arguments.rollouts, arguments.model_name_or_path])
    move_finished_aside(folder)
    options = {
        "model_path": arguments.model_name_or_path,
        "prompt_path": arguments.rollouts,
        "video_dir": arguments.media_root,
        "output_path": folder / "rollouts.json",
        "perturb": arguments.perturb,
        "temperature": arguments.temperature,
        "repetition_penalty": 1.0,
        "seed": arguments.seed,
        **(arguments.engine_options or {}),
    }
    words = [[f"--{name}", *(value if isinstance(value, list) else [value])] for name, value in options.items()]
    words = [str(word) for option in words for word in option]
    print(shlex.join(["evaluation_vllm.py", *words]), flush=True)  # its errors name its options
    script = RECIPES.parent / "evaluation" / "evaluation_vllm.py"
    if runpy.run_path(str(script))["main"](words):
        raise VeripoError(f"{folder}: not every question was answered, see above.")
    counts = {"rollouts": len(read_rollouts(find_rollout_files(folder), perturbed=True))}
    write_results(folder, {"counts": counts, "minutes": (time.time() - started) / 60})


ARGUMENTS = (SampleArguments,)

if __name__ == "__main__":
    sys.exit(run(main))
