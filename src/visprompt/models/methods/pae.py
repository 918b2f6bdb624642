"""Prompt-agnostic evolution ("PAE"). Wang et al., Visual Prompt-Agnostic Evolution, ICLR 2026.

Deep prompts that start from the image frequencies by which the backbone recognises classes ("MPA"), and a
loss that ties each block's prompts to those of the block before ("KLD"). Prediction is VPT-deep's.

MPA. A window of w x w frequencies slides with stride r over the centred spectrum of one batch of training
images. For each window the batch is reconstructed from the window's frequencies alone and classified with all
prompts at zero. Each of the p windows with the lowest cross-entropy gives a prompt of the first block:
t = sum of |e|^2 e / sum of |e|^2, over the patch tokens e of all images reconstructed from that window. The
prompts of block i + 1 are the outputs of block i for its prompts alone, without image tokens.

KLD. With z_i = P_i C of the prompts P_i of block i, C [width, k] and one operator K [k, k] for all blocks,

    Koopman:  sum over i of mean((z_i K - z_{i+1})^2)
    Lyapunov: sum over i of 10 tanh(mean over tokens of softplus(V(z_i K) - V(z_i)) / 10)

where V(z) = z~ Q z~^T, Q = L^T L / |L^T L|_2 and z~ = z / max(1, |z|). Both terms, times their weights, are
added to the cross-entropy. C, K and L are tuned together with the prompts, with their gradient clipped at a
norm of 10; prediction does not use them.

All this follows the released code; its README has max(0, V(z_{i+1}) - V(z_i)) as the second term. As there:
- The head scores the windows before it is trained, with its random initial weights. A head of zeros would
  give the same loss for all windows, and is refused.
- The sums run over pairs of neighbouring blocks from the second block on: no pair holds the first block.

Different from the released code: the images of the one batch are not augmented; two of its parts are left
out, a matrix from k back to the width, which no loss reads, and the option of an operator for each pair of
blocks (KOOPMAN_MOD layerwise), where the paper has one operator.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fft, nn
from torch.nn import functional as F

from visprompt.errors import UserError, unknown
from visprompt.models.contract import Geometry, Method, TokenBackbone
from visprompt.models.methods.checks import check_least
from visprompt.models.methods.vpt import VPT

INITS = ("frequency", "random")
IMAGES = 128  # images in the one batch: the released code's batch size
_SATURATION = 10.0  # upper bound of a pair's Lyapunov term
_CLIP = 10.0  # norm of the gradient of C, K and L together


class PAE(VPT):
    """VPT-deep with initial prompts from windows of frequencies, and a loss that ties the prompts of blocks.

    Args:
        backbone: The backbone whose width and number of blocks shape the prompts.
        num_tokens: Prompt tokens of a block (p).
        dropout: Dropout on prompt values, drawn for every image anew; the added loss reads them without it.
        init: "frequency", or "random" for prompts drawn as VPT's.
        window: Side of a window of frequencies (w), in pixels of the spectrum.
        stride: Step from one window to the next (r).
        koopman_dim: Width of the space that the operator acts on (k).
        koopman_weight: Weight of the Koopman term.
        lyapunov_weight: Weight of the Lyapunov term. If both weights are 0, or the backbone has fewer than
            three blocks and so no pair, there is no operator.

    Attributes:
        prompts: [blocks, num_tokens, width]; drawn as VPT's until `see_classes` is called.
        koopman_in: Linear(width -> k) without bias (C), as PyTorch draws it.
        koopman: [k, k], the identity at first (K).
        lyapunov: [k, k], the identity at first (L); only if its term has a weight above 0.

    Raises:
        UserError: A number lies outside its range, or a word is unknown.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"tokens", "stream"})
    needs_one_class: ClassVar[bool] = True
    images_per_class: ClassVar[int | None] = IMAGES  # all images of the batch may be of one class

    def __init__(
        self,
        backbone: Geometry,
        num_tokens: int = 10,
        dropout: float = 0.1,
        init: str = "frequency",
        window: int = 16,
        stride: int = 8,
        koopman_dim: int = 256,
        koopman_weight: float = 0.5,
        lyapunov_weight: float = 0.2,
    ) -> None:
        super().__init__(backbone, num_tokens=num_tokens, dropout=dropout)
        if init not in INITS:
            raise unknown("method.init", init, INITS)
        check_least(1, window=window, stride=stride, koopman_dim=koopman_dim)
        check_least(0, koopman_weight=koopman_weight, lyapunov_weight=lyapunov_weight)
        self.by_frequency, self.window, self.stride = init == "frequency", window, stride
        self.koopman_weight, self.lyapunov_weight = koopman_weight, lyapunov_weight
        self.evolves = self.num_blocks > 2 and (koopman_weight > 0 or lyapunov_weight > 0)
        if self.evolves:
            self.koopman_in = nn.Linear(backbone.width, koopman_dim, bias=False)
            self.koopman = nn.Parameter(torch.eye(koopman_dim))
            if lyapunov_weight > 0:
                self.lyapunov = nn.Parameter(torch.eye(koopman_dim))
        # in a tuple, so that torch does not register the classifier's parameters as this method's
        self._head: tuple[Any, ...] = ()

    @property
    def needs_images(self) -> bool:
        """Whether prompts are computed from windows of frequencies."""
        return self.by_frequency

    def make_head(self, width: int, num_classes: int, init: str) -> nn.Module:
        """Build a linear head, and keep it to score windows."""
        if self.by_frequency and init == "zeros":
            raise UserError(
                "method.init=frequency compares windows by the loss of the head before training, and with "
                "recipe.head_init=zeros all windows have the same: give recipe.head_init=vpt, or "
                "method.init=random"
            )
        head = super().make_head(width, num_classes, init)
        self._head = (head,)
        return head

    @torch.no_grad()
    def see_classes(self, backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> None:
        """Compute the prompts of all blocks from the first `IMAGES` images; `seed` is not used."""
        tokens, like = cast(TokenBackbone, backbone), next(backbone.parameters())
        images, labels = _first(batches)
        spectrum = fft.fftshift(fft.fft2(images.to(like.device).float()), dim=(-2, -1))
        windows = self._windows(*spectrum.shape[-2:])
        prompts = cast(Tensor, self.prompts).zero_()
        training, labels = self.training, labels.to(like.device)
        self.eval()
        losses = []
        for window in windows:
            losses.append(self._score(backbone, self._filtered(spectrum, window).to(like.dtype), labels))
        self.train(training)
        best = torch.stack(losses).argsort(stable=True)[: self.num_tokens].tolist()
        plain = Method(tokens)
        embedded = [tokens.embed(self._filtered(spectrum, windows[i]).to(like.dtype), plain) for i in best]
        x = torch.stack([_by_energy(patches[:, tokens.num_prefix :].float()) for patches in embedded])[None]
        prompts[0].copy_(x[0])
        for block in range(self.num_blocks - 1):
            x = tokens.carry(block, x.to(like.dtype), 0)
            prompts[block + 1].copy_(x[0])

    def _windows(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the (top, left) corners of all windows in a spectrum."""
        side = self.window
        corners = [
            (top, left)
            for top in range(0, height - side + 1, self.stride)
            for left in range(0, width - side + 1, self.stride)
        ]
        if len(corners) < self.num_tokens:
            raise UserError(
                f"method.num_tokens={self.num_tokens} needs as many windows of frequencies, and images of "
                f"{height} x {width} have {len(corners)} with method.window={side} and "
                f"method.stride={self.stride}: give smaller ones, or fewer tokens"
            )
        return corners

    def _filtered(self, spectrum: Tensor, corner: tuple[int, int]) -> Tensor:
        """Reconstruct images [B, 3, H, W] from the frequencies of one window alone."""
        rows, columns = (slice(start, start + self.window) for start in corner)
        filtered = torch.zeros_like(spectrum)
        filtered[..., rows, columns] = spectrum[..., rows, columns]
        return fft.ifft2(fft.ifftshift(filtered, dim=(-2, -1))).real

    def _score(self, backbone: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of images by the head before training."""
        head = self._head[0]
        return F.cross_entropy(head(backbone(images, self).to(head.weight.dtype)).float(), labels)

    def losses(self, task_loss: Tensor, head: nn.Module, labels: Tensor, weights: Tensor) -> Tensor:
        """Add the terms of the prompts to the cross-entropies [B]."""
        return task_loss + self._evolution() if self.evolves else task_loss

    def _evolution(self) -> Tensor:
        """Return the weighted sum of both terms; clip the gradient of C, K and L to a norm of `_CLIP`."""
        prompts = cast(Tensor, self.prompts)[1:]
        operators: list[Tensor] = [p for name, p in self.named_parameters() if name != "prompts"]
        if torch.is_grad_enabled():
            # clipped by the gradient of the whole term, so that under gradient accumulation the parts of a
            # batch, each with its share of the term, add up to the same
            gradients = torch.autograd.grad(self._terms(prompts.detach(), *operators), operators)
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            factor = (_CLIP / (norm + 1e-6)).clamp(max=1.0)
            operators = [p.detach() + factor * (p - p.detach()) for p in operators]  # scales gradients only
        return self._terms(prompts, *operators)

    def _terms(self, prompts: Tensor, koopman: Tensor, *others: Tensor) -> Tensor:
        """Return the weighted sum of both terms.

        Args:
            prompts: [n, p, width] of the blocks from the second on.
            koopman: K [k, k].
            others: L [k, k] if the Lyapunov term has a weight, then the weight of C [k, width].
        """
        z = prompts @ others[-1].T
        evolved = z[:-1] @ koopman
        term: Tensor = self.koopman_weight * (evolved - z[1:]).square().mean(dim=(1, 2)).sum()
        if self.lyapunov_weight:
            q = others[0].T @ others[0]
            # q is symmetric and positive, so its largest eigenvalue is its spectral norm
            q = q / (torch.linalg.eigvalsh(q).amax() + 1e-8)
            growth = F.softplus(_energy(evolved, q) - _energy(z[:-1], q)).mean(dim=1)
            term = term + self.lyapunov_weight * _SATURATION * (growth / _SATURATION).tanh().sum()
        return term


def _first(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the first `IMAGES` images, and their labels."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch_images, batch_labels in batches:
        images.append(batch_images)
        labels.append(batch_labels)
        if sum(map(len, labels)) >= IMAGES:
            break
    return torch.cat(images)[:IMAGES], torch.cat(labels)[:IMAGES]


def _by_energy(patches: Tensor) -> Tensor:
    """Return the mean [d] of all tokens [B, n, d], weighted by their squared norms."""
    energies = patches.square().sum(dim=-1, keepdim=True)
    return (energies / energies.sum() * patches).sum(dim=(0, 1))


def _energy(z: Tensor, q: Tensor) -> Tensor:
    """Return V of vectors [..., k], after scaling those with a norm above 1 to norm 1."""
    z = z / (z.norm(dim=-1, keepdim=True) + 1e-8).clamp(min=1.0)
    return (z @ q * z).sum(dim=-1)
