"""Rebuild `emoji.parquet` from the npm packages it comes from.

    python examples/emoji/prepare_data.py    # needs npm, downloads 160 MB

One row per image: every emoji as drawn by Google (Noto) and by Twitter (Twemoji), every skin-tone variant of Google's
and three tones of Twitter's. Columns: `vendor`, `unified` (code points), `base` (code points of the emoji that this
one is a variant of, or its own), `name`, `aliases`, `category`, `subcategory`, `skin_tone` ("" for a base emoji),
`image` (64x64 lossless WebP on white). Licenses: see DATA_LICENSE.md.
"""

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

from datasets import Dataset, Image
from tqdm import tqdm

from metamorph_hf.image_reading import read_image


VERSION = "16.0.0"
PACKAGES = {vendor: f"emoji-datasource-{vendor}-{VERSION}.tgz" for vendor in ("google", "twitter")}
METADATA = f"emoji-datasource-{VERSION}.tgz"
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
TWITTER_TONES = ("", "light", "medium", "dark")  # Twitter's other tones would push the file over 16 MB


def read_metadata(packages: Path) -> list[dict]:
    """Read a row with its image file for each emoji and each skin-tone variant, in the package's order."""
    with tarfile.open(packages / METADATA) as tar:
        emoji = json.load(tar.extractfile("package/emoji.json"))
    emoji.sort(key=lambda entry: entry["sort_order"])
    uses = Counter(entry["name"] for entry in emoji)
    rows = []
    for entry in emoji:
        aliases = [short.replace("_", " ").replace("-", " ") for short in entry["short_names"]]
        # "MAN IN TUXEDO" names two emoji in 16.0.0; their short names differ.
        name = aliases[0] if uses[entry["name"]] > 1 else " ".join(entry["name"].lower().split())
        common = {"base": entry["unified"], "name": name, "aliases": [alias for alias in aliases if alias != name]}
        common |= {"category": entry["category"], "subcategory": entry["subcategory"]}
        rows.append({"unified": entry["unified"], **common, "skin_tone": "", "file": entry["image"]})
        for tones, variant in entry.get("skin_variations", {}).items():
            skin_tone = " and ".join(SKIN_TONES[tone] for tone in tones.split("-"))
            rows.append({"unified": variant["unified"], **common, "skin_tone": skin_tone, "file": variant["image"]})
    return rows


def build(packages: Path) -> Dataset:
    """Read the three packages in `packages` into a dataset."""
    metadata, rows = read_metadata(packages), []
    for vendor, package in PACKAGES.items():
        folder = f"package/img/{vendor}/64/"
        with tarfile.open(packages / package) as tar:
            members = (member for member in tar if member.name.startswith(folder) and member.isfile())
            png = {member.name.removeprefix(folder): tar.extractfile(member).read() for member in members}
        for row in tqdm(metadata, desc=f"{vendor}: PNG to WebP"):
            if vendor == "google" or row["skin_tone"] in TWITTER_TONES:
                columns = {name: value for name, value in row.items() if name != "file"}
                webp = io.BytesIO()
                read_image(png[row["file"]]).save(webp, "WEBP", lossless=True, quality=100, method=6)
                rows.append({"vendor": vendor, **columns, "image": {"bytes": webp.getvalue(), "path": None}})
    return Dataset.from_list(rows).cast_column("image", Image())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "emoji.parquet")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as packages:
        for name in tqdm((METADATA, *PACKAGES.values()), desc="npm pack"):
            spec = f"{name.removesuffix(f'-{VERSION}.tgz')}@{VERSION}"
            subprocess.run(["npm", "pack", spec, "--silent"], cwd=packages, check=True, stdout=subprocess.DEVNULL)
        dataset = build(Path(packages))
    dataset.to_parquet(args.out)
    print(f"{len(dataset)} images, {args.out.stat().st_size / 1e6:.1f} MB -> {args.out}")


if __name__ == "__main__":
    main()
