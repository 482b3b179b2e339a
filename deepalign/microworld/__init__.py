"""A world small enough to train from scratch in minutes on a laptop, in which the whole method can be seen to work."""
