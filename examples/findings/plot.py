"""Draw the figures of the findings from their results.

    python examples/findings/plot.py                       # results.jsonl beside this script -> figures/
    python examples/findings/plot.py FILE --out FOLDER     # others

It also prints a table of all numbers: mean and range over the seeds, and for facts the share of all answers with its
95 % interval (Wilson's).
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


FOLDER = Path(__file__).parent
Z = 1.959964  # of a 95 % interval
MEASURES = ("_top1", "_top5", "_answered", "_said", "fid", "name_google", "category_twitter_held_out")
LANGUAGES = {"facts": "text-pretrained", "random": "random weights", "smollm2": "SmolLM2", "tiny": "tiny"}
LANGUAGES |= {"random_smollm2": "random weights", "random_tiny": "random weights"}


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return the ends of Wilson's score interval of a proportion."""
    share, spread = hits / count, Z * math.sqrt(hits * (count - hits) / count**3 + Z**2 / (4 * count**2))
    middle, scale = share + Z**2 / (2 * count), 1 + Z**2 / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)  # rounding may exceed 0 or 1


def read_value(row: dict, name: str) -> float:
    """Return a number of a row; a proportion in percent."""
    value = row[name]
    return 100 * value[0] / value[1] if isinstance(value, list) else value


def summarize(rows: list[dict], name: str) -> tuple[float, float, float]:
    """Return mean, smallest and largest value over the seeds."""
    values = [read_value(row, name) for row in rows]
    return mean(values), min(values), max(values)


def pool(rows: list[dict], name: str) -> tuple[float, float, float]:
    """Return a proportion over the answers of all seeds, and its interval, in percent."""
    hits, count = (sum(row[name][i] for row in rows) for i in (0, 1))
    low, high = wilson_interval(hits, count)
    return 100 * hits / count, 100 * low, 100 * high


def group(rows: list[dict], *fields: str) -> dict[tuple, list[dict]]:
    """Group rows by the values of fields, or of numbers of conversations (`data.generation`)."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(describe(row, field) for field in fields)].append(row)
    return dict(groups)


def describe(row: dict, field: str):
    """Return the value of a field, or something about the row's data or steps."""
    if field == "data":
        return ", ".join(f"{count} {kind}" for kind, count in row["data"].items())
    if field == "way":
        return ("say, then draw" if row["say_first"] else "draw at once") + ", recalls" * ("recalls" in row["data"])
    if field == "schedule":
        if row.get("shown"):
            return f"{row['shown']:,} requests shown"
        return "each conversation once" if row["steps"] == "once" else f"{row['steps']} steps"
    if field == "other":
        return " + ".join(kind for kind in row["data"] if kind != "generation") or f"nothing ({row['steps']} steps)"
    _, _, kind = field.partition("data.")
    return row["data"].get(kind, 0) if kind else row[field]


def split_errors(points: Iterable[tuple[float, float, float]]) -> tuple[list[float], list[list[float]]]:
    """Split (middle, low, high) into the middles, and the lengths of the error bars as matplotlib takes them."""
    middle, low, high = zip(*points)
    # A mean of equal values may differ from them by its rounding, and the length of a bar must not be negative.
    below = [max(0.0, m - end) for m, end in zip(middle, low)]
    above = [max(0.0, end - m) for m, end in zip(middle, high)]
    return [*middle], [below, above]


def plot_unlocking(rows: list[dict]):
    """Quality against the number of generation samples; a line for each schedule, alone and with understanding."""
    titles = {"generated_top1": "visual tokens found again, top-1 in %", "decoded_top1": "decoded images, top-1 in %"}
    titles |= {"fid": "FID by the judge"}
    names = [name for name in titles if all(name in row for row in rows)]
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names):
        for (schedule, understanding), line in group(rows, "schedule", "data.understanding").items():
            label = f"{'with understanding' if understanding else 'alone'}, {schedule}"
            points = sorted(group(line, "data.generation").items())
            y, errors = split_errors(summarize(cells, name) for _, cells in points)
            axis.errorbar([size for (size,), _ in points], y, yerr=errors, marker="o", capsize=3, label=label)
        axis.set(xscale="log", xlabel="different requests for images in training", ylabel=titles[name])
    axes[0][0].legend(fontsize=7)
    return figure


