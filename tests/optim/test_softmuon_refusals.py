"""SoftMuon: what is refused, and libraries that it was not run with."""

import math
import sys
from importlib import metadata

import pytest
import torch

from s3_megatron.errors import S3Error
from s3_megatron.optim import polar
from s3_megatron.optim.softmuon import SoftMuon
from tests.optim.matrices import DECAY, matrices, train

BAD = [
    ({"scale_mode": "frobenius"}, "scale_mode is 'frobenius'", "spectral, unit_rms_norm"),
    ({"coefficient_type": "cubic"}, "coefficient_type is 'cubic'", "quintic"),
    ({"coefficient_type": "custom"}, "coefficient_type is 'custom'", "quintic"),
    ({"fp32_matmul_prec": "low"}, "fp32_matmul_prec is 'low'", "medium, highest"),
    ({"extra_scale_factor": 0.0}, "extra_scale_factor is 0.0", "> 0"),
    ({"num_ns_steps": 0}, "num_ns_steps is 0", ">= 1"),
    ({"beta": 1.0}, "beta is 1.0", "[0, 1)"),
    ({"lr": -1.0}, "lr is -1.0", ">= 0"),
    ({"weight_decay": math.nan}, "weight_decay is nan", ">= 0"),
    ({"eps": 0.0}, "eps is 0.0", "(0, 1)"),
    ({"tmax": 0.5}, "tmax is 0.5", ">= 1"),
    ({"tmax": -1e9}, "tmax is -1000000000.0", ">= 1"),
    ({"soft_start": 1.1}, "soft_start is 1.1", "[0, 1]"),
    ({"soft_start": 0.9}, "length of the run is not known", "total_steps"),
    ({"sign_iters": 3, "transition_iters": 0}, "transition_iters is 0", ">= 1"),
    ({"qkv_split_shapes": (4, 0, 2)}, "qkv_split_shapes is (4, 0, 2)", "each >= 1"),
    ({"qkv_split_shapes": (4, 2, 3)}, "[6, 4]", "multiple of 9"),
]


@pytest.mark.parametrize(("settings", "value", "allowed"), BAD)
def test_bad_settings_are_refused_in_one_line(settings, value, allowed):
    with pytest.raises(S3Error) as caught:
        SoftMuon(matrices([(6, 4)]), **{"soft_start": 1, **settings})
    assert value in str(caught.value) and allowed in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(5,), (), (2, 2, 2, 2), (0, 3), (3, 0), (0, 3, 3)])
def test_what_is_no_matrix_is_refused_and_leaves_no_group_behind(shape):
    optimizer = SoftMuon(matrices([(3, 3)]), soft_start=1)
    with pytest.raises(S3Error, match="shape") as caught:
        optimizer.add_param_group({"params": [torch.zeros(shape, requires_grad=True)]})
    assert "\n" not in str(caught.value) and len(optimizer.param_groups) == 1
    with pytest.raises(S3Error, match="total_steps: that is the whole run's"):
        optimizer.add_param_group({"params": matrices([(3, 3)]), "total_steps": 4})


def test_other_optimizers_states_and_sparse_gradients_are_refused():
    params = matrices([(6, 4)])
    optimizer = SoftMuon(params, soft_start=1, weight_decay=DECAY)
    for kind in (torch.optim.AdamW, torch.optim.Muon):
        other = kind(matrices([(6, 4)]))
        train(other, range(1))
        with pytest.raises(S3Error, match="not written by SoftMuon"):
            optimizer.load_state_dict(other.state_dict())
    before = params[0].detach().clone()
    params[0].grad = torch.ones(6, 4).to_sparse()
    with pytest.raises(S3Error, match="sparse=False"):
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("soft", [True, False])
def test_a_state_of_another_shape_is_refused_in_one_line(soft):
    """torch loads any; lerp raised, of two sizes without the weight's."""
    saved, params = SoftMuon(matrices([(6, 4)]), total_steps=4, soft_start=0.5), matrices([(4, 6)])
    train(saved, range(3 if soft else 1))
    optimizer, before = SoftMuon(params, total_steps=4, soft_start=0.5, weight_decay=DECAY), params[0].detach().clone()
    optimizer.load_state_dict(saved.state_dict())
    with pytest.raises(S3Error, match=r"shape \[4, 6\] has an m of shape \[6, 4\]") as caught:
        train(optimizer, range(1))
    assert "\n" not in str(caught.value) and torch.equal(params[0], before)


@pytest.mark.parametrize(("version", "lines"), [("0.4.1", 1), ("0.3.2", 0), (None, 1)])
def test_a_library_of_another_version_is_used_and_one_line(monkeypatch, caplog, version, lines):
    def find(_: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(metadata, "version", find)
    polar._look_at_version.cache_clear()
    for _ in range(2):
        train(SoftMuon(matrices(), soft_start=1, weight_decay=DECAY), range(2))
    assert len(caplog.messages) == lines
    assert all("was never run with SoftMuon" in line and "==0.3.0" in line for line in caplog.messages)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "emerging_optimizers.orthogonalized_optimizers.muon", None)
    with pytest.raises(S3Error, match=r"SoftMuon needs emerging-optimizers 0\.3.*pip install") as caught:
        SoftMuon(matrices(), soft_start=1)
    assert "\n" not in str(caught.value)
