"""The queue alone, without HTTP: what shares a call, what fails apart, what is turned away. Time is given, never waited for."""

import asyncio
import threading

import pytest
import torch

from visalign.protocols import RewardSpec
from visalign.rewards.function import FunctionReward
from visalign.rewards.pairwise import BradleyTerry
from visalign.serving.batching import Batcher, OverloadedError
from visalign.serving.settings import ServerConfig
from visalign.types import Media, Prompt, Scores
from visalign.wire.rows import PairRow, ScoreRow

LONG = 60_000.0  # milliseconds that no test lives to see


def image(level):
    return Media("image", torch.full((3, 2, 2), level, dtype=torch.uint8))


def rows(*levels, group=0, prompt=None):
    prompt = prompt or Prompt("a")
    return [ScoreRow(image(level), prompt, group) for level in levels]


class Recording:
    """Scores the level of an image and remembers the levels and groups of every call; ``gate`` holds calls back until it is set."""

    def __init__(self, arity="pointwise", poison=None, gate=None):
        self.spec = RewardSpec(name="level", arity=arity)
        self.calls, self.groups, self.threads = [], [], set()
        self.poison, self.gate, self.entered = poison, gate, threading.Event()

    def score(self, media, prompts, group_id):
        levels = [int(one.data[0, 0, 0]) for one in media]
        self.calls.append(levels)
        self.groups.append(list(group_id))
        self.threads.add(threading.get_ident())
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(60)
        if self.poison is not None:
            self.poison(levels)
        return Scores.from_values([float(level) for level in levels], details={"double": torch.tensor([2.0 * level for level in levels])})


def serve(reward, *questions, together=True, **settings):
    """Answers (or exceptions) to questions that wait at the same time."""
    batcher = Batcher("level", reward, ServerConfig(**{"max_wait_ms": LONG if together else 0.0, **settings}))

    async def main():
        asked = [asyncio.ensure_future(batcher.ask(question)) for question in questions]
        await asyncio.sleep(0)  # all of them are in the queue
        worker = asyncio.create_task(batcher.run())
        answers = await asyncio.gather(*asked, return_exceptions=True)
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)
        return answers

    return asyncio.run(main())


def test_what_waits_together_is_scored_in_one_call_and_everyone_gets_their_own():
    reward = Recording()
    one, two, three = serve(reward, rows(1, 2), rows(3), rows(4, 5, 6), max_batch=6)
    assert reward.calls == [[1, 2, 3, 4, 5, 6]]
    assert [answer.raw.tolist() for answer in (one, two, three)] == [[1, 2], [3], [4, 5, 6]]
    assert three.details["double"].tolist() == [8, 10, 12]


def test_a_call_never_holds_more_than_it_may_and_a_request_is_not_torn_to_fill_it():
    reward = Recording()
    answers = serve(reward, rows(1, 2, 3), rows(4, 5), rows(6), together=False, max_batch=4)
    assert reward.calls == [[1, 2, 3], [4, 5, 6]]
    assert [answer.raw.tolist() for answer in answers] == [[1, 2, 3], [4, 5], [6]]


def test_large_requests_are_cut_and_full_parts_go_alone():
    """So that what one client gets does not depend on who else asks."""
    reward = Recording()
    answers = serve(reward, rows(*range(10)), rows(100), together=False, max_batch=4)
    assert reward.calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 100]]
    assert answers[0].raw.tolist() == list(range(10))


def test_a_call_waits_for_company_but_not_for_ever():
    reward = Recording()
    batcher = Batcher("level", reward, ServerConfig(max_wait_ms=1.0, max_batch=100))

    async def main():
        worker = asyncio.create_task(batcher.run())
        alone = await batcher.ask(rows(1))
        worker.cancel()
        return alone

    assert asyncio.run(main()).raw.tolist() == [1]
    assert (batcher.num_calls, batcher.num_rows) == (1, 1)


def test_a_reward_is_called_by_one_thread():
    reward = Recording()
    serve(reward, *(rows(level) for level in range(20)), together=False, max_batch=3)
    assert len(reward.threads) == 1
    assert threading.get_ident() not in reward.threads
    assert max(map(len, reward.calls)) == 3


def test_groups_of_a_groupwise_reward_stay_whole_and_apart():
    """Two requests with a group 0 each; groups of one request are interleaved."""
    reward = Recording(arity="groupwise")
    a, b = Prompt("a"), Prompt("b")
    mixed = [row for pair in zip(rows(1, 2, 3, group=0, prompt=a), rows(11, 12, 13, group=1, prompt=b), strict=True) for row in pair]
    answers = serve(reward, mixed, rows(21, 22, group=0, prompt=b), together=False, max_batch=5)
    assert reward.calls == [[1, 2, 3], [11, 12, 13, 21, 22]]
    assert [len(set(groups)) for groups in reward.groups] == [1, 2]
    assert answers[0].raw.tolist() == [1, 11, 2, 12, 3, 13]


def test_groups_of_two_requests_are_two_groups_whatever_their_numbers():
    reward = Recording(arity="groupwise")
    serve(reward, rows(1, 2, group=0), rows(3, 4, group=0), max_batch=4)
    assert reward.calls == [[1, 2, 3, 4]]
    assert reward.groups == [[0, 0, 1, 1]]


# --- failures ---------------------------------------------------------------------------------------------------------------------


def hates(*bad, error=ZeroDivisionError):
    def poison(levels):
        if set(levels) & set(bad):
            raise error("inside")

    return poison