def plot_abilities(rows: list[dict]):
    """Both abilities in each cell of understanding x generation samples, for each schedule."""
    measures = {"generated_top1": "generation, top-1 in %", "name_google": "naming, in %"}
    schedules = group(rows, "schedule")
    figure, axes = plt.subplots(len(schedules), 2, figsize=(9, 4 * len(schedules)), squeeze=False)
    for line, ((schedule,), cells) in zip(axes, schedules.items()):
        sizes = [sorted({describe(row, f"data.{kind}") for row in cells}) for kind in ("understanding", "generation")]
        found = group(cells, "data.understanding", "data.generation")
        for axis, (name, title) in zip(line, measures.items()):
            # A combination that is not there yet stays white.
            numbers = [
                [summarize(found[u, g], name) if (u, g) in found else (math.nan,) * 3 for g in sizes[1]]
                for u in sizes[0]
            ]
            axis.imshow([[middle for middle, _, _ in cells] for cells in numbers], vmin=0, vmax=100, cmap="Blues")
            for y, cells_of_line in enumerate(numbers):
                for x, (middle, low, high) in enumerate(cells_of_line):
                    if math.isnan(middle):
                        continue
                    text = f"{middle:.1f}" + (f"\n({low:.1f} to {high:.1f})" if low < high else "")
                    axis.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if middle > 60 else "k")
            axis.set_xticks(range(len(sizes[1])), sizes[1])
            axis.set_yticks(range(len(sizes[0])), sizes[0])
            axis.set(xlabel="generation", ylabel="understanding", title=f"{title}: {schedule}")
    return figure


def plot_kinds(rows: list[dict]):
    """Generation with one more kind of data."""
    found = group(rows, "other").items()
    kinds = dict(sorted(found, key=lambda item: summarize(item[1], "generated_top1")))
    figure, axis = plt.subplots(figsize=(8, 4))
    middle, errors = split_errors(summarize(cells, "generated_top1") for cells in kinds.values())
    axis.barh([kind for (kind,) in kinds], middle, xerr=errors, capsize=3)
    axis.set(xlabel="generation, top-1 in %")
    return figure


def plot_knowledge(rows: list[dict]):
    """Held-out facts: images drawn at once and after words, and the answers in words."""
    ways = dict(sorted(group(rows, "way", "language").items(), reverse=True))
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.5 + 0.6 * len(ways)), sharey=True)
    for axis, kind in zip(axes, ("capitals", "definitions")):
        measures = {"answered": "answer in words", "top5": "image, top-5", "top1": "image, top-1"}
        for number, (measure, label) in enumerate(measures.items()):
            middle, errors = split_errors(pool(cells, f"{kind}_held_out_{measure}") for cells in ways.values())
            y = [line + 0.27 * number for line in range(len(ways))]
            axis.barh(y, middle, 0.25, xerr=errors, capsize=3, label=label)
        names = [f"{way}, {LANGUAGES[language]}" for way, language in ways]
        axis.set_yticks([line + 0.27 for line in range(len(ways))], names)
        axis.set(title=f"held-out {kind}", xlabel="right, in %", xlim=(0, 100))
    axes[1].legend(*(reversed(part) for part in axes[1].get_legend_handles_labels()))
    return figure


FIGURES = {
    "unlocking": plot_unlocking,
    "abilities": plot_abilities,
    "kinds": plot_kinds,
    "knowledge": plot_knowledge,
    "real_llm": plot_knowledge,
}


def tabulate(rows: list[dict]) -> str:
    """Make a Markdown table: a line for each condition and measure."""
    lines = ["| experiment | condition | seeds | measure | value |", "|---|---|---|---|---|"]
    for experiment, cells in ((name, [row for row in rows if row["experiment"] == name]) for name in FIGURES):
        is_knowledge = FIGURES[experiment] is plot_knowledge
        fields = ("language", "way") if is_knowledge else ("data", "schedule")
        for condition, seeds in group(cells, *fields).items():
            text = f"{condition[0]}, {condition[1]}"
            measures = [name for name in seeds[0] if name.endswith(MEASURES)]
            for name in measures:
                middle, low, high = (pool if is_knowledge else summarize)(seeds, name)
                digits = 3 if name == "fid" else 1
                value = f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
                lines.append(f"| {experiment} | {text} | {len(seeds)} | {name} | {value} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=FOLDER / "results.jsonl", help="JSONL file of run.py")
    parser.add_argument("--out", type=Path, default=FOLDER / "figures", help="folder for the figures")
    args = parser.parse_args()
    if not args.results.is_file():
        sys.exit(f"There are no results in {args.results}: python examples/findings/run.py makes them.")
    rows = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
    args.out.mkdir(parents=True, exist_ok=True)
    for experiment, plot in FIGURES.items():
        if cells := [row for row in rows if row["experiment"] == experiment]:
            figure = plot(cells)
            figure.tight_layout()
            figure.savefig(args.out / f"{experiment}.png", dpi=120)
            plt.close(figure)
    print(tabulate(rows))


if __name__ == "__main__":
    main()
