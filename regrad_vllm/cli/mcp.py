"""`regrad mcp`: a bank and a ReGrad server as tools of the Model Context Protocol.

The tools are search, get, add, delete and ask. They are served over standard input and output, or over HTTP.
"""

from __future__ import annotations

import argparse
import os
import socket
from functools import partial
from typing import Any

from bank_service.wire.ports import is_loopback, target_of
from regrad_vllm.arguments import server_url, whole
from regrad_vllm.cli.connection import add_bank_flags
from regrad_vllm.console import CommandError, UsageError, note
from regrad_vllm.serve.settings import MCP_TOKEN


def add(commands: Any) -> None:  # argparse's subparsers action has no public type
    parser = commands.add_parser("mcp", help="a bank and a server as tools of an MCP client", description=__doc__)
    parser.add_argument(
        "--http",
        type=_host_port,
        metavar="HOST:PORT",
        help=f"serve http://HOST:PORT/mcp; a host other than loopback needs a secret in ${MCP_TOKEN}, which each "
        "request must bring as a bearer token (standard input and output)",
    )
    parser.add_argument("--read-only", action="store_true", help="without the tools add and delete")
    parser.add_argument(
        "--server", type=server_url, metavar="URL", help="`regrad serve`'s address, for the tool ask (no ask)"
    )
    parser.add_argument("--model", help="the name that the server serves; its key is in $OPENAI_API_KEY")
    parser.add_argument("--max-tokens", type=whole(1), default=256, help="of an answer, at most (%(default)s)")
    add_bank_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if (args.server is None) != (args.model is None):
        raise UsageError("--server and --model must be given together, got one of them")
    import asyncio

    from regrad_vllm.mcp.bank_tools import AnsweringServer, make_server
    from regrad_vllm.mcp.transports import serve_http, serve_stdio

    asked = None if args.server is None else AnsweringServer(args.server, args.model, args.max_tokens)
    make = partial(make_server, namespace=args.namespace, asked=asked, read_only=args.read_only)
    if args.http is None:
        asyncio.run(serve_stdio(args.bank, make))
        return 0
    host, port = args.http
    token = os.environ.get(MCP_TOKEN, "").strip() or None
    if token is None and not is_loopback(host):
        raise UsageError(f"--http must be on loopback without a secret in {MCP_TOKEN}, got {host}; set it")
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise CommandError(f"--http must be free to listen on, {target_of(host, port)} is not: {error}") from error
    with listening:
        note(f"MCP server at http://{target_of(host, listening.getsockname()[1])}/mcp; Ctrl-C ends it")
        asyncio.run(serve_http(args.bank, make, listening, host, token))
    return 0


def _host_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not (host.strip("[]") and colon and port.isdecimal() and int(port) < 65536):
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, such as 127.0.0.1:8070, got {text!r}")
    return host.strip("[]"), int(port)
