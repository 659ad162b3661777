"""Engines that share a model's weights out over processes, DeepSpeed's ZeRO-3 and FSDP2: what is refused, and where all
processes meet so that none waits for another.

Weights are gathered by all processes together, so each must run the same modules in the same order. Two things would
not: the vision tower, where only some have media, and generation, where some have more to do. For both, weights are
made whole at a point that every process enters; inside it each does what it has to.
"""

from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from accelerate.utils import DistributedType, fsdp_utils
from torch.distributed.fsdp import FSDPModule
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation

from veripo_trl.errors import VeripoError
from veripo_trl.model.features import tower_is_frozen


def check_engine(accelerator, model, reference=None) -> None:
    """Refuse what would hang, or be wrong without a word; under FSDP2 make accelerate see the model's final norm.

    Args:
        model: the policy without wrappers, not yet prepared. reference: likewise, if it is a model of its own.

    Raises:
        ValueError: accelerate's settings, wherever they come from (a YAML's reach no argument of the trainer).
    """
    sizes = accelerator.parallelism_config
    if sizes is not None and (sizes.cp_enabled or sizes.sp_enabled):
        raise ValueError(
            f"Expected no context or sequence parallelism; accelerate's parallelism_config has cp_size "
            f"{sizes.cp_size} and sp_size {sizes.sp_size}. Both cut a row's ids before its vision features are put in, "
            f"and know no positions in three axes. Set both to 1."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        check_fsdp(accelerator.state.fsdp_plugin, model)
        if reference is not None and not tower_is_frozen(model.model.visual):
            raise ValueError(
                "FSDP with train_vision_tower: expected no reference model beside the policy: its tower, frozen and "
                "sharded, would be asked outside of its forward. Use accelerate/zero3.yaml, or an adapter, or beta: 0."
            )
        fsdp_utils._find_final_norm = final_norm


def check_fsdp(plugin, model) -> None:
    layer = type(model.model.language_model.layers[0]).__name__
    # A tower in the ignored modules stays whole, frozen, on every process: no collective in it, so rows may differ.
    tower = r".*visual$" if tower_is_frozen(model.model.visual) else None
    checked = {  # what was found, what is expected
        "fsdp_version": (plugin.fsdp_version, 2),
        # The vision tower's blocks would become units, which must not run before the whole model did.
        "fsdp_transformer_layer_cls_to_wrap": (plugin.transformer_cls_names_to_wrap, [layer]),
        "fsdp_ignored_modules": (plugin.ignored_modules, tower),
        # By way of the meta device, where what is ignored would be lost.
        "fsdp_cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, False),
    }
    if wrong := [f"{name}: {found}, not {expected}" for name, (found, expected) in checked.items() if found != expected]:
        raise ValueError(
            f"FSDP is set up with {'; '.join(wrong)}. recipes/configs/accelerate/fsdp2.yaml says why; with "
            f"train_vision_tower the tower is not ignored, and for another family the layer's class is its own."
        )


def final_norm(model) -> torch.nn.Module:
    """For accelerate, which looks among the direct children of the base model and finds none in Qwen-VL.

    It would make the output head a unit alone. TRL's fused head never calls that module and takes its weight by
    `full_tensor()`, whose gradient is not summed over processes: each would train its shard of the head on its own rows.
    """
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return inner.model.language_model.norm


@contextmanager
def whole_policy(trainer, generation_kwargs: dict | None = None):
    """The unwrapped policy to generate with, its weights whole on every process. Entered by all of them.

    Inside, each process calls it as often as it likes: nothing in it waits for another (`synced_gpus=False`).
    """
    wrapped, state = trainer.model_wrapped, trainer.accelerator.state
    units = [module for module in wrapped.modules() if isinstance(module, FSDPModule)]
    with unwrap_model_for_generation(
        wrapped,
        trainer.accelerator,
        generation_kwargs=generation_kwargs,
        gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
    ) as model:
        try:
            for unit in units:
                unit.set_reshard_after_forward(False, recurse=False)
                unit.unshard()
            # TRL takes ZeRO-3's hooks off but those of the whole model, which compare the processes' calls.
            with without_hooks([model] if DistributedBackend(trainer.accelerator).is_zero3 else []):
                yield model
        finally:
            for unit in units:
                unit.reshard()
            if units:  # of the others, what head and root have must stay from a forward until its backward
                for layer in trainer._unwrapped(model).model.language_model.layers:
                    layer.set_reshard_after_forward(state.fsdp_plugin.reshard_after_forward, recurse=False)


def shares_out_towers(accelerator, model) -> bool:
    """Whether a model's vision tower is frozen and its weights shared out: ZeRO-3 leaves none whole."""
    return DistributedBackend(accelerator).is_zero3 and tower_is_frozen(model.model.visual)


@contextmanager
def whole_towers(towers: list):
    """Vision towers under ZeRO-3 with their weights whole and its hooks off. Entered by all processes.

    Inside, each process runs them on the media that it has, or not at all. The hooks of other modules stay, and with
    them DeepSpeed's record of their order, by which it gathers ahead.
    """
    import deepspeed

    with (
        deepspeed.zero.GatheredParameters([weight for tower in towers for weight in tower.parameters()]),
        without_hooks([module for tower in towers for module in tower.modules()]),
    ):
        yield


@contextmanager
def without_hooks(modules: list):
    """Modules whose forward runs without hooks before and after it."""
    with ExitStack() as stack:
        for module in modules:
            none = {name: OrderedDict() for name in ("_forward_pre_hooks", "_forward_hooks")}
            stack.enter_context(patch.multiple(module, **none))
        yield


def check_media_alike(accelerator, model, kinds: int) -> None:
    """Where a tower that is trained is shared out: raise on every process unless all have media of equally many kinds in
    a forward, which runs it once for each. Entered by all.

    Args:
        model: without wrappers. kinds: of media in this process's forward: images, videos, both, none.
    """
    backend = DistributedBackend(accelerator)
    if not (backend.is_zero3 or backend.is_fsdp) or tower_is_frozen(model.model.visual):
        return
    found = accelerator.gather(torch.tensor([kinds], device=accelerator.device)).tolist()
    if len(set(found)) > 1:
        raise VeripoError(
            f"train_vision_tower with its weights shared out (ZeRO-3, FSDP2): the processes have media of {found} kinds "
            f"in one forward, and those without would be waited for. Give every row a video (or every row an image), "
            f"take zero2.yaml, or freeze the tower."
        )
