"""Reading images: each mode of Pillow against values computed from the pixels' definition, and which files are read."""

import colorsys
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from visionmix.tools import images

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
COLOURS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
FOUR = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
WORDS = RNG.integers(0, 65536, (5, 7)).astype(np.uint16)
WORDS[0, :2] = 0, 65535
GREY_OF_WORDS = np.rint(WORDS.astype(np.float64) * 255 / 65535)


def grey(values):
    return np.repeat(np.asarray(values, dtype=np.float64)[..., None], 3, axis=2)


def of_bytes(mode, array):
    """Return an image of `mode` whose raw pixels are `array`."""
    return Image.frombytes(mode, (array.shape[1], array.shape[0]), np.ascontiguousarray(array).tobytes())


def palette_image(**info):
    image = of_bytes("P", BYTES)
    image.putpalette(PALETTE.tobytes())
    image.info.update(info)
    return image


PALETTE = RNG.integers(0, 256, (256, 3), dtype=np.uint8)


def with_alpha(palette):
    image = palette.convert("PA")
    image.putalpha(of_bytes("L", FOUR[..., 3]))
    return image


def ycbcr(pixels):
    y, cb, cr = np.moveaxis(pixels.astype(np.float64), -1, 0)
    rgb = y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)
    return np.clip(np.stack(rgb, axis=-1), 0, 255)


def hsv(pixels):
    return np.array([[colorsys.hsv_to_rgb(*pixel / 255) for pixel in row] for row in pixels.astype(float)]) * 255


def lab_to_rgb(lightness, a, b):
    """CIE L*a*b* under D50, adapted to D65 by Bradford's matrix, in sRGB."""
    y = (lightness + 16) / 116
    xyz = np.array([y + a / 500, y, y - b / 200])
    xyz = np.where(xyz > 6 / 29, xyz**3, (xyz - 4 / 29) * 3 * (6 / 29) ** 2) * [0.9642, 1.0, 0.8249]
    cone = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    white = (cone @ [0.95047, 1, 1.08883]) / (cone @ [0.9642, 1.0, 0.8249])
    linear = np.linalg.inv(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    ) @ (np.linalg.inv(cone) @ (white * (cone @ xyz)))
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


LAB = [(53, 0, 0), (53, 40, 30), (70, -20, 20), (30, 10, -30), (100, 0, 0), (0, 0, 0)]

# An image of each mode, the RGB values of its pixels, and how far rounding may take Pillow from them.
MODES = {
    "1": (Image.fromarray(BYTES > 127), grey((BYTES > 127) * 255), 0),
    "L": (of_bytes("L", BYTES), grey(BYTES), 0),
    "LA": (of_bytes("LA", FOUR[..., :2]), grey(FOUR[..., 0]), 0),
    "P": (palette_image(), PALETTE[BYTES], 0),
    "P with one transparent colour": (palette_image(transparency=int(BYTES[0, 0])), PALETTE[BYTES], 0),
    "P with an alpha for each colour": (palette_image(transparency=bytes(range(256))), PALETTE[BYTES], 0),
    "PA": (with_alpha(palette_image()), PALETTE[BYTES], 0),
    "RGB": (of_bytes("RGB", COLOURS), COLOURS, 0),
    "RGBA": (of_bytes("RGBA", FOUR), FOUR[..., :3], 0),
    "RGBX": (of_bytes("RGBX", FOUR), FOUR[..., :3], 0),
    "RGBa": (Image.new("RGBa", (2, 1), (30, 60, 90, 120)), np.full((1, 2, 3), np.array([30, 60, 90]) * 255 / 120), 1.5),
    "La": (Image.new("La", (2, 1), (30, 120)), grey(np.full((1, 2), 30 * 255 / 120)), 1.5),
    "CMYK": (of_bytes("CMYK", FOUR), (255.0 - FOUR[..., :3]) * (255.0 - FOUR[..., 3:]) / 255, 1.5),
    "YCbCr": (of_bytes("YCbCr", COLOURS), ycbcr(COLOURS), 1.5),
    "HSV": (of_bytes("HSV", COLOURS), hsv(COLOURS), 1.5),
    "LAB": (
        of_bytes("LAB", np.array([[(round(n * 2.55), a % 256, b % 256) for n, a, b in LAB]], dtype=np.uint8)),
        np.array([[lab_to_rgb(round(n * 2.55) / 2.55, a, b) for n, a, b in LAB]]),
        1.5,
    ),
    "I": (Image.fromarray(WORDS.astype(np.int32)), grey(GREY_OF_WORDS), 0),
    "I;16": (of_bytes("I;16", WORDS.astype("<u2")), grey(GREY_OF_WORDS), 0),
    "I;16L": (of_bytes("I;16L", WORDS.astype("<u2")), grey(GREY_OF_WORDS), 0),
    "I;16B": (of_bytes("I;16B", WORDS.astype(">u2")), grey(GREY_OF_WORDS), 0),
    "I;16N": (of_bytes("I;16N", WORDS.astype("=u2")), grey(GREY_OF_WORDS), 0),
    "F": (Image.fromarray((WORDS / 65535).astype(np.float32)), grey(GREY_OF_WORDS), 0),
}


@pytest.mark.parametrize("mode", MODES)
def test_to_rgb_of_each_mode(mode):
    image, expected, tolerance = MODES[mode]
    assert image.mode == mode.split()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rgb = images.to_rgb(image)
    assert (rgb.mode, rgb.size) == ("RGB", image.size)
    assert np.abs(np.asarray(rgb) - expected).max() <= tolerance


def test_every_mode_of_pillow_has_a_case():
    assert {mode.split()[0] for mode in MODES} >= set(Image.MODES)


