"""SGD with momentum, in one state tensor: an optimizer that the engines know by its Spec alone."""

import torch

from s3_megatron.optim.engine_optimizer import EngineOptimizer
from s3_megatron.optim.spec import Hyperparameter, Range, Spec


class Toy(EngineOptimizer):
    """As torch.optim.SGD; see ``step``."""

    _momentum = Hyperparameter("momentum", 0.9, "what stays a step", range=Range(0, 1), defines_state=True)
    spec = Spec("toy", "tests.toy:Toy", "torch.optim.SGD", {"exp_avg": "sum of gradients"}, (_momentum,))

    def __init__(self, params, lr=1e-3, weight_decay=0.0, momentum=0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for x in (param for param in group["params"] if param.grad is not None):
                m = self.state_of(x)["exp_avg"].mul_(group["momentum"])
                x.sub_(m.add_(x.grad).add_(x, alpha=group["weight_decay"]), alpha=group["lr"])
