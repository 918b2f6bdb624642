"""Which cases of a wide product of tests are fast.

Products such as every kind of model times every way of prompts through it are tested whole, but most of their
cases differ from others in nothing that code looks at together. The rule: the first value of each axis is the
usual one, and a case is fast if it differs from the usual in one axis at most, so that every value is met.
The others are slow: `make test-slow` and `.ci/run` run them.
"""

from itertools import product

import pytest

from visprompt.models.methods import METHODS


def plain_class(method):
    """The class of a method, also of one that METHODS has with an option."""
    return getattr(METHODS[method], "func", METHODS[method])


# of methods that enter a backbone at the same sites (models/contract.py): the first stands for all
REPRESENTATIVES = {
    next(m for m in METHODS if plain_class(m).sites == sites)
    for sites in {plain_class(m).sites for m in METHODS}
}


def case(*values, fast, id=None):
    """A case of `pytest.mark.parametrize`."""
    return pytest.param(*values, id=id, marks=[] if fast else pytest.mark.slow)


def slow(*values):
    """A case that is slow: it trains again what another case of its test trains in much the same way."""
    return case(*values, fast=False)


def star(*axes):
    """The product of axes, each a list of values or a dict of them by name; its fast part is the rule above."""
    named = [list(axis.items()) if isinstance(axis, dict) else [(str(v), v) for v in axis] for axis in axes]
    return [
        case(
            *(value for _, value in chosen),
            id=", ".join(name for name, _ in chosen),
            fast=sum(one is not axis[0] for one, axis in zip(chosen, named, strict=True)) <= 1,
        )
        for chosen in product(*named)
    ]
