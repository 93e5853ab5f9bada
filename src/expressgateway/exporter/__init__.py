"""The process that sends spans to a collector: the only one that knows OTLP, and what a slow collector is.

The supervisor starts it where ``observability.tracing`` is set, and replaces it if it dies. It reads lines
from its standard input (``observe.spans``) and says on its standard output what became of them. While it
waits for the collector it reads nothing, so its memory is bounded; what does not fit into the pipe is dropped
by the supervisor. The end of its input is an order to send what is left, and to end.

It needs the extra ``otlp``: see docs/tracing.md.
"""
