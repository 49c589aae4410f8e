"""Reasoning by reinforcement and distillation: tasks with verifiable answers, rewards, losses."""
