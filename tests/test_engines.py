"""What accelerate may be set to, in every trainer. That engines train alike is in tests_engines/test_matrix.py."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, fsdp_utils
from helpers import make_dpo_trainer, make_grpo_trainer, make_sft_trainer, pair_dataset, video_rows

from veripo_trl.errors import VeripoError
from veripo_trl.trainers.engines import check_engine, final_norm, without_hooks

MAKERS = {
    "sft": make_sft_trainer,
    "grpo": make_grpo_trainer,
    "dpo": lambda model, encoder, rows, folder: make_dpo_trainer(model, encoder, pair_dataset(rows), folder),
}


@pytest.mark.parametrize(("stage", "kind"), [("sft", "CP"), ("grpo", "SP"), ("dpo", "CP")])
def test_context_and_sequence_parallelism_are_refused(stage, kind, load, media_root, tmp_path, monkeypatch):
    """As `accelerate launch` sets them from its YAML: TRL's own check looks at the trainer's arguments alone."""
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind}_SIZE", "2")
    for name in ("get_device_mesh", "_validate_accelerator"):  # which ask for two processes
        monkeypatch.setattr(ParallelismConfig, name, lambda *args: None)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    with pytest.raises(VeripoError, match=rf"{kind.lower()}_size 2\b.*Set both to 1"):
        MAKERS[stage](*load(), video_rows(media_root, 1), tmp_path)


FSDP = {
    "fsdp_version": 2, "transformer_cls_names_to_wrap": ["Qwen2_5_VLDecoderLayer"], "ignored_modules": ".*visual$",
    "cpu_ram_efficient_loading": False,
}  # fmt: skip


@pytest.mark.parametrize(("changed", "trained", "words"), [
    ({}, False, None),
    ({"ignored_modules": None}, True, None),
    ({}, True, r"fsdp_ignored_modules: \.\*visual\$, not None"),  # its gradients would never be summed
    ({"ignored_modules": None}, False, r"fsdp_ignored_modules: None, not \.\*visual\$"),
    ({"fsdp_version": 1}, False, "fsdp_version: 1, not 2"),
    ({"cpu_ram_efficient_loading": True}, False, "fsdp_cpu_ram_efficient_loading: True, not False"),
    ({"transformer_cls_names_to_wrap": None}, False, r"not \['Qwen2_5_VLDecoderLayer'\]"),
])  # fmt: skip
def test_fsdp_as_it_is_right_or_refused(changed, trained, words, load, monkeypatch):
    monkeypatch.setattr(fsdp_utils, "_find_final_norm", fsdp_utils._find_final_norm)
    model, _ = load()
    model.model.visual.requires_grad_(trained)
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**{**FSDP, **changed}))
    accelerator = SimpleNamespace(parallelism_config=None, distributed_type=DistributedType.FSDP, state=state)
    assert fsdp_utils._find_final_norm(model) is None  # why `final_norm` is there
    if words is None:
        check_engine(accelerator, model)
        assert fsdp_utils._find_final_norm(model) is final_norm(model) is model.model.language_model.norm
    else:
        with pytest.raises(ValueError, match=words):
            check_engine(accelerator, model)


def test_hooks_are_back_after_an_error():
    module, called = torch.nn.Linear(1, 1), []
    module.register_forward_pre_hook(lambda *args: called.append("before"))
    module.register_forward_hook(lambda *args: called.append("after"))
    with pytest.raises(ZeroDivisionError), without_hooks([module]):
        module(torch.ones(1))
        assert not called
        1 / 0
    module(torch.ones(1))
    assert called == ["before", "after"]
