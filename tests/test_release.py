"""What a release and a report of a bug rest on."""

from __future__ import annotations

import re

import yaml
from commands import ROOT
from documents import read


def test_tag_is_compared_with_the_one_version():
    assert len(re.findall(r'^version = "[^"]+"$', read("pyproject.toml"), re.MULTILINE)) == 1
    workflow = yaml.safe_load(read(".github", "workflows", "release.yml"))
    lines = [step.get("run", "") for step in workflow["jobs"]["build"]["steps"]]
    assert ".ci/run" in lines
    assert "make dist" in lines
    assert any('version = \\"${GITHUB_REF_NAME#v}\\"' in line for line in lines)


def test_only_the_publishing_job_may_identify_itself():
    jobs = yaml.safe_load(read(".github", "workflows", "release.yml"))["jobs"]
    assert [name for name, job in jobs.items() if "id-token" in job["permissions"]] == ["publish"]


def test_issue_forms_ask_for_the_doctor():
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        labels = [field["attributes"]["label"] for field in yaml.safe_load(form.read_text("utf-8"))["body"]]
        assert any("doctor --json" in label for label in labels), form.name


def test_citation_is_that_of_the_readme():
    cited = yaml.safe_load(read("CITATION.cff"))["preferred-citation"]
    (entry,) = re.findall(r"```bibtex\n(.*?)```", read("README.md"), re.DOTALL)
    assert cited["title"] in entry
    assert cited["identifiers"][0]["value"].removeprefix("arXiv:") in entry
    for author in cited["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in entry
