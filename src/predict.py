"""Label a folder of images: `python src/predict.py state=logs/<task>/<method>/<hash> images=FOLDER`."""

from visprompt.runs import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import hydra
from omegaconf import DictConfig

from visprompt.runs.cli import check_words, one_sentence_errors
from visprompt.runs.paths import expand_paths


@hydra.main(version_base="1.3", config_path="../configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    """Label the images and write the CSV file or the masks."""
    with one_sentence_errors():
        # imported late: typing errors are reported before torch is loaded
        from visprompt.runs.predict import predict

        signals.started()
        expand_paths(cfg)
        names = ("output", "batch_size", "device", "weights", "overwrite", "max_pixels", "multi_scale")
        predict(cfg.state, cfg.images, **{name: cfg[name] for name in names})


if __name__ == "__main__":
    check_words("predict")
    main()
