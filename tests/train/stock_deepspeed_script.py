"""A person's own training script, which knows nothing of this package but the optimizer's name: DeepSpeed, ZeRO 1.

Its arguments are the size of a micro-batch and the number of steps; every loss is printed to its last bit.
"""

import sys

import deepspeed
import torch
from deepspeed import comm

if __name__ == "__main__":
    size, steps = map(int, sys.argv[1:])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled here, for a minute
    config = {
        "train_micro_batch_size_per_gpu": size,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "S3", "params": {"lr": 1e-2, "weight_decay": 0.1}},
    }
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    torch.manual_seed(1 + comm.get_rank())
    batch = torch.randn(size, 8)
    if comm.get_rank() == 0:
        print(f"host {deepspeed.__file__}")
    for _ in range(steps):
        loss = (engine(batch) - batch.sum(dim=1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.step()
        losses = [None] * comm.get_world_size()
        torch.distributed.all_gather_object(losses, loss.item())
        if comm.get_rank() == 0:
            print(f"loss {losses!r}")
    torch.distributed.destroy_process_group()
