"""Write the questions of the emoji tasks for lmms-eval (`emoji/lmms_eval_tasks/`), and run them:

    python examples/export_emoji_questions.py
    python -m lmms_eval --model metamorph --include_path examples/emoji/lmms_eval_tasks --tasks emoji_naming \\
        --model_args pretrained=examples/emoji/checkpoint --batch_size 16

`emoji_drawing` needs visualizer=examples/emoji/checkpoint, too. Run both from the folder that has `runs/`.
"""

import argparse
import random
from pathlib import Path

from datasets import Dataset, DatasetDict
from emoji.images import draw_image, load_rows
from emoji.tasks import DEFAULT_PHRASING, EmojiTasks
from tqdm import tqdm
from transformers.image_transforms import to_pil_image


NAMING = "name_twitter_held_out"  # Twitter's images that no training question has shown


def list_questions(tasks: EmojiTasks) -> dict[str, list[dict]]:
    """Return the questions of both tasks: `question`, `answer`, and the `row` of the real image."""
    naming = [(r["messages"][0]["content"][-1]["text"], r["images"][0]) for r in tasks.evaluation(NAMING)]
    drawing = [(DEFAULT_PHRASING.replace("{}", tasks.rows[row]["name"]), row) for row in tasks.bases]
    return {
        task: [{"question": q, "answer": tasks.rows[i]["name"], "row": i} for q, i in questions]
        for task, questions in (("naming", naming), ("drawing", drawing))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/emoji_questions"), help="folder (default: runs/emoji_questions)"
    )
    parser.add_argument("--limit", type=int, help="maximum number of questions of each task (default: all)")
    args = parser.parse_args()
    tasks = EmojiTasks(load_rows())
    for name, questions in list_questions(tasks).items():
        if args.limit is not None and args.limit < len(questions):
            questions = random.Random(0).sample(questions, args.limit)
        for question in tqdm(questions, desc=f"drawing the images of {name}"):
            question["image"] = to_pil_image(draw_image(tasks, question["row"]).numpy())
        DatasetDict({"test": Dataset.from_list(questions)}).save_to_disk(str(args.output / name))


if __name__ == "__main__":
    main()
