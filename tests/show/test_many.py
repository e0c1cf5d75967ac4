"""Numbers as people read them."""

import pytest

from whence.show.numbers import many


@pytest.mark.parametrize("count, said", [(0, "0 queries"), (1, "1 query"), (2, "2 queries"), (1200, "1,200 queries")])
def test_one_thing_is_not_many(count, said):
    assert many(count, "query", "queries") == said
    assert many(count, "row") == said.replace("queries", "rows").replace("query", "row")
