import lightning.pytorch as L
import numpy as np
import pytest
import torch

from visprompt.data.datasets import Batch
from visprompt.data.digits_datamodule import DigitsLocDataModule
from visprompt.data.sampler import GlobalBatches
from visprompt.data.sources.digits import compose
from visprompt.errors import UserError

GIVEN = {
    "batch_size": 64,
    "split": "final",
    "seed": 42,
    "image_size": 64,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}


def loc(**options):
    return DigitsLocDataModule(**{**GIVEN, **options})


def rows_of(loader):
    return torch.cat([batch.rows for batch in loader]).tolist()


def test_tune_trains_on_train800_and_scores_val200_only():
    data = loc(split="tune")
    assert sorted(rows_of(data.train_dataloader())) == list(range(800))
    images, labels, _ = compose("digits_loc", "val200")
    batches = list(data.val_dataloader())
    assert np.array_equal(torch.cat([batch.images for batch in batches]).numpy(), images)
    assert np.array_equal(torch.cat([batch.labels for batch in batches]).numpy(), labels)
    with pytest.raises(UserError, match=r"split=tune has no test set \(it scores val200\): use split=final"):
        data.test_dataloader()


def test_final_trains_on_both_and_reads_test_in_order():
    data = loc()
    assert len(data.train_dataset) == 1000
    assert data.val_dataloader() == []
    labels = compose("digits_loc", "test")[1]
    batches = list(data.test_dataloader())
    assert rows_of(batches) == list(range(797))
    assert np.array_equal(torch.cat([batch.labels for batch in batches]).numpy(), labels)
    both = [compose("digits_loc", split_set)[1] for split_set in ("train800", "val200")]
    assert np.array_equal(data.train_dataset.labels.numpy(), np.concatenate(both))


def test_unknown_split():
    with pytest.raises(UserError, match="unknown split 'test': did you mean tune"):
        loc(split="test")


def test_features_are_read_in_order_and_without_augmentation():
    module = loc(accumulate=4)
    batches = list(module.feature_dataloader(module.train_dataset))
    assert rows_of(batches) == list(range(1000))
    assert {len(batch.rows) for batch in batches} == {64, 1000 % 64}


def test_what_a_result_records():
    data = loc(image_size=32)
    assert (data.task, data.source, data.num_classes, data.augments) == (
        "digits_loc",
        "scikit-learn",
        16,
        False,
    )
    assert data.sizes == {"train800": 800, "val200": 200, "test": 797}
    assert data.class_names[:5] == ("row0_col0", "row0_col1", "row0_col2", "row0_col3", "row1_col0")
    assert data.fingerprint == "c3e7a2103fa9a5413b3ad57edda5803f1126a6564175ee8952d932c88176e5c8"
    assert data.preprocessing == {
        "size": 32,
        "resize": "squash",
        "short_side": None,
        "decode": "upright",
        "native": None,
        "interpolation": "bilinear",
        "resampling": "pillow",
        "crop": None,
        "flip": 0.0,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }


def test_transfer_normalises_pixels_and_leaves_features_alone():
    data = loc(image_size=32)
    batch = next(iter(data.test_dataloader()))
    moved = data.on_after_batch_transfer(batch, 0)
    assert moved.images.shape == (64, 3, 32, 32)
    assert moved.images.min() >= -1
    assert moved.images.max() > 0
    assert torch.equal(moved.labels, batch.labels)
    features = Batch(torch.randn(2, 5), batch.labels[:2], batch.rows[:2], batch.weights[:2])
    assert data.on_after_batch_transfer(features, 0) is features


def test_a_loader_leaves_the_global_random_stream_alone():
    before = torch.get_rng_state()
    next(iter(loc().train_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


class Seen(L.LightningModule):
    """Notes what Lightning hands to a step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.train_rows, self.test_rows, self.shares = [], [], []

    def training_step(self, batch):
        assert batch.images.dtype == torch.float32
        self.train_rows.append((self.current_epoch, batch.rows.tolist()))
        self.shares.append(float(batch.weights.sum()) / 2)
        return self.weight.sum()

    def validation_step(self, batch):
        raise AssertionError("split=final holds no images out")

    def test_step(self, batch):
        self.test_rows += batch.rows.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_trainer_sees_each_epochs_own_permutation_and_the_test_set_once(tmp_path):
    trainer = L.Trainer(
        max_epochs=2,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    model, data = Seen(), loc(batch_size=128, accumulate=2)
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 2 * 8
    for epoch in (0, 1):
        batches = GlobalBatches(
            num_rows=1000,
            batch_size=128,
            accumulate=2,
            seed=42,
            epoch=lambda epoch=epoch: epoch,
            training=True,
        )
        expected = [(epoch, [ticket.row for ticket in tickets]) for tickets in batches]
        assert [seen for seen in model.train_rows if seen[0] == epoch] == expected
    assert sum(model.shares) == pytest.approx(2 * 8)
    trainer.test(model, datamodule=data, verbose=False)
    assert model.test_rows == list(range(797))
