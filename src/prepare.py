"""Download, verify and decode datasets, once: `python src/prepare.py tasks=vtab_natural`."""

from visprompt.runs import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import hydra
from omegaconf import DictConfig

from visprompt.runs.cli import check_words, one_sentence_errors
from visprompt.runs.paths import expand_paths


@hydra.main(version_base="1.3", config_path="../configs", config_name="prepare")
def main(cfg: DictConfig) -> None:
    """Prepare the tasks of a command line, or with `verify=true` say which of their files are missing."""
    with one_sentence_errors():
        # imported late: typing errors are reported before torch is loaded
        from visprompt.data.stores.prepare_all import prepare_all, verify_all
        from visprompt.runs.compose import plans

        signals.started()
        expand_paths(cfg)
        (verify_all if cfg.verify else prepare_all)(plans(cfg))


if __name__ == "__main__":
    check_words("prepare")
    main()
