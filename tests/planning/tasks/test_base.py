"""Each task against the public samples, its own verifier, and leaks from test into training."""

import itertools
import random
import re
from collections import Counter

import pytest

from diffusion_lm.planning.tasks import base
from diffusion_lm.planning.tasks.countdown import Countdown
from diffusion_lm.planning.tasks.path import PathPlanning
from diffusion_lm.planning.tasks.queens import Queens
from diffusion_lm.planning.tasks.satisfiability import Satisfiability
from diffusion_lm.planning.tasks.sudoku import Sudoku

PUBLIC = {
    **{f"cd{n}_sample.jsonl": Countdown(numbers=n) for n in (3, 4, 5)},
    **{f"3sat{n}_sample.jsonl": Satisfiability(variables=n) for n in (5, 7, 9)},
    "path_sample.jsonl": PathPlanning(),
    "sudoku_sample.csv": Sudoku(),
}
OWN = [Sudoku(size=4, least=4, most=8), Queens(size=8, given=2)]
TASKS = [
    *(task for task in PUBLIC.values() if task != Sudoku()),
    *OWN,
]  # 9 x 9 puzzles are slow: they have a test of their own
QUICK = 60


def drawn(task, count=QUICK, seed=0, **where):
    return list(itertools.islice(base.examples(task, seed, **where), count))


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_samples_are_read_and_verified(name, shared):
    task = PUBLIC[name]
    found = task.read(shared / "data/planning" / name)
    assert len(found) == 40
    for one in found:
        assert task.verify(*one)
        assert set(one.prompt + one.answer) <= set(task.alphabet)
        assert len(one.prompt) <= task.max_lengths[0] and len(one.answer) <= task.max_lengths[1]


@pytest.mark.parametrize("name", [name for name in PUBLIC if PUBLIC[name] != Sudoku()])
def test_generated_examples_look_like_the_public_samples(name, shared):
    """The same characters and the same shape, where a number of any digits counts as one."""
    task = PUBLIC[name]
    public, own = task.read(shared / "data/planning" / name), drawn(task)

    def shape(text):
        plain = re.sub(r"\d+", "n", text) if not isinstance(task, Satisfiability) else re.sub(r"\w", "v", text)
        return re.sub(r"[-+*/](?=n=)", "?", plain)

    for part in (0, 1):
        assert {shape(one[part]) for one in public} == {shape(one[part]) for one in own}
        assert set("".join(one[part] for one in public)) <= set(task.alphabet)
        assert abs(_mean(public, part) - _mean(own, part)) < 2


def _mean(found, part):
    return sum(len(one[part]) for one in found) / len(found)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_generated_examples_are_correct_and_fit(task):
    found = drawn(task)
    assert len({one.prompt for one in found}) > QUICK // 2
    for one in found:
        assert task.verify(*one)
        assert set(one.prompt + one.answer) <= set(task.alphabet)
        assert len(one.prompt) <= task.max_lengths[0] and len(one.answer) <= task.max_lengths[1]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_max_lengths_are_reached(task):
    found = drawn(task, 500)
    assert max(len(one.prompt) for one in found) == task.max_lengths[0]
    assert max(len(one.answer) for one in found) >= task.max_lengths[1] - 2  # or nearly


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_a_changed_answer_is_wrong(task):
    """Answers with one character changed, removed or doubled. (Of 3-SAT several assignments may be correct.)"""
    rng = random.Random(0)
    for one in drawn(task, 20):
        at = rng.randrange(len(one.answer))
        others = [c for c in task.alphabet if c != one.answer[at]]
        for middle in ("", one.answer[at] * 2, rng.choice(others)):
            changed = one.answer[:at] + middle + one.answer[at + 1 :]
            assert not task.verify(one.prompt, changed) or isinstance(task, Satisfiability), changed
        for nothing in ("", one.prompt, one.answer + "\n", one.answer + ",", "x" * len(one.answer)):
            assert not task.verify(one.prompt, nothing) or nothing == one.answer


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_training_shares_no_split_key_with_the_test_split(task):
    tests = base.test_examples(task, 7, 20)
    keys = {task.split_key(one) for one in tests}
    prompts = {one.prompt for one in tests}
    assert len(prompts) == 20
    for seed in (0, 7):
        training = drawn(task, 300, seed)
        assert not keys & {task.split_key(one) for one in training}
        assert not prompts & {one.prompt for one in training}


@pytest.mark.parametrize("name", ["cd3_sample.jsonl", "path_sample.jsonl"])
def test_training_shares_no_split_key_with_a_public_test(name, shared):
    task = PUBLIC[name]
    public = task.read(shared / "data/planning" / name)
    keys = {task.split_key(one) for one in public}
    training = drawn(task, 300, exclude=base.split_hashes(task, public))
    assert not keys & {task.split_key(one) for one in training}


def test_public_targets_occur_in_training_unless_excluded(shared):
    task = Countdown(numbers=3)
    public = task.read(shared / "data/planning/cd3_sample.jsonl")
    assert {task.split_key(one) for one in public} & {task.split_key(one) for one in drawn(task, 300)}


