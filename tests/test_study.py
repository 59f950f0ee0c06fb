"""The robustness study: its runner, its commands on a toy track, its tables and sentences."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import study_jobs
import torch
from click.testing import CliRunner
from commands import ROOT
from study_results import made_up_result

pytest.importorskip("matplotlib")

from benchmarks.robustness import commands, evidence, findings, methods, study, summary, tables, tracks
from benchmarks.robustness.__main__ import main
from benchmarks.robustness.jobs import JobError, run_jobs
from benchmarks.robustness.report import as_page
from benchmarks.robustness.store import Job, Store

TOY = "study_toy:ToyTrack"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "work")


def chain(calls, stamp=""):
    first = Job("first", study_jobs.write, {"calls": str(calls), "text": "a"}, stamp=stamp)
    second = Job("second", study_jobs.append, {"calls": str(calls), "text": "b"}, {"before": first})
    return first, second


def test_what_is_done_is_not_done_again(store, tmp_path):
    calls = tmp_path / "calls"
    done = run_jobs(chain(calls), store, workers=0, quiet=True)
    (second,) = (found for job, found in done.items() if job.name == "second")
    assert second.value == {"text": "ab"}
    assert calls.read_text().split() == ["a", "b"]
    again = run_jobs(chain(calls), store, workers=0, quiet=True)
    assert [found.value for found in again.values()] == [found.value for found in done.values()]
    assert calls.read_text().split() == ["a", "b"]


def test_a_new_stamp_repeats_the_job_and_all_that_need_it(store, tmp_path):
    calls = tmp_path / "calls"
    run_jobs(chain(calls), store, workers=0, quiet=True)
    run_jobs(chain(calls, stamp="new"), store, workers=0, quiet=True)
    assert calls.read_text().split() == ["a", "b", "a", "b"]


def test_a_job_whose_folder_is_gone_is_done_again(store, tmp_path):
    calls = tmp_path / "calls"
    first, second = chain(calls)
    run_jobs((first, second), store, workers=0, quiet=True)
    (store.folder(first.key) / "text").unlink()
    store.folder(first.key).rmdir()
    run_jobs((first, second), store, workers=0, quiet=True)
    assert calls.read_text().split() == ["a", "b", "a"]


def test_a_failure_names_job_and_log_and_stops_only_what_needs_it(store, tmp_path):
    calls = tmp_path / "calls"
    broken = Job("the broken one", study_jobs.fail, {"calls": str(calls)})
    after = Job("after", study_jobs.append, {"calls": str(calls), "text": "x"}, {"before": broken})
    jobs = (broken, after, *chain(calls))
    with pytest.raises(JobError, match="the broken one failed: no luck") as error:
        run_jobs(jobs, store, workers=0, quiet=True)
    assert calls.read_text().split() == ["a", "b"]
    log = store.log(broken.key)
    assert str(log) in str(error.value)
    assert "RuntimeError: no luck" in log.read_text()
    assert "printed before" in log.read_text()
    assert not list((store.root / "scratch").iterdir())


def test_workers_do_the_same(store, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    calls = tmp_path / "calls"
    broken = Job("broken", study_jobs.fail, {"calls": str(calls)})
    with pytest.raises(JobError, match="broken failed: no luck"):
        run_jobs((*chain(calls), broken), store, workers=2)
    assert sorted(calls.read_text().split()) == ["a", "b"]
    shown = capfd.readouterr().err
    assert "100 %" in shown
    assert "printed before" not in shown


def test_a_killed_worker_ends_the_run_with_the_jobs_name(store, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    killed = Job("the killed one", study_jobs.vanish)
    after = Job("after", study_jobs.append, {"calls": "", "text": ""}, {"before": killed})
    with pytest.raises(JobError, match=r"the killed one failed: .*\n1 other jobs were not done"):
        run_jobs((killed, after), store, workers=1, quiet=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process")
def test_an_interrupted_run_goes_on(tmp_path):
    code = (
        "import sys; from pathlib import Path; import study_jobs\n"
        "from benchmarks.robustness.jobs import run_jobs\n"
        "from benchmarks.robustness.store import Job, Store\n"
        "if __name__ == '__main__':\n"
        "    calls = sys.argv[1]\n"
        "    a = Job('a', study_jobs.write, {'calls': calls, 'text': 'a'})\n"
        "    b = Job('b', study_jobs.wait, {'calls': calls}, {'before': a})\n"
        "    run_jobs((a, b), Store(Path(sys.argv[2])), 1, True)\n"
    )
    script, calls = tmp_path / "script.py", tmp_path / "calls"
    script.write_text(code)
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(script), str(calls), str(tmp_path / "work")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 100
    while not calls.exists() or calls.read_text().split() != ["a", "waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in errors
    store = Store(tmp_path / "work")
    assert len(list((store.root / "results").iterdir())) == 1


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """The whole command on the toy track: its output folder and its work folder."""
    folder = tmp_path_factory.mktemp("study")
    patch = pytest.MonkeyPatch()
    patch.setattr(commands, "SCORE", [sys.executable, str(ROOT / "tests" / "study_jobs.py")])
    patch.setenv("STUDY_TOY", str(folder / "toy.npz"))
    patch.chdir(ROOT)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    arguments = [
        "--short",
        "--track",
        TOY,
        "--jobs",
        "0",
        "--work",
        str(folder / "work"),
        "--out",
        str(folder / "out"),
    ]
    try:
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        trained = list(tracks.open_track(TOY, True).trained)
        again = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert again.exit_code == 0, again.output
        assert tracks.open_track(TOY, True).trained == trained
    finally:
        torch.set_num_threads(before)
        patch.undo()
    return folder, result.output, again.output


def test_the_whole_command_leaves_results_figures_and_a_page(toy_run):
    folder, first, again = toy_run
    out = folder / "out"
    assert ", 0 of them done before" in first
    count = first.split(" jobs, ")[0].split()[-1]
    assert f"{count} jobs, {count} of them done before" in again
    assert (out / "RESULTS.md").exists()
    assert {file.name for file in (out / "figures").iterdir()} >= {"toy-scatter.png", "toy-curves.png"}


def test_every_method_has_a_row_for_every_fine_tune(toy_run):
    result = toy_result(toy_run)
    labels = {"fine-tuned", *(method.label for method in methods.of_one())}
    adapters = {method.label for method in methods.of_adapter()}
    for recipe in result["recipes"]:
        for seed in result["seeds"]:
            mine = [r["method"] for r in result["rows"] if (r["recipe"], r["seed"]) == (recipe["name"], seed)]
            assert len(mine) == len(set(mine))
            assert set(mine) == (labels if recipe["lora_rank"] is None else adapters)
    keys = {result["validation"], result["in_distribution"], *result["shifts"]}
    assert all(set(row["scores"]) == keys for row in result["rows"])
    assert {record["block"] for record in result["lambdas"]} == {None, 0, 1, 2}


def test_methods_did_what_they_are_called(toy_run):
    """The toy's `start` is the distance from the base, so linear methods are known from it."""
    result = toy_result(toy_run)

    def start(method, recipe="M-1", seed=0):
        (row,) = (r for r in summary.rows_of(result, method, [recipe]) if r["seed"] == seed)
        return row["scores"]["start"]

    whole, edited = start("fine-tuned"), start("MonoSoup")
    assert start("base") == 0
    assert edited < whole
    for alpha in methods.ALPHAS:
        assert start(f"Wise-FT α={alpha}") == pytest.approx(alpha * whole, rel=1e-4)
        assert start(f"MonoSoup → Wise-FT α={alpha}") == pytest.approx(alpha * edited, rel=1e-4)
    parts = start("high only"), start("low only")
    assert max(parts) < whole
    # Vectors are not decomposed and are in both.
    assert parts[0] ** 2 + parts[1] ** 2 > whole**2
    assert start("LiNeS (0.1, 0.9)") < start("LiNeS (0.5, 0.5)") < whole
    exact = start("MonoSoup, exact LoRA", "LoRA")
    # In float32 the merged weights hold the factors' product nearly exactly.
    assert exact == pytest.approx(start("MonoSoup", "LoRA"), rel=1e-3)
    assert exact <= start("fine-tuned", "LoRA")


