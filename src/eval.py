"""Scores a saved state on its test set: `python src/eval.py run=logs/<task>/<method>/<hash>`."""

from visprompt import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import hydra
from omegaconf import DictConfig

from visprompt.cli import check_words, one_sentence_errors
from visprompt.paths import expand_paths


@hydra.main(version_base="1.3", config_path="../configs", config_name="eval")
def main(cfg: DictConfig) -> float:
    """Returns test/acc."""
    with one_sentence_errors():
        from visprompt import inference  # imported late: a wrong word is said before torch is loaded

        signals.started()
        expand_paths(cfg)
        return inference.evaluate(cfg)


if __name__ == "__main__":
    check_words("eval")
    main()
