"""Every order that published code visits, from the golden files, against the call that gives it."""

import numpy as np
import pytest
import torch
from golden import FOLDER

from visionmix import scans


def stacked(name, height, width, field="index"):
    return torch.stack([getattr(order, field) for order in scans.directions(name, height, width)])


def after_reverse(name, height, width):
    """Token numbers put in scan order and then back on the grid by the order's inverse."""
    index, inverse = scans.order(name, height, width)
    return torch.arange(height * width)[index][inverse]


def mhs_routes(field):
    # The file holds the eight routes that are read both ways.
    return stacked("mhs_vm", 8, 8, field)[0::2]


def plain_moves(height, width):
    return torch.stack(
        [scans.move_codes(order.index, width) for order in scans.directions("plainmamba", height, width)]
    )


def registers(height, width, count):
    return scans.insert_registers(scans.order("raster", height, width), count)


CALLS = {"mhs_routes": lambda: mhs_routes("index"), "mhs_inverse": lambda: mhs_routes("inverse")}
CALLS["msvmamba_lowres"] = lambda: stacked("msvmamba_lowres", 8, 8)[0]
for suffix, (height, width) in {"": (8, 8), "_6x9": (6, 9)}.items():
    for key, name in {"cross": "cross", "bidi": "vmamba_bidirectional", "unidi": "vmamba_unidirectional"}.items():
        CALLS[f"vmamba_{key}{suffix}"] = lambda name=name, h=height, w=width: stacked(name, h, w)
for suffix, (height, width) in {"": (8, 8), "_14x14": (14, 14), "_6x9": (6, 9)}.items():
    for position, key in enumerate(("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip")):
        CALLS[f"local_{key}{suffix}"] = lambda p=position, h=height, w=width: (
            scans.directions("localmamba", h, w)[p].index
        )
CALLS["local_v_6x9_after_reverse"] = lambda: after_reverse("column_unswapped", 6, 9)
CALLS["local_v_flip_6x9_after_reverse"] = lambda: after_reverse("column_unswapped_reversed", 6, 9)
for suffix, (height, width) in {"": (8, 8), "_7x9": (7, 9), "_7x8": (7, 8), "_8x9": (8, 9)}.items():
    CALLS[f"efficient_skip2{suffix}"] = lambda h=height, w=width: stacked("efficientvmamba", h, w)
    CALLS[f"plain_order{suffix}"] = lambda h=height, w=width: stacked("plainmamba", h, w)
    CALLS[f"plain_inverse{suffix}"] = lambda h=height, w=width: stacked("plainmamba", h, w, "inverse")
    CALLS[f"plain_direction{suffix}"] = lambda h=height, w=width: plain_moves(h, w)
for height, width, count in ((14, 14, 12), (8, 8, 3), (12, 16, 12)):
    key = f"{height}x{width}_{count}"
    CALLS[f"mambareg_token_idx_{key}"] = lambda h=height, w=width, n=count: registers(h, w, n).index
    CALLS[f"mambareg_cls_positions_{key}"] = lambda h=height, w=width, n=count: registers(h, w, n).inverse[h * w :]

OCCMAMBA_CALLS = {
    "order": lambda: scans.directions("occmamba", 16, 16, 4)[0].index,
    "order_yx": lambda: scans.directions("occmamba", 16, 16, 4)[1].index,
    "order_xy_inverse": lambda: scans.directions("occmamba", 16, 16, 4)[2].index,
    "order_yx_inverse": lambda: scans.directions("occmamba", 16, 16, 4)[3].index,
    "order_12x10x3": lambda: scans.order("u_order", 12, 10, 3).index,
    "order_12x10x3_xy_inverse": lambda: scans.order("u_order_hflip_vflip", 12, 10, 3).index,
}

FILES = {"scan_orders_8x8": CALLS, "occmamba_order_16x16x4": OCCMAMBA_CALLS}


def golden(file):
    with np.load(FOLDER / f"{file}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files if key != "meta"}


@pytest.mark.parametrize("file", FILES)
def test_every_golden_has_a_call(file):
    assert set(golden(file)) == set(FILES[file])


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, calls in FILES.items() for key in calls])
def test_equal_to_the_published_order(file, key):
    expected = torch.from_numpy(golden(file)[key])
    ours = FILES[file][key]()
    assert ours.dtype == expected.dtype == torch.int64
    assert torch.equal(ours, expected)


def test_vims_class_token_stands_in_the_middle():
    order = scans.insert_registers(scans.order("raster", 14, 14), 1)
    assert order.index[98] == 196
    assert order.inverse[196] == 98
    assert torch.equal(order.index[order.inverse], torch.arange(197))
