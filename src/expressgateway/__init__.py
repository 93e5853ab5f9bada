"""ExpressGateway: a layer 4 and layer 7 load balancer and reverse proxy."""

from importlib.metadata import version

__version__ = version("expressgateway")
