"""Elements in memory to vectors of floats and back: every float16 and bfloat16, every kind of float32."""

import ctypes
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from visionmix.kernels import dispatch, native

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
SOURCE = """
#include <type_traits>
#include "elements.h"
using namespace simd;
extern "C" void convert(const void* from, void* to, std::int64_t count, std::int64_t kind, std::int64_t into) {
  with_kind(kind, [&](auto* x) {
    with_kind(into, [&](auto* y) {
      for (std::int64_t i = 0; i < count; i += lanes) {
        const auto* first = static_cast<const std::remove_pointer_t<decltype(x)>*>(from) + i;
        store_part(static_cast<decltype(y)>(to) + i, load_part(first, count - i), count - i);
      }
    });
  });
}
"""
# The machine's own instructions, and those of x86-64 without conversions of float16.
TARGETS = ["native", "x86-64"] if platform.machine() == "x86_64" else ["native"]


@pytest.fixture(scope="module", params=TARGETS)
def convert(request, tmp_path_factory):
    """Return a function of a tensor and a type to the tensor in that type."""
    folder = tmp_path_factory.mktemp("elements")
    (folder / "convert.cpp").write_text(SOURCE)
    try:
        command = [*native._compiler(), *native.FLAGS, f"-march={request.param}", f"-I{Path(native.__file__).parent}"]
    except dispatch.Unavailable as error:
        pytest.skip(str(error))
    done = subprocess.run([*command, "convert.cpp", "-o", "convert.so"], cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    function = ctypes.CDLL(str(folder / "convert.so")).convert
    function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3

    def call(x, dtype):
        y = torch.empty(x.shape, dtype=dtype)
        function(x.data_ptr(), y.data_ptr(), x.numel(), native.KINDS[x.dtype], native.KINDS[dtype])
        return y

    return call


@HALVES
def test_every_half_becomes_the_float_that_it_is(convert, dtype):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    y = convert(x, torch.float32)
    assert torch.equal(y.isnan(), x.isnan())
    number = ~x.isnan()
    assert torch.equal(y[number].view(torch.int32), x.float()[number].view(torch.int32))


@HALVES
def test_floats_are_rounded_as_pytorch_rounds_them(convert, dtype):
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    between = (numbers[:-1] + numbers[1:]) / 2  # ties, which go to the even one of two
    bits = torch.randint(-(2**31), 2**31, (100_003,), generator=torch.Generator().manual_seed(0))
    any_bits = bits.to(torch.int32).view(torch.float32)
    for x in (between, any_bits, torch.linspace(65_400, 65_600, 2_001), torch.linspace(-1e-7, 1e-7, 2_001)):
        ours, theirs = convert(x, dtype), x.to(dtype)
        assert torch.equal(ours.isnan(), x.isnan())
        number = ~x.isnan()
        assert torch.equal(ours[number].view(torch.int16), theirs[number].view(torch.int16))
