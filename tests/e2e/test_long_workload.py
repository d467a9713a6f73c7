"""At any moment of a long random workload, what blocks hold is the index of their keys."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from tests.e2e.conftest import ENVIRONMENT
from tests.e2e.long_workload import run_workload
from tests.e2e.start_engines import set_environment
from tests.e2e.tiny_models import write_tiny_model


def test_the_index_is_that_of_the_keys_at_any_moment(model_path: str, tmp_path) -> None:
    """And each request gets the tokens that it gets alone, whatever is beside it."""
    folder = write_tiny_model("llama", tmp_path, model_path)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, set_environment, (ENVIRONMENT,)) as pool:
        report = pool.submit(run_workload, str(folder), 28, 0).result()
    assert report.prepared
    assert not report.wrong, report.wrong[:5]
    assert not report.different, report.different[:3]
    # It was the workload that it is meant to be.
    assert report.compared > 3000
    assert report.preemptions >= 2
    assert report.aborted >= 3
    assert report.hit_tokens >= 64
    assert report.chunked >= 15
    assert report.finished + report.aborted == 28
