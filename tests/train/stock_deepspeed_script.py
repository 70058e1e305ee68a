"""A person's own training script, which knows nothing of this package but the optimizer's name: DeepSpeed, ZeRO 1."""

import sys

import deepspeed
import torch

if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled here, for a minute
    config = {
        "train_micro_batch_size_per_gpu": int(sys.argv[1]),
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "S3", "params": {"lr": 1e-2, "weight_decay": 0.1}},
    }
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for _ in range(5):
        loss = (engine(torch.ones(4, 8)) - 1).square().mean()
        engine.backward(loss)
        engine.step()
        print(f"loss {float(loss):.6f}")
    torch.distributed.destroy_process_group()
