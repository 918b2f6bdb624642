from visprompt.data.catalog import SUITES, TASKS, resolve
from visprompt.data.catalog.task import Cut

SPEC = TASKS["ade20k"]


def test_ade20k_has_the_numbers_of_its_page():
    assert (SPEC.num_classes, len(SPEC.class_names)) == (150, 150)
    assert SPEC.official_sizes == {"training": 20_210, "validation": 2_000}
    assert SPEC.class_names[:3] == ("wall", "building", "sky")
    assert SPEC.class_names[-1] == "flag"
    assert SPEC.files[0].checksums == {"sha1": "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"}


def test_the_test_set_is_the_official_validation_set_and_val_a_slice_of_the_training_set():
    assert SPEC.cuts["test"] == Cut("validation")
    assert SPEC.cuts["train"].stop == SPEC.cuts["val"].start == 19_210
    assert SPEC.split_sizes == {"train": 19_210, "val": 1_000, "test": 2_000}


def test_it_is_in_its_own_suite_and_in_no_other():
    assert [name for name, tasks in SUITES.items() if "ade20k" in tasks] == ["segmentation"]
    assert [spec.id for spec in resolve("ADE20K")] == ["ade20k"]
