"""Grading on several machines, by Dask distributed: each submission travels as JSON and comes back as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from distributed import Client, Future, Security, wait

from llmlab.grading.batch import Failure, Local, Outcome
from llmlab.grading.classroom import model_cache
from llmlab.grading.grade import Bundle, to_json
from llmlab.grading.probe import refusal
from llmlab.grading.sandbox import Level

IN_FLIGHT = 2  # for each thread of the cluster


class Cluster:
    """A Dask cluster by its scheduler's address. What travels holds hidden tests and the secret: use TLS or localhost."""

    def __init__(self, address: str) -> None:
        """``tls://`` addresses take certificates from Dask's own configuration. Raises OSError if nobody answers."""
        security = Security() if address.startswith("tls://") else None
        self._client = Client(address, security=security)

    def run(self, bundles: Iterable[Bundle]) -> Iterator[Outcome]:
        """The outcomes as they come, with a few submissions ready for each thread of the cluster."""
        waiting = iter(bundles)
        most = IN_FLIGHT * max(1, sum(self._client.nthreads().values()))
        flying: dict[Future, str] = {}
        while True:
            while len(flying) < most and (bundle := next(waiting, None)) is not None:
                flying[self._client.submit(grade_there, bundle.to_json(), pure=False)] = bundle.student
            if not flying:
                return
            for future in wait(list(flying), return_when="FIRST_COMPLETED").done:
                student = flying.pop(future)
                if future.status != "finished":
                    yield Failure(student, f"the cluster failed: {future.exception()}")
                    continue
                said = json.loads(future.result())
                yield said["result"] if "result" in said else Failure(student, said["failed"])

    def close(self) -> None:
        self._client.close()


def grade_there(text: str) -> str:
    """Grade a bundle where this runs, in this machine's own sandbox; JSON with ``result`` or ``failed``."""
    bundle = Bundle.from_json(text)
    level, reason = refusal(bundle.level is Level.NONE)
    if reason:
        return json.dumps({"failed": reason})
    outcome: Any = next(Local(1).run([replace(bundle, level=level, readable=model_cache())]))
    if isinstance(outcome, Failure):
        return json.dumps({"failed": outcome.reason})
    return f'{{"result":{to_json({**outcome, "digest": bundle.digest})}}}'
