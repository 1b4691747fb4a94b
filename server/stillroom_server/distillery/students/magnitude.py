"""Magnitude pruning: the smallest weights of a tower's layers become zero, and stay zero through further training.

Over all products of all layers together (`torch.nn.utils.prune.global_unstructured`; Han et al. 2015, arXiv 1506.02626;
Zhu and Gupta 2017, arXiv 1710.01878). A folder or an ONNX file of such a tower compresses better; nothing runs faster on a
CPU, whose kernels multiply by zero as by anything else. What shall be faster is pruned by structure (`pruning.py`).

The zeros are permanent: they are the weights themselves, no parametrization is left, and whatever saves a model saves them.
`held` keeps them through training by masking gradients: an optimizer that starts with zero moments and decays towards zero,
as Adam, AdamW and SGD do, then leaves zero weights at zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from stillroom_server.distillery.students.towers import AnyModel, Model, bert_of
from stillroom_shared.errors import SettingsError

Masks = Mapping[str, Tensor]
"""By the name of a product in the tower: True where a weight is left."""


def prune_magnitude(student: AnyModel, fraction: float) -> AnyModel:
    """A copy in which the smallest `fraction` of the weights that are left is zero. Raises `SettingsError`."""
    if not 0 <= fraction < 1:
        raise SettingsError(f"fraction {fraction} of the weights to prune: choose 0 to below 1")
    sparse = copy.deepcopy(student)
    products = list(_products(sparse).values())
    zeros = sum(int((product.weight == 0).sum()) for product in products)
    total = sum(product.weight.numel() for product in products)
    amount = zeros + round(fraction * (total - zeros))
    if amount:
        prune.global_unstructured([(p, "weight") for p in products], prune.L1Unstructured, amount=amount)
        for product in products:
            learns = product.get_parameter("weight_orig").requires_grad
            prune.remove(product, "weight")  # type: ignore[no-untyped-call]  # of torch
            product.weight.requires_grad_(learns)
    return sparse


def sparsity(student: Model) -> float:
    """Fraction of the weights of the tower's layers that are zero."""
    weights = [product.weight for product in _products(student).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def masks_of(student: Model) -> Masks:
    """Where weights are left now."""
    return {name: product.weight.detach() != 0 for name, product in _products(student).items()}


@torch.no_grad()
def apply_masks(student: Model, masks: Masks) -> None:
    """Set what the masks leave out to zero, in place."""
    for name, product in _products(student).items():
        product.weight.mul_(masks[name].to(product.weight.device))


@contextmanager
def held(student: Model, masks: Masks) -> Iterator[None]:
    """While this lasts, what the masks leave out gets no gradient, whoever trains."""
    hooks = []
    for name, product in _products(student).items():
        if product.weight.requires_grad:
            hook = product.weight.register_hook(_masking(masks[name]))  # type: ignore[no-untyped-call]  # of torch
            hooks.append(hook)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _masking(mask: Tensor):  # type: ignore[no-untyped-def]  # the type of a hook is torch's own
    return lambda gradient: gradient * mask.to(gradient.device)


def _products(student: Model) -> dict[str, nn.Linear]:
    layers = bert_of(student).encoder.named_modules()
    return {name: module for name, module in layers if isinstance(module, nn.Linear)}
