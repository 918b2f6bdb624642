"""Serve tuned states over HTTP: `python src/serve.py states=FOLDER`, or `states='[A,B]'`."""

from visprompt.runs import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import hydra
from omegaconf import DictConfig

from visprompt.runs.cli import check_words, one_sentence_errors
from visprompt.runs.compose import plain
from visprompt.runs.paths import expand_paths


@hydra.main(version_base="1.3", config_path="../configs", config_name="serve")
def main(cfg: DictConfig) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    with one_sentence_errors():
        # imported late: typing errors are reported before torch is loaded
        from visprompt.serving.run import serve

        signals.started()
        expand_paths(cfg)
        serve(**{name: value for name, value in plain(cfg).items() if name != "paths"})


if __name__ == "__main__":
    check_words("serve")
    main()
