"""Weights of a backbone in a checkpoint that Lightning itself wrote."""

import lightning.pytorch as L
import torch
from torch import nn

from helpers.tiny import tiny_model
from visprompt.models.backbones.weights.loading import load_file


def test_a_real_checkpoint_of_lightning_is_loaded(tmp_path):
    class Training(L.LightningModule):
        def __init__(self, rate, name):
            super().__init__()
            self.save_hyperparameters()
            self.model, self.head = tiny_model(), nn.Linear(32, 5)
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(5))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.hparams["rate"])

    training = Training(rate=0.001, name="tiny")
    options = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    trainer = L.Trainer(max_epochs=1, default_root_dir=tmp_path, **options)
    trainer.strategy.connect(training)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert "hyper_parameters" in torch.load(tmp_path / "last.ckpt", weights_only=True)
    model, expected = tiny_model(seed=1), tiny_model().state_dict()
    load_file(model, tmp_path / "last.ckpt")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
