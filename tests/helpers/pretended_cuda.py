"""A CUDA device that is pretended: shapes, types and devices of every tensor, on a machine without a GPU.

PyTorch's fake tensors say that they are on `cuda:0` and compute nothing. Its autograd engine asks the real
driver, so the backward pass is driven here, node by node.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode


@contextmanager
def pretended_cuda(*modules: nn.Module) -> Iterator[None]:
    """Pretend that there is a CUDA device and move modules to it; a tensor that stays behind is an error."""
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(
        True
    )  # a fake tensor cannot be a real one's data
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            for module in modules:
                module.to("cuda")
            mode.allow_non_fake_inputs = False
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


@contextmanager
def cuda_autocast(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Autocast on CUDA: `torch.autocast` would look for a device and switch itself off."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


def backward(loss: Tensor) -> None:
    """Compute gradients as `loss.backward()` does, and check that each has the type of its tensor.

    Raises:
        AssertionError: A node returns a gradient of another shape, type or device than it must.
    """
    order: list[object] = []
    seen: set[object] = set()
    stack = [(loss.grad_fn, False)]
    while stack:  # the nodes, each after all that it leads to
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    arrived: dict[object, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    for node in reversed(order):
        gradients = arrived.pop(node, {})
        if not gradients:
            continue
        given = node(*(gradients.get(slot) for slot in range(len(node._input_metadata))))
        given = given if isinstance(given, tuple) else (given,)
        for (following, slot), gradient in zip(node.next_functions, given, strict=True):
            if following is None or gradient is None:
                continue
            expected = following._input_metadata[slot]
            assert gradient.device == expected.device, (following, gradient.device)
            # as the engine does: sums over broadcast axes, and casts
            gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
            slots = arrived.setdefault(following, {})
            slots[slot] = slots[slot] + gradient if slot in slots else gradient
