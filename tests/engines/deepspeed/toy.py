"""Runs on ranks, from worker.py: an optimizer that is known by its Spec alone, under DeepSpeed's ZeRO 1."""

import torch

from s3_megatron.engines.deepspeed import activity
from s3_megatron.optim import registry
from tests.engines.deepspeed import harness as on
from tests.engines.deepspeed.checkpoints import load, save
from tests.rank_checks import refuses, shared_folder
from tests.toy import Toy


def check_a_toy_spec_trains_resumes_and_refuses() -> None:
    registry.add(Toy.spec)
    toy = {"optimizer": "Toy", "params": {"momentum": 0.8}}
    run, resumed, folder, of_s3 = on.Run(1, **toy), on.Run(1, **toy), shared_folder(), shared_folder()
    reference = on.Reference(torch.optim.SGD, momentum=0.8)
    for step in range(6):
        if step == 3:
            save(run, folder)
            load(resumed, folder)
        assert all(each.step(on.gradients(step)) for each in (run, resumed)[: 1 + step // 3])
        reference.step(on.gradients(step))
    on.equal(resumed.everything(), run.everything())
    assert activity(resumed.engine).steps == 3
    # 8 ULP of weights that have moved by up to 0.5: momentum adds in another order.
    on.close(resumed.weights(), reference.weights(), rtol=1e-6, atol=5e-7)
    save(on.Run(1), of_s3)
    refuses(lambda: load(resumed, of_s3), "written by optimizer s3")
