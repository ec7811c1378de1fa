import json

import matplotlib.image


def test_the_comparison_runs_from_end_to_end(run_example):
    finished = run_example("weight_norm_vs_batch_norm.py", "--quick", afresh=False)
    results = json.loads((finished.folder / "results.json").read_text())
    assert list(results) == ["plain", "wn", "wn_data", "wn_mean_only", "batch_norm"]
    for result in results.values():
        assert result["learning_rate"] == 0.003
        (curve,) = result["curves"]
        assert [len(series) for series in curve.values()] == [2] * 4
        assert 0 < curve["seconds"][0] < curve["seconds"][1]
        assert all(0 <= error <= 100 for error in curve["error"])
    # data-dependent initialization is seen in the first epochs already
    assert results["wn_data"]["curves"][0]["loss"][1] < results["wn"]["curves"][0]["loss"][1]
    assert finished.stdout.count("\n| ") == 6
    height, width = matplotlib.image.imread(finished.folder / "curves.png").shape[:2]
    assert 1000 < width < 2000
    assert 600 < height < 1200
