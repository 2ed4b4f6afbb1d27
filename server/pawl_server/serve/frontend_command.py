"""`pawl frontend --fleet HOST:PORT`: one front end alone, without Ray and torch."""

from __future__ import annotations

import os

from pawl.errors import InvalidRequest
from pawl_server.collector import leave_alone
from pawl_server.config import Config
from pawl_server.frontend.main import FrontendAddresses, run_frontend
from pawl_server.serve.checks import check_port, exposure_warning
from pawl_server.serve.events import Output, ServerAddresses
from pawl_server.serve.internal_token import token_for_frontend
from pawl_server.serve.ready_file import remove_ready_file, write_ready_file

__all__ = ["run_frontend_alone"]


async def run_frontend_alone(config: Config, output: Output) -> int:
    """Run one front end until SIGINT or SIGTERM; returns the exit code.

    Raises:
        PawlError: it could not start.
    """
    address = config.fleet.fleet
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise InvalidRequest(
            f"--fleet {address}: `pawl frontend` needs HOST:PORT of a running fleet, such as 127.0.0.1:50060"
            " (`pawl fleet` prints it)",
            reason="BAD_SETTING",
        )
    frontend = config.frontend
    remove_ready_file(frontend.ready_file)
    check_port(frontend.host, frontend.port, "--port")
    check_port(frontend.admin_host, frontend.admin_port, "--admin-port")
    check_port(frontend.metrics_host, frontend.metrics_port, "--metrics-port")
    token = token_for_frontend(config.security)
    output.begin("frontend", f"fleet at {address}")

    def on_ready(addresses: FrontendAddresses) -> None:
        leave_alone()
        served = ServerAddresses(
            grpc=addresses.grpc,
            admin=addresses.admin,
            metrics=f"http://{addresses.metrics}/metrics",
            fleet=address,
            process_id=os.getpid(),
        )
        if warning := exposure_warning(config):
            output.warning(warning)
        write_ready_file(frontend.ready_file, served)
        output.ready(served)

    try:
        return await run_frontend(config, address, token, on_ready)
    finally:
        remove_ready_file(frontend.ready_file)
