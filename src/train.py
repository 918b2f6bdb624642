"""Tunes a frozen backbone on one task or several: `python src/train.py data=demo/digits method=vpt_deep`."""

from visprompt.runs import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import hydra
from omegaconf import DictConfig

from visprompt.runs.cli import check_words, one_sentence_errors


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> float:
    """Return the mean score over the tasks, by which a sweeper of Hydra's may choose in split=tune."""
    with one_sentence_errors():
        from visprompt.runs import run_all  # imported late: a wrong word is said before torch is loaded
        from visprompt.tuning import dry_run

        signals.started()
        return (dry_run if cfg.dry_run else run_all).train(cfg)


if __name__ == "__main__":
    check_words("train")
    main()
