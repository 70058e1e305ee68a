"""Runs on ranks, from worker.py: an optimizer that is known by its Spec alone, on Megatron's distributed optimizer."""

import torch

from s3_megatron.optim import registry
from tests.engines.megatron import harness as on
from tests.rank_checks import refuses, shared_folder
from tests.toy import Toy


def started(momentum: str) -> on.Run:
    return on.by_flags("toy", "--toy-momentum", momentum, iterations=2)


def check_a_toy_spec_trains_resumes_and_refuses() -> None:
    on.since(19, "distributed optimizer with one state tensor")
    registry.add(Toy.spec)
    refuses(lambda: started("1"), "--toy-momentum is 1.0", "[0, 1)")
    for kind in ("dp_reshardable", "fully_reshardable"):
        run, resumed, folder = started("0.8"), started("0.8"), shared_folder()
        sgd, copies = on.unsharded(run, torch.optim.SGD, momentum=0.8)
        for step in range(6):
            if step == 3:
                on.save(run, folder, kind)
                resumed.net.load_state_dict(run.net.state_dict())
                on.load(resumed, folder, kind)
            assert all(each.step(on.gradients(run.net, step)) for each in (run, resumed)[: 1 + step // 3])
            on.step_reference(sgd, copies, on.gradients(run.net, step))
        assert all(torch.equal(a, b) for a, b in zip(run.inner_tensors(), resumed.inner_tensors(), strict=True))
        for name, weight in resumed.weights().items():  # 8 ULP of the largest: momentum adds in another order
            torch.testing.assert_close(weight, copies[name].data, rtol=1e-6, atol=1e-6 * float(weight.abs().max()))
        refuses(lambda f=folder, k=kind: on.load(started("0.7"), f, k), "--toy-override-hyperparameters")
        for into, source in ((on.Run(s3_from_adam=True), run), (on.Run(optimizer="adam"), run), (resumed, on.Run())):
            advice = f"optimizer {source.part.optimizer.spec.name}"
            refuses(lambda i=into, s=source: i.part.load_state_dict(s.part.state_dict()), advice)
