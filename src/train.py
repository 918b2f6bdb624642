"""Tune a frozen backbone on one task or several: `python src/train.py data=demo/digits method=vpt_deep`."""

from visprompt.runs import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import hydra
from omegaconf import DictConfig

from visprompt.runs.cli import check_words, one_sentence_errors


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> float:
    """Train and return the mean score over the tasks, by which a Hydra sweeper may choose if split=tune."""
    with one_sentence_errors():
        # imported late: typing errors are reported before torch is loaded
        from visprompt.runs import run_all
        from visprompt.tuning import commands, dry_run

        signals.started()
        return (commands if cfg.plan else dry_run if cfg.dry_run else run_all).train(cfg)


if __name__ == "__main__":
    check_words("train")
    main()
