"""A training step never waits for the device: on tensors of "meta", which have no numbers that could be read."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.tiny import NUM_CLASSES, tiny_classifier, tiny_model
from visprompt.data import loader
from visprompt.data.datasets import ArrayDataset, DeviceDataset
from visprompt.data.digits_datamodule import DigitsDataModule
from visprompt.models.methods import METHODS
from visprompt.models.methods.locations import LOCATIONS
from visprompt.models.optim import build_optimizer
from visprompt.models.recipe import Recipe
from visprompt.models.tuning_module import TuningModule

DEVICE = torch.device("meta")
PLAIN = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0, "batch_size": 4, "epochs": 1, "warmup_epochs": 0}
RECIPES = {
    "class weights": {"class_weights": [1.0, 2.0, 3.0, 4.0, 5.0], "label_smoothing": 0.1},
    "balanced": {"class_weights": "balanced", "sampling": "balanced"},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "AdamW": {"optimizer": "adamw"},
    "VPT's AdamW": {"optimizer": "vpt_adamw"},
}


class Made(TorchFunctionMode):
    """Notes tensors that are made on the device from numbers of the host, which `Copies` does not see."""

    def __init__(self, noted):
        super().__init__()
        self.noted = noted

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("tensor", "as_tensor", "new_tensor", "asarray", "from_numpy"):
            self.noted += [func.__name__] if out.device == DEVICE else []
        return out


class Copies(TorchDispatchMode):
    """Notes copies between host and device, for each of which the host waits."""

    def __init__(self):
        super().__init__()
        self.noted = []
        self.made = Made(self.noted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        if name in ("aten._to_copy", "aten.copy_"):
            tensors = [each for each in (*args[:2], out) if isinstance(each, torch.Tensor)]
            self.noted += [name] if len({each.device for each in tensors}) > 1 else []
        return out


def copies(monkeypatch, method="vpt_deep", features=False, options=None, **settings):
    """Takes two steps after a first one, and returns the copies that they make."""
    recipe = Recipe(**PLAIN | settings)
    datamodule = DigitsDataModule(
        batch_size=4, split="tune", seed=0, image_size=32, mean=[0.5] * 3, std=[0.5] * 3
    )
    trainer = SimpleNamespace(
        datamodule=datamodule,
        accumulate_grad_batches=1,
        training=True,
        global_rank=0,
        world_size=1,
        current_epoch=0,
        global_step=0,
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # which knows no device "meta"
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(TuningModule, "trainer", trainer)
    monkeypatch.setattr(TuningModule, "current_epoch", 0)
    monkeypatch.setattr(TuningModule, "global_step", 0)
    module = TuningModule(
        tiny_classifier(method, model=tiny_model(depth=2), **options or {}), recipe, seed=0
    ).to(DEVICE)
    labels = torch.arange(12) % NUM_CLASSES
    # uint8 pixels of another size, as a store without resizing has them
    images = torch.zeros(12, 3, 24, 24, dtype=torch.uint8)
    datamodule.train_dataset = DeviceDataset(images, labels, [str(i) for i in range(12)])
    module._weigh()
    module._objective.place(DEVICE)
    stored = module.classifier.frozen(torch.zeros(12, 3, 32, 32, device=DEVICE)) if features else images
    datamodule.train_dataset = DeviceDataset(stored.to(DEVICE), labels, datamodule.train_dataset.keys)
    optimizer, schedule = build_optimizer(
        module.classifier.tuned_parameters(), recipe, 3, module.classifier.method.undecayed
    )
    with Copies() as noted, noted.made:
        for step, batch in enumerate(datamodule.train_dataloader()):
            if step == 1:
                noted.noted.clear()
            moved = datamodule.on_after_batch_transfer(
                datamodule.transfer_batch_to_device(batch, DEVICE, 0), 0
            )
            module.training_step(moved, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return noted.noted


@pytest.mark.parametrize("method", METHODS)
def test_no_method_waits(monkeypatch, method):
    assert copies(monkeypatch, method) == []


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES)
def test_no_recipe_waits(monkeypatch, settings, features):
    if not (features and {"mixup", "cutmix"} & settings.keys()):
        assert copies(monkeypatch, "linear", features, **settings) == []


@pytest.mark.parametrize("location", LOCATIONS)
def test_no_location_of_prompts_waits(monkeypatch, location):
    assert copies(monkeypatch, "vpt_shallow", options={"location": location}) == []


class Transfers(TorchDispatchMode):
    """Notes of each copy to the device whether it is asynchronous, and where its source lies."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if str(func.overloadpacket) == "aten._to_copy" and out.device == DEVICE:
            source = args[0].untyped_storage().data_ptr()
            self.noted.append(((kwargs or {}).get("non_blocking", False), source))
        return out


@pytest.mark.parametrize(("pins", "gpu"), [(True, True), (False, True), (True, False)])
def test_batches_from_memory_are_copied_from_locked_pages_without_waiting(monkeypatch, pins, gpu):
    pages = []  # kept, so that no address is given twice

    def locked(tensor):
        pages.append(tensor.clone())
        return pages[-1]

    def empty(shape, dtype):
        return locked(torch.empty(shape, dtype=dtype))

    monkeypatch.setattr(loader, "_pinned", locked)  # PyTorch locks pages for a driver alone
    monkeypatch.setattr(loader, "_empty_pinned", empty)
    datamodule = DigitsDataModule(
        batch_size=4, split="tune", seed=0, image_size=32, mean=[0.5] * 3, std=[0.5] * 3, pin_memory=pins
    )
    strategy = SimpleNamespace(root_device=torch.device("cuda" if gpu else "cpu"))
    datamodule.trainer = SimpleNamespace(world_size=1, global_rank=0, current_epoch=0, strategy=strategy)
    images = np.arange(10 * 3 * 2 * 2, dtype=np.uint8).reshape(10, 3, 2, 2)
    dataset = ArrayDataset(images, np.arange(10) % 5, [str(i) for i in range(10)])
    batches = list(datamodule.feature_dataloader(dataset))
    assert np.array_equal(torch.cat([batch.images for batch in batches]), images)
    assert torch.cat([batch.labels for batch in batches]).tolist() == dataset.labels.tolist()
    with Transfers() as transfers:
        for batch in batches:
            datamodule.transfer_batch_to_device(batch, DEVICE, 0)
    assert len(transfers.noted) == 3 * 5, "images, labels, rows, weights and scales of each batch"
    assert all(waits_not for waits_not, _ in transfers.noted)
    known = {page.untyped_storage().data_ptr() for page in pages}
    assert [source in known for _, source in transfers.noted] == [pins and gpu] * 15


def test_what_a_step_copies_is_noted(monkeypatch):
    def scaled_anew(datamodule, batch, _):
        mean = torch.tensor([0.5] * 3, device=batch.images.device)[:, None, None]
        return batch._replace(
            images=batch.images.float()[..., :24, :24].repeat(1, 1, 2, 2)[..., :32, :32] - mean
        )

    monkeypatch.setattr(DigitsDataModule, "on_after_batch_transfer", scaled_anew)
    assert copies(monkeypatch) == ["tensor", "tensor"]  # one for each of two steps
