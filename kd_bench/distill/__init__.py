"""Training: terms over student, teacher and visual switch, on transformers' Trainer."""
