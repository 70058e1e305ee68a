"""A parameter's tensors in one place: DTensors are brought to their weight's placement, then taken as local ones."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from s3_megatron.errors import S3Error


def localize(param: Tensor, grad: Tensor, state: dict[str, Any], names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Return weight, gradient and the states ``names`` as they lie on this rank.

    A gradient with another placement than its weight's (a sum still to be made, another dimension) is redistributed,
    which talks to the ranks of the weight's mesh: as with DTensor's own operators they must all come here. A state
    with another one is, too, and stays so (replaces it in ``state``).

    Raises:
        S3Error: the weight is itself a sum still to be made; or a tensor is on another mesh.
    """
    if isinstance(param, DTensor):
        if any(placement.is_partial() for placement in param.placements):
            raise S3Error(
                f"a weight of shape {list(param.shape)} is placed {param.placements}, a sum still to be made: it "
                "can be moved only after param.redistribute(...)"
            )
        grad = _as(param, "gradient", grad)
        for name in names:
            state[name] = _as(param, name, state[name])
    local = (x.to_local() if isinstance(x, DTensor) else x for x in (param, grad, *(state[name] for name in names)))
    return tuple(local)


def _as(param: DTensor, name: str, x: Tensor) -> Tensor:
    """Return a tensor of the weight's shape in the weight's placement; a local part already there is taken as it is."""
    if not isinstance(x, DTensor):
        whole = x.shape == param.shape and x.shape != param.to_local().shape
        return distribute_tensor(x, param.device_mesh, param.placements) if whole else x
    if x.device_mesh != param.device_mesh:
        raise S3Error(
            f"a weight of shape {list(param.shape)} is on {param.device_mesh} and its {name} on {x.device_mesh}: "
            "they must be on one mesh"
        )
    return x if x.placements == param.placements else x.redistribute(placements=param.placements)
