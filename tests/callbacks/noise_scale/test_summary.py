"""The few lines at the end of a fit."""

from __future__ import annotations

import math
from dataclasses import replace

from helpers.made_up_estimates import make_advice, make_estimate

from lightning_wn.callbacks.noise_scale.summary import fit_summary
from lightning_wn.noise_scale.samples import Rejection

NOTHING = dict.fromkeys(Rejection, 0)


def summary_of(advice, rejected=NOTHING, every_n_steps=10, **arguments):
    return fit_summary(advice, rejected, every_n_steps, **arguments).splitlines()


def test_three_lines():
    advice = replace(make_advice(128.0, 110.0, 150.0), doubts=())
    measured, suggestion, rest = summary_of(advice)
    assert measured.startswith("Gradient noise scale 128 examples (95 % interval 110 to 150; ")
    assert measured.endswith("by the probe 'micro_batch' on one optimizer step in 10.")
    assert suggestion.startswith("Try a batch size of 128 examples: ")
    assert rest == "`print(callback.advise())` says more: other batch sizes, in hours too, how sure it is."


def test_doubts_are_counted():
    advice = make_advice(128.0, 110.0, 150.0)
    for count, words in ((1, "how sure it is and 1 reason for doubt."), (3, "how sure it is and 3 reasons for doubt.")):
        assert summary_of(replace(advice, doubts=("Why.",) * count))[-1].endswith(words)


def test_what_was_left_out_and_parts_have_a_line_each():
    advice = make_advice(128.0, 110.0, 150.0)
    rejected = NOTHING | {Rejection.NON_FINITE: 4, Rejection.SINGLE_SAMPLE: 1}
    others = {"head": make_estimate(50.0, 40.0, 60.0), "body": make_estimate(200.0, 0.0, math.inf)}
    _, parts, left_out, _, _ = summary_of(advice, rejected, others=others, unread=95)
    assert parts == "Of its parts: head 50 (40 to 60); body 200 (0 to inf)."
    assert left_out == (
        "Optimizer steps that were left out, 20% of those looked at: 1 that had a single gradient sample, 4 that had "
        "NaN or infinite gradients, 95 that could not be read by the probe."
    )


def test_several_optimizers_are_named():
    lines = summary_of(make_advice(128.0), optimizer=1)
    assert lines[0].startswith("Optimizer 1: gradient noise scale 128 examples")
    assert lines[-1].startswith("`print(callback.advise(1))` says more")


def test_an_infinite_noise_scale_says_how_large_it_is_at_least():
    _, suggestion, _ = summary_of(make_advice(math.inf, 140.0, math.inf))
    assert suggestion == (
        "No advice on the batch size: |G|² is not above zero yet; measure more steps. The noise scale is "
        "probably above 140 examples."
    )


def test_nothing_measured_is_one_line_and_what_was_left_out():
    advice = make_advice(math.nan, 0.0, math.inf, batch_size=math.nan, num_measurements=0)
    assert summary_of(advice, NOTHING | {Rejection.MISMATCH: 7}, 1) == [
        "Gradient noise scale not measured yet, by the probe 'micro_batch' on every optimizer step.",
        "Optimizer steps that were left out, 100% of those looked at: 7 that had samples that do not add up to the "
        "optimizer's gradient.",
    ]
    assert "not measured yet" in advice.suggestion
