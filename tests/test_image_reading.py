import base64
import io
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from metamorph_hf.image_reading import ImageReadError, read_image


def encode(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A folder and the address at which it is served."""
    folder = tmp_path_factory.mktemp("server")
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *arguments: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


class TestReadImage:
    GRAY = np.array([[0, 128, 255]], dtype=np.uint8)

    @pytest.mark.parametrize(
        "image",
        [
            Image.fromarray(GRAY),
            Image.fromarray(GRAY.astype(np.uint16) * 257),
            encode(Image.fromarray(GRAY.astype(np.uint16) * 257)),
            b"P5 3 1 65535\n" + (GRAY.astype(">u2") * 257).tobytes(),
            Image.fromarray(GRAY.astype(np.float32) / 255),
            encode(Image.fromarray(GRAY.astype(np.float32) / 255), "TIFF"),
            Image.fromarray(GRAY).convert("LA"),
            Image.fromarray(GRAY).convert("RGBA").convert("RGBa"),
        ],
        ids=["L", "I;16", "16-bit PNG", "16-bit PGM", "F", "float TIFF", "LA", "RGBa"],
    )
    def test_depths(self, image):
        assert np.asarray(read_image(image))[..., 0].tolist() == self.GRAY.tolist()

    @pytest.mark.parametrize("order", ["I;16L", "I;16B"])
    def test_byte_orders(self, order):
        assert read_image(Image.new(order, (2, 1), 32896)).getpixel((1, 0)) == (128, 128, 128)

    @pytest.mark.parametrize(
        ("mode", "kind"), [("CMYK", "JPEG"), ("P", "PNG"), ("P", "GIF"), ("YCbCr", "JPEG"), ("RGB", "WEBP")]
    )
    def test_color_modes(self, mode, kind):
        image = read_image(encode(Image.new("RGB", (4, 4), "red").convert(mode), kind))
        assert image.mode == "RGB" and np.allclose(np.asarray(image), [255, 0, 0], atol=6)

    def test_animations_give_their_first_frame(self):
        frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
        image = read_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
        assert np.allclose(np.asarray(image), [255, 0, 0], atol=6)

    def test_transparent_pixels_are_white(self):
        clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
        for kind in ("PNG", "WEBP"):
            assert read_image(encode(clear, kind, lossless=True)).getpixel((0, 0)) == (255, 255, 255)
        palette = clear.convert("P")
        palette.info["transparency"] = palette.getpixel((0, 0))
        assert read_image(palette).getpixel((0, 0)) == (255, 255, 255)
        assert read_image(Image.new("LA", (4, 4), (0, 128))).getpixel((0, 0)) == (127, 127, 127)

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "I;16"])
    @pytest.mark.parametrize(
        "form", ["path", "Path", "bytes", "bytes and path", "path alone", "PIL", "URL", "data URI", "base64"]
    )
    def test_every_form_means_the_same_pixels(self, server, mode, form):
        """A rotated image, transparent or of 16 bits, however it is given."""
        folder, address = server
        pixels = np.arange(8 * 4, dtype=np.uint16).reshape(4, 8) * 2000
        image = Image.fromarray(pixels) if mode == "I;16" else Image.fromarray((pixels // 256).astype(np.uint8))
        image = image.convert(mode)
        if mode == "RGBA":
            image.putalpha(Image.fromarray((pixels // 256).astype(np.uint8)))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        path = folder / f"{mode.replace(';', '')}.png"
        image.save(path, exif=exif)
        text = base64.b64encode(path.read_bytes()).decode()
        given = {
            "path": str(path),
            "Path": path,
            "bytes": path.read_bytes(),
            "bytes and path": {"bytes": path.read_bytes(), "path": path.name},
            "path alone": {"bytes": None, "path": str(path)},
            "PIL": Image.open(path),
            "URL": f"{address}/{path.name}",
            "data URI": f"data:image/png;base64,{text}",
            "base64": text,
        }[form]
        expected = {"I;16": (pixels / 257).round(), "RGBA": 255 - (pixels // 256) * (255 - pixels // 256) / 255}
        expected = np.rot90(expected.get(mode, pixels // 256), -1)
        found = read_image(given)
        assert found.mode == "RGB" and found.size == (4, 8)
        tolerance = 1 if mode == "RGBA" else 0  # PIL's rounding when it composites
        assert np.abs(np.asarray(found).astype(int) - expected[..., None]).max() <= tolerance

    @pytest.mark.parametrize("channels", [None, 1, 3, 4])
    def test_arrays_and_tensors(self, channels):
        """The layouts and value ranges of diffusers' `output_type="np"` and `"pt"`, and plain uint8."""
        shape = (5, 6) if channels is None else (5, 6, channels)
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        expected = read_image(Image.fromarray(pixels[..., 0] if channels == 1 else pixels))
        moved = pixels if channels is None else np.moveaxis(pixels, -1, 0)
        floats = torch.tensor(np.ascontiguousarray(moved)) / 255
        forms = [pixels, moved, pixels / 255, (pixels / 255).astype(np.float32), torch.tensor(pixels), floats]
        forms += [floats.requires_grad_(), torch.tensor(np.ascontiguousarray(moved)), pixels.astype(np.uint16) * 257]
        for form in forms:
            assert np.array_equal(read_image(form), expected)
        assert np.abs(np.asarray(read_image(floats.bfloat16())).astype(int) - np.asarray(expected)).max() <= 1

    @pytest.mark.parametrize(
        ("image", "reason"),
        [
            ("/no/such.png", r"\(/no/such.png\): the file does not exist"),
            ("/no/such", r"\(/no/such\): the file does not exist"),
            ({"bytes": None, "path": "/no/such.png"}, r"\(/no/such.png\): the file does not exist"),
            ({"bytes": b"", "path": "empty.png"}, r"\(empty.png\): its format is unknown"),
            (b"", r"\(bytes\): its format is unknown"),
            (b"not an image", r"\(bytes\): its format is unknown"),
            ("data:image/png;base64,AAAA", r"\(data:image/png;base64\): its format is unknown"),
            ("http://127.0.0.1:9/image.png", r"\(http://127.0.0.1:9/image.png\): .*refused"),
            ("/", r"\(/\): .*Is a directory"),
            (None, r"\(NoneType\): it is NoneType, expected a path"),
            ({"bytes": None, "path": None}, "it is NoneType, expected a path"),
            (17, r"\(int\): it is int, expected a path, URL, bytes, PIL image, array or tensor"),
            (Image.new("RGB", (0, 4)), "it has 0x4 pixels"),
            (Image.new("I", (4, 4), 200), r'the range of 32-bit integers \(mode "I"\) is unknown'),
            (Image.new("F", (4, 4), 200), "float32 values from 200 to 200, expected uint8, uint16 or floats"),
            (np.full((4, 4, 3), np.nan), "float64 values from nan to nan"),
            (np.full((4, 4, 3), 200.0), "float64 values from 200 to 200"),
            (np.zeros((4, 4, 3), np.int64), "int64 values from 0 to 0, expected uint8"),
            (np.zeros((2, 4, 4, 3), np.uint8), r"its shape is \(2, 4, 4, 3\), expected \(H, W\)"),
            (torch.zeros(5, 4, 2), r"its shape is \(5, 4, 2\)"),
        ],
    )
    def test_what_cannot_be_read_is_named(self, image, reason):
        with pytest.raises(ImageReadError, match=f"^The image cannot be read .*{reason}.*[.]$"):
            read_image(image)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    def test_truncated_files(self, tmp_path, kind):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
        (tmp_path / "cut").write_bytes(encode(noise, kind)[:2000])
        with pytest.raises(ImageReadError, match=r"cannot be read \(.*cut\)"):
            read_image(tmp_path / "cut")

    def test_decompression_bombs(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        Image.new("1", (100, 100)).save(tmp_path / "bomb.png")
        with pytest.raises(ImageReadError, match=r"cannot be read \(.*bomb.png\): Image size .* exceeds limit"):
            read_image(str(tmp_path / "bomb.png"))
