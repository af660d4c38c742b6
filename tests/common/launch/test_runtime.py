"""What is set up before a launcher's work: its logs."""

import logging

from common.launch import runtime


def test_a_plugin_for_gpus_that_are_not_here_is_no_page_of_errors(monkeypatch):
    record = logging.LogRecord(
        "jax", logging.ERROR, "", 0, "Jax plugin configuration error: x\ny", (), None
    )
    monkeypatch.setattr(runtime.Path, "exists", lambda path: False)
    assert not runtime._shorten_plugin_error(record)
    monkeypatch.setattr(runtime.Path, "exists", lambda path: True)
    assert runtime._shorten_plugin_error(record)
    assert record.getMessage() == "Jax plugin configuration error: x"
    other = logging.LogRecord("jax", logging.ERROR, "", 0, "out of %s", ("memory",), None)
    assert runtime._shorten_plugin_error(other)
    assert other.getMessage() == "out of memory"
