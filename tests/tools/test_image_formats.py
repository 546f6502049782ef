"""Reading image files: each format that Pillow decodes against the pixels that were written, and the rarer layouts."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from visionmix.tools import images

Image.init()
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
# Formats by what their files hold of the colours above; those with a loss are tried with one colour.
MODES = {"BLP": "P", "MSP": "1", "XBM": "1"}
LOSSY = {"AVIF": 3, "JPEG": 2, "WEBP": 2}
# EPS is drawn by Ghostscript, which may be missing; ICNS holds other sizes than the image's.
NAMED = {*Image.registered_extensions().values()} - images.NOT_DECODED - {"EPS", "ICNS"}


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def read(content):
    image = images.read_rgb(io.BytesIO(content) if isinstance(content, bytes) else content)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.filterwarnings("ignore:IM image format")
@pytest.mark.parametrize("kind", sorted(NAMED & {*Image.SAVE} & {*Image.OPEN}))
def test_the_pixels_of_each_format_come_back(kind):
    image = Image.fromarray(COLOURS)
    if kind in LOSSY:
        image = Image.new("RGB", (16, 16), (200, 100, 50))
    elif kind in MODES:
        image = image.convert(MODES[kind])
    elif kind == "GIF":
        image = image.quantize(256)
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(read(saved(image, kind)) - expected).max() <= LOSSY.get(kind, 0)
    if kind == "WEBP":
        assert np.array_equal(read(saved(Image.fromarray(COLOURS), kind, lossless=True)), COLOURS)


def test_an_icns_gives_its_largest_image():
    assert (read(saved(Image.new("RGB", (1024, 1024), (200, 100, 50)), "ICNS")) == [200, 100, 50]).all()


SUN = struct.pack(">8I", 0x59A66A95, 2, 1, 24, 6, 1, 0, 0) + bytes([3, 2, 1, 6, 5, 4])  # blue first
XPM = b'/* XPM */\nstatic char *x[] = {\n"2 1 2 1",\n"a c #010203",\n"b c #040506",\n"ab",\n};\n'
PSD = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 1, 2, 8, 3) + struct.pack(">III", 0, 0, 0)
PSD += struct.pack(">H", 0) + bytes([1, 4, 2, 5, 3, 6])
QOI = b"qoif" + struct.pack(">IIBB", 2, 1, 3, 0) + bytes([0xFE, 1, 2, 3, 0xFE, 4, 5, 6]) + bytes(7) + b"\1"
PPM_10 = b"P6 2 1 1023\n" + struct.pack(">6H", *(round(value * 1023 / 255) for value in range(1, 7)))


@pytest.mark.parametrize("content", [SUN, XPM, PSD, QOI, PPM_10], ids=["SUN", "XPM", "PSD", "QOI", "PPM of 10 bits"])
def test_files_written_by_hand(content):
    assert read(content).tolist() == [[[1, 2, 3], [4, 5, 6]]]


def test_floats_of_a_pfm_and_fits_are_scaled():
    rows = np.array([[0, 0.2], [1, 0.6]], dtype="<f4")
    assert read(b"Pf 2 2 -1.0\n" + rows[::-1].tobytes())[..., 0].tolist() == [[0, 51], [255, 153]]
    cards = ["SIMPLE  =                    T", "BITPIX  =                  -32", "NAXIS   =                    2",
             "NAXIS1  =                    2", "NAXIS2  =                    2", "END"]  # fmt: skip
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    assert sorted(read(header + rows.astype(">f4").tobytes().ljust(2880, b"\0"))[..., 0].ravel()) == [0, 51, 153, 255]


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP"])
def test_transparency_is_dropped_and_colours_stay(kind):
    palette = Image.fromarray(COLOURS).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    options = {"transparency": 3} if kind in ("PNG", "GIF") else {}
    if kind == "WEBP":
        palette, options = Image.fromarray(expected).convert("RGBA"), {"lossless": True, "exact": True}
        palette.putalpha(Image.fromarray(COLOURS[..., 0]))
    assert np.array_equal(read(saved(palette, kind, **options)), expected)


def test_a_palette_of_alphas_in_a_png():
    palette = Image.fromarray(COLOURS).quantize(16)
    file = saved(palette, "PNG", transparency=bytes(range(0, 256, 16)))
    with Image.open(file) as opened:
        assert isinstance(opened.info["transparency"], bytes)
    assert np.array_equal(read(file), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_with_alpha(kind):
    image = Image.merge("LA", (Image.fromarray(COLOURS[..., 0]), Image.fromarray(COLOURS[..., 1])))
    assert np.array_equal(read(saved(image, kind)), np.repeat(COLOURS[..., :1], 3, axis=2))


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk(kind):
    """JPEG stores it inverted, as Adobe's programs do, and Pillow turns it back."""
    image = Image.new("CMYK", (16, 16), (255, 0, 51, 102))
    expected = [(255 - ink) * (255 - 102) / 255 for ink in (255, 0, 51)]
    assert np.abs(read(saved(image, kind, **({"quality": 100} if kind == "JPEG" else {}))) - expected).max() <= 3


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_16_bits_a_channel_is_scaled(order):
    values = RNG.integers(0, 65536, (5, 7, 3)).astype(f"{order}u2")
    values[0, 0], values[0, 1] = 0, 65535
    tags = [(256, 4, 1, 7), (257, 4, 1, 5), (258, 3, 3, 0), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 0)]
    tags += [(277, 3, 1, 3), (278, 4, 1, 5), (279, 4, 1, values.nbytes)]
    end = 8 + 2 + 12 * len(tags) + 4
    content = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    for tag, kind, count, value in tags:
        value = {258: end, 273: end + 6}.get(tag, value)
        short = kind == 3 and count == 1
        content += struct.pack(f"{order}HHI", tag, kind, count)
        content += struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
    content += bytes(4) + struct.pack(f"{order}3H", 16, 16, 16) + values.tobytes()
    pixels = read(content)
    assert np.abs(pixels - values / 257).max() <= 1  # Pillow cuts the low byte of several channels off
    assert pixels[0, :2, 0].tolist() == [0, 255]
