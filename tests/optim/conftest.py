"""What the optimizer tests share."""

import pytest
import torch

from s3_megatron.optim import S3


@pytest.fixture(scope="session")
def applied_updates():
    """A function that steps a new S3 through a stream of gradients and returns what it did to the weights.

    The weight starts at 0.5 with weight decay on, and the update n/b is recovered from how it moved, in the
    parameter's own dtype: that includes the weight's rounding, half a ULP of 1 over the learning rate of 0.5.
    """

    def run(gradients, **hyperparameters):
        gradients = torch.as_tensor(gradients)
        param = torch.full_like(gradients[0], 0.5, requires_grad=True)
        optimizer = S3([param], lr=0.5, weight_decay=0.1, **hyperparameters)
        updates = []
        for grad in gradients:
            before = param.detach().double().clone()
            param.grad = grad
            optimizer.step()
            updates.append((before * (1 - 0.5 * 0.1) - param.detach().double()) / 0.5)
        return torch.stack(updates), optimizer.state[param]

    return run
