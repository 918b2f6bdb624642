"""Write a tuned state as a folder for the Hugging Face hub: tuned.safetensors, config.json, README.md."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from visprompt.errors import UserError
from visprompt.export.check import compare
from visprompt.export.model_card import model_card
from visprompt.models.api import load
from visprompt.models.classifier import Classifier
from visprompt.models.tuned_state import TunedState, save_state
from visprompt.runs.result import Result


def write(
    folder: Path,
    state: TunedState,
    results: Sequence[Result],
    *,
    licence: str | None = None,
    repository: str | None = None,
) -> None:
    """Write the folder; `visprompt.load` reads `tuned.safetensors` alone, and checks it.

    Args:
        folder: An existing folder.
        state: The tuned state.
        results: The result of its run, then those of runs that differ only in the seed, for the card.
        licence: The hub's word for the licence of the tuned state, such as "apache-2.0".
        repository: USER/NAME, for the card.

    Raises:
        UserError: The results differ in more than the seed.
    """
    config: dict[str, Any] = {
        "library_name": "visprompt",
        "model_type": "visprompt",
        "task": state.task,
        "method": dict(state.method),
        "backbone": dict(state.backbone),
        "preprocessing": dict(state.preprocessing),
        "num_labels": len(state.class_names),
        "id2label": {str(i): name for i, name in enumerate(state.class_names)},
        "temperature": state.temperature,
        "versions": dict(state.versions),
    }
    card = model_card(state, results, licence=licence, repository=repository)
    save_state(folder / "tuned.safetensors", state)
    # ASCII: a folder's name, and so a class's, may have bytes that are not Unicode
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="ascii")
    (folder / "README.md").write_text(card, encoding="utf-8")


def check(folder: Path, classifier: Classifier, weights: str | None = None) -> None:
    """Load the folder as a user will, and compare its logits with those of the classifier.

    Args:
        folder: A result of `write`.
        classifier: The classifier of the run.
        weights: A file of the backbone's weights; None if the backbone is embedded or timm's.

    Raises:
        UserError: The logits are not equal.
    """
    loaded = load(folder, weights=weights)
    size = classifier.backbone.image_size
    preprocessing = {"size": size}

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits = loaded(images)
        return logits, loaded.probabilities(logits)

    agreement = compare(classifier.eval(), run, preprocessing, in_graph=False)
    if agreement.error != 0:
        raise UserError(
            f"{folder} answers differently from the run (relative error {agreement.error:.1e}): it is not "
            "written; report this run"
        )