def png16(channels: np.ndarray, colour_type: int) -> bytes:
    """Return a PNG of 16 bits per channel, written by hand: Pillow does not write those of several channels."""
    height, width = channels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in channels)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
             for kind, body in chunks]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values: np.ndarray, *, bits: int, sample_format: int = 1, photometric: int = 1, order: str = "<") -> bytes:
    """Return an uncompressed TIFF of one channel, written by hand; `values` holds its bytes."""
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8 + 2 + 12 * 10 + 4)]
    tags += [(277, 1), (278, height), (279, values.nbytes), (339, sample_format)]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4) + values.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_a_grey_file_of_16_bits_is_scaled(tmp_path, kind):
    file = tmp_path / "grey"
    Image.fromarray(WORDS).save(file, kind)
    assert np.array_equal(np.asarray(images.read_rgb(file)), grey(GREY_OF_WORDS))


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiffs_of_more_than_8_bits(order):
    def read(values, **options):
        return np.asarray(images.read_rgb(io.BytesIO(tiff(values, order=order, **options))))

    assert np.array_equal(read(WORDS.astype(f"{order}u2"), bits=16), grey(GREY_OF_WORDS))
    floats = (WORDS / 65535).astype(f"{order}f4")
    assert np.array_equal(read(floats, bits=32, sample_format=3), grey(GREY_OF_WORDS))
    assert np.array_equal(read(WORDS.astype(f"{order}i4"), bits=32, sample_format=2), grey(GREY_OF_WORDS))
    if order == "<":  # Pillow reads no others
        black_is_one = read(WORDS.astype("<u2"), bits=16, photometric=0)
        assert np.array_equal(black_is_one, 255 - grey(GREY_OF_WORDS))
        twelve = np.array([[0x00, 0x0F, 0xFF]], dtype=np.uint8)  # two pixels, 0x000 and 0xFFF
        content = tiff(twelve, bits=12).replace(struct.pack("<HHII", 256, 4, 1, 3), struct.pack("<HHII", 256, 4, 1, 2))
        assert np.asarray(images.read_rgb(io.BytesIO(content)))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_pngs_of_16_bits_a_channel(colour_type, channels):
    values = RNG.integers(0, 65536, (5, 7, channels))
    rgb = np.asarray(images.read_rgb(io.BytesIO(png16(values, colour_type)))).astype(float)
    expected = values[..., :3] if channels > 2 else values[..., :1].repeat(3, axis=2)
    assert np.abs(rgb - expected / 257).max() <= 1  # Pillow cuts the low byte of several channels off


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.float32([[0, 255]]), r"mode 'F' and values from 0 to 255.*\[0, 1\]"),
        (np.float32([[0, np.nan]]), "values from nan to nan"),
        (np.float32([[-0.1, 1]]), r"from -0\.1 to 1"),
        (np.int32([[0, 65536]]), r"mode 'I' and values from 0 to 65536.*\[0, 65535\]"),
        (np.int32([[-1, 5]]), "from -1 to 5"),
    ],
)
def test_values_without_a_known_white_are_refused(tmp_path, values, words):
    Image.fromarray(values).save(tmp_path / "wide.tif")
    with pytest.raises(images.UnreadableImage, match=words) as caught:
        images.read_rgb(tmp_path / "wide.tif")
    assert str(caught.value).count(str(tmp_path / "wide.tif")) == 1
    assert "save it with 8 or 16 bits" in str(caught.value)
    with pytest.raises(ValueError, match="the image has mode"):
        images.to_rgb(Image.fromarray(values))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "not in a format that Pillow decodes"),
        (b"not an image", "not in a format that Pillow decodes"),
        (png16(WORDS[..., None], 0)[:60], "truncated"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, content, reason):
    file = tmp_path / "a.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(images.UnreadableImage, match=reason) as caught:
        images.read_rgb(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_the_first_frame_is_read_and_orientation_is_not_applied(tmp_path):
    frames = [Image.new("RGB", (4, 2), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert images.read_rgb(tmp_path / "two.gif").getpixel((0, 0)) == (255, 0, 0)
    exif = Image.Exif()
    exif[274] = 6
    frames[0].save(tmp_path / "turned.jpg", exif=exif)
    assert images.read_rgb(tmp_path / "turned.jpg").size == (4, 2)


def test_extensions_are_those_that_pillow_decodes():
    read = images.extensions()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".jp2", ".mpo"} <= read
    for end in (".pdf", ".h5", ".mpg", ".grib", ".txt", ""):
        assert end not in read
    stubs = {kind for kind, (factory, _) in Image.OPEN.items()
             if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)}  # fmt: skip
    assert stubs <= images.NOT_DECODED


def test_find_files_passes_over_what_is_hidden(tmp_path):
    for name in ("b/2.jpg", "a.PNG", "b/c/1.txt", ".DS_Store", "b/._2.jpg", ".ipynb_checkpoints/a.png",
                 "__MACOSX/a.jpg", "b/@eaDir/2.jpg", "b/Thumbs.db"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = [path.relative_to(tmp_path).as_posix() for path in images.find_files(tmp_path)]
    assert found == ["a.PNG", "b/2.jpg", "b/c/1.txt"]
    assert [images.is_image(tmp_path / name) for name in found] == [True, True, False]


def test_left_out_files_are_counted_and_the_first_are_named(tmp_path, caplog):
    files = [tmp_path / f"{i}.txt" for i in range(7)]
    images.log_left_out(tmp_path, [])
    assert not caplog.records
    images.log_left_out(tmp_path, files)
    (record,) = caplog.records
    assert "7 file(s)" in record.message
    assert "0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more" in record.message