def test_a_poisoned_sample_stands_alone(caplog):
    """Its request and its neighbours' get their scores; it is invalid with its reason; the log has the traceback."""
    reward = Recording(poison=hates(5))
    one, two, three = serve(reward, rows(1, 2), rows(3, 4, 5, 6), rows(7), max_batch=7)
    assert [answer.raw.tolist() for answer in (one, three)] == [[1, 2], [7]]
    assert two.valid.tolist() == [True, True, False, True]
    assert two.reasons == (None, None, "raised ZeroDivisionError", None)
    assert two.details["double"][torch.tensor([0, 1, 3])].tolist() == [6, 8, 12]
    assert "ZeroDivisionError: inside" in caplog.text
    assert len(reward.calls) < 9


def test_a_broken_reward_gives_no_score_for_anything():
    answer, = serve(Recording(poison=hates(*range(20))), rows(*range(5)), together=False)
    assert not answer.valid.any()
    assert set(answer.reasons) == {"raised ZeroDivisionError"}


def test_a_poisoned_group_takes_no_other_with_it():
    reward = Recording(arity="groupwise", poison=hates(2))
    one, two = serve(reward, rows(1, 2, group=7), rows(3, 4, group=7), max_batch=4)
    assert one.reasons == ("raised ZeroDivisionError",) * 2
    assert two.raw.tolist() == [3, 4]


def test_too_large_a_batch_for_the_memory_is_halved():
    def out_of_memory(levels):
        if len(levels) > 2:
            raise RuntimeError("CUDA out of memory")

    answer, = serve(Recording(poison=out_of_memory), rows(*range(8)), together=False)
    assert answer.raw.tolist() == list(range(8))


def test_a_complaint_about_the_request_is_its_own_alone():
    """A ValueError says that the caller is wrong; it ends the caller's run, not its neighbours' requests."""
    bad, good = serve(Recording(poison=hates(1, error=ValueError)), rows(1, 2), rows(3), max_batch=3)
    assert isinstance(bad, ValueError)
    assert str(bad) == "inside"
    assert good.raw.tolist() == [3]


def test_an_answer_of_another_length_is_refused():
    class Short(Recording):
        def score(self, media, prompts, group_id):
            return Scores.from_values([1.0])

    answer, = serve(Short(), rows(1, 2), together=False)
    assert isinstance(answer, ValueError)
    assert "returned 1 scores for 2 samples" in str(answer)


def test_pairs_are_compared_and_fail_alone():
    level = FunctionReward(lambda media, prompts: [float(one.data[0, 0, 0]) for one in media], name="level")

    class Picky(BradleyTerry):
        def compare(self, first, second, prompts):
            if any(int(one.data[0, 0, 0]) == 9 for one in first):
                raise RuntimeError("nine")
            return super().compare(first, second, prompts)

    a, b, c, prompt = image(1), image(2), image(9), Prompt("a")
    one, two = serve(Picky(level), [PairRow(a, b, prompt), PairRow(c, a, prompt)], [PairRow(b, a, prompt)], max_batch=3)
    assert one.raw[0] == pytest.approx(1 / (1 + torch.e), abs=1e-6)
    assert two.raw[0] == pytest.approx(1 - 1 / (1 + torch.e), abs=1e-6)
    assert one.reasons == (None, "raised RuntimeError")


# --- load -------------------------------------------------------------------------------------------------------------------------


def test_what_there_is_no_room_for_is_turned_away_and_the_rest_is_served():
    reward = Recording()
    answers = serve(reward, rows(1, 2), rows(3), rows(4, 5), rows(6), together=False, max_waiting=3)
    assert [getattr(answer, "retry_after", None) for answer in answers] == [None, None, 1, 1]
    assert sorted(level for call in reward.calls for level in call) == [1, 2, 3]


def test_an_empty_queue_takes_any_request():
    answer, = serve(Recording(), rows(*range(9)), together=False, max_waiting=3)
    assert answer.raw.tolist() == list(range(9))


def test_who_waited_too_long_is_turned_away_without_being_scored():
    """The reward is held back until the second request has been given up."""
    gate = threading.Event()
    reward = Recording(gate=gate)
    batcher = Batcher("level", reward, ServerConfig(max_wait_ms=0.0, max_batch=1, queue_timeout=0.05))

    async def main():
        worker = asyncio.create_task(batcher.run())
        first = asyncio.ensure_future(batcher.ask(rows(1)))
        await asyncio.get_running_loop().run_in_executor(None, reward.entered.wait)
        with pytest.raises(OverloadedError, match=r"busy with others for 0.05 s"):
            await batcher.ask(rows(2, 3))
        gate.set()
        answer = await first
        worker.cancel()
        return answer

    assert asyncio.run(main()).raw.tolist() == [1]
    assert reward.calls == [[1]]
    assert batcher.waiting == 0


def test_who_has_gone_is_not_worked_for():
    gate = threading.Event()
    reward = Recording(gate=gate)
    batcher = Batcher("level", reward, ServerConfig(max_wait_ms=0.0, max_batch=1))

    async def main():
        worker = asyncio.create_task(batcher.run())
        first = asyncio.ensure_future(batcher.ask(rows(1)))
        await asyncio.get_running_loop().run_in_executor(None, reward.entered.wait)
        leaving = asyncio.ensure_future(batcher.ask(rows(2)))
        staying = asyncio.ensure_future(batcher.ask(rows(3)))
        await asyncio.sleep(0)
        leaving.cancel()
        first.cancel()  # under way: its answer is thrown away
        gate.set()
        answer = await staying
        worker.cancel()
        return answer

    assert asyncio.run(main()).raw.tolist() == [3]
    assert reward.calls == [[1], [3]]


def test_a_request_without_samples_is_refused():
    answer, = serve(Recording(), [], together=False)
    assert "without samples" in str(answer)
