"""Score a finished run on its test set: `python src/eval.py run=logs/<task>/<method>/<hash>`."""

from visprompt.runs import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import hydra
from omegaconf import DictConfig

from visprompt.runs.cli import check_words, one_sentence_errors
from visprompt.runs.paths import expand_paths


@hydra.main(version_base="1.3", config_path="../configs", config_name="eval")
def main(cfg: DictConfig) -> float:
    """Score the run, or the ensemble of runs, and return the test score."""
    with one_sentence_errors():
        # imported late: typing errors are reported before torch is loaded
        from visprompt.runs import evaluate

        signals.started()
        expand_paths(cfg)
        return evaluate.evaluate(cfg)


if __name__ == "__main__":
    check_words("eval")
    main()
