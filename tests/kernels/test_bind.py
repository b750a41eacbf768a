"""How native kernels take the fields of their structs: by name, in any order, and nothing that is not one of them."""

from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from sparing.kernels import dispatch

pytestmark = pytest.mark.skipif(dispatch.native is None, reason="built without native kernels")


def fields(x: Tensor) -> dict[str, Any]:
    """Of the norm of x [rows, size], without a weight; `y` takes the result."""
    return {"x": x, "y": torch.zeros_like(x), "rows": len(x), "size": x.shape[1], "eps": 0.0, "bfloat16": False}


def norm(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


def test_fields_come_in_any_order_and_under_names_made_on_the_way():
    x = torch.randn(3, 5)
    given = fields(x)
    for names in (list(given), sorted(given), sorted(given, reverse=True)):
        given["y"].zero_()
        dispatch.native.norm(**{"".join(list(name)): given[name] for name in names})
        torch.testing.assert_close(given["y"], norm(x))


def test_a_pointer_is_a_tensor_an_address_or_none():
    x = torch.randn(3, 5)
    given = fields(x)
    dispatch.native.norm(**{**given, "x": x.data_ptr(), "y": given["y"].data_ptr(), "weight": None, "threads": 1})
    torch.testing.assert_close(given["y"], norm(x))
    dispatch.native.norm(**given, weight=torch.nn.Parameter(torch.full((5,), 2.0)))
    torch.testing.assert_close(given["y"], 2 * norm(x))


def test_numbers_of_other_types_are_converted_where_nothing_is_lost():
    x = torch.randn(3, 5)
    given = fields(x)
    dispatch.native.norm(**{**given, "eps": 0, "rows": torch.tensor(3).numpy()[()]})
    torch.testing.assert_close(given["y"], norm(x))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"wieght": None}, r"norm: no field is named 'wieght'; there are: const void \*x, \*weight"),
        ({"rows": 3.5}, "norm: rows is 3.5, expected an integer of 64 bits"),
        ({"rows": None}, "norm: rows is None"),
        ({"size": 2**63}, "norm: size is 9223372036854775808"),
        ({"threads": 2**31}, "norm: threads is 2147483648, expected an integer of 32 bits"),
        ({"eps": "1"}, "norm: eps is '1', expected a number"),
        ({"bfloat16": 1}, "norm: bfloat16 is 1, expected True or False"),
        ({"x": "x"}, "norm: x is 'x', expected a tensor, an address or None"),
        ({"x": -1}, "norm: x is -1"),
        ({"x": 1.0}, "norm: x is 1.0"),
    ],
)
def test_what_does_not_fit_is_named(change, said):
    given = fields(torch.randn(3, 5))
    with pytest.raises(TypeError, match=said):
        dispatch.native.norm(**{**given, **change})
    assert not given["y"].any()


@pytest.mark.parametrize("name", ["x", "y", "rows", "size", "eps", "bfloat16"])
def test_a_field_without_a_default_is_needed(name):
    given = fields(torch.randn(3, 5))
    del given[name]
    with pytest.raises(TypeError, match=f"norm: '{name}' is missing"):
        dispatch.native.norm(**given)


def test_no_field_goes_by_its_place():
    with pytest.raises(TypeError, match="norm takes its fields by name"):
        dispatch.native.norm(*fields(torch.randn(3, 5)).values())
    with pytest.raises(TypeError, match="is missing"):
        dispatch.native.norm()


def test_a_tensor_without_an_address_says_so():
    with pytest.raises(RuntimeError, match=r"data_ptr|storage"):
        dispatch.native.norm(**{**fields(torch.randn(3, 5)), "x": torch.empty(3, 5).to_sparse()})


def test_an_enum_is_one_of_its_names_or_a_number():
    x, w = torch.randn(1, 8), torch.randn(4, 8)
    given = {"x": x, "w": w, "y": torch.zeros(1, 4), "rows": 1, "inputs": 8, "outputs": 4, "bfloat16": False}
    for silu in ("silu", "".join(["si", "lu"]), 1):
        dispatch.native.product(**given, activation=silu)
        torch.testing.assert_close(given["y"], torch.nn.functional.silu(x @ w.T))
    for bad in ("relu", 3, -1, None):
        with pytest.raises(TypeError, match=f"product: activation is {bad!r}, expected one of none, silu, gelu"):
            dispatch.native.product(**given, activation=bad)


def scan(**change: Any) -> Tensor:
    """y [1, 1, 2] of one token and a state of zeros: B . C times dt and x."""
    given = {"x": torch.tensor([2.0, 3.0]), "dt": torch.tensor([0.5]), "B": torch.ones(4), "C": torch.ones(4)}
    staged = {**given, "tokens": 1, "x_row": 2, "dt_row": 1, "B_row": 4}
    y = torch.zeros(1, 1, 2)
    call = {"state": torch.zeros(1, 2, 4), "A": -torch.ones(1), "staged": staged, "y": y, "heads": 1, "p": 2, "n": 4}
    dispatch.native.scan(**{**call, "groups": 1, **change})
    return y


def test_a_struct_in_a_struct_is_a_dict_of_its_fields_or_none():
    assert torch.equal(scan(), torch.tensor([[[4.0, 6.0]]]))
    assert torch.equal(scan(pending=None, after=None), torch.tensor([[[4.0, 6.0]]]))
    assert torch.equal(scan(staged=None), torch.zeros(1, 1, 2))


@pytest.mark.parametrize(
    ("staged", "said"),
    [
        ({}, "scan: 'x' is missing"),
        ({"z": 1}, "scan: no field is named 'z'"),
        ({"tokens": "1"}, "scan: tokens is '1', expected an integer"),
        ({1: 1}, "scan: no field is named 1"),
        ((1, 2), "scan: staged is .*, expected a dict of the fields of ScanInputs"),
        (MappingProxyType({}), "scan: staged is .*, expected a dict"),
    ],
)
def test_what_does_not_fit_into_a_struct_is_named(staged, said):
    with pytest.raises(TypeError, match=said):
        scan(staged=staged)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (None, "code_parts: keys is None, expected a list of dicts of the fields of CodePart"),
        ({}, "code_parts: keys is {}"),
        ([None], r"code_parts: keys is \[None\]"),
        ([{"bits": 2}], "code_parts: 'codes' is missing"),
        (({"bits": 2.5},), "code_parts: bits is 2.5"),
    ],
)
def test_what_does_not_fit_into_a_list_is_named(keys, said):
    with pytest.raises(TypeError, match=said):
        dispatch.native.code_parts(keys=keys)
