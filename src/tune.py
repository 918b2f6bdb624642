"""Try a grid, choose on val200, run the seeds, write a table: `python src/tune.py experiment=demo_table`."""

from visprompt.runs import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import hydra
from omegaconf import DictConfig

from visprompt.runs.cli import check_words, one_sentence_errors
from visprompt.runs.paths import expand_paths


@hydra.main(version_base="1.3", config_path="../configs", config_name="tune")
def main(cfg: DictConfig) -> float:
    """Run the protocol and return the mean test score over methods and tasks."""
    with one_sentence_errors():
        # imported late: typing errors are reported before torch is loaded
        from visprompt.tuning import commands, dry_run, protocol

        signals.started()
        expand_paths(cfg)
        return (commands if cfg.plan else dry_run if cfg.dry_run else protocol).tune(cfg)


if __name__ == "__main__":
    check_words("tune")
    main()
