"""The 2-D recurrence of pLSTM against what its published code computes, and against its definition cell by cell."""

import golden
import pytest
import torch
from tolerance import assert_close, assert_gradients_close, gradients
from torch import nn
from torch.export import Dim

import visionmix
from visionmix.kernels.plstm_2d import plstm_2d
from visionmix.models.plstm import _KEYS

META, ARRAYS = golden.load("op_plstm2d")
LAYERS = [each for each in META["cases"] if each["kind"] == "layer"]
GATES = ("s_r", "s_d", "t_rl", "t_du", "t_ru", "t_dl", "m_l", "m_u")


def arguments(case: int, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Return the op's arguments of a case, whose heads and directions the file has in other places."""
    found = {}
    for name in ("q", "k", "v", *GATES, "d"):
        x = ARRAYS.get(f"case{case}_{name}")
        found[name] = None if x is None else torch.from_numpy(x).to(dtype)
    gates = [None if found[name] is None else found[name].permute(0, 2, 3, 1).unsqueeze(3) for name in GATES]
    return [*(found[name].unsqueeze(3) for name in "qkv"), *gates, found["d"].unsqueeze(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [each["case"] for each in META["cases"] if each["kind"] == "op"])
def test_the_published_op(case, dtype):
    inputs = [None if x is None else x.requires_grad_() for x in arguments(case, dtype)]
    out = plstm_2d(*inputs)
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    assert golden.relative_error(out.squeeze(3), ARRAYS[f"case{case}_out"]) <= bound
    if f"case{case}_dq" not in ARRAYS:
        return
    (out.squeeze(3) * torch.from_numpy(ARRAYS[f"case{case}_w"])).sum().backward()
    for name, x in zip(("q", "k", "v", *GATES, "d"), inputs, strict=True):
        if x is not None:
            grad = x.grad.squeeze(3)
            grad = grad.permute(0, 3, 1, 2) if name in GATES else grad
            expected = torch.from_numpy(ARRAYS[f"case{case}_d{name}"])
            assert (grad - expected).abs().max() <= bound * expected.abs().max(), name  # both 0 in a single row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", LAYERS, ids=[str(each["case"]) for each in LAYERS])
def test_the_published_layer(case, dtype):
    """The mixer, with the gradients of all its parameters."""
    options = {"num_heads": case["heads"], "mode": case["mode"], "chirality": case["chirality"]}
    mixer = visionmix.create_mixer("plstm", case["dim"], **options)

    def ours(prefix: str) -> dict[str, torch.Tensor]:
        """Return the file's tensors of this prefix as the mixer's."""
        before = "block_stack.blocks.0.block0.interaction_module."
        tensors = _KEYS({before + key: torch.from_numpy(ARRAYS[prefix + key]) for key in case["params"]})
        own = {f"blocks.0.mixer.{key}": key for key in mixer.state_dict()}
        return {own[key]: value.reshape(mixer.state_dict()[own[key]].shape) for key, value in tensors.items()}

    name = f"case{case['case']}_"
    mixer.load_state_dict(ours(name))
    mixer.to(dtype)
    x = torch.from_numpy(ARRAYS[f"{name}x"]).to(dtype).requires_grad_()
    out = mixer(x)
    bound = 1e-5 if dtype == torch.float32 else 1e-11
    assert golden.relative_error(out, ARRAYS[f"{name}out"]) <= bound
    (out * torch.from_numpy(ARRAYS[f"{name}w"])).sum().backward()
    assert golden.relative_error(x.grad, ARRAYS[f"{name}dx"]) <= bound
    for key, grad in ours(f"{name}d").items():
        assert golden.relative_error(mixer.get_parameter(key).grad, grad) <= bound, key


def definition(q, k, v, source_r, source_d, t_rl, t_du, t_ru, t_dl, mark_l, mark_u, direct):
    """The recurrence cell by cell, in float64."""
    rows, columns = q.shape[1:3]
    scaled, outer = q * q.shape[-1] ** -0.5, k.unsqueeze(-1) * v.unsqueeze(-2)
    out = (direct * (scaled * k).sum(-1)).unsqueeze(-1) * v
    cells = [[out[:, x, y] for y in range(columns)] for x in range(rows)]
    for direction in range(4):
        at = [None if g is None else g[..., direction, None, None]
              for g in (source_r, source_d, t_rl, t_du, t_ru, t_dl, mark_l, mark_u)]  # fmt: skip
        edges_r, edges_d = {}, {}
        down, right = (-1 if direction % 2 else 1), (-1 if direction // 2 else 1)
        for x in range(rows)[::down]:
            for y in range(columns)[::right]:
                zero = torch.zeros_like(outer[:, x, y])
                left, up = edges_r.get((x - down, y), zero), edges_d.get((x, y - right), zero)
                s_r, s_d, rl, du, ru, dl, m_l, m_u = (None if g is None else g[:, x, y] for g in at)
                read = m_l * left + m_u * up
                cells[x][y] = cells[x][y] + (scaled[:, x, y].unsqueeze(-2) @ read).squeeze(-2)
                edges_r[x, y] = rl * left + s_r * outer[:, x, y] + (0 if ru is None else ru * up)
                edges_d[x, y] = du * up + s_d * outer[:, x, y] + (0 if dl is None else dl * left)
    return torch.stack([torch.stack(row, 1) for row in cells], 1)


def drawn(rows, columns, turns="both", dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)

    def draw(*last):
        return torch.randn(2, rows, columns, 2, *last, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = draw(3), draw(3), draw(5)
    gates = [torch.tanh(draw(4)) for _ in GATES]
    if turns != "both":
        gates[5 if turns == "left" else 4] = None
    return [None if x is None else x.requires_grad_() for x in (q, k, v, *gates, draw())]


@pytest.mark.parametrize("turns", ["both", "left", "right"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 1), (3, 4)])
def test_the_definition(size, turns):
    inputs = drawn(*size, turns)
    ours, expected = plstm_2d(*inputs), definition(*inputs)
    assert_close(ours, expected)
    given = [x for x in inputs if x is not None]
    if 1 not in size:  # where some gates have no gradient
        assert_gradients_close(gradients(ours, given), gradients(expected, given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_and_returned_in_float32(dtype):
    inputs = drawn(3, 4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours = plstm_2d(*inputs)
    assert ours.dtype == torch.float32
    assert_close(ours, definition(*(x.double() for x in inputs)))


def test_graphs_and_the_reference():
    inputs = [x.detach() for x in drawn(2, 3)]
    with visionmix.kernels.use("reference"):
        assert torch.equal(plstm_2d(*inputs), torch.ops.visionmix.plstm_2d(*inputs))
    inputs[0].requires_grad_()
    # Not under AOT autograd, which takes 15 seconds for the loops of the backward pass.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.visionmix.plstm_2d, tuple(inputs), test_utils=checks)


@pytest.mark.parametrize("turns", ["both", "left", "right"])
def test_a_program_for_every_size_has_no_loop_over_rows(turns):
    class Model(nn.Module):
        def forward(self, inputs):
            return plstm_2d(*inputs)

    def detached(*size):
        return [None if x is None else x.detach() for x in drawn(*size, turns)]

    axes = [None if x is None else {1: Dim.DYNAMIC, 2: Dim.DYNAMIC} for x in detached(3, 4)]
    with visionmix.kernels.use("reference"):
        program = torch.export.export(Model(), (detached(3, 4),), dynamic_shapes=(axes,)).module()
        for size in ((3, 4), (7, 2), (2, 9), (17, 5)):
            assert_close(program(detached(*size)), definition(*detached(*size)), str(size))


def test_wrong_arguments_are_named():
    inputs = drawn(2, 3)
    with pytest.raises(ValueError, match=r"transition_ru has shape \(2, 2, 3, 2, 3\).*directions=4"):
        plstm_2d(*inputs[:7], inputs[7][..., :3], *inputs[8:])
    with pytest.raises(TypeError, match="source_r is a NoneType"):
        plstm_2d(*inputs[:3], None, *inputs[4:])
    with pytest.raises(ValueError, match="num_heads=5 does not fit dim=24"):
        visionmix.create_mixer("plstm", 24, num_heads=5)
    with pytest.raises(ValueError, match="mode='X' is unknown; give 'P' or 'D'"):
        visionmix.create_mixer("plstm", 24, mode="X")
