import pytest

from whence.show.numbers import many, percent, percentile, plain_number, times, typeset


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0213, "+0.0213"),
        (-3.531e-5, "−3.53×10⁻⁵"),
        (0.0, "0"),
        (-8114.0, "−8,110"),
        (999.4, "+999"),
        (999.6, "+1,000"),
        (4.0, "+4.00"),
        (2.5e7, "+2.50×10⁷"),
    ],
)
def test_effects_have_a_sign_and_three_digits(value, shown):
    assert typeset(value) == shown


def test_other_numbers():
    assert [percentile(value) for value in (100.0, 99.99, 95.04, 0.0)] == ["100", "99.9", "95", "0"]
    assert [percent(value) for value in (0.0, 0.0004, 0.137)] == ["0.0%", "< 0.1%", "13.7%"]
    assert [times(value) for value in (1.42, 27.3, 1234.0)] == ["1.4 ×", "27 ×", "1,234 ×"]
    assert [plain_number(value) for value in (None, True, 12345, 0.123456, "0.123456", "text.", {"a": 1.5}, [1, 2])] == [
        "–",
        "yes",
        "12,345",
        "0.1235",
        "0.1235",
        "text.",
        "a 1.5",
        "1, 2",
    ]


@pytest.mark.parametrize(("count", "said"), [(0, "0 queries"), (1, "1 query"), (2, "2 queries"), (1200, "1,200 queries")])
def test_one_thing_is_not_many(count, said):
    assert many(count, "query", "queries") == said
    assert many(count, "row") == said.replace("queries", "rows").replace("query", "row")
