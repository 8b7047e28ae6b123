from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unicom_ext.margins import ArcFace, CombinedMargin, CosFace, SphereFace

numbers = st.floats(-2, 2)
per_sample = st.lists(numbers, min_size=1, max_size=5).map(torch.tensor)
values = numbers | per_sample
margins = (
    st.builds(CombinedMargin, m1=st.floats(0.1, 4), m2=values, m3=values)
    | st.builds(ArcFace, values)
    | st.builds(CosFace, values)
    | st.builds(SphereFace, st.floats(0.1, 4))
)


def test_each_class_sets_its_own_parameter_and_leaves_psi_plain_otherwise():
    assert ArcFace(0.3) == CombinedMargin(m1=1.0, m2=0.3, m3=0.0)
    assert CosFace(0.3) == CombinedMargin(m1=1.0, m2=0.0, m3=0.3)
    assert SphereFace(1.3) == CombinedMargin(m1=1.3, m2=0.0, m3=0.0)
    assert ArcFace() == ArcFace(0.5)
    assert CosFace() == CosFace(0.35)
    assert ArcFace(0) == CosFace(0) == SphereFace(1) == CombinedMargin()


@given(margins)
def test_copies_are_equal_and_hash_alike(margin):
    for other in (pickle.loads(pickle.dumps(margin)), copy.copy(margin), copy.deepcopy(margin)):
        assert other == margin
        assert hash(other) == hash(margin)
        assert type(other) is type(margin)


@given(margins)
def test_repr_of_numbers_evaluates_to_the_margin(margin):
    if not isinstance(margin.m2, torch.Tensor) and not isinstance(margin.m3, torch.Tensor):
        assert eval(repr(margin)) == margin
    else:
        assert "tensor [" in repr(margin)
        assert len(repr(margin)) < 200


def test_equality_looks_at_values():
    m2 = torch.tensor([0.1, 0.2])
    assert ArcFace(m2) == ArcFace(m2.clone())
    assert ArcFace(m2) != ArcFace(m2 + 0.1)
    assert ArcFace(m2) != ArcFace(m2.double())
    assert ArcFace(m2) != ArcFace(0.1)
    assert ArcFace(0.1) != ArcFace(0.2)
    assert ArcFace(0.1) != CosFace(0.1)
    assert ArcFace(0.1) != 0.1


def test_margins_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ArcFace(0.3).m2 = 0.4


def test_values_are_floats_or_the_given_tensor():
    assert isinstance(SphereFace(2).m1, float)
    assert isinstance(ArcFace(1).m2, float)
    m3 = torch.rand(3)
    assert CosFace(m3).m3 is m3


@pytest.mark.parametrize("name", ["m1", "m2", "m3"])
@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (math.nan, ValueError, "nan"),
        (math.inf, ValueError, "inf"),
        ("0.3", TypeError, "'0.3'"),
        (None, TypeError, "None"),
        (True, TypeError, "True"),
        ([0.1, 0.2], TypeError, "list"),
    ],
)
def test_a_bad_value_is_named(name, value, error, shown):
    with pytest.raises(error, match=f"{name} must be a finite number.*{shown}"):
        CombinedMargin(**{name: value})


@pytest.mark.parametrize("name", ["m2", "m3"])
def test_a_bad_tensor_is_named(name):
    with pytest.raises(TypeError, match=rf"{name} must be .*\[B\].*torch.int64"):
        CombinedMargin(**{name: torch.tensor([1, 2])})
    with pytest.raises(ValueError, match=rf"{name} must be .*\[B\].*shape \[\]"):
        CombinedMargin(**{name: torch.tensor(0.3)})
    with pytest.raises(ValueError, match=rf"{name} must be .*\[B\].*shape \[2, 3, 4\]"):
        CombinedMargin(**{name: torch.zeros(2, 3, 4)})


@pytest.mark.parametrize("m1", [0, -1.0])
def test_the_angle_factor_is_positive(m1):
    with pytest.raises(ValueError, match=f"m1 must be a finite number > 0, got {float(m1)}"):
        SphereFace(m1)


def test_the_angle_factor_is_one_number():
    with pytest.raises(TypeError, match="m1 must be a finite number > 0, got Tensor"):
        SphereFace(torch.ones(3))


def test_degrees_are_noticed():
    for make in (ArcFace, lambda m2: CombinedMargin(m2=m2)):
        with pytest.warns(UserWarning, match="m2 is in radians.* 28.6 degrees would be 0.499"):
            make(28.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ArcFace(math.pi)
