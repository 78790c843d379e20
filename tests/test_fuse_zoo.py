"""fuse on the networks of torchvision and timm: what is fused in each, verified by fuse itself."""

from __future__ import annotations

import os

import pytest
import torch
from fuse_models import images
from models import torchvision

import fastres

WHOLE = "batch norm + add + ReLU"
IN_PLACE = "it adds in place, and there is nothing beside that"
slow = pytest.mark.skipif(not os.environ.get("FASTRES_LARGE"), reason="minutes: FASTRES_LARGE=1")


def vision(name):
    torch.manual_seed(0)
    return torchvision().models.get_model(name, weights=None)


def timm(name):
    torch.manual_seed(0)
    return pytest.importorskip("timm").create_model(name)


@pytest.mark.parametrize(
    ("make", "name", "what", "blocks"),
    [
        (vision, "resnet18", WHOLE, 8),
        pytest.param(vision, "resnet34", WHOLE, 16, marks=slow),
        pytest.param(vision, "resnet50", WHOLE, 16, marks=slow),
        pytest.param(vision, "resnet101", WHOLE, 33, marks=slow),
        pytest.param(vision, "resnext50_32x4d", WHOLE, 16, marks=slow),
        pytest.param(vision, "wide_resnet50_2", WHOLE, 16, marks=slow),
        (vision, "mobilenet_v2", "batch norm + add", 10),
        (timm, "resnet10t", WHOLE, 4),
        pytest.param(timm, "resnet26d", WHOLE, 8, marks=slow),
        pytest.param(timm, "resnet50", WHOLE, 16, marks=slow),
        pytest.param(timm, "seresnet50", "add + ReLU", 16, marks=slow),
        pytest.param(timm, "resnetv2_50", "add", 16, marks=slow),
        pytest.param(timm, "resnetv2_50d_gn", "add", 16, marks=slow),
    ],
)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_every_block_of_a_resnet_is_fused(make, name, what, blocks, train):
    model, x = make(name).train(train), images(3, 64)
    sites = fastres.trace(model, x)
    fusion = fastres.fuse(model, x)
    assert fusion.verified
    assert list(fusion.fused.values()) == [what] * blocks
    assert not fusion.left
    assert list(fusion.fused) == [site.name for site in sites]
    assert fastres.trace(model, x) == sites


def test_the_blocks_of_a_convnext_add_in_place_and_stay():
    model = vision("convnext_tiny")
    fusion = fastres.fuse(model, images(1, 32))
    assert not fusion.fused
    assert list(fusion.left.values()) == [IN_PLACE] * 18
