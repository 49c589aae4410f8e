"""Reasoning by reinforcement and distillation: tasks, rewards, losses and their loops."""
