"""Rebuild `emoji.parquet` from the npm packages it comes from.

    python examples/emoji/prepare_data.py                 # needs npm, downloads 160 MB
    python examples/emoji/prepare_data.py --packages DIR  # reads *.tgz files that `npm pack` left in DIR

One row per picture: every emoji as drawn by Google (Noto) and by Twitter (Twemoji), every skin-tone variant of
Google's and three tones of Twitter's.
Columns: `vendor`, `unified` (code points), `base` (code points of the emoji that this one is a variant of, or its
own), `name`, `aliases`, `category`, `subcategory`, `skin_tone` ("" for a base emoji), `image` (64x64 lossless WebP on
white). Licences: see DATA_LICENSE.md.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from tqdm import tqdm


VERSION = "16.0.0"
PACKAGES = {vendor: f"emoji-datasource-{vendor}-{VERSION}.tgz" for vendor in ("google", "twitter")}
METADATA = f"emoji-datasource-{VERSION}.tgz"
# Twemoji's other tones would push the file over 16 MB.
TONES_KEPT = {"google": None, "twitter": {"", "light", "medium", "dark"}}
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
FEATURES = Features(
    {
        "vendor": Value("string"),
        "unified": Value("string"),
        "base": Value("string"),
        "name": Value("string"),
        "aliases": List(Value("string")),
        "category": Value("string"),
        "subcategory": Value("string"),
        "skin_tone": Value("string"),
        "image": Image(),
    }
)


def read_metadata(packages: Path) -> list[dict]:
    """Rows without pictures: one per emoji and per skin-tone variant, in the package's order."""
    with tarfile.open(packages / METADATA) as tar:
        emoji = json.load(tar.extractfile("package/emoji.json"))
    emoji.sort(key=lambda entry: entry["sort_order"])
    shared = {name for name, count in Counter(entry["name"] for entry in emoji).items() if count > 1}
    rows = []
    for entry in emoji:
        aliases = [short.replace("_", " ").replace("-", " ") for short in entry["short_names"]]
        # "MAN IN TUXEDO" names two emoji in 16.0.0; their short names differ.
        name = aliases[0] if entry["name"] in shared else " ".join(entry["name"].lower().split())
        common = {"base": entry["unified"], "name": name, "aliases": [a for a in aliases if a != name]}
        common |= {"category": entry["category"], "subcategory": entry["subcategory"]}
        rows.append({**common, "unified": entry["unified"], "skin_tone": "", "file": entry["image"]})
        for tones, variant in entry.get("skin_variations", {}).items():
            skin_tone = " and ".join(SKIN_TONES[tone] for tone in tones.split("-"))
            rows.append({**common, "unified": variant["unified"], "skin_tone": skin_tone, "file": variant["image"]})
    return rows


def to_webp(png: bytes) -> bytes:
    image = PILImage.open(io.BytesIO(png)).convert("RGBA")
    on_white = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
    buffer = io.BytesIO()
    on_white.save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue()


def build(packages: Path) -> Dataset:
    """Read the three packages in `packages` into a dataset.

    Raises:
        FileNotFoundError: if a package is not there.
        ValueError: if a picture that the metadata names is missing or is not 64x64.
    """
    for name in (METADATA, *PACKAGES.values()):
        if not (packages / name).is_file():
            raise FileNotFoundError(f"{packages / name} is missing: run `npm pack` for it, or leave out --packages.")
    metadata = read_metadata(packages)
    rows = []
    for vendor, package in PACKAGES.items():
        folder = f"package/img/{vendor}/64/"
        with tarfile.open(packages / package) as tar:
            members = (m for m in tar if m.name.startswith(folder) and m.isfile())
            png = {m.name.removeprefix(folder): tar.extractfile(m).read() for m in members}
        missing = [row["file"] for row in metadata if row["file"] not in png]
        if missing:
            raise ValueError(
                f"{package} lacks {len(missing)} pictures that {METADATA} names, the first: {missing[0]}."
            )
        kept = [row for row in metadata if TONES_KEPT[vendor] is None or row["skin_tone"] in TONES_KEPT[vendor]]
        with ProcessPoolExecutor() as pool:
            webp = pool.map(to_webp, (png[row["file"]] for row in kept), chunksize=16)
            for row, image in zip(kept, tqdm(webp, desc=f"{vendor}: PNG to WebP", total=len(kept))):
                row = {key: row[key] for key in FEATURES if key in row}
                rows.append({**row, "vendor": vendor, "image": {"bytes": image, "path": None}})
    return Dataset.from_list(rows, features=FEATURES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder with the three .tgz files; default: fetch them with npm")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "emoji.parquet")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        packages = args.packages
        if packages is None:
            packages = Path(scratch)
            for name in tqdm((METADATA, *PACKAGES.values()), desc="npm pack"):
                spec = f"{name.removesuffix(f'-{VERSION}.tgz')}@{VERSION}"
                subprocess.run(["npm", "pack", spec, "--silent"], cwd=packages, check=True, stdout=subprocess.DEVNULL)
        try:
            dataset = build(packages)
        except (FileNotFoundError, ValueError) as error:
            sys.exit(str(error))
    dataset.to_parquet(args.out)
    print(f"{len(dataset)} pictures, {args.out.stat().st_size / 1e6:.1f} MB -> {args.out}")


if __name__ == "__main__":
    main()
