import io

import numpy as np
import pytest
from PIL import Image

from metamorph_hf.image_reading import BadSample, read_image


class TestReadImage:
    def bytes_of(self, image, kind="PNG", **options):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    def test_depths_and_modes(self):
        deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
        assert np.asarray(read_image(self.bytes_of(deep)))[0, :, 0].tolist() == [0, 128, 255]
        red = Image.new("RGB", (4, 4), "red")
        for image, kind in ((red.convert("CMYK"), "JPEG"), (red.convert("P"), "PNG"), (red.convert("P"), "GIF")):
            found = read_image(self.bytes_of(image, kind))
            assert found.mode == "RGB" and np.allclose(np.asarray(found)[0, 0], [255, 0, 0], atol=6)
        two = self.bytes_of(red, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")])
        assert np.allclose(np.asarray(read_image(two))[0, 0], [255, 0, 0], atol=6)  # an animation's first frame

    def test_transparent_is_white(self):
        clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
        for kind in ("PNG", "WEBP"):
            assert read_image(self.bytes_of(clear, kind, lossless=True)).getpixel((0, 0)) == (255, 255, 255)
        palette = clear.convert("P")
        palette.info["transparency"] = palette.getpixel((0, 0))
        assert read_image(palette).getpixel((0, 0)) == (255, 255, 255)
        half = Image.new("LA", (4, 4), (0, 128))
        assert read_image(half).getpixel((0, 0)) == (127, 127, 127)

    def test_exif_turns(self):
        image = Image.new("RGB", (8, 4), "white")
        exif = Image.Exif()
        exif[0x0112] = 6
        assert read_image(self.bytes_of(image, "JPEG", exif=exif)).size == (4, 8)

    @pytest.mark.parametrize("kind", ["path", "bytes", "pil", "datasets", "Path"])
    def test_forms(self, pictures, kind):
        path = pictures / "4.png"
        image = {
            "path": str(path),
            "Path": path,
            "bytes": path.read_bytes(),
            "pil": Image.open(path),
            "datasets": {"bytes": path.read_bytes(), "path": None},
        }[kind]
        assert read_image(image).getpixel((0, 0)) == (100, 100, 100)

    @pytest.mark.parametrize(
        ("image", "reason"),
        [
            ("/no/such.png", "cannot be read"),
            (b"", "cannot be read"),
            (b"no picture", "cannot be read"),
            (None, "cannot be read"),
            ({"bytes": None, "path": None}, "cannot be read"),
            (17, "cannot be read"),
        ],
    )
    def test_unreadable(self, image, reason):
        with pytest.raises(BadSample, match=reason):
            read_image(image)

    def test_truncated(self):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
        for kind in ("JPEG", "PNG"):
            with pytest.raises(BadSample, match="cannot be read"):
                read_image(self.bytes_of(noise, kind)[:2000])

    def test_bomb(self, tmp_path):
        Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
        with pytest.raises(BadSample, match="too large to be safe .*bomb.png"):
            read_image(str(tmp_path / "bomb.png"))
