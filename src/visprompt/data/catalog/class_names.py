"""Names of classes that are stored in text files."""

from importlib.resources import files


def class_names(task: str) -> tuple[str, ...]:
    """Return the names in `classes/<task>.txt`, one per line, in the order of the labels."""
    return tuple((files(__package__) / "classes" / f"{task}.txt").read_text(encoding="utf-8").splitlines())