def test_pools_have_all_soups_and_decisions(toy_run):
    result = toy_result(toy_run)
    assert [pool["pool"] for pool in result["pools"]] == ["seed 0"]
    for pool in result["pools"]:
        names = [row["method"] for row in pool["rows"]]
        assert names == ["best single", *(m.label for m in methods.of_pool()), "greedy soup"]
        assert [d["threshold"] for d in pool["sfgs"]] == list(methods.THRESHOLDS)
        assert sorted(pool["greedy"]["order"]) == sorted(pool["members"])
        validation = [pool["validation"][member] for member in pool["greedy"]["order"]]
        assert validation == sorted(validation)
        assert pool["greedy"]["taken"][0] == pool["greedy"]["order"][0]
        best = min(pool["validation"].values())
        (greedy,) = (row for row in pool["rows"] if row["method"] == "greedy soup")
        assert greedy["scores"][result["validation"]] <= best


def test_the_page_lists_every_method(toy_run):
    folder, *_ = toy_run
    page = (folder / "out" / "RESULTS.md").read_text("utf-8")
    for method in [*methods.of_one(), *methods.of_adapter(), *methods.of_pool()]:
        assert f"| {method.label} |" in page, method.label
    assert "](figures/toy-scatter.png)" in page
    assert "nan" not in page.lower().split()


@pytest.mark.slow
def test_the_short_study_of_the_convnet_by_its_workers(tmp_path):
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "benchmarks.robustness", "--short", "--track", "convnet"]
    command += ["--work", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "short" / "RESULTS.md").read_text("utf-8")
    assert "**From a short run: a check that everything works, and no result.**" in page
    assert "## convnet" in page
    assert "## language" not in page


def toy_result(toy_run):
    return json.loads((toy_run[0] / "out" / "results" / "toy.json").read_text("utf-8"))


