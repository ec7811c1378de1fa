import csv
import math
import random
import re

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_wn.__main__ import main
from lightning_wn.reports.history import read_history

NAMES = ("noise_scale", "noise_scale_lower", "noise_scale_upper", "grad_sq_norm", "cov_trace", "batch_size")


def rows_of(count, prefix="gns"):
    """A run on the power law B = 60 / loss³."""
    rng = random.Random(0)
    for i in range(count):
        loss = 2 * (1 + i / (count / 20)) ** -0.3
        value = 60 / loss**3 * math.exp(rng.gauss(0, 0.05))
        numbers = (value, 0.8 * value, 1.3 * value if i > 2 else math.inf, 0.01 * loss, 0.01 * loss * value, 32.0)
        yield 10 * i + 9, {"train_loss": loss} | {f"{prefix}/{n}": x for n, x in zip(NAMES, numbers, strict=True)}


def log_run(logger, count=60, **kwargs):
    for step, values in rows_of(count, **kwargs):
        loss = values.pop("train_loss")
        # Lightning writes them apart
        logger.log_metrics({"train_loss": loss}, step=step)
        logger.log_metrics(values, step=step)
    logger.save()
    return logger.log_dir


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_reads_either_logger(kind, tmp_path, capsys):
    logger = kind(tmp_path, name="run")
    folder = log_run(logger)
    logger.finalize("success")
    history = read_history(folder)
    assert history["step"] == [10 * i + 9 for i in range(60)]
    # event files hold 32 bits
    assert history["gns/noise_scale"][-1] == pytest.approx(list(rows_of(60))[-1][1]["gns/noise_scale"], rel=1e-6)
    assert math.isinf(history["gns/noise_scale_upper"][0])
    output = tmp_path / "report.html"
    assert main(["report", str(folder), "--output", str(output), "--accumulate", "4"]) == 0
    assert str(output) in capsys.readouterr().out
    page = output.read_text(encoding="utf-8")
    assert "accumulate_grad_batches=" in page
    assert "instead of 4" in page
    assert "<code>target=0.1</code>" in page
    assert "`" not in page
    # only what differs from now has an interval
    assert "<td>x1</td><td>x1</td>" in page
    assert len(re.findall(r"<td>x[\d.]+ \([\d.]+ to [\d.]+\)</td>", page)) == 2 * (page.count("<tr>") - 2)
    assert page.count("<td>now</td></tr>") == page.count("<td>suggested</td></tr>") == 1
    assert "Gradient noise scale of run/version_0</h1>" in page
    # one file for light and dark, and nothing from elsewhere
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"(src|href|srcset)=\"(?!data:)", page)
    assert "http" not in re.sub(r"base64,[\w+/=]*", "", page)


def test_the_folder_above_a_single_run_will_do(tmp_path):
    folder = log_run(CSVLogger(tmp_path, name="run"))
    assert read_history(tmp_path) == read_history(folder)
    log_run(CSVLogger(tmp_path, name="run"))
    with pytest.raises(ValueError, match="holds 2 runs; give the folder of one"):
        read_history(tmp_path)


def test_100_000_points_make_a_small_page(tmp_path):
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["step", "train_loss", *(f"gns/{name}" for name in NAMES)])
        table.writeheader()
        for step, values in rows_of(100_000):
            table.writerow({"step": step, **values})
    output = tmp_path / "report.html"
    assert main(["report", str(tmp_path), "--output", str(output)]) == 0
    assert output.stat().st_size < 1_500_000
    assert "100,000 logged points" in output.read_text(encoding="utf-8")


def test_names_from_outside_are_escaped(tmp_path):
    folder = log_run(CSVLogger(tmp_path, name="run", version="<b>bold"))
    output = tmp_path / "report.html"
    assert main(["report", folder, "--output", str(output), "--unit", "<i>tokens"]) == 0
    page = output.read_text(encoding="utf-8")
    assert "<b>bold" not in page
    assert "<i>tokens" not in page
    assert "&lt;i&gt;tokens" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "There is no folder"),
        (["."], "holds neither `metrics.csv` nor TensorBoard's event files"),
        (["run", "--prefix", "other"], "no key that starts with 'other/'"),
        (["run", "--target", "0"], "`target` must be a positive number"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "run":
        log_run(CSVLogger(tmp_path, name="run"), 5)
    assert main(["report", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_a_run_without_an_end_of_its_interval_says_so(tmp_path):
    logger = CSVLogger(tmp_path, name="run")
    numbers = {f"gns/{name}": 1.0 for name in NAMES} | {"gns/noise_scale": math.inf, "gns/noise_scale_upper": math.inf}
    logger.log_metrics(numbers, step=3)
    logger.save()
    output = tmp_path / "report.html"
    assert main(["report", logger.log_dir, "--output", str(output)]) == 0
    page = output.read_text(encoding="utf-8")
    assert "No advice on the batch size" in page


def test_a_step_that_was_logged_twice_counts_once(tmp_path):
    logger = CSVLogger(tmp_path, name="run")
    for value in (1.0, 2.0):
        logger.log_metrics({"gns/noise_scale": value}, step=3)
    logger.save()
    assert read_history(logger.log_dir) == {"step": [3.0], "gns/noise_scale": [2.0]}
