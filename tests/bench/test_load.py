"""What the load generators write is read right, and anything but success is no number."""

import json

import pytest
from bench.load import (
    LoadError,
    check_version,
    parse_h2load,
    parse_handshakes,
    parse_wrk,
    run_generator,
    upload_lua,
)

WRK = """Running 1s test @ http://127.0.0.1:21999/
  20635 requests in 1.00s, 2.89MB read
RESULT {"requests":20635,"microseconds":1000919,"bytes":3033345,"p50":505.0,"p99":1200.0,"errors":{%s}}
"""
NO_ERRORS = '"connect":0,"read":0,"write":0,"status":0,"timeout":0'

H2LOAD = """
finished in 163.07ms, 122645.96 req/s, 17.78MB/s
requests: 4 total, 36 started, 4 done, 4 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 4 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 2.90MB (3040000) total, 2.06MB (2160000) headers (space savings 0.00%), 97.66KB (100000) data
"""
H2LOAD_LOG = (
    "1795190726258216\t200\t490\n1795190726258223\t200\t502\n1795190726258229\t200\t10\n1\t200\t9000\n"
)


class TestWrk:
    def test_result_line(self) -> None:
        load = parse_wrk(WRK % NO_ERRORS)
        assert (load.requests, load.bytes, load.p50_us, load.p99_us) == (20635, 3033345, 505.0, 1200.0)
        assert load.seconds == pytest.approx(1.000919)

    @pytest.mark.parametrize("kind", ["connect", "read", "write", "status", "timeout"])
    def test_any_error_fails_the_run_and_is_named(self, kind: str) -> None:
        with pytest.raises(LoadError, match=f"3 {kind} errors beside 20635"):
            parse_wrk(WRK % NO_ERRORS.replace(f'"{kind}":0', f'"{kind}":3'))

    def test_no_request_is_no_result(self) -> None:
        with pytest.raises(LoadError, match="no request"):
            parse_wrk((WRK % NO_ERRORS).replace('"requests":20635', '"requests":0'))

    def test_no_result_line(self) -> None:
        with pytest.raises(LoadError, match="unable to connect"):
            parse_wrk("unable to connect to 127.0.0.1:1 Connection refused\n")


class TestH2load:
    def test_summary_and_percentiles(self) -> None:
        load = parse_h2load(H2LOAD, H2LOAD_LOG)
        assert (load.requests, load.bytes, load.p50_us, load.p99_us) == (4, 3040000, 490.0, 9000.0)
        assert load.seconds == pytest.approx(0.16307)

    def test_without_a_log_there_are_no_percentiles(self) -> None:
        load = parse_h2load(H2LOAD, "")
        assert load.p50_us is None
        assert load.p99_us is None

    @pytest.mark.parametrize(
        ("reported", "instead"),
        [
            ("0 failed", "1 failed"),
            ("0 errored", "1 errored"),
            ("0 timeout", "1 timeout"),
            ("4 succeeded", "3 succeeded"),
            ("4 2xx, 0 3xx, 0 4xx, 0 5xx", "3 2xx, 0 3xx, 0 4xx, 1 5xx"),
            ("4 2xx, 0 3xx", "3 2xx, 1 3xx"),
        ],
    )
    def test_any_failure_fails_the_run(self, reported: str, instead: str) -> None:
        with pytest.raises(LoadError, match="saw failures"):
            parse_h2load(H2LOAD.replace(reported, instead), H2LOAD_LOG)

    def test_a_head_whose_body_the_end_of_the_run_cut_is_no_failure(self) -> None:
        assert parse_h2load(H2LOAD.replace("4 2xx", "5 2xx"), H2LOAD_LOG).requests == 4

    @pytest.mark.parametrize(
        ("spoken", "streams", "is_right"),
        [("h2", 16, True), ("http/1.1", 0, True), ("http/1.1", 16, False), ("h2", 0, False), ("", 16, False)],
    )
    def test_a_run_in_another_version_is_no_result(self, spoken: str, streams: int, is_right: bool) -> None:
        output = f"Application protocol: {spoken}\n{H2LOAD}" if spoken else H2LOAD
        if is_right:
            check_version(output, streams)
        else:
            with pytest.raises(LoadError, match=r"instead of|did not agree"):
                check_version(output, streams)

    def test_no_summary(self) -> None:
        with pytest.raises(LoadError, match="wrote no summary"):
            parse_h2load("could not resolve", "")


class TestHandshakes:
    def test_result(self) -> None:
        said = {"seconds": 2.0, "bytes": 300, "latencies_us": [30.0, 10.0, 20.0], "errors": []}
        load = parse_handshakes(json.dumps(said))
        assert (load.requests, load.seconds, load.p50_us, load.p99_us) == (3, 2.0, 20.0, 30.0)

    def test_one_failed_handshake_fails_the_run(self) -> None:
        said = {"seconds": 2.0, "bytes": 300, "latencies_us": [30.0], "errors": ["SSLError: alert"]}
        with pytest.raises(LoadError, match="1 handshakes or requests failed, first: SSLError: alert"):
            parse_handshakes(json.dumps(said))

    def test_garbage(self) -> None:
        with pytest.raises(LoadError, match="no result"):
            parse_handshakes("Traceback")


def test_a_generator_that_is_missing_is_named() -> None:
    with pytest.raises(LoadError, match="no-such-generator cannot be run"):
        run_generator(["no-such-generator"], 1)


def test_upload_body_has_the_size_asked_for() -> None:
    assert 'string.rep("0123456789", 1000000)' in upload_lua(10_000_000)
