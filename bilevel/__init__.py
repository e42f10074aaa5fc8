"""Bilevel reweighting of fine-tuning data by the penalty method with first-order steps only."""
