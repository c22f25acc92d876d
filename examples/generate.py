"""Ask a MetaMorph pipeline for images or text.

    python examples/generate.py "a red apple"                                      # text to image
    python examples/generate.py "What is this?" --image examples/emoji/red_apple.png   # a question about an image
    python examples/generate.py "make the skin tone dark" --image hand.png             # an edit of your image

Without --model it uses the small emoji model in this repository, which knows emoji and nothing else. It runs on a CPU
in seconds.
"""

import argparse

from common import EMOJI_CHECKPOINT, exit_with_sentence

from metamorph_hf import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_arguments(parser, default_model=EMOJI_CHECKPOINT)
    args = parser.parse_args()
    with exit_with_sentence():
        cli.run(args)


if __name__ == "__main__":
    main()
