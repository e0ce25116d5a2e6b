"What all tests share."
import os, re

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers and transformers are imported: no test needs the network
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["OMP_NUM_THREADS"] = "1"  # the tests run two at a time; for the programs that they start

import pytest
import torch

torch.set_num_threads(1)

ALLOWED = re.compile(r"\b(CUDA|MPS|GPU|Windows|macOS|SD_SCRATCH_SLOW)\b", re.IGNORECASE)


def refuse_skip(report):
    "Where SD_SCRATCH_REQUIRE_DATA=1 promises everything that can be installed, turn a skip into a failure, unless other hardware is missing or the test is an hour long and asked for by SD_SCRATCH_SLOW=1."
    if os.environ.get("SD_SCRATCH_REQUIRE_DATA") != "1" or not report.skipped or hasattr(report, "wasxfail"): return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not ALLOWED.search(reason):
        report.outcome, report.longrepr = "failed", f"{report.nodeid}: {reason} (SD_SCRATCH_REQUIRE_DATA=1 allows no such skip)"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    refuse_skip(report)
    return report
