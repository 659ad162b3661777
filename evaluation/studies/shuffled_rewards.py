"""A control: GRPO whose rewards are dealt out at random within each group, so that their
distribution stays and what they say about a completion is gone.

    python evaluation/studies/shuffled_rewards.py --config grounding/tiny.yaml --output_dir
    outputs/shuffled

Takes what recipes/grpo_video.py takes.
"""

import importlib.util
import sys
from pathlib import Path

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "grpo_video.py"
spec = importlib.util.spec_from_file_location("grpo_video", RECIPE)
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)  # first: it sets the environment that torch is imported in

import torch

from veripo_trl.errors import run


class ShuffledRewards(recipe.VideoGRPOTrainer):
    """GRPO whose rewards carry no information about their completions."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        size = self.num_generations if self.model.training else self.num_generations_eval
        groups = rewards.view(-1, size, rewards.size(1))
        order = torch.rand(groups.shape[:2], device=rewards.device).argsort(1)
        self._scored["rewards"] = groups.gather(1, order[..., None].expand_as(groups)).view_as(
            rewards
        )
        return self._scored["rewards"]


def main(argv: list[str] | None = None) -> int | None:
    recipe.VideoGRPOTrainer = ShuffledRewards
    return recipe.main(argv)


if __name__ == "__main__":
    sys.exit(run(main))
