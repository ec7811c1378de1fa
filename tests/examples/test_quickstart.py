def test_quickstart_shows_a_newcomer_what_is_promised(run_example):
    finished = run_example("quickstart.py", "--max-epochs=3")
    finished.require_results()
    assert "135 measurements" in finished.stdout, "3 epochs of 179 micro-batches, 4 to a step"
