"""The operations deepalign is built on, one folder per operation, one file per implementation.

`ls completion_loss/` is the list of implementations of the loss: `reference.py` holds the equations in eager PyTorch,
`api.py` validates what the caller passed and chooses. This package knows only torch and Triton.
"""
