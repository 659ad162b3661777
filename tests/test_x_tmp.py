import sys; sys.path.insert(0,"/work/main/tests")
from test_adapters import *
from conftest import *
@pytest.mark.parametrize("stage,options,more,extra", [(sft,{},{"lora_dropout":0.0},{}),(sft,{},{},{"per_device_train_batch_size":1}),(grpo,QUANTIZED,{"lora_dropout":0.0},{}),(sft,QUANTIZED,{"lora_dropout":0.0},{})])
def test_x(stage, options, more, extra, model_paths, rows, tmp_path):
    switches = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **extra}
    switches |= {"beta": 0.1} if stage is grpo else {}
    model, encoder = make(model_paths["qwen2_5_vl"], **options, **more)
    torch.manual_seed(1)
    stage(model, encoder, rows, tmp_path, **switches).train()
    resumed, encoder = make(model_paths["qwen2_5_vl"], **options, **more)
    start = adapter(resumed)
    trainer = stage(resumed, encoder, rows, tmp_path, **switches)
    torch.manual_seed(2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    a, b = adapter(model), adapter(resumed)
    print("RES", {v.dtype for v in a.values()}, {v.dtype for v in b.values()}, max((a[n].float()-b[n].float()).abs().max() for n in a), len(changed(state(model), resumed)))
