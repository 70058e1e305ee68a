"""Whatever is changed between two steps, the next one is that of an optimizer made this moment, to the bit."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s3_megatron.errors import S3Error
from s3_megatron.kernels import guards, metadata, rows
from s3_megatron.optim import EXP_AVG, EXP_AVG_ROOT, S3

SETTINGS = {"lr": 0.1, "weight_decay": 0.1}
SHAPE = (2, 4, 4, 4)


def fresh_param() -> nn.Parameter:
    param = nn.Parameter(torch.rand(SHAPE))
    param.grad = torch.rand(SHAPE) - 0.5
    return param


def params_of(optimizer: S3) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def some(optimizer: S3, index: int) -> nn.Parameter:
    params = params_of(optimizer)
    return params[index % len(params)]


def state_of(optimizer: S3, index: int) -> dict[str, Tensor]:
    return optimizer.state_of(some(optimizer, index))


def swap_two(optimizer: S3, index: int) -> None:
    """The Python objects stay, and each has the other's tensor."""
    one, other = some(optimizer, index), some(optimizer, index + 1)
    if one is not other:
        one.grad = other.grad = None  # torch refuses otherwise
        torch.utils.swap_tensors(one, other)
        one.grad, other.grad = torch.rand(SHAPE), torch.rand(SHAPE)


def replace_entry(optimizer: S3, index: int) -> None:
    optimizer.state[some(optimizer, index)] = {name: x * 0.5 for name, x in state_of(optimizer, index).items()}


def turn_entry(optimizer: S3, index: int) -> None:
    optimizer.state[some(optimizer, index)] = dict(reversed(state_of(optimizer, index).items()))


def exchange_entries(optimizer: S3, index: int) -> None:
    one, other = some(optimizer, index), some(optimizer, index + 1)
    states = state_of(optimizer, index), state_of(optimizer, index + 1)
    optimizer.state[one], optimizer.state[other] = states[1], states[0]


def turn_state(optimizer: S3, index: int) -> None:
    for param in reversed(params_of(optimizer)):
        if param in optimizer.state:
            optimizer.state[param] = optimizer.state.pop(param)


def remove(optimizer: S3, index: int) -> None:
    params = optimizer.param_groups[0]["params"]
    if len(params) > 1:
        optimizer.state.pop(params.pop(index % len(params)), None)


def set_data(make: Callable[[Tensor], Tensor]) -> Callable[[S3, int], None]:
    def change(optimizer: S3, index: int) -> None:
        param = some(optimizer, index)
        param.data = make(param.data)

    return change


def set_grad(make: Callable[[Tensor], Tensor | None]) -> Callable[[S3, int], None]:
    def change(optimizer: S3, index: int) -> None:
        param = some(optimizer, index)
        param.grad = make(torch.rand(SHAPE) - 0.5)

    return change


def set_moment(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[S3, int], None]:
    def change(optimizer: S3, index: int) -> None:
        state = state_of(optimizer, index)
        state[name] = make(state[name])

    return change


def resize(name: str | None) -> Callable[[S3, int], object]:
    def change(optimizer: S3, index: int) -> None:
        x = some(optimizer, index).data if name is None else state_of(optimizer, index)[name]
        x.untyped_storage().resize_(16)

    return change


