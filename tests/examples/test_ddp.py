def test_ddp_measures_over_two_ranks_and_ends_cleanly(run_example):
    finished = run_example("ddp.py", "--max-epochs=3")
    finished.require_results()
    # 2 ranks of 89 micro-batches, 2 to a step on each
    assert "135 measurements, batch size 32" in finished.stdout
    assert finished.stdout.count("Validation accuracy") == 1, "only rank 0 reports"