def test_pools_of_the_full_study():
    made = study.plan(TOY, False)
    assert list(made.pools) == ["all", "M-1", "M-2", "seed 0", "seed 1"]
    assert made.pools["seed 1"][0] == ["M-1/1", "M-2/1"]
    assert made.base.key == study.plan(TOY, False).base.key
    assert made.base.key != study.plan(TOY, True).base.key


@pytest.mark.parametrize("higher", [True, False])
def test_sentences_follow_the_numbers(higher):
    result = made_up_result(higher)
    result["recipes"] = [recipe for recipe in result["recipes"] if recipe["lora_rank"] is None]
    found = {finding.hypothesis: finding for finding in findings.findings(result)}
    robust = found["MonoSoup raises mean OOD"]
    assert robust.verdict == "agrees"
    assert "in 9 of 9 checkpoints" in robust.sentence
    # 0.77 against 0.75, and 3 - 2 x where lower is better.
    assert ("(mean +2.0 points)" if higher else "(mean -0.040 bits per byte)") in robust.sentence
    cheap = found["MonoSoup costs less ID than it gains OOD"]
    assert cheap.verdict == "agrees"
    assert ("by -0.5 points" if higher else "by +0.010 bits per byte") in cheap.sentence
    assert "improves in 0 of 9" in cheap.sentence
    rivals = found["MonoSoup balances ID and OOD better than the other data-free methods"]
    assert rivals.verdict == "does not agree"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 1, 1, -1], "agrees"),
        ([1, 1, -1, -1], "mixed"),
        ([-1, -1, -1, 1], "does not agree"),
        ([1, 1, 1, -9], "mixed"),
        ([0, 0, 0, 0], "does not agree"),
    ],
)
def test_verdicts(values, expected):
    assert findings.verdict(values) == expected


def test_curves_are_compared_at_equal_id():
    points = [(0.0, 0.0), (1.0, 2.0), (2.0, 0.0)]
    assert summary.best_at(points, 0.5) == 1.0
    assert summary.best_at(points, 3.0) is None
    # A curve that comes back has two values; the better one counts.
    assert summary.best_at([(0.0, 0.0), (1.0, 1.0), (0.5, 3.0)], 0.75) == pytest.approx(2.0)


def test_agreement_with_greedy_soup():
    result = made_up_result()
    pool = result["pools"][1]
    # Greedy keeps two of three; thresholds 0, 0.1, 0.2 keep three, two, one.
    assert evidence.pool_agreement(pool)[:3] == [(1, 2), (2, 2), (1, 2)]
    result["pools"] = [pool]
    assert evidence.best_thresholds([result]) == ([0.1], 2, 2)
    assert any(line.startswith("| 0.1 | 2 of 2 |") for line in evidence.threshold_table([result]))


def test_tables_show_means_spreads_and_changes():
    lines = tables.overview(made_up_result())
    (row,) = (line for line in lines if line.startswith("| MonoSoup |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:] == ["-0.5 ± 0.0", "+2.0 ± 0.0"]
    assert cells[2].startswith("75.")
    (base,) = (line for line in lines if line.startswith("| base |"))
    assert "±" not in base.split("|")[2]


def test_soups_are_spread_over_the_pools_of_one_seed_each():
    result = made_up_result()
    assert tables.soups_over_seeds(result) == []
    result["pools"] = [{**result["pools"][1], "pool": f"seed {seed}"} for seed in result["seeds"]]
    lines = tables.soups_over_seeds(result)
    assert "| best single | 3, 3, 3 | 98.5 ± 0.0 | 75.0 ± 0.0 |  |  |" in lines
    assert "| uniform soup | 3, 3, 3 | 98.2 ± 0.0 | 78.5 ± 0.0 | -0.3 ± 0.0 | +3.5 ± 0.0 |" in lines
    assert "| SFGS, threshold 0.1 | 2, 2, 2 | 98.1 ± 0.0 | 78.2 ± 0.0 | -0.4 ± 0.0 | +3.2 ± 0.0 |" in lines


def test_prose_of_the_page_is_wrapped():
    lines = as_page([{**made_up_result(), **CIRCUMSTANCES}]).splitlines()
    assert max(len(line) for line in lines if not line.startswith(("|", "#"))) <= 110
    # Angle brackets make a link of an address, and hide anything else.
    assert not [line for line in lines if "<" in line and "<https://" not in line]


def test_the_paper_has_its_numbers_beside_ours():
    page = as_page([{**made_up_result(), **CIRCUMSTANCES}])
    assert "## The paper's own numbers" in page
    assert "CLIP ViT-B/32, M-43, best ID (ID+), monosoup | 80.34 % | 48.94 %" in page


CIRCUMSTANCES = {
    "short": True,
    "architecture": "none",
    "recipes": [
        {
            "name": name,
            "learning_rate": 1.0,
            "schedule": "cosine",
            "steps": 1,
            "weight_decay": 0.0,
            "lora_rank": None,
        }
        for name in ("M-1", "M-2", "M-3")
    ],
    "machine": {"cores": "2"},
    "versions": {"torch": "2"},
    "seconds": {
        "work": 60,
        "wall of the whole command": 60,
        "jobs done in this run, all tracks": 1,
        "workers": 2,
    },
}
