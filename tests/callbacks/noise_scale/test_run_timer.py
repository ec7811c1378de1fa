import pytest

from lightning_wn.callbacks.noise_scale.run_timer import RunTimer


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def train(
    timer, clock, windows, *, micro_batches=4, micro_batch=0.5, step=0.25, loading=0.125, measured=False, full=True
):
    """Play windows of a run whose every part takes a known time."""
    for _ in range(windows):
        for i in range(micro_batches):
            timer.start_batch(first=i == 0)
            clock.now += micro_batch - loading
            if i == micro_batches - 1:
                timer.before_step()
                clock.now += step
                timer.end_window(full=full, measured=measured)
            clock.now += loading


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def timer(clock):
    return RunTimer(clock=clock)


def test_tells_micro_batches_from_the_step(timer, clock):
    train(timer, clock, 30)
    time = timer.run_time()
    assert (time.micro_batch_seconds, time.step_seconds) == pytest.approx((0.5, 0.25))
    assert (time.is_split, time.includes_measuring) == (True, False)
    assert time.seconds(4) == pytest.approx(2.25)


def test_without_accumulation_what_is_not_forward_and_backward_is_the_step(timer, clock):
    train(timer, clock, 30, micro_batches=1)
    time = timer.run_time()
    assert time.seconds(1) == pytest.approx(0.75), "nothing is lost"
    assert time.micro_batch_seconds == pytest.approx(0.375)


def test_windows_of_changing_length_tell_the_same(timer, clock):
    for micro_batches in (4, 8, 2, 4):
        train(timer, clock, 6, micro_batches=micro_batches)
    time = timer.run_time()
    assert (time.micro_batch_seconds, time.step_seconds) == pytest.approx((0.5, 0.25))


def test_slow_first_steps_and_rare_events_leave_no_trace(timer, clock):
    train(timer, clock, 5, micro_batch=20.0)
    train(timer, clock, 10)
    train(timer, clock, 1, step=500.0)  # a checkpoint
    train(timer, clock, 10)
    assert timer.run_time().seconds(4) == pytest.approx(2.25)


def test_validation_is_left_out(timer, clock):
    for _ in range(10):
        train(timer, clock, 3)
        timer.interrupt()
        clock.now += 1000.0
    time = timer.run_time()
    assert time.seconds(4) == pytest.approx(2.25)
    assert time.num_steps == 25, "a window before validation counts"


def test_validation_in_the_middle_of_a_window_spoils_that_window(timer, clock):
    train(timer, clock, 10)
    timer.start_batch(first=True)
    timer.interrupt()
    clock.now += 1000.0
    timer.start_batch(first=False)
    timer.end_window(full=False, measured=False)
    train(timer, clock, 10)
    time = timer.run_time()
    assert (time.seconds(4), time.num_steps) == (pytest.approx(2.25), 14)


def test_short_windows_are_left_out(timer, clock):
    train(timer, clock, 30, micro_batches=1, full=False)
    assert timer.run_time() is None


def test_measured_steps_count_only_where_there_are_no_others(timer, clock):
    train(timer, clock, 20, micro_batch=0.75, measured=True)
    assert timer.run_time().includes_measuring
    assert timer.run_time().micro_batch_seconds == pytest.approx(0.75)
    train(timer, clock, 20)
    assert not timer.run_time().includes_measuring
    assert timer.run_time().micro_batch_seconds == pytest.approx(0.5)


def test_too_few_steps_give_no_time(timer, clock):
    train(timer, clock, 10)
    assert timer.run_time() is None, "the last window still waits for its end"
    train(timer, clock, 1)
    assert timer.run_time() is not None


def test_where_the_host_runs_ahead_only_the_sum_is_true(clock):
    """Most windows are handed over at once; every tenth waits for the device."""
    timer = RunTimer(runs_ahead=True, clock=clock)
    train(timer, clock, 5)
    for _ in range(20):
        train(timer, clock, 9, micro_batch=0.002, step=0.0, loading=0.001)
        train(timer, clock, 1, micro_batch=0.002, step=22.5 - 10 * 0.008, loading=0.001)
    timer.interrupt()
    time = timer.run_time()
    assert time.seconds(4) == pytest.approx(2.25, rel=1e-3)  # loading of the last batch is cut off
    assert not time.is_split
    assert time.step_seconds == 0


def test_what_happens_once_at_the_start_of_a_step_is_the_steps(timer, clock):
    """Gradients are zeroed in the first of four micro-batches."""
    for _ in range(20):
        for i in range(4):
            timer.start_batch(first=i == 0)
            clock.now += 0.75 if i == 0 else 0.5
        timer.end_window(full=True, measured=False)
        clock.now += 1.0
    time = timer.run_time()
    assert (time.micro_batch_seconds, time.step_seconds) == pytest.approx((0.5, 1.25))
