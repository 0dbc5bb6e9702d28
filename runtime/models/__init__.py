"""Where models come from: folders, tokenizers, chat templates, weights."""
