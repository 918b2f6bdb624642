"""Write tables, tests, figures and a page about the runs in a folder: `python src/report.py runs=logs`."""

from visprompt.runs import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import hydra
from omegaconf import DictConfig

from visprompt.runs.cli import check_words, one_sentence_errors
from visprompt.runs.paths import expand_paths


@hydra.main(version_base="1.3", config_path="../configs", config_name="report")
def main(cfg: DictConfig) -> None:
    """Write the report."""
    with one_sentence_errors():
        # imported late: typing errors are reported before torch is loaded
        from visprompt.reports import report

        signals.started()
        expand_paths(cfg)
        report.report(cfg)


if __name__ == "__main__":
    check_words("report")
    main()
