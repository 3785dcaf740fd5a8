"""The page on trust: each of its statements is held by a test that is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STATEMENTS = re.findall(r"(?ms)^- .*?(?=^- |^$)", (ROOT / "docs/trust.md").read_text())


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda text: text[2:40])
def test_a_statement_names_the_test_that_holds_it(statement):
    named = re.findall(r"<!-- (\w+\.py)::(\w+) -->", statement)
    assert named
    assert statement.count("<!--") == len(named)
    for file, name in named:
        assert re.search(rf"(?m)^def {name}\(", (ROOT / "tests" / file).read_text()), name


def test_the_page_has_statements():
    assert len(STATEMENTS) >= 20
