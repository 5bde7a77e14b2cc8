"""Images and captions from a model: its files, lists of prompts, runs that can be continued."""
