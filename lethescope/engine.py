"""Where cells are computed: here, one after the other, or by Ray on many GPUs or machines."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from typing import Any, Literal

from lethescope.errors import InputError


def run(
    function: Callable[[Any], Any], cells: Sequence[Any], *, engine: Literal["local", "ray"] = "local"
) -> Iterator[Any]:
    """Yield `function(cell)` for every cell, in order.

    `local` computes them one by one, so that a stopped run has whole cells behind it. `ray` hands them all to Ray
    (`pip install lethescope[ray]`), which knows about GPUs and machines; every worker loads what the function needs.

    Raises:
        InputError: Ray is asked for and not installed, or the engine is unknown.
    """
    if engine == "local":
        yield from map(function, cells)
        return
    if engine != "ray":
        raise InputError(f"unknown engine {engine!r}; use local or ray")
    try:
        import ray
    except ImportError as error:
        raise InputError("the ray engine needs Ray: pip install 'lethescope[ray]'") from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    shared = ray.put(function)  # once, not with every cell: it carries the models
    call = ray.remote(lambda function, cell: function(cell))
    for result in [call.remote(shared, cell) for cell in cells]:
        yield ray.get(result)


def spread(function: Callable[[Any], Any], jobs: Sequence[Any], processes: int) -> Iterator[Any]:
    """Yield `function(job)` for every job, in order, computed by so many processes of one thread each.

    On one machine's CPU, small models run side by side are faster than one after the other on all cores. One process
    computes here, as it is.
    """
    if processes == 1 or len(jobs) < 2:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        try:
            yield from pool.map(function, jobs)
        except BaseException:  # a stop too: do not wait for what is being computed
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():
                worker.terminate()
            raise


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
