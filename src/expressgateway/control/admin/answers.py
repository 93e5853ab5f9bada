"""Answers of the API: JSON objects, and the statuses that say the same."""

import json
from typing import Any, Final

from expressgateway.control.admin.http import JSON, Response
from expressgateway.control.changes import ChangeError
from expressgateway.control.reload import APPLIED, FAILED, INVALID, REFUSED, UNCHANGED, Outcome

STATUSES: Final = {APPLIED: 200, UNCHANGED: 200, INVALID: 422, REFUSED: 409, FAILED: 500}
"""By the result of a reload or change."""


class StaleError(ChangeError):
    """The write is based on what is not there any more: 412 or 409."""

    def __init__(self, status: int, sentence: str, version: int, etag: str) -> None:
        super().__init__(status, sentence)
        self.version = version
        self.etag = etag


def answered(value: object, status: int = 200) -> Response:
    return Response(status, json.dumps(value).encode(), JSON)


def refused(error: ChangeError) -> Response:
    """The answer to what was understood and is not done."""
    body: dict[str, Any] = {"error": str(error)}
    if len(error.details) > 1:
        body["details"] = list(error.details)
    if isinstance(error, StaleError):
        body["version"] = error.version
    response = answered(body, error.status)
    if isinstance(error, StaleError):
        response.headers["ETag"] = error.etag
    if error.status == 503:
        response.headers["Retry-After"] = "1"
    return response


def told(outcome: Outcome, version: int) -> dict[str, Any]:
    """What became of a reload or a change; `version`: in force now."""
    answer: dict[str, Any] = {
        "result": outcome.result,
        "version": outcome.version or version,
        "plan": list(outcome.report),
    }
    if not outcome.is_success:
        answer["error"] = "; ".join(outcome.report) or f"it was {outcome.result}"
        answer["details"] = answer.pop("plan")
    return answer
