"""Task scores of several models in one table."""

from megatron_inherit.eval.task_table import task_tables


def result(value, *, suite=None, items=100, published=None):
    row = {"task": "piqa", "metric": "acc", "shots": 0, "items": items, "value": value, "stderr": 0.05}
    return {"suite": suite, "rows": [row | {"published": published or {}}], "published_names": list(published or {})}


def test_models_with_the_same_task_share_a_row():
    (table,) = task_tables([("teacher", result(0.66)), ("student", result(0.46))])
    assert table.models == ["teacher", "student"]
    (row,) = table.rows
    assert row.values == {"teacher": (0.66, 0.05), "student": (0.46, 0.05)}


def test_scores_on_different_numbers_of_items_are_not_side_by_side():
    (table,) = task_tables([("teacher", result(0.66)), ("student", result(0.46, items=10))])
    assert [list(row.values) for row in table.rows] == [["teacher"], ["student"]]


def test_each_suite_has_its_table_and_its_published_rows():
    ours = [("a", result(0.5)), ("b", result(0.6, suite="inheritune", published={"paper": 0.7}))]
    plain, suite = task_tables(ours)
    assert (plain.suite, plain.published) == ("", [])
    assert (suite.suite, suite.models, suite.published) == ("inheritune", ["b"], ["paper"])
    assert suite.rows[0].published == {"paper": 0.7}
