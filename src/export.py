"""Export a run: `python src/export.py run=logs/<task>/<method>/<hash> to=onnx output=FOLDER`."""

from visprompt.runs import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import hydra
from omegaconf import DictConfig

from visprompt.runs.cli import check_words, one_sentence_errors
from visprompt.runs.paths import expand_paths


@hydra.main(version_base="1.3", config_path="../configs", config_name="export")
def main(cfg: DictConfig) -> None:
    """Write the run in another form, compared with its classifier."""
    with one_sentence_errors():
        # imported late: typing errors are reported before torch is loaded
        from visprompt.export.command import export

        signals.started()
        expand_paths(cfg)
        export(cfg)


if __name__ == "__main__":
    check_words("export")
    main()
