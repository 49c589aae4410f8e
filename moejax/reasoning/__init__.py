"""Reasoning by reinforcement and distillation: tasks with verifiable answers, rewards, stages.

tasks           problems by rule or from data, their held-out splits, and who judges answers
templates       from a question to a prompt, and from a completion to an answer
rewards         what a completion is worth
rl_config, advantages, losses       group-relative policy optimization and its variants
rollouts        questions asked, answers sampled and judged
policy_config, policy_setup, policy_step, policy_run, policy_train      a run of reinforcement
evaluate, policy_evaluation         pass@1, pass@k, majority@n on held-out problems
pairs_config, short_stages          pairs by rule, rejection sampling, evaluation as stages
stage_run       what opens, runs and closes any of them
stages          which kind of run a config is, and pipelines of several

Distillation and DPO are objectives of a training run: ``distillation`` and ``preferences`` of
``moejax.training``.
"""
