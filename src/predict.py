"""Labels a folder of images: `python src/predict.py state=logs/<task>/<method>/<hash> images=FOLDER`."""

from visprompt.runs import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import hydra
from omegaconf import DictConfig

from visprompt.runs.cli import check_words, one_sentence_errors
from visprompt.runs.paths import expand_paths


@hydra.main(version_base="1.3", config_path="../configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    """Write predictions.csv."""
    with one_sentence_errors():
        from visprompt.runs.predict import (
            predict,
        )  # imported late: a wrong word is said before torch is loaded

        signals.started()
        expand_paths(cfg)
        options = {
            name: cfg[name]
            for name in ("output", "batch_size", "device", "weights", "overwrite", "max_pixels")
        }
        predict(cfg.state, cfg.images, **options)


if __name__ == "__main__":
    check_words("predict")
    main()
