"""Reasoning by reinforcement: tasks with verifiable answers, rewards, losses, evaluation."""
