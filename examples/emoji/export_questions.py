"""Write the questions of the emoji tasks for lmms-eval (`lmms_eval_tasks/`), and run them:

    python examples/emoji/export_questions.py
    python -m lmms_eval --model metamorph --include_path examples/emoji/lmms_eval_tasks --tasks emoji_naming \\
        --model_args pretrained=examples/emoji/checkpoint --batch_size 16

`emoji_drawing` needs visualizer=examples/emoji/checkpoint, too. Run both from the folder that has `runs/`.
"""

import argparse
import random
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict
from emoji_images import PARQUET
from emoji_tasks import DEFAULT_PHRASING, EmojiTasks


NAMING = "name_twitter_held_out"  # Twitter's images that no training question has shown


def list_questions(rows: list[dict]) -> dict[str, list[dict]]:
    """Return the questions of both tasks: `question`, `answer`, the `row` of the real image, and that image."""
    tasks = EmojiTasks(rows)
    naming = [(r["messages"][0]["content"][-1]["text"], r["images"][0]) for r in tasks.evaluation(NAMING)]
    drawing = [(DEFAULT_PHRASING.replace("{}", rows[row]["name"]), row) for row in tasks.google]
    return {
        task: [{"question": q, "answer": rows[i]["name"], "row": i, "image": rows[i]["image"]} for q, i in questions]
        for task, questions in (("naming", naming), ("drawing", drawing))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/emoji_questions"))
    parser.add_argument("--limit", type=int, help="maximum number of questions of each task (default: all)")
    args = parser.parse_args()
    rows = Dataset.from_parquet(str(PARQUET)).cast_column("image", datasets.Image(decode=False)).to_list()
    for name, questions in list_questions(rows).items():
        if args.limit is not None and args.limit < len(questions):
            questions = random.Random(0).sample(questions, args.limit)
        test = Dataset.from_list(questions).cast_column("image", datasets.Image())
        DatasetDict({"test": test}).save_to_disk(str(args.output / name))


if __name__ == "__main__":
    main()
