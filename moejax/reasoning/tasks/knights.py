"""Knights, who speak the truth, and knaves, who lie: who is what?

Every puzzle has exactly one solution, which is found by trying all 2^n assignments.
"""

import itertools
from collections.abc import Iterator, Sequence

from moejax.reasoning.tasks.draws import Draws
from moejax.reasoning.tasks.task import Instance, Problem, RuleTask

# (form, (person, person), (bool, bool)):
#   ("is", (j,), (v,))             person j is a knight (v) or a knave
#   ("alike", (j, k), (v,))        j and k are of one kind (v), or differ
#   ("and" | "or", (j, k), (v, w)) j is v and (or) k is w
Statement = tuple[str, tuple[int, ...], tuple[bool, ...]]
KINDS = {True: "knight", False: "knave"}
NAMES = "ABCDEF"


def holds(statement: Statement, knights: Sequence[bool]) -> bool:
    """Whether a statement is true of an assignment."""
    form, people, values = statement
    if form == "alike":
        return (knights[people[0]] == knights[people[1]]) == values[0]
    facts = [knights[person] == value for person, value in zip(people, values, strict=True)]
    return any(facts) if form == "or" else all(facts)


def solutions(statements: Sequence[Statement]) -> list[tuple[bool, ...]]:
    """Every assignment in which the knights' statements are true and the knaves' false."""
    return [
        knights
        for knights in itertools.product((True, False), repeat=len(statements))
        if all(holds(said, knights) == knights[i] for i, said in enumerate(statements))
    ]


def words(statement: Statement) -> str:
    """``B is a knave or C is a knight``."""
    form, people, values = statement
    if form == "alike":
        return f"{' and '.join(NAMES[p] for p in people)} {'are alike' if values[0] else 'differ'}"
    facts = (f"{NAMES[p]} is a {KINDS[v]}" for p, v in zip(people, values, strict=True))
    return f" {form} ".join(facts)


def canonical(statements: Sequence[Statement], knights: Sequence[bool]) -> str:
    """A form that other names of the people, and the order of two facts, do not change.

    People are ordered by what they are and the form of what they say; where that leaves several
    alike, the least of all their orders is taken.
    """
    colours = [f"{knights[i]}{form}{sorted(v)}" for i, (form, _, v) in enumerate(statements)]
    kinds = sorted(set(colours))
    groups = [[i for i, c in enumerate(colours) if c == colour] for colour in kinds]
    orders = itertools.product(*(itertools.permutations(group) for group in groups))
    return min(_renamed(statements, [*itertools.chain(*order)]) for order in orders)


def _renamed(statements: Sequence[Statement], order: list[int]) -> str:
    place = {person: new for new, person in enumerate(order)}
    said = []
    for person in order:
        form, people, values = statements[person]
        paired = values if len(values) == len(people) else values * len(people)
        facts = sorted((place[p], v) for p, v in zip(people, paired, strict=True))
        said.append(f"{form}{facts}")
    return ";".join(said)


def _statement(draws: Draws, speaker: int, count: int) -> Statement:
    others = [person for person in range(count) if person != speaker]
    form = draws.choice(("is", "alike", "and", "or"))
    value = lambda: draws.chance(50)
    if form == "is":
        return form, (draws.choice(others),), (value(),)
    pair = tuple(sorted(draws.sample(others, 2)))
    return form, pair, (value(),) if form == "alike" else (value(), value())


def _search(statements: Sequence[Statement]) -> Iterator[str]:
    """The kinds tried person by person, each dropped at the first contradiction."""
    chosen: list[bool] = []
    lies = {True: "lies", False: "speaks the truth"}
    while True:
        tried = ", ".join(f"{NAMES[i]} {KINDS[kind]}" for i, kind in enumerate(chosen))
        bad = _contradiction(statements, chosen)
        if bad is None and len(chosen) == len(statements):
            yield f"{tried}: all fits"
            return
        if bad is None:
            chosen.append(True)
            continue
        yield f"{tried}: {NAMES[bad]} is a {KINDS[chosen[bad]]} but {lies[chosen[bad]]}"
        while not chosen[-1]:
            chosen.pop()
        chosen[-1] = False


def _contradiction(statements: Sequence[Statement], chosen: list[bool]) -> int | None:
    """The first speaker whose words, all about people already chosen, do not fit them."""
    for speaker, (said, kind) in enumerate(zip(statements, chosen, strict=False)):
        known = all(person < len(chosen) for person in said[1])
        if known and holds(said, chosen) != kind:
            return speaker
    return None


class Knights(RuleTask):
    """Level d: d + 2 people, one statement each.

    Puzzles that differ in the people's names alone lie in one split. An answer names everyone, in
    any order: ``A knight, B knave, C knave``.
    """

    name, most_difficult = "knights", 4
    characters = NAMES + "knightve :.,;sayordfeWlu?bwp"

    def make(self, draws: Draws, difficulty: int) -> Instance:
        count = difficulty + 2
        found: list[tuple[bool, ...]] = []
        while len(found) != 1:
            said = [_statement(draws, speaker, count) for speaker in range(count)]
            found = solutions(said)
        spoken = " ".join(f"{NAMES[i]} says: {words(s)}." for i, s in enumerate(said))
        answer = ", ".join(f"{NAMES[i]} {KINDS[kind]}" for i, kind in enumerate(found[0]))
        return Instance(
            f"{spoken} Who is what?", answer, "; ".join(_search(said)), canonical(said, found[0])
        )

    def _right(self, problem: Problem, answer: str) -> bool:
        return self._vote(answer) == problem.answer

    def _vote(self, answer: str) -> str | None:
        items = [item.strip(" ").replace(" is a ", " ") for item in answer.split(",")]
        known = {f"{name} {kind}" for name in NAMES for kind in KINDS.values()}
        once = len({item[:1] for item in items}) == len(items)
        return ", ".join(sorted(items)) if once and known.issuperset(items) else None
