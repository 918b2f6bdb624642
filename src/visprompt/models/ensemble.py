"""Prompt ensembling. Jia et al., Visual Prompt Tuning, ECCV 2022, section 5.

States that were tuned with different seeds share one backbone, and their logits are averaged.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from visprompt.errors import UserError
from visprompt.models.classifier import Classifier
from visprompt.models.windows import slide


class Ensemble(nn.Module):
    """The mean of the logits of several tuned states on one backbone.

    Image tokens before the first tuned block are computed once for all members, and so are the features if
    only the head is tuned.

    Args:
        classifier: The classifier that the states were tuned on; its tuned state is not changed.
        states: Results of `Classifier.tuned_state`, one for each member.

    Raises:
        UserError: There is no state, or one does not fit the classifier.
    """

    def __init__(self, classifier: Classifier, states: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        if not states:
            raise UserError(
                "an ensemble needs at least one tuned state, and the list is empty: give one or more"
            )
        current = {name: tensor.clone() for name, tensor in classifier.tuned_state().items()}
        try:
            for state in states:
                classifier.load_tuned_state(state)  # raises if the state does not fit
        finally:
            classifier.load_tuned_state(current)
        self.classifier = classifier
        self.num_members = len(states)
        full = {name.removeprefix("method."): name for name in classifier.state_dict()}
        self._names = [full[name] for name in current]
        like = next(classifier.parameters())
        for i, name in enumerate(current):
            stacked = torch.stack([state[name].to(like.device) for state in states])
            self.register_buffer(f"members_{i}", stacked, persistent=False)
        # tokens before a tuned block are the same for all members; features only if nothing but the head
        # differs (frozen prompts differ from member to member)
        only_head = all(name.startswith("head.") for name in current)
        self._common = classifier.has_frozen_part and (only_head or not self._caches_features())

    def _caches_features(self) -> bool:
        method = self.classifier.method
        return method.first_block == method.num_blocks

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, C] of normalised images [B, 3, H, W]; of a dense kind [B, C, H, W]."""
        if self.classifier.slides(images):  # what the members have in common is that of a window
            return slide(self, images, *self.classifier.own_size)
        x = self.classifier.frozen(images) if self._common else images
        total = torch.zeros((), device=x.device)
        for member in range(self.num_members):
            state = {name: self.get_buffer(f"members_{i}")[member] for i, name in enumerate(self._names)}
            total = total + functional_call(self.classifier, state, (x,)).float()
        return total / self.num_members
