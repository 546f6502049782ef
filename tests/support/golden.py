"""Weights filled by key name, and the published code's outputs for them.

A golden file lists the keys and shapes of a published model's state dict and the outputs that the published code gives
when every key is filled by `fill`. A model loaded from the same state dict that computes the same function gives the
same outputs, whatever its code looks like inside.
"""

import contextlib
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

FOLDER = Path(__file__).parent.parent / "goldens"

_POSITION = ("pos_embed", "position", "bias_table", "rpb", "token", "_pe", "abs_pos", "dirpe", "agent_pos")
_DECAY = ("A_logs", "A_log", "A_b_log", "A_log_b", "A_c_log")
_STEP_BIAS = ("dt_projs_bias", "dt_bias")


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 value of parameter or BatchNorm statistic `key`, drawn from a generator seeded by its name."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    noise = rng.standard_normal(shape)
    leaf = key.rsplit(".", 1)[-1]
    count = int(np.prod(shape, dtype=np.int64))
    if leaf == "num_batches_tracked":
        value = np.zeros(shape)
    elif leaf == "running_var":
        value = 1 + 0.1 * np.abs(noise)
    elif leaf == "running_mean":
        value = 0.1 * noise
    elif leaf in _DECAY:
        value = np.log(np.arange(1, shape[-1] + 1)) + 0.05 * noise
    elif leaf in ("Ds", "D", "D_b"):
        value = 1 + 0.05 * noise
    elif leaf in _STEP_BIAS or key.endswith(("dt_proj.bias", "dt_proj_b.bias")):
        step = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), shape))
        value = step + np.log(-np.expm1(-step))
    elif any(word in key for word in _POSITION):
        value = 0.2 * noise
    elif max(shape, default=1) == count:  # a vector, whatever its rank
        scale = leaf in ("weight", "gamma", "scale") or "gamma" in leaf or "layer_scale" in key
        value = 1 + 0.1 * noise if scale else 0.1 * noise
    else:
        value = noise / np.sqrt(np.prod(shape[1:], dtype=np.int64))
    return value.astype(np.float32)


@contextlib.contextmanager
def quick_start() -> Iterator[None]:
    """Fill the random parameters of models built here with constants, each with its own: drawing them takes longer than
    a forward pass, and a checkpoint replaces them anyway.
    """
    count = itertools.count(1)

    def share() -> float:
        return next(count) * 0.618 % 1

    def uniform_(self, low=0.0, high=1.0, **_):
        return self.fill_(low + (high - low) * share())

    def normal_(self, mean=0.0, std=1.0, **_):
        return self.fill_(mean + std * (2 * share() - 1))

    with mock.patch.multiple(torch.Tensor, uniform_=uniform_, normal_=normal_, erfinv_=lambda self: self):
        yield


def image(height: int, width: int, *, batch: int = 1, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Return the goldens' input, float32 (batch, channels, height, width), standard normal."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(rng.standard_normal((batch, channels, height, width)).astype(np.float32))


def load(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Return (meta, arrays) of the golden called `name`."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads(str(arrays.pop("meta"))), arrays


def state_dict(meta: dict) -> dict[str, torch.Tensor]:
    """Return the published checkpoint as it would lie on disk."""
    tensors = {key: torch.from_numpy(fill(key, tuple(shape))) for key, shape in meta["filled"]}
    tensors |= {key: tensors[source].clone() for key, source in meta.get("tied", {}).items()}
    return tensors | {key: torch.from_numpy(np.zeros(shape, dtype)) for key, shape, dtype in meta["kept"]}


def relative_error(ours: torch.Tensor, golden: np.ndarray) -> float:
    """Return max|ours - golden| / max|golden|, in float64."""
    expected = torch.from_numpy(np.asarray(golden, np.float64))
    return ((ours.detach().cpu().double() - expected).abs().max() / expected.abs().max()).item()
