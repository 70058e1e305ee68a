"""Replacing symbols of a host: in order, undone in the reverse order, and loud where one has moved."""

import argparse

import pytest

from s3_megatron.errors import S3Error
from s3_megatron.swap import SymbolSwap


class Owner:
    """Has a method."""

    def method(self) -> str:
        return "original"


class Heir(Owner):
    """Has no method of its own."""


def test_undo_puts_back_in_reverse_order() -> None:
    owner = argparse.Namespace(__name__="owner", value=1)
    swap = SymbolSwap("host 1.0")
    swap.replace(owner, "value", lambda old: old + 1)
    swap.replace(owner, "value", lambda old: old * 10)
    assert owner.value == 20 and swap.active
    swap.undo()
    assert owner.value == 1 and not swap.active
    swap.undo()
    assert owner.value == 1, "a second time does nothing"


def test_a_symbol_that_has_moved_is_named_and_nothing_stays_replaced() -> None:
    owner = argparse.Namespace(__name__="owner", value=1)
    swap = SymbolSwap("host 1.0")
    swap.replace(owner, "value", lambda old: old + 1)
    with pytest.raises(S3Error, match=r"^host 1\.0 has no owner\.gone, which s3_megatron replaces: install a version"):
        swap.replace(owner, "gone", lambda old: old)
    assert owner.value == 1 and not swap.active
    with pytest.raises(S3Error, match=r"^host 1\.0 has no Owner\.gone"):
        swap.replace(Owner(), "gone", lambda old: old)


def test_a_wrapper_that_cannot_be_made_leaves_the_symbol_alone() -> None:
    owner = argparse.Namespace(value=1)
    swap = SymbolSwap("host")
    with pytest.raises(ZeroDivisionError):
        swap.replace(owner, "value", lambda old: old / 0)
    assert owner.value == 1 and not swap.active


def test_a_method_is_replaced_for_the_class_that_is_named() -> None:
    swap = SymbolSwap("host")
    swap.replace(Heir, "method", lambda original: lambda self: f"heir's {original(self)}")
    assert (Heir().method(), Owner().method()) == ("heir's original", "original")
    swap.undo()
    assert (Heir().method(), Owner().method()) == ("original", "original")


def test_modules_that_hold_one_function_share_its_wrapper() -> None:
    """Callers compare it, and a wrapper a module would wrap twice what one module imports from the other. Where two
    modules hold different functions, each has its own."""

    def one() -> int:
        return 1

    owners = [argparse.Namespace(__name__=str(i), call=function) for i, function in enumerate((one, one, lambda: 2))]
    swap = SymbolSwap("host")
    swap.replace_in(owners, "call", lambda original: lambda: 10 * original())
    assert owners[0].call is owners[1].call is not owners[2].call
    assert [owner.call() for owner in owners] == [10, 10, 20]
    swap.undo()
    assert [owner.call() for owner in owners] == [1, 1, 2] and owners[0].call is one
