"""A model in two parts, SoftMuon's matrices and the rest; and the names under which optim has its parts."""

import types

import pytest
import torch
from torch import nn

from s3_megatron import optim
from s3_megatron.errors import S3Error
from s3_megatron.optim.model_parts import softmuon_groups


class Net(nn.Module):
    """A weight of each kind."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(4, 8)
        self.experts = nn.Parameter(torch.zeros(2, 4, 8))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(8, 11, bias=False)


def test_no_name_of_the_package_is_a_module_however_often_it_is_read():
    """Incident: a file called as its function took the function's place in the package, once it was imported."""
    for _ in range(2):
        assert [name for name in optim.__all__ if isinstance(getattr(optim, name), types.ModuleType)] == []


def test_a_model_is_parted_into_matrices_and_the_rest():
    net = Net()
    found, rest = softmuon_groups(net, others=["head.*"])
    assert {id(p) for p in found} == {id(net.hidden.weight), id(net.experts)}
    assert len(found) + len(rest) == len([p for p in net.parameters() if p.requires_grad])
    net.get_output_embeddings = lambda: net.head  # as models of transformers have it
    assert {id(p) for p in softmuon_groups(net)[0]} == {id(net.hidden.weight), id(net.experts)}
    tied = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 11, bias=False))
    tied[2].weight = tied[0].weight
    assert [p is tied[1].weight for p in softmuon_groups(tied)[0]] == [True]
    with pytest.raises(S3Error, match=r"called 'lm_head\.\*'"):
        softmuon_groups(net, others=["lm_head.*"])
    with pytest.raises(S3Error, match="no matrix of the model"):
        softmuon_groups(nn.LayerNorm(3))