@pytest.mark.parametrize("task", TASKS, ids=str)
@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_together_generate_the_examples_of_one(task, hosts):
    apart = [drawn(task, 4, 3, start=host, step=hosts) for host in range(hosts)]
    assert [one for turn in zip(*apart, strict=True) for one in turn] == drawn(task, 4 * hosts, 3)
    assert drawn(task, 12, 4) != drawn(task, 12, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sudoku(size=9, least=16),
        lambda: Sudoku(size=5),
        lambda: Sudoku(size=4, least=9, most=8),
        lambda: Countdown(numbers=1),
        lambda: Satisfiability(variables=6),
        lambda: Satisfiability(variables=3, clauses=8),
        lambda: PathPlanning(nodes=10),
        lambda: PathPlanning(length=2),
        lambda: Queens(size=8, given=8),
        lambda: Queens(size=3),
    ],
)
def test_an_impossible_difficulty_is_refused(make):
    with pytest.raises(ValueError, match=r"task\.|clauses"):
        make()


@pytest.mark.parametrize("text", ['{"input": "3,5,2", "output": "3+5=9"}', '{"question": "3,5"}', "3,5,8", ""])
def test_a_file_of_another_task_is_refused(text, tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"test\.jsonl"):
        Countdown(numbers=2).read(path)


def test_too_few_test_examples_are_an_error():
    with pytest.raises(ValueError, match="ask for fewer"):
        base.test_examples(Queens(size=6, given=1), 0, 50)


class TestCountdown:
    task = Countdown(numbers=3)

    @pytest.mark.parametrize("answer", ["5+3=8,8*2=16", "3+5=8,2*8=16", "3*5=15,15+1=16", "5+3=8,16/2=8"])
    def test_other_solutions_count_and_false_ones_do_not(self, answer):
        assert self.task.verify("3,5,2,16", answer) == answer.startswith(("5+3=8,8", "3+5=8,2"))

    @pytest.mark.parametrize("answer", ["3-5=-2,-2+2=0", "2/5=0,3+0=3", "5-3=2,2/2=1", "5/5=1,1+2=3", "05-3=2,2/2=1"])
    def test_results_are_positive_integers_and_numbers_used_once(self, answer):
        assert self.task.verify("3,5,2,1", answer) == (answer == "5-3=2,2/2=1")

    def test_equal_numbers_are_used_as_often_as_given(self):
        assert self.task.verify("4,4,2,6", "4/4=1,1*2=2") is False
        assert self.task.verify("4,4,2,10", "4+4=8,8+2=10")
        assert not self.task.verify("4,2,3,11", "4+4=8,8+3=11")


class TestSatisfiability:
    @pytest.mark.parametrize("variables", [5, 7, 9])
    def test_an_assignment_is_correct_if_no_clause_is_false(self, variables):
        """Against enumeration: correct assignments are those where no clause has only false literals."""
        task = Satisfiability(variables=variables)
        signs = dict(zip(task.literals, task.literals[variables:] + task.literals[:variables], strict=True))
        one = drawn(task, 1)[0]
        right = 0
        for choice in itertools.product(*(task.literals[v::variables] for v in range(variables))):
            false = any(all(signs[literal] in choice for literal in clause.split(",")) for clause in one[0].split("/"))
            assert task.verify(one.prompt, ",".join(choice)) == (not false)
            right += not false
        assert 1 <= right <= 12


class TestPath:
    def test_the_shared_node_lies_at_any_depth(self):
        met = Counter()
        for one in drawn(PathPlanning(), 600):
            edges = [edge.split(",") for edge in one.prompt.split("-")[0].split("/")]
            froms, tos = Counter(a for a, _ in edges), Counter(b for _, b in edges)
            (shared,) = {node for node in froms | tos if froms[node] == 2 or tos[node] == 2}
            way = [one.answer.split(",")[0], *(edge.split(",")[1] for edge in one.answer.split("/"))]
            met[way.index(shared)] += 1
            assert len(edges) == 10 and len(set(froms | tos)) == 11 and len(way) == 6
        assert set(met) == set(range(6)) and min(met.values()) > 60

    def test_a_path_with_a_missing_edge_or_another_end_is_wrong(self):
        task, prompt = PathPlanning(nodes=5, length=3), "0,1/1,2/3,1/1,4-0,4"
        assert task.verify(prompt, "0,1/1,4")
        for wrong in ("0,1/1,2", "3,1/1,4", "0,1/3,1/1,4", "0,4", "1,4", "0,1", "1,4/0,1", "0,1/1,4/"):
            assert not task.verify(prompt, wrong)


class TestQueens:
    def test_any_completion_is_correct(self):
        task = Queens(size=6, given=0)
        right = [c for c in map("".join, itertools.permutations("123456")) if task.verify("000000", c)]
        assert len(right) == 4 and not task.verify("100000", right[0])
