import csv
import itertools
import math

import matplotlib.image


def read_rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_adaptive_run_takes_fewer_steps_over_the_planned_data(run_example):
    finished = run_example("adaptive_batch_size.py", "--quick", afresh=False)
    assert not finished.stderr, finished.stderr
    ways = {row["way"]: {k: v if k == "way" else float(v) for k, v in row.items()} for row in
            read_rows(finished.folder / "summary.csv")}  # fmt: skip
    small, large, adaptive = (ways[name] for name in ("small", "large", "adaptive"))
    assert list(ways) == ["small", "large", "adaptive"]

    # 1600 sequences of 16 characters, 2 or 64 to a step, and 1.05 times as many
    assert (small["steps"], small["characters"]) == (800, 25_600)
    assert (large["steps"], large["characters"]) == (25, 25_600)
    assert adaptive["characters"] == 26_880
    assert adaptive["steps"] < 0.6 * small["steps"]
    assert small["smallest_batch"] == small["largest_batch"] == 2
    assert adaptive["smallest_batch"] >= 2
    assert adaptive["largest_batch"] >= 6

    # all have learned, and fewer steps by a batch size that is too large are what costs loss
    for row in ways.values():
        assert row["held_out_loss"] < math.log(128) - 1
        assert row["train_loss"] < math.log(128) - 1
    assert abs(adaptive["difference"]) < 0.5 * large["difference"]
    assert small["difference"] == small["difference_error"] == 0
    assert 0 < adaptive["difference_error"] < adaptive["held_out_loss_error"]

    points = [row for row in read_rows(finished.folder / "curves.csv") if row["way"] == "adaptive"]
    assert len(points) == 9
    for before, after in itertools.pairwise(points):
        sequences = (int(after["characters"]) - int(before["characters"])) / 16
        steps = int(after["steps"]) - int(before["steps"])
        # a window that is open at a point counts for the next one
        largest, smallest = int(after["batch_size"]), int(before["batch_size"])
        assert smallest <= largest
        assert smallest * (steps - 1) <= sequences <= largest * (steps + 1)

    assert finished.stdout.count("\n| ") == 4
    height, width = matplotlib.image.imread(finished.folder / "curves.png").shape[:2]
    assert 1000 < width < 2000
    assert 600 < height < 1200
