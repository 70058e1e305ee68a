"""What S3 does not take, and that the message names what was wrong and what is allowed."""

import pytest
import torch
from torch import nn

from s3_megatron.errors import S3Error
from s3_megatron.optim import S3

NAN, INF = float("nan"), float("inf")
BAD = [  # name, value, what the message must contain of the value, and of the range
    *[("lr", value, f"lr is {value}", "finite number >= 0") for value in (-1e-9, NAN, INF)],
    *[("lr", torch.tensor(value), f"lr is {value}", "finite number >= 0") for value in (-1.0, NAN)],
    *[("beta", value, f"beta is {value}", "[0, 1)") for value in (-0.1, 1, 1.0, 1.5, NAN)],
    ("betas", (0.9, 1.0), "betas is (0.9, 1.0)", "[0, 1)"),
    ("betas", (NAN, 0.9), "betas is (nan, 0.9)", "[0, 1)"),
    # Incident: a single beta in a tuple was called out of [0, 1).
    ("betas", (0.9,), "betas is (0.9,)", "a pair"),
    ("betas", (0.9, 0.9, 0.9), "betas is (0.9, 0.9, 0.9)", "a pair"),
    *[("p", value, f"p is {value}", "finite number >= 1") for value in (0.999, 0, -3, NAN, INF)],
    *[("weight_decay", v, f"weight_decay is {v}", "finite number >= 0") for v in (-1e-9, NAN, INF)],
]


@pytest.mark.parametrize(("name", "value", "given", "allowed"), BAD)
@pytest.mark.parametrize("where", ["argument", "group", "later group"])
def test_a_hyperparameter_out_of_range_names_the_value_and_the_range(name, value, given, allowed, where):
    param = torch.zeros(2, requires_grad=True)
    optimizer = S3([torch.zeros(1, requires_grad=True)])
    with pytest.raises(S3Error) as caught:
        if where == "argument":
            S3([param], **{name: value})
        elif where == "group":
            S3([{"params": [param], name: value}])
        else:
            optimizer.add_param_group({"params": [param], name: value})
    message = str(caught.value)
    assert given in message and allowed in message and "\n" not in message
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "allowed", [{"lr": 0}, {"beta": 0}, {"beta": 0.999999}, {"p": 1}, {"p": 100.0}, {"weight_decay": 0}]
)
def test_the_ends_of_the_ranges_are_allowed_and_work(allowed):
    x = torch.ones(3, requires_grad=True)
    optimizer = S3([x], **{"weight_decay": 0.1, **allowed})
    for grad in torch.tensor([[1.0, -2.0, 0.0], [1e-20, 5.0, 0.0]]):
        x.grad = grad
        optimizer.step()
    assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_complex_and_integer_parameters_are_refused_and_leave_no_group_behind(dtype):
    good, bad = torch.zeros(2, requires_grad=True), torch.zeros(2, dtype=dtype)
    with pytest.raises(S3Error, match=f"{dtype}.*real floating-point"):
        S3([good, bad])
    optimizer = S3([good])
    with pytest.raises(S3Error, match=str(dtype)):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1
    good.grad = torch.ones(2)
    optimizer.step()


def test_a_sparse_gradient_is_refused_and_changes_nothing():
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = S3(embedding.parameters(), weight_decay=0.1)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(S3Error, match="sparse=False"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


def test_a_parameter_in_two_groups_is_refused():
    """torch's own check, which our add_param_group must not get around."""
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="more than one parameter group"):
        S3([{"params": [x]}, {"params": [x], "beta": 0.5}])


def test_no_parameters_at_all_is_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        S3([])
