"""Check before training that dividing a batch does not change what a method computes from it."""

from torch.nn.modules.batchnorm import _BatchNorm

from visprompt.errors import UserError
from visprompt.models.classifier import Classifier


def check_batch_norm(
    classifier: Classifier, *, accumulated: int, processes: int, on_cpu: bool, short: int
) -> None:
    """Refuse to train batch norm on parts of a batch; on several GPUs the trainer synchronises it.

    Args:
        classifier: The classifier that is trained.
        accumulated: Micro steps per optimiser step.
        processes: Number of processes that share a batch.
        on_cpu: Whether they compute on the CPU.
        short: Number of images in the last batch if it is shorter than the others, else 0.

    Raises:
        UserError: Batch norm is trained, and its statistics would be those of a part of a batch.
    """
    trained = classifier.method.trains_backbone  # a frozen backbone keeps its batch statistics
    names = [n for n in classifier.tuned_names if trained or not n.startswith("backbone.")]
    tuned = {name.rpartition(".")[0] for name in names}
    if not any(isinstance(m, _BatchNorm) and name in tuned for name, m in classifier.named_modules()):
        return
    if accumulated > 1:
        raise UserError(
            "batch norm is trained here, and each of the accumulated parts of a batch would have separate "
            "statistics: set trainer.accumulate_grad_batches=1"
        )
    if processes > 1 and on_cpu:
        raise UserError(
            "batch norm is trained here, and cannot be synchronised over CPU processes: set trainer.devices=1"
        )
    if 0 < short < processes:
        raise UserError(
            f"batch norm is trained here, and the last batch of {short} images is too short for "
            f"{processes} devices: change recipe.batch_size"
        )


def check_comparison(classifier: Classifier, accumulated: int) -> None:
    """Refuse gradient accumulation for a loss that compares the images of a batch.

    Raises:
        UserError: The method has such a loss, and batches are accumulated.
    """
    if classifier.method.compares_images and accumulated > 1:
        raise UserError(
            "this method's loss compares the images of a batch, and would see only those of each accumulated "
            "part: set trainer.accumulate_grad_batches=1"
        )