CHANGES: dict[str, Callable[[S3, int], object]] = {
    "nothing": lambda optimizer, index: None,
    "gradient: new": set_grad(lambda x: x),
    "gradient: none": set_grad(lambda x: None),
    "gradient: turned": set_grad(lambda x: x.mT.contiguous().mT),
    "gradient: channels_last": set_grad(lambda x: x.contiguous(memory_format=torch.channels_last)),
    "gradient: negative": set_grad(torch._neg_view),
    "gradient: expanded": set_grad(lambda x: x[:1].expand(SHAPE)),
    "gradient: of m": lambda optimizer, index: setattr(
        some(optimizer, index), "grad", state_of(optimizer, index)[EXP_AVG]
    ),
    "weight: elsewhere": set_data(torch.clone),
    "weight: turned in place": set_data(lambda x: x.mT),
    "weight: channels_last": set_data(lambda x: x.contiguous(memory_format=torch.channels_last)),
    "weight: another's": lambda optimizer, index: setattr(
        some(optimizer, index), "data", some(optimizer, index + 1).data
    ),
    "weights: swapped": swap_two,
    "weight: storage resized": resize(None),
    "m: storage resized": resize(EXP_AVG),
    "r: storage resized": resize(EXP_AVG_ROOT),
    "m: elsewhere": set_moment(EXP_AVG, torch.clone),
    "r: channels_last": set_moment(EXP_AVG_ROOT, lambda x: x.contiguous(memory_format=torch.channels_last)),
    "m: of float64": set_moment(EXP_AVG, torch.Tensor.double),
    "entry: replaced": replace_entry,
    "entry: in another order": turn_entry,
    "entry: gone": lambda optimizer, index: optimizer.state.pop(some(optimizer, index), None),
    "entry: empty": lambda optimizer, index: optimizer.state.__setitem__(some(optimizer, index), {}),
    "entries: exchanged": exchange_entries,
    "state: in another order": turn_state,
    "state: gone": lambda optimizer, index: optimizer.state.clear(),
    "state: another mapping": lambda optimizer, index: setattr(optimizer, "state", type(optimizer.state)(
        dict, {param: dict(entry) for param, entry in optimizer.state.items()}
    )),
    "state: loaded": lambda optimizer, index: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "group: added": lambda optimizer, index: optimizer.add_param_group({"params": [fresh_param()]}),
    "param: added": lambda optimizer, index: optimizer.param_groups[0]["params"].append(fresh_param()),
    "param: removed": remove,
    "params: turned": lambda optimizer, index: optimizer.param_groups[0]["params"].reverse(),
    "params: another list": lambda optimizer, index: optimizer.param_groups[0].update(
        params=list(optimizer.param_groups[0]["params"])
    ),
}  # fmt: skip


def twin(optimizer: S3) -> S3:
    """An optimizer over copies, each in the layout of what it copies, and over one memory where those are."""
    theirs = params_of(optimizer)
    # deepcopy keeps layouts, and which tensors share a storage.
    tensors = [x.data for x in theirs], [x.grad for x in theirs], [optimizer.state.get(x) for x in theirs]
    params, grads, state = copy.deepcopy(tensors)
    copies = [nn.Parameter(x) for x in params]
    for param, grad in zip(copies, grads, strict=True):
        param.grad = grad
    rest = iter(copies)
    made = S3([{"params": [next(rest) for _ in group["params"]]} for group in optimizer.param_groups], **SETTINGS)
    for param, entry in zip(copies, state, strict=True):
        if entry is not None:
            made.state[param] = entry
    return made


def outcome(optimizer: S3) -> str | None:
    try:
        optimizer.step()
    except S3Error as error:
        return str(error)
    return None


def values(optimizer: S3) -> list[Tensor]:
    found = []
    for param in params_of(optimizer):
        found += [param.detach(), *optimizer.state.get(param, {}).values()]
    return found


@pytest.mark.parametrize("way", ["read by C++", "known to torch's guards"])
@settings(max_examples=100, derandomize=True, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 4)), min_size=1, max_size=6))
def test_a_step_is_that_of_an_optimizer_made_this_moment(way: str, changes: list[tuple[str, int]]) -> None:
    """No list, address or look of an earlier step may be used where something has changed since."""
    torch.manual_seed(0)
    optimizer = S3([{"params": [fresh_param() for _ in range(3)]}, {"params": [fresh_param()]}], **SETTINGS)
    reader = metadata._reader
    if way != "read by C++":
        metadata._reader = lambda: None
    try:
        for name, index in [("nothing", 0), *changes]:
            CHANGES[name](optimizer, index)
            if "resized" in name:  # its copy would read past the end
                message = outcome(optimizer)
                grads = [param.grad is None for param in params_of(optimizer)]
                assert any(grads) or "longer than its storage" in str(message), (name, message)
                return
            fresh = twin(optimizer)
            known = dict(rows._apart), dict(guards._known)
            rows._apart.clear(), guards._known.clear()
            expected = outcome(fresh)
            rows._apart.update(known[0]), guards._known.update(known[1])
            assert outcome(optimizer) == expected
            for a, b in zip(values(optimizer), values(fresh), strict=True):
                assert torch.equal(a, b), name
    finally:
        metadata._reader = reader
