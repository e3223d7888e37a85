"""Wrong types and wrong shapes are noticed while tests run, also where no test looks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import mech_absa
from mech_absa.examples import Example, Polarity
from mech_absa.metrics import METRICS
from support import type_checks
from support.type_checks import checked, hints_of, names_a_shape


def outer(x: Float[Tensor, "rows n"], y: Float[Tensor, "rows m"]) -> Float[Tensor, "rows n m"]:
    return torch.einsum("rn,rm->rmn", x, y)  # the last two the wrong way round


def test_shapes_have_to_agree_with_each_other():
    wrong = checked(outer)
    with pytest.raises(TypeCheckError, match="parameters"):
        wrong(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(TypeCheckError, match="return value"):
        wrong(torch.zeros(2, 3), torch.zeros(2, 5))
    assert wrong(torch.zeros(2, 3), torch.zeros(2, 3)).shape == (2, 3, 3)


def test_a_shape_is_found_inside_other_types():
    assert names_a_shape(dict[str, Float[Tensor, "n"] | None]) and not names_a_shape(list[Tensor])


def test_plain_types_of_functions_and_of_dataclasses_are_checked():
    @checked
    def double(n: int) -> str:
        return n * 2

    @checked
    @dataclass
    class Row:
        count: int

    for call in (lambda: double("2"), lambda: double(2), lambda: Row("2")):
        with pytest.raises(TypeError, match="violates type hint"):
            call()
    assert Row(2).count == 2


def test_a_name_that_is_not_defined_yet_is_left_out():
    def later(a: NotYet, b: int) -> None:
        pass

    assert hints_of(later) == {"b": int, "return": type(None)}


def test_the_first_calls_of_every_test_are_checked():
    def twice(n: int) -> Any:
        return n * 2

    double = checked(twice)
    for _ in range(type_checks.MOST):
        with pytest.raises(TypeError, match="violates type hint"):
            double("2")
    assert double("2") == "22"  # it has been looked at often enough
    type_checks.pytest_runtest_setup(None)  # as before the next test
    with pytest.raises(TypeError, match="violates type hint"):
        double("2")


def test_the_package_is_checked():
    one = torch.zeros(3, dtype=torch.long)
    with pytest.raises(TypeCheckError):
        METRICS["logit_diff"](torch.zeros(2, 3), one, one)  # two rows of scores, three labels
    with pytest.raises(TypeError, match="violates type hint"):
        mech_absa.class_counts(3)
    with pytest.raises(TypeError, match="violates type hint"):
        Example(3, "a", Polarity.POSITIVE, None)
