"""Offline, one thread a worker, and checkpoints that all tests of a session share."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# The first example of a worker pays for torch. The same examples everywhere, so that a failure on
# one machine is a failure of that machine.
settings.register_profile("tests", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def registered():
    """Our methods in mergekit's registry."""
    import mergekit_monosoup

    return mergekit_monosoup.register()


@pytest.fixture(scope="session")
def cluster():
    """The address of a Ray cluster of two workers on this machine, which this process is connected to."""
    ray = pytest.importorskip("ray")
    from commands import ROOT

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Newer versions of Ray ask for a token, which the tests' own cluster can do without.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with pytest.MonkeyPatch.context() as starting:
            starting.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
            context = ray.init(
                num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1"
            )
        yield context.address_info["address"]
        ray.shutdown()


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """family(architecture, dtype name, ...): a base and its variants, written once a session."""
    from checkpoints import DTYPES, write_family

    written = {}

    def get(architecture="qwen3-tied", dtype="bf16", **options):
        key = (architecture, dtype, *sorted(options.items()))
        if key not in written:
            folder = tmp_path_factory.mktemp(f"{architecture}-{dtype}")
            written[key] = write_family(folder, architecture, DTYPES[dtype], **options)
        return written[key]

    return get


@pytest.fixture(scope="session")
def family_pair(tmp_path_factory):
    """family_pair(key): base and fine-tuned checkpoint of a family of `families`, written once a session."""
    from families import BY_KEY, write_pair

    written = {}

    def get(key):
        if key not in written:
            written[key] = write_pair(BY_KEY[key], tmp_path_factory.mktemp(key))
        return written[key]

    return get


@pytest.fixture
def fresh_loaders():
    """A merge that knows nothing of the files of the tests before it."""
    from commands import forget_loaders

    forget_loaders()
    yield
    forget_loaders()


@pytest.fixture
def one_thread():
    """Matrices of a few dozen rows: several threads would only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def environment(tmp_path):
    """A virtual environment with the start-up hook and the package, and without mergekit."""
    from stand_ins import hooked_environment

    return hooked_environment(tmp_path / "environment")


@pytest.fixture
def stand_in(environment):
    """The same with stand-ins for mergekit and for the registration in it."""
    from stand_ins import add_stand_ins

    add_stand_ins(environment)
    return environment
