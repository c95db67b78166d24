"""Budgets against hand-computed bytes, and the form in which they travel."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from mlorq.config.budget import Budget, parse_budget, parse_budgets
from mlorq.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3bit", "bits", Fraction(3)),
        ("2.5 bits", "bits", Fraction(5, 2)),
        (" 2.3 bit ", "bits", Fraction(23, 10)),
        ("12.5%", "percent", Fraction(25, 2)),
        ("10 %", "percent", Fraction(10)),
        ("25MB", "bytes", Fraction(25 * 10**6)),
        ("25MiB", "bytes", Fraction(25 * 2**20)),
        ("1.5GB", "bytes", Fraction(3 * 10**9, 2)),
        ("800kB", "bytes", Fraction(800_000)),
        (".5KiB", "bytes", Fraction(512)),
        ("25mb", "bytes", Fraction(25 * 10**6)),
        ("123456B", "bytes", Fraction(123456)),
    ],
)
def test_budgets_are_read(text: str, kind: str, value: Fraction) -> None:
    assert parse_budget(text) == Budget(kind, value, text.strip())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["", "3", "bit", "three bits", "3bit3", "3 4 bit", "1e3MB", "12.5%%", "25Mb", "3b", "25TB", "٣bit",
     "nan%", "3,5bit", "inf bits", "3bit\n25MB", "33bit", "100.5%", "0.5B"],
)  # fmt: skip
def test_nonsense_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(BudgetError) as error:
        parse_budget(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["0bit", "-3bit", "0%", "-12.5%", "0.0MB", "-25MB"])
def test_nothing_and_less_is_an_error(text: str) -> None:
    with pytest.raises(BudgetError, match="more than zero"):
        parse_budget(text)


def test_budget_that_is_no_text_is_an_error() -> None:
    with pytest.raises(BudgetError, match="3"):
        parse_budget(3)  # type: ignore[arg-type]


def test_bytes_of_the_compressible_layers() -> None:
    assert parse_budget("3bit").compressible_bytes(1001, 10**9) == 3 * 1001 // 8
    assert parse_budget("2.5bit").compressible_bytes(1001, 0) == 312
    assert parse_budget("12.5%").compressible_bytes(1001, 10**9) == 500
    assert parse_budget("25MB").compressible_bytes(1, 24_000_001) == 999_999
    assert parse_budget("1.0005kB").compressible_bytes(1, 0) == 1000
    # Exact where float arithmetic gives 2299 and 56.
    assert parse_budget("2.3bit").compressible_bytes(8000, 0) == 2300
    assert parse_budget("0.57%").compressible_bytes(2500, 0) == 57


def test_a_size_below_the_rest_names_the_smallest() -> None:
    assert parse_budget("1kB").compressible_bytes(10, 1000) == 0
    with pytest.raises(BudgetError, match=r"1kB.*1,001 B"):
        parse_budget("1kB").compressible_bytes(10, 1001)


@pytest.mark.parametrize(
    ("text", "bits"),
    [("3bit", 3), ("3.0 bits", 3), ("16bit", 16), ("2.5bit", None), ("12.5%", None), ("12%", None), ("3MB", None)],
)
def test_whole_bits(text: str, bits: int | None) -> None:
    assert parse_budget(text).whole_bits == bits


def test_exact_bytes_of_the_layers_under_another_label() -> None:
    budget = Budget.of_layers(16_726, "3bit")
    assert budget.compressible_bytes(37_312, 10**9) == 16_726
    assert (str(budget), budget.whole_bits) == ("3bit", None)
    # Beyond what a float holds.
    assert Budget.of_layers(2**60 + 1, "x").compressible_bytes(1, 0) == 2**60 + 1


@pytest.mark.parametrize("text", ["3bit", "2.3 bits", "0.57%", "1.0005kB", ".3GiB", "25MB"])
def test_the_json_form_is_exact(text: str) -> None:
    for budget in (parse_budget(text), Budget.of_layers(13_992, text)):
        again = Budget.from_json(json.loads(json.dumps(budget.to_json())))
        assert again == budget
        assert again.compressible_bytes(8001, 77) == budget.compressible_bytes(8001, 77)


@pytest.mark.parametrize(
    "value",
    ["3bit", None, {}, {"kind": "bits", "value": "3"}, {"kind": "bits", "value": "three", "text": "3bit"},
     {"kind": "bits", "value": "1/0", "text": "3bit"}, {"kind": "apples", "value": "3", "text": "3 apples"}],
)  # fmt: skip
def test_another_object_is_no_budget(value: object) -> None:
    with pytest.raises(BudgetError, match="kind"):
        Budget.from_json(value)  # type: ignore[arg-type]


def test_one_or_several() -> None:
    assert parse_budgets("3bit") == [parse_budget("3bit")]
    assert [budget.text for budget in parse_budgets(["3bit", "10 %"])] == ["3bit", "10 %"]
    assert parse_budgets([]) == []
    with pytest.raises(BudgetError, match="0bit"):
        parse_budgets(["3bit", "0bit"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("3.586218910806bit", "3.586bit"),
        ("disk=12.50001MB,memory=40.12345MB", "disk=12.5MB,memory=40.123MB"),
        ("16726B", "16726B"),
        ("2.125bit", "2.125bit"),
        ("3.00001%", "3%"),
    ],
)
def test_budgets_are_displayed_with_few_decimals(text: str, shown: str) -> None:
    budget = parse_budget(text)
    assert str(budget) == shown
    assert budget.text == text
