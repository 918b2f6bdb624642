"""Pre-trains the embedded demo backbone: `python src/pretrain.py output=my.safetensors` (see configs/pretrain.yaml)."""

from visprompt import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import hydra
from omegaconf import DictConfig, OmegaConf

from visprompt.cli import check_words, one_sentence_errors
from visprompt.paths import expand_paths


@hydra.main(version_base="1.3", config_path="../configs", config_name="pretrain")
def main(cfg: DictConfig) -> None:
    """Hands the settings over as plain values."""
    with one_sentence_errors():
        from visprompt.lit.pretrain import PretrainRecipe, pretrain  # late: a wrong word is answered at once

        signals.started()
        expand_paths(cfg)
        values = dict(OmegaConf.to_object(cfg))  # type: ignore[arg-type]  # a mapping at the top
        progress = values.pop("progress")
        pretrain(PretrainRecipe(**values), progress)


if __name__ == "__main__":
    check_words("pretrain")
    main()
