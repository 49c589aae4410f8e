"""Rollouts: prompts as rows, seeds, judged answers, and the groups that dynamic sampling keeps."""

import contextlib
import dataclasses

import numpy as np
import pytest
import tiny

from moejax.config import UserError
from moejax.data.tokenizers import BytesTokenizer
from moejax.models.decode import Sampled
from moejax.models.sampling_config import SamplingConfig
from moejax.reasoning import rollouts
from moejax.reasoning.rewards import RewardConfig, Scorer
from moejax.reasoning.rl_config import RLConfig
from moejax.reasoning.rollouts import Asker, Roller, seeds_of
from moejax.reasoning.tasks import Problem, TaskConfig, TaskSet
from moejax.reasoning.templates import TEMPLATES

TOKENIZER, PLAIN = BytesTokenizer(), TEMPLATES["plain"]
MODEL = tiny.moe_config(vocab_size=260)
ASKER = Asker(MODEL, TOKENIZER, PLAIN, 8, SamplingConfig(max_tokens=4))


def problem(prompt, answer="7"):
    return Problem("add", prompt, answer, 1, "rl")


def sampled(answers, experts=None):
    """What a sampler would give for ``3+4=``: the answers' bytes, then the stop token."""
    start = [TOKENIZER.separator, *map(int, TOKENIZER.encode("3+4="))]
    rows = np.zeros((len(answers), 12), np.int32)
    lengths = []
    for row, text in zip(rows, answers, strict=True):
        ids = [*start, *map(int, TOKENIZER.encode(text)), TOKENIZER.separator]
        row[: len(ids)] = ids
        lengths.append(len(ids))
    count = len(answers)
    return Sampled(
        rows, np.full(count, len(start), np.int32), np.array(lengths, np.int32),
        np.ones(count, bool), np.zeros((count, 12), np.float32), experts,
    )  # fmt: skip


def roller(rounds, **options):
    """A roller whose sampler gives these answers, round after round."""
    config = RLConfig(**{"group_size": 2, "kl_weight": 0.0, **options}).resolved()
    given = iter(rounds)

    @dataclasses.dataclass(frozen=True)
    class Made(Asker):
        def ask(self, variables, problems, seeds, keep_experts=False, place=None):
            assert len({*seeds.tolist()}) == len(seeds) == len(problems)
            answers = next(given)
            marks = np.arange(len(answers) * 12).reshape(1, -1, 12, 1)
            return sampled(answers, {"segment_0": marks} if keep_experts else None)

    asker = Made(MODEL, TOKENIZER, PLAIN, 8, SamplingConfig(max_tokens=4))
    tasks = TaskSet(TaskConfig(("add",), (1,)))
    scorer = Scorer(RewardConfig(format=0.0), PLAIN, lambda problem, answer: answer == "7")
    phases = lambda name: contextlib.nullcontext()
    return Roller(asker, tasks, scorer, config, 4, 0, phases, np.asarray)


def test_prompts_begin_with_the_separator_and_are_padded_on_the_right():
    rows, lengths = ASKER.prompts([problem("3+4="), problem("13+4=")])
    assert rows.shape == (2, 8) and lengths.tolist() == [5, 6]
    assert rows[0].tolist() == [TOKENIZER.separator, *b"3+4=", 0, 0, 0]


def test_a_prompt_that_does_not_fit_names_the_field():
    with pytest.raises(UserError, match=r"train\.seq_len leaves 8 tokens.*has 9"):
        ASKER.prompts([problem("1234567=")])


def test_texts_are_what_follows_the_prompt_without_the_stop_token():
    assert ASKER.texts(sampled(["7", "", "12"])) == ["7", "", "12"]
    cut = sampled(["7", "12"])
    cut = cut.replace(finished=np.array([True, False]), lengths=cut.lengths - np.array([0, 1]))
    assert ASKER.texts(cut) == ["7", "12"]


def test_seeds_depend_on_every_number():
    base = seeds_of(0, 1, 2, count=4)
    assert base.dtype == np.uint32
    np.testing.assert_array_equal(base, seeds_of(0, 1, 2, count=4))
    for other in (
        seeds_of(1, 1, 2, count=4),
        seeds_of(0, 2, 2, count=4),
        seeds_of(0, 1, 3, count=4),
    ):
        assert (other != base).all()


def test_a_group_is_judged_by_its_own():
    found = roller([["7", "8", "7", "7"]]).roll({}, 0)
    assert [reward.accuracy for reward in found.rewards] == [1, 0, 1, 1]
    np.testing.assert_allclose(
        found.rows.advantages, [np.sqrt(0.5), -np.sqrt(0.5), 0, 0], rtol=1e-6
    )
    assert found.metrics["reward/accuracy"] == 0.75
    assert found.metrics["groups/without_spread"] == 0.5
    # 5 tokens of prompt; an answer's token and the stop token are targets, at positions 4 and 5.
    assert np.argwhere(found.rows.mask[0]).ravel().tolist() == [4, 5]
    assert found.tokens == 4 * 6


def test_dynamic_sampling_asks_until_the_batch_is_full_of_groups_with_spread():
    rounds = [["7", "8", "7", "7"], ["8", "8", "8", "8"], ["8", "8", "8", "7"]]
    found = roller(rounds, dynamic_sampling=True, routing_replay="rollout").roll({}, 3)
    assert found.texts == ["7", "8", "8", "7"]
    assert (found.rows.advantages != 0).all()
    assert found.metrics["rounds"] == 3 and found.metrics["groups/filled_up"] == 0
    # The rows' own experts: the first two of round 1, the last two of round 3.
    kept = np.asarray(found.rows.experts["segment_0"])[0, :, 0, 0].tolist()
    assert kept == [0, 12, 24, 36]
    assert found.tokens == 3 * 4 * 6


def test_where_no_group_has_spread_others_fill_up_and_move_nothing():
    rounds = [["7", "7", "8", "8"]] * rollouts.MOST_ROUNDS
    found = roller(rounds, dynamic_sampling=True).roll({}, 0)
    assert found.metrics["rounds"] == rollouts.MOST_ROUNDS
    assert found.metrics["groups/filled_up"] == 1
    assert not found.rows.advantages.any() and len(found.texts) == 4


def test_questions_differ_from_step_to_step_and_from_round_to_round():
    asked = []
    for step in (0, 1):
        made = roller([["7", "8", "7", "8"]])
        asked.append([p.prompt for p in made.roll({}, step).problems])
    assert asked[0][0] == asked[0][1] and asked[0] != asked[1]
    rounds = [["7", "7", "7", "7"], ["7", "8", "8", "7"]]
    found = roller(rounds, dynamic_sampling=True).roll({}, 0)
    assert [p.prompt for p in found.problems] != asked[0]


def test_an_overlong_answer_is_worth_less():
    """At four of four tokens allowed the whole penalty is taken off."""
    options = dict(overlong_buffer=0.5, overlong_penalty=1.0, advantage_std=False)
    found = roller([["7", "  7", "8", "8"]], **options).roll({}, 0)
    assert [reward.accuracy for reward in found.rewards][:2] == [1, 1]
    np.testing.assert_allclose(found.rows.advantages[:2], [0.5, -0.5])
