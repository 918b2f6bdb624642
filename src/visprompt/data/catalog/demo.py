"""The records of the demo tasks, whose data comes with scikit-learn."""

from visprompt.data.catalog.task import TaskSpec


def _digits(
    task: str, group: str, class_names: tuple[str, ...], description: str, kind: str = "single_label"
) -> TaskSpec:
    return TaskSpec(
        kind=kind,
        id=task,
        dataset="digits",
        num_classes=len(class_names),
        group=group,
        family="demo",
        class_names=class_names,
        split_sizes={"train800": 800, "val200": 200, "test": 797},
        source="the 1,797 scans (8 x 8 pixels, 17 grey levels) that scikit-learn bundles as load_digits",
        licence="CC BY 4.0 (data); scikit-learn's copy is distributed with its BSD 3-clause licence",
        homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        citation="E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning "
        "Repository, 1998, doi:10.24432/C50P49",
        description=description,
        how_to_get="nothing to do: it is installed with scikit-learn and composed in memory",
    )


_DIGIT_NAMES = tuple(str(digit) for digit in range(10))
RECORDS = (
    _digits("digits", "natural", _DIGIT_NAMES, "A handwritten digit, enlarged to 64 x 64: which one is it?"),
    _digits(
        "digits_crowded",
        "specialized",
        _DIGIT_NAMES,
        "As in SVHN: a handwritten digit in the middle, between the halves of two others: which one is in "
        "the middle?",
    ),
    _digits(
        "digits_loc",
        "structured",
        tuple(f"row{cell // 4}_col{cell % 4}" for cell in range(16)),
        "A small handwritten digit in one of 4 x 4 cells, black elsewhere: in which cell is it?",
    ),
    _digits(
        "digits_masks",
        "dense",
        ("background", *_DIGIT_NAMES),
        "A handwritten digit between halves of two others: which pixels belong to it, and which digit is it? "
        "The others are background.",
        "segmentation",
    ),
)
