"""`tune --ray` on a cluster of real processes: the trials of a local search, whatever is killed."""

from __future__ import annotations

import pytest
from tuned import SCRIPT, calls, found, pair_of, tune, write_task

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

models = pytest.fixture(scope="module")(pair_of)
task = pytest.fixture(write_task)


def told(out):
    """What a search has found, but for the seconds that it took."""
    content = found(out)
    trials = [{key: value for key, value in t.items() if key != "seconds"} for t in content["trials"]]
    return trials, content["chosen"], content["written"]


def test_the_trials_of_a_local_search_though_a_worker_is_killed(task, tmp_path, cluster):
    file, options, log = task
    tune(file, tmp_path / "local", *options, "--trials", 3, "--seed", 2)
    assert len(calls(log)) == 2 * (6 + 3) + 2
    log.unlink()
    # Once: the process that asks in the middle of the search is a worker.
    script = tmp_path / "score.py"
    script.write_text(SCRIPT.replace("    os.kill(", "    stop.unlink()\n    os.kill("))
    (tmp_path / "stop").write_text("7")
    # The script is a part of what a score is, not of what it says.
    tune(file, tmp_path / "ray", *options, "--trials", 3, "--seed", 2, "--ray", cluster)
    assert not (tmp_path / "stop").exists()
    assert told(tmp_path / "ray") == told(tmp_path / "local")
    assert len(calls(log)) > 2 * (6 + 3) + 2
    kept = sorted(path.name for path in (tmp_path / "ray.tune").iterdir())
    assert kept == ["journal.jsonl", "study.db"]


def test_a_search_goes_on_here_and_there(task, tmp_path, cluster):
    file, options, log = task
    out = tmp_path / "tuned"
    tune(file, out, *options, "--trials", 1)
    before = found(out)["trials"]
    log.unlink()
    tune(file, out, *options, "--trials", 3, "--resume", "--ray", cluster)
    assert found(out)["trials"][: len(before)] == before
    assert sum("candidate" in call for call in calls(log)) == 2 * 2
    log.unlink()
    tune(file, out, *options, "--trials", 3, "--resume")
    assert calls(log) == []


def test_an_error_comes_back_once(task, tmp_path, cluster):
    file, options, _ = task
    (tmp_path / "score.py").write_text("raise SystemExit(3)")
    output = tune(file, tmp_path / "tuned", *options, "--trials", 1, "--ray", cluster, code=1)
    errors = [line for line in output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert "ended with status 3" in errors[0]
    assert not (tmp_path / "tuned").exists()
