"""The emoji data: the scripts in the folder above import `emoji.emoji_images` and `emoji.emoji_tasks`."""
