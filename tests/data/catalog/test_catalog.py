import pytest

from visprompt.data.catalog import SUITES, TASKS, resolve
from visprompt.errors import UserError


def ids(tasks):
    return [spec.id for spec in resolve(tasks)]


def test_words_become_tasks_in_order_and_once():
    assert ids("digits_loc") == ["digits_loc"]
    assert ids("demo") == ["digits", "digits_crowded", "digits_loc"]
    assert ids(["digits_loc", "demo"]) == ["digits_loc", "digits", "digits_crowded"]
    assert ids("digits_loc, digits,digits_loc") == ["digits_loc", "digits"]


@pytest.mark.parametrize("nothing", ["", " , ", []])
def test_no_task_is_an_error(nothing):
    with pytest.raises(
        UserError, match=r"tasks= is empty: name a task or a suite \(vtab_natural, vtab_specialized"
    ):
        resolve(nothing)


def test_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown task 'digit_loc': did you mean digits_loc"):
        resolve("digits,digit_loc")


def test_suites_name_tasks_and_no_name_means_two_things():
    names = [name for spec in TASKS.values() for name in (spec.id, *spec.aliases)] + list(SUITES)
    assert len(names) == len(set(names))
    for suite in SUITES.values():
        assert set(suite) <= set(TASKS)


@pytest.mark.parametrize("spec", TASKS.values(), ids=list(TASKS))
def test_a_record_is_complete(spec):
    assert spec.group in ("natural", "specialized", "structured", "fine-grained", "dense")
    assert spec.num_classes >= 2
    assert len(set(spec.class_names)) in (0, spec.num_classes)
    assert {"test"} < set(spec.split_sizes)
    assert all(size > 0 for size in spec.split_sizes.values())
    assert all((spec.source, spec.licence, spec.homepage, spec.citation, spec.description))
    assert spec.config == f"{spec.family}/{spec.id}"
