"""Targeted completion training: `deepspeed deepalign/train/run.py --config X.yaml`."""
