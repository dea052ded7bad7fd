"""Step selections against their contract."""

import math

import pytest

from visalign.samplers.steps import (
    STEP_SELECTIONS,
    AllSteps,
    NoSteps,
    ProgressiveWindow,
    RandomTail,
    RandomWindow,
    SingleStep,
    Tail,
    Window,
    build_selection,
)

SELECTIONS = [
    AllSteps(), Window(1, 3), RandomWindow(2), RandomWindow(3, 0, 5), SingleStep(4), SingleStep(), ProgressiveWindow(4, 3),
    ProgressiveWindow(4, 3, stride=2), ProgressiveWindow(3, 10, strategy="decay"), ProgressiveWindow(3, 10, strategy="exp_decay"),
    ProgressiveWindow(3, 2, strategy="random"),
]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selections_are_ascending_deterministic_and_leave_out_the_last_step(selection):
    for num_steps in (6, 10, 25):
        for iteration in range(120):
            steps = selection.select(num_steps, iteration, seed=3)
            assert list(steps) == sorted(set(steps))
            assert steps
            assert all(0 <= step <= num_steps - 2 for step in steps)
            assert steps == selection.select(num_steps, iteration, seed=3)


def test_plain_selections():
    assert AllSteps().select(5, 0, 0) == (0, 1, 2, 3)
    assert Window(1, 4).select(5, 7, 0) == (1, 2, 3)
    assert SingleStep(3).select(5, 7, 0) == (3,)


def test_random_windows_visit_every_position_evenly():
    """4 positions, 4000 iterations: a count has standard deviation 27; five of them allowed."""
    counts: dict[tuple[int, ...], int] = {}
    for iteration in range(4000):
        steps = RandomWindow(size=2, start=1, end=6).select(10, iteration, seed=0)
        counts[steps] = counts.get(steps, 0) + 1
    assert sorted(counts) == [(1, 2), (2, 3), (3, 4), (4, 5)]
    assert all(abs(count - 1000) < 137 for count in counts.values())


def test_random_single_steps_reach_the_last_trainable_one_and_depend_on_the_seed():
    drawn = [SingleStep().select(5, iteration, seed=0) for iteration in range(100)]
    assert set(drawn) == {(0,), (1,), (2,), (3,)}
    assert drawn != [SingleStep().select(5, iteration, seed=1) for iteration in range(100)]


def test_progressive_window_advances_reaches_the_last_trainable_step_and_starts_over():
    window = ProgressiveWindow(size=4, interval=25, stride=1)
    first = [window.select(25, iteration, 0)[0] for iteration in range(21 * 25 + 1)]
    assert first[:25] == [0] * 25
    assert first[25] == 1
    assert first[20 * 25:21 * 25] == [20] * 25
    assert window.select(25, 20 * 25, 0) == (20, 21, 22, 23)
    assert first[21 * 25] == 0


def test_progressive_window_with_a_stride_that_does_not_divide_still_ends_at_the_last_trainable_step():
    starts = [ProgressiveWindow(size=4, interval=1, stride=3).select(10, iteration, 0)[0] for iteration in range(4)]
    assert starts == [0, 3, 5, 0]


def test_decay_shortens_late_positions_linearly():
    window = ProgressiveWindow(size=4, interval=10, final_interval=1, strategy="decay")
    starts = [window.select(25, iteration, 0)[0] for iteration in range(400)]
    cycle = starts[:starts.index(0, 11)]
    assert [cycle.count(position) for position in range(21)] == [max(1, round(10 - 9 * position / 23)) for position in range(21)]
    assert starts[len(cycle):2 * len(cycle)] == cycle


def test_exponential_decay_starts_at_its_step():
    window = ProgressiveWindow(size=4, interval=20, strategy="exp_decay")
    starts = [window.select(25, iteration, 0)[0] for iteration in range(500)]
    counts = [starts[:starts.index(0, 21)].count(position) for position in range(21)]
    assert counts == [math.ceil(20 * math.exp(-0.1 * max(0, position - 13))) for position in range(21)]
    assert counts[13] == 20
    assert counts[20] == 10


def test_random_strategy_keeps_its_window_for_an_interval_and_reaches_both_ends():
    starts = [ProgressiveWindow(size=4, interval=5, strategy="random").select(10, iteration, 0)[0] for iteration in range(500)]
    assert all(len(set(starts[i:i + 5])) == 1 for i in range(0, 500, 5))
    assert set(starts) == set(range(6))


@pytest.mark.parametrize("selection", [
    Window(0, 10), Window(3, 3), Window(-1, 2), Window(4, 2), RandomWindow(10), RandomWindow(3, 0, 2),
    RandomWindow(2, 0, 10), RandomWindow(0), SingleStep(9), SingleStep(-1), ProgressiveWindow(10),
])
def test_windows_that_do_not_fit_are_refused(selection):
    with pytest.raises(ValueError, match=r"does not fit 10 sampler steps.*the last step is always deterministic"):
        selection.select(10, 0, 0)


@pytest.mark.parametrize("selection", [AllSteps(), SingleStep(), RandomWindow(1), ProgressiveWindow(1)])
def test_one_sampler_step_leaves_nothing_to_train(selection):
    with pytest.raises(ValueError, match="use at least 2"):
        selection.select(1, 0, 0)


@pytest.mark.parametrize("name", STEP_SELECTIONS)
def test_only_tails_are_deterministic(name):
    assert STEP_SELECTIONS[name].stochastic == ("tail" not in name)


def test_a_tail_leaves_its_number_of_steps():
    assert [Tail(last).select(10, 3, 0) for last in (1, 4, 10)] == [(9,), (6,), (0,)]


def test_random_tails_are_uniform_over_their_range_and_reach_the_last_step():
    """10 positions, 5000 iterations: a count has standard deviation 21; five of them allowed."""
    drawn = [RandomTail(30, 40).select(40, iteration, seed=0)[0] for iteration in range(5000)]
    assert set(drawn) == set(range(30, 40))
    assert all(abs(drawn.count(step) - 500) < 106 for step in range(30, 40))
    assert {RandomTail().select(4, iteration, seed=0) for iteration in range(100)} == {(0,), (1,), (2,), (3,)}
    assert [RandomTail().select(40, i, seed=1) for i in range(9)] != [RandomTail().select(40, i, seed=0) for i in range(9)]


@pytest.mark.parametrize("selection", [Tail(0), Tail(11), RandomTail(-1), RandomTail(3, 3), RandomTail(0, 11), RandomTail(10)])
def test_tails_that_do_not_fit_are_refused(selection):
    with pytest.raises(ValueError, match="does not fit 10 sampler steps: it needs"):
        selection.select(10, 0, 0)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ProgressiveWindow(size=0), "ProgressiveWindow.size must be at least 1"),
    (lambda: ProgressiveWindow(stride=0), "ProgressiveWindow.stride"),
    (lambda: ProgressiveWindow(strategy="forward"), "use progressive, random, decay or exp_decay"),
])
def test_parameters_are_checked_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_building_by_name():
    assert build_selection("window", start=0, end=3) == Window(0, 3)
    assert build_selection("single") == SingleStep()
    assert build_selection("none") == NoSteps()
    assert set(STEP_SELECTIONS) == {"none", "all", "window", "random_window", "single", "progressive_window", "tail", "random_tail"}


@pytest.mark.parametrize(("build", "message"), [
    (lambda: build_selection("windows"), "unknown step selection 'windows'"),
    (lambda: build_selection("window", start=0), "takes start, end; got .*missing"),
])
def test_building_errors_teach(build, message):
    with pytest.raises(ValueError, match=message):
        build()
