"""The measure of every check: what is no number is as wrong as can be."""

import math

import pytest
import torch

from longvila.bench.bars import at_most
from longvila.difference import relative_error

ONE, NAN = torch.tensor([4.0, 1.0]), torch.tensor([math.nan, 1.0])


def test_it_is_the_largest_difference_over_the_largest_reference():
    assert relative_error(torch.tensor([4.0, 3.0]), ONE) == 0.5
    assert relative_error(torch.tensor([4.0, 3.0]), ONE, scale=1) == 2
    assert relative_error(1.5, 2.0) == 0.25


@pytest.mark.parametrize(("found", "expected"), [(NAN, ONE), (ONE, NAN), (math.nan, 1.0), (ONE, torch.zeros(2))])
def test_what_is_no_number_is_infinitely_wrong_and_no_maximum_passes_over_it(found, expected):
    errors = [0.0, relative_error(found, expected), 0.0]
    assert max(errors) == math.inf
    assert not at_most("worst", max(errors), 1.0)["holds"]


def test_what_is_equal_has_no_error_even_where_all_of_it_is_zero():
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
