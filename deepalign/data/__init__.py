"""Data: JSONL conversations, chat templates, response masks -> row weights, and the stream of training steps."""
