"""Grid, choice on val200, seeds, table: `python src/tune.py experiment=demo_table`."""

from visprompt.runs import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import hydra
from omegaconf import DictConfig

from visprompt.runs.cli import check_words, one_sentence_errors
from visprompt.runs.paths import expand_paths


@hydra.main(version_base="1.3", config_path="../configs", config_name="tune")
def main(cfg: DictConfig) -> float:
    """Return the mean test accuracy over methods and tasks."""
    with one_sentence_errors():
        from visprompt.tuning import (
            dry_run,
            protocol,
        )  # imported late: a wrong word is said before torch is loaded

        signals.started()
        expand_paths(cfg)
        return (dry_run if cfg.dry_run else protocol).tune(cfg)


if __name__ == "__main__":
    check_words("tune")
    main()
