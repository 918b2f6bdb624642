"""The one sentence for a word that is not among the valid ones."""

import pytest

from visprompt.errors import UserError, unknown

TASKS = ["digits", "digits_crowded", "digits_loc", "cifar"]
MANY = [f"vit_{i:03}" for i in range(41)]


@pytest.mark.parametrize(
    ("word", "choices", "sentence"),
    [
        (
            "digts",
            TASKS,
            "unknown task 'digts': did you mean digits or digits_loc or digits_crowded? (all: cifar, ",
        ),
        ("CIFAR", TASKS, "unknown task 'CIFAR': did you mean cifar? (all: cifar, "),
        ("zzz", TASKS, "unknown task 'zzz': choose one of cifar, digits, digits_crowded, digits_loc"),
        ("zzz", ["b", "a", "b"], "unknown task 'zzz': choose one of a, b"),
        ("", TASKS, "unknown task '': choose one of cifar"),
        (None, TASKS, "unknown task 'None': choose one of cifar"),
        (12, ["12a"], "unknown task '12': did you mean 12a? (all: 12a)"),
    ],
)
def test_the_nearest_words_come_first_and_all_of_them_are_listed(word, choices, sentence):
    error = unknown("task", word, choices)
    assert isinstance(error, UserError)
    assert str(error).startswith(sentence)


def test_a_list_too_long_to_read_is_cut():
    assert str(unknown("backbone", "vit_0400", MANY)).startswith(
        "unknown backbone 'vit_0400': did you mean vit_040 or "
    )
    assert "all:" not in str(unknown("backbone", "vit_0400", MANY))
    assert "(all: vit_000, " in str(unknown("backbone", "vit_0400", MANY[:40]))
    far = str(unknown("backbone", "zzz", MANY))
    assert far.startswith("unknown backbone 'zzz': choose one of vit_000, vit_001")
    assert far.endswith("vit_039 or 1 more")


def test_any_iterable_of_words_will_do():
    assert str(unknown("key", "lrr", (word for word in ("lr", "epochs")))) == (
        "unknown key 'lrr': did you mean lr? (all: epochs, lr)"
    )
