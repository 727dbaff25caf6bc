"""`hack-pipelines app`: a web page that draws a picture with the full cache and with a smaller one."""

import argparse
import socket

from .options import add_model_arguments, check_device_map, choose_device, load_pipeline


LARGEST_PORT = 2**16 - 1


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "app",
        help="open a web page to draw in",
        description="Serve a web page that draws a picture with the full cache and with a smaller one, side by side. Needs "
        "gradio: pip install 'hack_pipelines[app]'.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default: 127.0.0.1, this machine only; 0.0.0.0 is all of its networks)",
    )
    parser.add_argument(
        "--port", type=parse_port, metavar="N", help="port to listen at (default: the first free one from 7860 on)"
    )
    add_model_arguments(parser)
    return parser


def parse_port(text: str) -> int:
    """A port, for argparse."""
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= LARGEST_PORT:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {LARGEST_PORT} but is {text!r}")
    return value


def run(args: argparse.Namespace):
    """Serve the page until Ctrl-C."""
    from ..app.page import launch

    check_device_map(args)
    choose_device(args.device)
    check_address(args.host, args.port)
    launch(load_pipeline(args), args.model, args.host, args.port)


def check_address(host: str, port: int | None):
    """
    Refuse an address that cannot be listened at, before a model is loaded for it.

    Raises:
        `ValueError`: if the host is none of this machine's, or the port is taken.
    """
    try:
        with socket.socket() as probe:
            # As the server does it: connections that have just ended do not hold a port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Port 0 is any that is free.
            probe.bind((host, port or 0))
    except OSError as error:
        address = host if port is None else f"{host}:{port}"
        raise ValueError(
            f"The page cannot listen at {address}: {error.strerror}. Give another `--host` or `--port`."
        ) from error
