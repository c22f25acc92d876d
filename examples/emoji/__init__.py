"""The emoji data and recipe, a package for the scripts in the folder above: `from emoji.tasks import EmojiTasks`."""
